"""Every way in which a software GPU can be told to be bad: a strict relying party refuses it, and says why.

What no NVIDIA signature covers (the mode) no verifier can refuse; there the test shows where it is seen instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

import pytest

from cgpu_agent.backends.base import GpuInfo
from cgpu_agent.backends.gpu.software.client import SoftwareGpus
from cgpu_agent.backends.gpu.software.commands import MISBEHAVIOURS
from cgpu_agent.errors import DeviceFault
from cgpu_agent.verifier.gpucase import DeviceEvidence, DeviceResult
from cgpu_agent.verifier.gpuset import SetResult, verify_devices
from fixtures.softwaregpu import NONCE, PATIENCE, GpuProcess, party_of, running_gpus, using

Refusal = tuple[str, str]

REFUSED: Mapping[str, Refusal] = {
    "wrong-nonce": ("gpu.nonce", "NONCE_MISMATCH"),
    "edited-measurement": ("gpu.signature", "BAD_SIGNATURE"),
    "other-firmware": ("gpu.measurements", "MEASUREMENT_MISMATCH"),
    "other-chain": ("gpu.chain", "UNKNOWN_ROOT"),
    "revoked": ("gpu.revocation", "CERTIFICATE_REVOKED"),
    "stale-rim": ("gpu.driver-rim", "CERTIFICATE_EXPIRED"),
}
"""By ``verify_device``."""
REFUSED_TOGETHER = {"duplicate": ("set.distinct", "DUPLICATE_DEVICE")}
"""By ``verify_devices``: each device is sound on its own."""
FAULTS = {"hang": "GPU_TIMEOUT", "vanish": "GPU_LOST", "other-device": "GPU_LOST"}
"""By the backend: there is no evidence of the GPU that was asked for."""
SHOWN_ONLY = {"cc-off": {"cc": False, "cc_environment": "unavailable"}, "dev-tools": {"dev_tools": True}}
"""Unsigned words of the driver; policy refuses them."""


@pytest.fixture(scope="module")
def process() -> Iterator[GpuProcess]:
    with running_gpus("--count", "2") as found:
        yield found


async def judged(gpus: SoftwareGpus) -> SetResult:
    party = party_of(await gpus.collateral(timeout=PATIENCE))
    evidence = [await gpus.evidence(info.uuid, NONCE, timeout=PATIENCE) for info in await gpus.list(timeout=PATIENCE)]
    return verify_devices([DeviceEvidence(each.report, each.chain) for each in evidence], party, expected_gpus=2)


def bad(process: GpuProcess, name: str) -> SetResult:
    """The verdict on two GPUs of which the second misbehaves."""

    async def work(gpus: SoftwareGpus) -> SetResult:
        await gpus.misbehave(name, gpu=2, timeout=PATIENCE)
        try:
            return await judged(gpus)
        finally:
            await gpus.behave(timeout=PATIENCE)

    return using(process, work)


def refusal(result: SetResult | DeviceResult) -> Refusal | None:
    return None if result.refusal is None else (result.refusal.id, result.refusal.slug or "")


def test_every_misbehaviour_has_its_answer_here() -> None:
    assert sorted([*REFUSED, *REFUSED_TOGETHER, *FAULTS, *SHOWN_ONLY]) == sorted(MISBEHAVIOURS)


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_gpu_is_refused(process: GpuProcess, name: str) -> None:
    result = bad(process, name)
    assert refusal(result.devices[1]) == REFUSED[name]
    assert refusal(result) == ("set.devices", REFUSED[name][1])


def test_an_honest_gpu_beside_a_bad_one_is_still_judged_on_its_own(process: GpuProcess) -> None:
    assert bad(process, "other-firmware").devices[0].accepted


@pytest.mark.parametrize("name", REFUSED_TOGETHER)
def test_bad_gpus_are_refused_together(process: GpuProcess, name: str) -> None:
    result = bad(process, name)
    assert all(device.accepted for device in result.devices)
    assert refusal(result) == REFUSED_TOGETHER[name]


@pytest.mark.parametrize("name", FAULTS)
def test_a_gpu_that_is_not_there_gives_no_evidence(process: GpuProcess, name: str) -> None:
    async def work(gpus: SoftwareGpus) -> str:
        _, second = await gpus.list(timeout=PATIENCE)
        await gpus.misbehave(name, gpu=2, timeout=PATIENCE)
        try:
            with pytest.raises(DeviceFault) as caught:
                await gpus.evidence(second.uuid, NONCE, timeout=0.3 if name == "hang" else PATIENCE)
        finally:
            await gpus.behave(timeout=PATIENCE)
        return caught.value.slug

    assert using(process, work) == FAULTS[name]


@pytest.mark.parametrize("name", SHOWN_ONLY)
def test_a_bad_mode_is_in_what_the_driver_says(process: GpuProcess, name: str) -> None:
    async def work(gpus: SoftwareGpus) -> tuple[GpuInfo, GpuInfo]:
        await gpus.misbehave(name, gpu=2, timeout=PATIENCE)
        try:
            first, second = await gpus.list(timeout=PATIENCE)
        finally:
            await gpus.behave(timeout=PATIENCE)
        return first, second

    honest, lying = using(process, work)
    for field, value in SHOWN_ONLY[name].items():
        assert getattr(lying, field) == value
        assert getattr(honest, field) != value


def test_another_gpu_in_the_same_place_is_another_gpu(process: GpuProcess) -> None:
    async def work(gpus: SoftwareGpus) -> None:
        _, before = await gpus.list(timeout=PATIENCE)
        first = await judged(gpus)
        events = gpus.events()
        await gpus.misbehave("other-device", gpu=2, timeout=PATIENCE)
        told = [await asyncio.wait_for(anext(events), PATIENCE) for _ in range(2)]
        assert [(event.kind, event.bdf) for event in told] == [("vanished", before.bdf), ("appeared", before.bdf)]
        _, after = await gpus.list(timeout=PATIENCE)
        assert (after.bdf, after.uuid == before.uuid) == (before.bdf, False)
        second = await judged(gpus)
        assert second.accepted, "it is as sound as the first, so that only its identity tells"
        identities = [result.devices[1].facts for result in (first, second)]
        assert identities[0] is not None
        assert identities[1] is not None
        assert identities[0].identity.keys != identities[1].identity.keys

    using(process, work)


def test_a_session_with_a_stranger_shows_with_whom_it_is(process: GpuProcess) -> None:
    """``other-chain`` holds that stranger's key, so there is a session; its chain is not that of the evidence."""

    async def work(gpus: SoftwareGpus) -> None:
        _, second = await gpus.list(timeout=PATIENCE)
        honest = await gpus.evidence(second.uuid, NONCE, timeout=PATIENCE)
        await gpus.misbehave("other-chain", gpu=2, timeout=PATIENCE)
        try:
            session = await gpus.establish_session(second.uuid, timeout=PATIENCE)
        finally:
            await gpus.behave(timeout=PATIENCE)
        assert session.chain != honest.chain

    using(process, work)


def test_misbehaviour_from_the_start_is_in_the_exported_files() -> None:
    with running_gpus("--count", "2", "--misbehave", "revoked:2", "--misbehave", "wrong-nonce:1") as process:
        result = using(process, judged)
    assert [refusal(device) for device in result.devices] == [REFUSED["wrong-nonce"], REFUSED["revoked"]]
