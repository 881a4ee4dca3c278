"""``make bench``: one run, ratios on the terminal, every number in build/bench.json.

Nothing here is an absolute: each number of ours is measured in turns with what it is compared with, on the same
machine within the same second, and the ratio is what counts. ``--quick`` takes fewer turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
from brokers import openbao, releases
from crowd import crowd
from domain import group_commit
from gpus import gpus
from lanes import gpus_in_bundles
from objects import objects
from offline import offline
from online import SLOW_QUOTE_SECONDS, World, evidence, front_door, in_turns, one_bundle, quotes, running
from ratios import Pair, show
from transfer import transfers
from world import HEALTH, proportional_memory

OUTPUT = Path(__file__).resolve().parents[2] / "build" / "bench.json"


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to look."""

    rounds: int
    door_calls: int
    quote_calls: int
    evidence_seconds: float
    offline_seconds: float
    gpu_times: int
    starts: int
    crowd_seconds: float


FULL = Effort(
    rounds=7,
    door_calls=400,
    quote_calls=8,
    evidence_seconds=0.6,
    offline_seconds=0.4,
    gpu_times=24,
    starts=4,
    crowd_seconds=5.0,
)
QUICK = Effort(
    rounds=3,
    door_calls=150,
    quote_calls=4,
    evidence_seconds=0.2,
    offline_seconds=0.1,
    gpu_times=8,
    starts=1,
    crowd_seconds=3.0,
)


def memory(world: World) -> list[Pair]:
    """PSS of the daemon beside the bare server, both after their first call and with nothing to do."""
    daemon = world.machines["ECC"].daemon
    for address in (daemon.api, world.bare_address):
        world.p50(address, HEALTH, b"", 1, 10)
    try:
        found = in_turns(
            3,
            {
                "daemon": lambda: float(proportional_memory(daemon.pid)),
                "bare": lambda: float(proportional_memory(world.bare.pid)),
            },
        )
    except PermissionError:
        print("memory: the daemon's is for root alone to look at", file=sys.stderr)
        return []
    return [Pair.of("idle memory (PSS)", "bare grpc.aio server", "B", found["daemon"], found["bare"])]


def cold_start(world: World, starts: int) -> list[Pair]:
    """From fork to READY=1, keys of this boot being there, beside an interpreter that only imports grpc."""
    daemon = world.machines["RSA"].daemon

    def start() -> float:
        daemon.stop()
        return daemon.start()

    def import_grpc() -> float:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import grpc"], check=True)
        return time.perf_counter() - begun

    found = in_turns(starts, {"daemon": start, "import": import_grpc})
    return [Pair.of("start to READY=1", 'python -c "import grpc"', "s", found["daemon"], found["import"])]


def sections(world: World, home: Path, effort: Effort) -> dict[str, Callable[[], tuple[list[Pair], str]]]:
    """How each section is measured, in the order of the table: what was found, and what could not be, and why."""
    few, seconds = effort.rounds // 2, effort.offline_seconds

    def whole(found: list[Pair]) -> tuple[list[Pair], str]:
        return found, ""

    return {
        "memory": lambda: whole(memory(world)),
        "front door": lambda: whole(front_door(world, rounds=effort.rounds, calls=effort.door_calls)),
        "quotes": lambda: whole(quotes(world, rounds=effort.rounds, calls=effort.quote_calls)),
        "evidence": lambda: whole(evidence(world, rounds=few, seconds=effort.evidence_seconds)),
        "group commit": lambda: whole(group_commit(home, rounds=few)),
        "GPUs in bundles": lambda: whole(gpus_in_bundles(rounds=few, seconds=seconds)),
        "verification": lambda: whole(offline(one_bundle(world), rounds=few, seconds=seconds)),
        "GPUs": lambda: gpus(rounds=few, times=effort.gpu_times),
        "sealed objects": lambda: whole(objects(rounds=few, seconds=seconds)),
        "key releases": lambda: whole(releases(world, home / "k", rounds=few, calls=effort.door_calls // 2)),
        "transfers": lambda: whole(transfers(rounds=few, seconds=seconds, times=effort.gpu_times)),
        "key brokers": lambda: openbao(home / "b", rounds=few, seconds=effort.evidence_seconds),
        "crowd": lambda: crowd(home / "c", rounds=effort.rounds, seconds=effort.crowd_seconds),
        "start": lambda: whole(cold_start(world, effort.starts)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure cgpu-agent against what it is built on.")
    parser.add_argument("--quick", action="store_true", help="fewer turns: under half a minute")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT, metavar="FILE", help=f"default: {OUTPUT}")
    parser.add_argument("--only", action="append", metavar="SECTION", help="this section, and others so named")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    # Every connection takes descriptors on both sides of two doors.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16384), hard))
    begun = time.monotonic()

    def say(section: str) -> None:
        print(f"{time.monotonic() - begun:5.0f} s  {section} ...", file=sys.stderr, flush=True)

    say("starting")
    # A short path: socket addresses have at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder, running(Path(folder)) as world:
        work = sections(world, Path(folder), effort)
        wanted = arguments.only or list(work)
        if unknown := [name for name in wanted if name not in work]:
            parser.error(f"no such section: {unknown[0]} ({', '.join(work)})")
        found = {}
        for name in wanted:
            say(name)
            found[name], lacking = work[name]()
            if lacking:
                print(f"{name}: {lacking}", file=sys.stderr)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "quick": arguments.quick,
        "seconds": round(time.monotonic() - begun, 1),
        "machine": {
            "cpus": os.cpu_count(),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "grpc": grpc.__version__,
        },
        "sections": {name: [pair.to_json() for pair in pairs] for name, pairs in found.items()},
    }
    arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    show([pair for pairs in found.values() for pair in pairs])
    print(f"slow ECC: an swtpm whose every quote takes {SLOW_QUOTE_SECONDS * 1e3:.0f} ms longer, as a cloud's would")
    print(f"{document['seconds']} s; every number: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
