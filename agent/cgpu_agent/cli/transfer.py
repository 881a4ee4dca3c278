"""``cgpuctl transfer``: how fast bytes get to a GPU's memory and back, and whether they come back the same."""

from __future__ import annotations

import argparse
import os
import stat
import time
from io import BufferedReader
from pathlib import Path

from cgpu_agent.api.v1 import transfer_buffers_pb2
from cgpu_agent.cli import output
from cgpu_agent.cli.inputs import parse_size
from cgpu_agent.cli.progress import Progress
from cgpu_agent.cli.transferbench import SMALL, Measured, measure
from cgpu_agent.cli.transfercopy import there_and_back
from cgpu_agent.client import Agent
from cgpu_agent.client.channels import Channel
from cgpu_agent.errors import AgentError, DeviceFault, HostileInput, Misuse
from cgpu_agent.wire.sealed import SEGMENT_SIZES

_YARDSTICK = 0.25
"""GB/s; a rate is told in multiples of it, too."""
_NOT_THE_OBJECT = ("NOT_AUTHENTIC", "BAD_FORMAT", "TRUNCATED", "TOO_LARGE")
"""Faults of a file, which the agent tells as those of a call."""
_WAYS = {"to": ("to",), "from": ("from",), "both": ("to", "from")}


def run(arguments: argparse.Namespace) -> int:
    if arguments.verb == "bench":
        return _bench(arguments)
    named = (arguments.sealed, arguments.object_id, arguments.object_version)
    if None in named and any(each is not None for each in named):
        raise Misuse("BAD_ARGUMENT", "--sealed, --object-id and --object-version go together")
    with _open(arguments.file) as file, Agent(arguments.socket) as agent, agent.channel(_gpu(arguments)) as channel:
        return (_copy if arguments.sealed is None else _load)(arguments, channel, file)


def _gpu(arguments: argparse.Namespace) -> int | str:
    gpu: str = arguments.gpu
    return int(gpu) if gpu.isascii() and gpu.isdecimal() and len(gpu) < 4 else gpu


def _open(path: Path) -> BufferedReader:
    """Raises ``Misuse``: ``NO_FILE``, ``NOT_A_FILE``."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise Misuse("NO_FILE", f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise Misuse("NOT_A_FILE", f"{path}: only a regular file has a size to tell")
    return file


def _bench(arguments: argparse.Namespace) -> int:
    size = parse_size(arguments.size, "--size")
    if not 1 <= arguments.seconds <= 600:
        raise Misuse("BAD_ARGUMENT", "--seconds must be 1-600")
    with Agent(arguments.socket) as agent, agent.channel(_gpu(arguments)) as channel:
        found = measure(channel, _WAYS[arguments.direction], size, arguments.seconds)
        stats = channel.stats()
        simulated = any(gpu.simulated for gpu in agent.list_gpus().gpus if gpu.uuid == stats.gpu)
    if arguments.json:
        ways = {way: _document(each) for way, each in found.items()}
        sizes = {"size_bytes": size, "small_bytes": SMALL}
        output.emit_json({**_of_channel(stats), "simulated": simulated, **sizes, "directions": ways})
        return output.EXIT_PASS
    output.say(f"{output.printable(stats.gpu)}{', simulated: it protects nothing' if simulated else ''}")
    output.pairs(row for way, each in found.items() for row in _rows(way, each))
    _say_staging(stats)
    return output.EXIT_PASS


def _document(found: Measured) -> dict[str, object]:
    return {
        "gigabytes_per_second": found.gigabytes,
        "multiples_of_0.25": found.gigabytes / _YARDSTICK,
        "copies": found.copies,
        "seconds": found.seconds,
        "small": {"copies": len(found.waited), "p50_seconds": found.small(0.5), "p99_seconds": found.small(0.99)},
    }


def _rows(way: str, found: Measured) -> list[tuple[str, str]]:
    rate = f"{found.gigabytes:.2f} GB/s, {found.gigabytes / _YARDSTICK:.1f} times {_YARDSTICK}"
    small = f"p50 {found.small(0.5) * 1e3:.2f} ms, p99 {found.small(0.99) * 1e3:.2f} ms"
    return [
        (f"{way} device", f"{rate} ({found.copies} copies in {found.seconds:.1f} s)"),
        (f"  {SMALL} bytes", f"{small} ({len(found.waited)} copies)"),
    ]


def _copy(arguments: argparse.Namespace, channel: Channel, file: BufferedReader) -> int:
    found, stats = there_and_back(channel, file), channel.stats()
    rates = {"to": found.size / 1e9 / found.to_seconds, "from": found.size / 1e9 / found.from_seconds}
    told = {"bytes": found.size, "sha256": found.sent, "gigabytes_per_second": rates, **_of_channel(stats)}
    if found.back != found.sent:
        fault = DeviceFault("TRANSFER_MISMATCH", f"what came back is not what was sent: sha256 {found.back}")
        return _refused(arguments, fault, told)
    if arguments.json:
        output.emit_json({"result": "pass", **told})
        return output.EXIT_PASS
    output.say(f"{found.size} bytes to {output.printable(stats.gpu)} and back, the same: sha256 {found.sent}")
    output.pairs((f"{way} device", f"{rate:.2f} GB/s") for way, rate in rates.items())
    _say_staging(stats)
    return output.EXIT_PASS


def _load(arguments: argparse.Namespace, channel: Channel, file: BufferedReader) -> int:
    began = time.monotonic()
    try:
        _open_into(channel, file, arguments)
    except (HostileInput, Misuse) as error:
        if error.slug not in _NOT_THE_OBJECT:
            raise
        return _refused(arguments, error, {})
    seconds, stats = time.monotonic() - began, channel.stats()
    count, rate = stats.bytes_to_device, stats.bytes_to_device / 1e9 / seconds
    if arguments.json:
        told = {"result": "pass", "bytes": count, "gigabytes_per_second": {"to": rate}}
        output.emit_json({**told, **_of_channel(stats)})
        return output.EXIT_PASS
    output.say(f"{count} bytes opened into {output.printable(stats.gpu)}, all verified")
    output.pairs([("to device", f"{rate:.2f} GB/s")])
    _say_staging(stats)
    return output.EXIT_PASS


def _open_into(channel: Channel, file: BufferedReader, arguments: argparse.Namespace) -> None:
    progress = Progress("load", None)
    try:
        channel.load_sealed(
            file,
            key=arguments.sealed,
            object_id=arguments.object_id,
            version=arguments.object_version,
            segment_size=SEGMENT_SIZES[arguments.segment_size],
            progress=lambda found: progress.reach(found.done, found.total),
        )
    finally:
        progress.end()


def _refused(arguments: argparse.Namespace, error: AgentError, told: dict[str, object]) -> int:
    if arguments.json:
        output.emit_json({"result": "refused", "reason": {"slug": error.slug, "detail": error.message}, **told})
    output.complain(error)
    return output.EXIT_REFUSED


def _of_channel(stats: transfer_buffers_pb2.ChannelStats) -> dict[str, object]:
    return {"gpu": stats.gpu, "locked": stats.locked, "transfers": stats.transfers, "errors": stats.errors}


def _say_staging(stats: transfer_buffers_pb2.ChannelStats) -> None:
    if not stats.locked:
        output.say("  the agent's staging can be swapped out: its RLIMIT_MEMLOCK is too small")
