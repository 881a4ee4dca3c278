"""A real software GPU process, its backend, and the verifier: whole conversations over a socket."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cgpu_agent.backends.base import GpuEvent, Gpus
from cgpu_agent.backends.gpu.software import commands
from cgpu_agent.backends.gpu.software.client import SoftwareGpus
from cgpu_agent.errors import DeviceFault
from cgpu_agent.verifier.gpucase import DeviceEvidence
from cgpu_agent.verifier.gpuset import SetResult, verify_devices
from cgpu_agent.wire.strictjson import b64
from fixtures.softwaregpu import NONCE, PATIENCE, GpuProcess, party_of, running_gpus, using


@pytest.fixture(scope="module")
def process() -> Iterator[GpuProcess]:
    with running_gpus("--count", "2") as found:
        yield found


async def judged(gpus: SoftwareGpus) -> SetResult:
    party = party_of(await gpus.collateral(timeout=PATIENCE))
    evidence = [await gpus.evidence(info.uuid, NONCE, timeout=PATIENCE) for info in await gpus.list(timeout=PATIENCE)]
    return verify_devices([DeviceEvidence(each.report, each.chain) for each in evidence], party, expected_gpus=2)


async def faults(call: object) -> str:
    with pytest.raises(DeviceFault) as caught:
        await call  # type: ignore[misc]
    return caught.value.slug


def test_it_is_what_the_domain_wants_of_gpus(process: GpuProcess) -> None:
    async def work(gpus: SoftwareGpus) -> None:
        wanted: Gpus = gpus
        found = await wanted.list(timeout=PATIENCE)
        assert [info.bdf for info in found] == list(await wanted.pci(timeout=PATIENCE))
        assert [(info.cc, info.dev_tools, info.cc_environment) for info in found] == [(True, False, "sim")] * 2
        assert wanted.kind == "software"
        assert wanted.heartbeat_age(0.0) == 0.0

    using(process, work)


def test_a_strict_relying_party_accepts_it_as_simulated(process: GpuProcess) -> None:
    result = using(process, judged)
    assert result.accepted, result.refusal
    assert all(device.facts is not None and device.facts.simulated for device in result.devices)
    assert all(device.passed(step) for device in result.devices for step in ("gpu.measurements", "gpu.revocation"))


def test_the_ready_state_is_kept(process: GpuProcess) -> None:
    async def work(gpus: SoftwareGpus) -> list[bool | None]:
        found = [await gpus.ready(timeout=PATIENCE)]
        for state in (True, False):
            await gpus.set_ready(state, timeout=PATIENCE)
            found.append(await gpus.ready(timeout=PATIENCE))
        return found

    assert using(process, work) == [False, True, False]


def test_a_session_carries_sealed_messages_and_ends(process: GpuProcess) -> None:
    async def work(gpus: SoftwareGpus) -> None:
        first, _ = await gpus.list(timeout=PATIENCE)
        evidence = await gpus.evidence(first.uuid, NONCE, timeout=PATIENCE)
        one = await gpus.establish_session(first.uuid, timeout=PATIENCE)
        two = await gpus.establish_session(first.uuid, timeout=PATIENCE)
        assert one.chain == evidence.chain
        assert len(one.exporter) == 48
        assert one.exporter != two.exporter
        deadline = asyncio.get_running_loop().time() + PATIENCE
        for session in (one, two, one):
            answer = await session.vendor(commands.encode_request("report", nonce=NONCE.hex()), deadline)
            assert not isinstance(commands.parse_answer(answer), str)
        await one.end(deadline)
        assert await faults(one.vendor(b"{}", deadline)) == "GPU_DRIVER"
        await two.end(deadline)

    using(process, work)


def test_calls_side_by_side_are_all_answered(process: GpuProcess) -> None:
    async def work(gpus: SoftwareGpus) -> None:
        found = await gpus.list(timeout=PATIENCE)
        nonces = [bytes([number]) * 32 for number in range(8)]
        calls = [gpus.evidence(info.uuid, nonce, timeout=PATIENCE) for nonce in nonces for info in found]
        reports = [each.report[4:36] for each in await asyncio.gather(*calls)]
        assert reports == [nonce for nonce in nonces for _ in found]

    using(process, work)


def test_a_hung_gpu_times_out_and_holds_up_no_other(process: GpuProcess) -> None:
    async def work(gpus: SoftwareGpus) -> None:
        first, second = await gpus.list(timeout=PATIENCE)
        await gpus.misbehave("hang", gpu=1, timeout=PATIENCE)
        try:
            slug, evidence = await asyncio.gather(
                faults(gpus.evidence(first.uuid, NONCE, timeout=0.5)),
                gpus.evidence(second.uuid, NONCE, timeout=PATIENCE),
            )
        finally:
            await gpus.behave(timeout=PATIENCE)
        assert slug == "GPU_TIMEOUT"
        assert evidence.report
        assert (await gpus.evidence(first.uuid, NONCE, timeout=PATIENCE)).report

    using(process, work)


def test_a_hung_driver_times_out_and_heals(process: GpuProcess) -> None:
    async def work(gpus: SoftwareGpus) -> None:
        await gpus.misbehave("hang", timeout=PATIENCE)
        try:
            slugs = [await faults(gpus.list(timeout=0.2)), await faults(gpus.set_ready(False, timeout=0.2))]
        finally:
            await gpus.behave(timeout=PATIENCE)
        assert slugs == ["GPU_TIMEOUT"] * 2
        assert len(await gpus.list(timeout=PATIENCE)) == 2

    using(process, work)


async def _next(events: object) -> GpuEvent:
    return await asyncio.wait_for(anext(events), PATIENCE)  # type: ignore[call-overload, no-any-return]


def test_a_vanished_gpu_is_lost_and_told_of(process: GpuProcess) -> None:
    async def work(gpus: SoftwareGpus) -> None:
        first, second = await gpus.list(timeout=PATIENCE)
        events = gpus.events()
        await gpus.misbehave("vanish", gpu=2, timeout=PATIENCE)
        gone = await _next(events)
        assert (gone.kind, gone.bdf) == ("vanished", second.bdf)
        assert await gpus.pci(timeout=PATIENCE) == (first.bdf,)
        assert await faults(gpus.evidence(second.uuid, NONCE, timeout=PATIENCE)) == "GPU_LOST"
        await gpus.behave(timeout=PATIENCE)
        back = await _next(events)
        assert (back.kind, back.bdf) == ("appeared", second.bdf)

    using(process, work)


def test_a_session_with_a_vanished_gpu_is_lost(process: GpuProcess) -> None:
    async def work(gpus: SoftwareGpus) -> str:
        _, second = await gpus.list(timeout=PATIENCE)
        session = await gpus.establish_session(second.uuid, timeout=PATIENCE)
        await gpus.misbehave("vanish", gpu=2, timeout=PATIENCE)
        try:
            return await faults(session.vendor(b"{}", asyncio.get_running_loop().time() + PATIENCE))
        finally:
            await gpus.behave(timeout=PATIENCE)

    assert using(process, work) == "GPU_LOST"


def test_a_vanished_gpu_that_returns_between_two_looks_is_told_of(process: GpuProcess) -> None:
    async def work(gpus: SoftwareGpus) -> GpuEvent:
        await gpus.list(timeout=PATIENCE)
        await gpus.misbehave("vanish", gpu=2, timeout=PATIENCE)
        await gpus.behave(timeout=PATIENCE)
        return await _next(gpus.events())

    assert using(process, work).kind == "watch-lost"


def test_a_mode_that_changes_is_told_of(process: GpuProcess) -> None:
    async def work(gpus: SoftwareGpus) -> GpuEvent:
        await gpus.list(timeout=PATIENCE)
        events = gpus.events()
        await gpus.misbehave("cc-off", gpu=1, timeout=PATIENCE)
        try:
            return await _next(events)
        finally:
            await gpus.behave(timeout=PATIENCE)

    assert using(process, work).kind == "watch-lost"


def test_a_restart_keeps_identities_and_is_told_of(tmp_path: Path) -> None:
    process = GpuProcess(tmp_path, "--seed", str(tmp_path / "state"))
    process.start()

    async def work(gpus: SoftwareGpus) -> None:
        before = await gpus.list(timeout=PATIENCE)
        await gpus.evidence(before[0].uuid, NONCE, timeout=PATIENCE)
        events = gpus.events()
        assert process.stop() == 0
        assert (await _next(events)).kind == "watch-lost"
        assert await faults(gpus.list(timeout=PATIENCE)) == "GPU_DRIVER"
        process.start()
        assert (await _next(events)).kind == "driver-reloaded"
        assert await gpus.list(timeout=PATIENCE) == before
        assert (await gpus.evidence(before[0].uuid, NONCE, timeout=PATIENCE)).report
        process.stop()
        assert (await _next(events)).kind == "watch-lost"

    using(process, work)
    assert stat.S_IMODE((tmp_path / "state" / "seed").stat().st_mode) == 0o600


def test_the_socket_is_its_owners_only(process: GpuProcess) -> None:
    assert stat.S_IMODE(process.socket.stat().st_mode) == 0o600


def test_refuses_a_seed_that_others_may_read(tmp_path: Path) -> None:
    (tmp_path / "seed").write_bytes(bytes(32))
    (tmp_path / "seed").chmod(0o644)
    arguments = ["--socket", str(tmp_path / "s"), "--seed", str(tmp_path)]
    found = subprocess.run(
        [sys.executable, "-m", "cgpu_agent.backends.gpu.software", *arguments], capture_output=True, text=True
    )
    assert found.returncode == 2
    assert "BAD_STATE" in found.stderr


def test_the_command_line_judges_it_with_the_exported_files(tmp_path: Path) -> None:
    with running_gpus("--export", str(tmp_path)) as process:

        async def collect(gpus: SoftwareGpus) -> bytes:
            (info,) = await gpus.list(timeout=PATIENCE)
            found = await gpus.evidence(info.uuid, NONCE, timeout=PATIENCE)
            item = {"arch": "HOPPER", "nonce": NONCE.hex()}
            item |= {"evidence": b64(found.report), "certificate": b64(found.chain)}
            return json.dumps([item]).encode()

        (tmp_path / "evidence.json").write_bytes(using(process, collect))
    command = [sys.executable, "-m", "cgpu_agent.cli.main", "gpu", "verify", "--json", "--require-revocation"]
    command += ["--evidence", str(tmp_path / "evidence.json"), "--nonce", NONCE.hex()]
    command += ["--device-root", str(tmp_path / "device-root.pem"), "--rim-root", str(tmp_path / "rim-root.pem")]
    for path in sorted(tmp_path.glob("*.swidtag")):
        command += ["--rim", str(path)]
    for path in sorted(tmp_path.glob("*.crl")):
        command += ["--crl", str(path)]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert found.returncode == 0, found.stderr + found.stdout
    verdict = json.loads(found.stdout)
    assert (verdict["result"], verdict["devices"][0]["simulated"]) == ("pass", True)


def test_a_party_that_pins_nvidias_root_refuses_it(process: GpuProcess) -> None:
    async def work(gpus: SoftwareGpus) -> SetResult:
        from cgpu_agent.verifier.gpuchain import NVIDIA_DEVICE_ROOTS

        party = replace(party_of(await gpus.collateral(timeout=PATIENCE)), device_roots=NVIDIA_DEVICE_ROOTS)
        info, _ = await gpus.list(timeout=PATIENCE)
        found = await gpus.evidence(info.uuid, NONCE, timeout=PATIENCE)
        return verify_devices([DeviceEvidence(found.report, found.chain)], party)

    result = using(process, work)
    assert result.refusal is not None
    assert result.refusal.slug == "UNKNOWN_ROOT"
