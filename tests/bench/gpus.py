"""What judging a real Hopper offline costs, beside NVIDIA's own Python verifier on the same bytes.

Which CA signed which certificate, and what a manifest holds, is found once in a process of ours, and kept: all but
the "first" are what a service or an agent pays from the second judgement on. Both sides start from files and end with
a verdict; neither asks anybody whether a certificate was revoked, which is what takes NVIDIA's verifier most of its
time when it is online. Its own environment is made in the build directory, because it pins libraries from years ago.
"""

from __future__ import annotations

import json
import subprocess
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from online import in_turns
from ratios import Pair, seconds_each

from cgpu_agent.verifier import certificate, rim
from cgpu_agent.verifier.collateral import Collateral
from cgpu_agent.verifier.gpu import verify_device
from cgpu_agent.verifier.gpucase import DeviceEvidence, DeviceResult, GpuParty
from cgpu_agent.verifier.gpuchain import NVIDIA_RIM_ROOTS

Ask = Callable[[dict[str, Any]], Any]
"""Sends NVIDIA's side a request and gives its answer."""

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data" / "nvidia" / "rims"
THEIRS = ROOT / "build" / "nvidia-verifier"
PACKAGE = "nv-local-gpu-verifier==2.7.3"
AGAINST = f"NVIDIA's {PACKAGE.replace('==', ' ')}"
DRIVER_RIM, VBIOS_RIM = "NV_GPU_DRIVER_GH100_550.90.07.swidtag", "NV_GPU_VBIOS_1010_0200_882_96009F0001.swidtag"
NONCE = "931d8dd0add203ac3d8b4fbde75e115278eefcdceac5b87671a748f32364dfcb"
DAY, OLD_DAY = "2026-03-01", "2024-10-01"
"""When the sample's own reference values were current, and those that come with the package."""
OLD_RIM, OLD_VERSION = "1010_0200_882_96005E0001_PROD.swidtag", "96.00.5E.00.01"
GOAL = "<= 0.2"
SIGNATURES = 16
"""Of P-384: five of the device's chain, its report's, and five of each manifest with its chain of four."""
_KEY = ec.generate_private_key(ec.SECP384R1())
_SIGNATURE = _KEY.sign(b"", ec.ECDSA(hashes.SHA384()))


class NotInstalled(Exception):
    """Says in a sentence why NVIDIA's verifier is not there."""


def gpus(*, rounds: int, times: int) -> tuple[list[Pair], str]:
    """The section, and a sentence about what it lacks; no pair where there is nothing to compare with."""
    try:
        python = _install()
    except NotInstalled as reason:
        return [], str(reason)
    with _worker(python) as ask:
        samples = Path(ask({"work": "samples"}))
        pairs = [_device(ask, samples, rounds, times), _rim(ask, samples / OLD_RIM, rounds, times)]
        if not SHARED.is_dir():
            return pairs, "no full judgement: the reference values of the sample (../shared/data) are not there"
        return [*pairs, *_whole(ask, samples, rounds, times)], ""


def _install() -> Path:
    """Its interpreter, in an environment with its own pins."""
    python = THEIRS / "bin" / "python"
    done = THEIRS / "installed"
    if done.exists() and done.read_text() == PACKAGE:
        return python
    try:
        venv.create(THEIRS, clear=True, with_pip=True)
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
        subprocess.run([*command, "--retries", "1", PACKAGE], check=True, capture_output=True, text=True, timeout=600)
    except subprocess.CalledProcessError as error:
        said = str(error.stderr).strip().splitlines() or ["no reason given"]
        raise NotInstalled(f"{PACKAGE} cannot be installed: {said[-1]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(f"{PACKAGE} cannot be installed: {type(error).__name__}") from error
    done.write_text(PACKAGE)
    return python


@contextmanager
def _worker(python: Path) -> Iterator[Ask]:
    """It writes a log where it runs, so it runs in its environment's folder."""
    command = [python, Path(__file__).with_name("nvidia_worker.py")]
    with subprocess.Popen(command, cwd=THEIRS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(request: dict[str, Any]) -> Any:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


def _moment(day: str) -> datetime:
    return datetime.fromisoformat(day).replace(tzinfo=timezone.utc)


def _evidence(samples: Path) -> DeviceEvidence:
    report = bytes.fromhex((samples / "hopperAttestationReport.txt").read_text())
    return DeviceEvidence(report, (samples / "hopperCertChain.txt").read_bytes())


def _accepted(results: Sequence[DeviceResult]) -> None:
    assert all(result.accepted for result in results), results[0].refusal


def _compare(
    title: str,
    ask: Ask,
    request: dict[str, Any],
    ours: Callable[[], object],
    rounds: int,
    times: int,
    *,
    logs: bool = False,
) -> Pair:
    measures = {
        "ours": lambda: seconds_each(ours, times),
        "theirs": lambda: float(ask({**request, "logs": logs, "times": times})),
    }
    found = in_turns(rounds, measures)
    against = f"{AGAINST}, {'as it comes' if logs else 'its logs off'}"
    return Pair.of(title, against, "s", found["ours"], found["theirs"], GOAL)


def _device(ask: Ask, samples: Path, rounds: int, times: int) -> Pair:
    party = GpuParty(at=_moment(DAY), nonce=bytes.fromhex(NONCE), allow_no_rim=True)
    request = {"work": "device", "day": DAY, "nonce": NONCE}
    title = "GPU: report, chain, FWID, signature"
    return _compare(title, ask, request, lambda: _accepted([verify_device(_evidence(samples), party)]), rounds, times)


def _rim(ask: Ask, file: Path, rounds: int, times: int) -> Pair:
    def judge() -> None:
        found = rim.verify_rim(file.read_bytes(), roots=NVIDIA_RIM_ROOTS, at=_moment(OLD_DAY)).verified
        assert found is not None
        assert found.rim.version == OLD_VERSION

    request = {"work": "rim", "day": OLD_DAY, "version": OLD_VERSION, "vbios_rim": str(file)}
    return _compare("GPU: one RIM", ask, request, judge, rounds, times)


def _signatures() -> None:
    """As many bare checks as a judgement makes: what no way of judging can do without, on this machine."""
    for _ in range(SIGNATURES):
        _KEY.public_key().verify(_SIGNATURE, b"", ec.ECDSA(hashes.SHA384()))


def _forget() -> None:
    """Make the next judgement the first of its process: what is known of CAs and manifests goes."""
    certificate._SIGNED.clear()
    rim._signed_content.cache_clear()
    rim._parse_signed.cache_clear()


def _whole(ask: Ask, samples: Path, rounds: int, times: int) -> list[Pair]:
    """One GPU, and the same eight times: of eight real ones there are no public reference values."""
    rims = [SHARED / DRIVER_RIM, SHARED / VBIOS_RIM]

    def judge(count: int, *, first: bool = False) -> None:
        if first:
            _forget()
        collateral = Collateral.load(rims=[file.read_bytes() for file in rims])
        party = GpuParty(at=_moment(DAY), nonce=bytes.fromhex(NONCE), collateral=collateral)
        _accepted([verify_device(_evidence(samples), party) for _ in range(count)])

    request = {"work": "attest", "day": DAY, "nonce": NONCE, "driver_rim": str(rims[0]), "vbios_rim": str(rims[1])}
    pairs = [
        _compare(
            f"GPU: whole judgement of {count}",
            ask,
            {**request, "count": count},
            partial(judge, count),
            rounds,
            max(times // count, 1),
            logs=logs,
        )
        for count, logs in ((1, True), (1, False), (8, False))
    ]
    first = partial(judge, 1, first=True)
    title = "GPU: the first judgement of a process"
    pairs.append(_compare(title, ask, {**request, "count": 1}, first, rounds, times))
    bare = in_turns(
        rounds, {"ours": lambda: seconds_each(first, times), "bare": lambda: seconds_each(_signatures, times)}
    )
    pairs.append(Pair.of(title, f"its {SIGNATURES} signature checks alone", "s", bare["ours"], bare["bare"]))
    found = in_turns(
        rounds,
        {
            "eight": lambda: seconds_each(partial(judge, 8), max(times // 8, 1)) / 8,
            "one": lambda: seconds_each(partial(judge, 1), times),
        },
    )
    return [*pairs, Pair.of("GPU: each of eight", "one alone", "s", found["eight"], found["one"], "<= 1.1")]
