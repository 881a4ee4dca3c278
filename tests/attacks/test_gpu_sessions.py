"""Attacks on the GPU sessions: opening the GPUs to a wrong device, lending a report, one caller who stops all."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace

import pytest

from cgpu_agent.api.v1 import gpus_pb2
from cgpu_agent.backends.base import GpuEvent, GpuEvidence, GpuInfo
from cgpu_agent.backends.gpu.software.client import SoftwareGpus
from cgpu_agent.domain.gpurules import GpuRules, mode_fault
from cgpu_agent.domain.policy import OPEN, Action
from cgpu_agent.errors import DeviceFault, Exhausted, Unavailable
from cgpu_agent.rpc.auditor import WEIGHTY
from cgpu_agent.rpc.methods import ACTIONS
from cgpu_agent.wire.gpunonce import gpu_report_nonce
from fixtures.gpusessions import Site, site
from fixtures.machine import WORKLOAD
from fixtures.softwaregpu import PATIENCE, GpuProcess, running_gpus


@pytest.fixture(scope="module")
def process() -> Iterator[GpuProcess]:
    with running_gpus("--count", "2") as gpus:
        yield gpus


class Between(SoftwareGpus):
    """Devices to which something happens exactly before or after the agent does something."""

    def __init__(self, gpus: SoftwareGpus) -> None:
        self._gpus = gpus
        self.kind = gpus.kind
        self.calls: list[str] = []
        self.before: dict[str, Callable[[], Awaitable[None]]] = {}
        self.after: dict[str, Callable[[], Awaitable[None]]] = {}

    async def _around(self, name: str, call: Callable[[], Awaitable[object]]) -> object:
        self.calls.append(name)
        if name in self.before:
            await self.before.pop(name)()
        result = await call()
        if name in self.after:
            await self.after.pop(name)()
        return result

    async def pci(self, *, timeout: float) -> tuple[str, ...]:
        return await self._around("pci", lambda: self._gpus.pci(timeout=timeout))  # type: ignore[return-value]

    async def list(self, *, timeout: float) -> tuple[GpuInfo, ...]:
        return await self._around("list", lambda: self._gpus.list(timeout=timeout))  # type: ignore[return-value]

    async def evidence(self, uuid: str, nonce: bytes, *, timeout: float) -> GpuEvidence:
        call = lambda: self._gpus.evidence(uuid, nonce, timeout=timeout)  # noqa: E731
        return await self._around("evidence", call)  # type: ignore[return-value]

    async def ready(self, *, timeout: float) -> bool | None:
        return await self._around("ready", lambda: self._gpus.ready(timeout=timeout))  # type: ignore[return-value]

    async def set_ready(self, ready: bool, *, timeout: float) -> None:
        name = "open" if ready else "close"
        await self._around(name, lambda: self._gpus.set_ready(ready, timeout=timeout))

    def close(self) -> None:
        self._gpus.close()


class Meddled:
    """Makes and keeps a ``Between`` for ``site``."""

    gpus: Between

    def __call__(self, gpus: SoftwareGpus) -> Between:
        self.gpus = Between(gpus)
        return self.gpus


# 9: GetReport is no oracle for somebody else's nonce


def test_9_a_report_for_a_caller_answers_no_nonce_that_anybody_else_chose() -> None:
    name, claims, wanted = b"\x00\x0b" + bytes(32), WORKLOAD.claims_bytes(), bytes(range(32))
    made = gpu_report_nonce(name, claims, wanted)
    assert made != wanted
    framed = b"cgpu/gpu-report/1\0" + name + b"\0" + len(claims).to_bytes(4, "big") + claims + wanted
    assert made == hashlib.sha256(framed).digest()


@pytest.mark.parametrize("part", ["machine", "caller", "nonce"])
def test_9_the_nonce_of_a_report_names_machine_caller_and_nonce(part: str) -> None:
    one = {"machine": b"\x00\x0b" + bytes(32), "caller": WORKLOAD.claims_bytes(), "nonce": bytes(32)}
    other = {**one, part: one[part][:-1] + bytes((one[part][-1] ^ 1,))}
    assert gpu_report_nonce(*one.values()) != gpu_report_nonce(*other.values())


def test_9_bytes_cannot_be_moved_between_claims_and_nonce() -> None:
    name = b"\x00\x0b" + bytes(32)
    assert gpu_report_nonce(name, b"claims", b"nonce-of-rp") != gpu_report_nonce(name, b"claimsno", b"nce-of-rp")


def test_9_a_raw_nonce_is_an_action_of_its_own_closed_and_on_record() -> None:
    assert Action.GPU_RAW_REPORT not in OPEN
    assert ACTIONS["/cgpu.agent.v1.Gpus/GetRawReport"] is Action.GPU_RAW_REPORT
    assert "/cgpu.agent.v1.Gpus/GetRawReport" in WEIGHTY


# 10: what no signature covers is looked at all the same


@pytest.mark.parametrize(
    ("changed", "slug"),
    [
        ({"cc": False}, "GPU_CC_OFF"),
        ({"cc": None}, "GPU_CC_OFF"),
        ({"cc_environment": "sim"}, "GPU_CC_NOT_PRODUCTION"),
        ({"cc_environment": None}, "GPU_CC_NOT_PRODUCTION"),
        ({"dev_tools": True}, "GPU_DEV_TOOLS"),
        ({"dev_tools": None}, "GPU_DEV_TOOLS"),
        ({"multi_gpu": "unknown"}, "GPU_MODE_UNKNOWN"),
    ],
)
def test_10_a_gpu_in_an_unsafe_or_unknown_mode_is_refused(changed: dict[str, object], slug: str) -> None:
    good = dict.fromkeys(("uuid", "bdf", "model", "driver", "vbios"), "x")
    info = {**good, "architecture": "hopper", "cc": True, "cc_environment": "prod", "dev_tools": False}
    info |= {"multi_gpu": "none", "protected_memory": None, "key_rotation_threshold": None}
    assert mode_fault(GpuInfo(**info), GpuRules()) is None  # type: ignore[arg-type]
    fault = mode_fault(GpuInfo(**(info | changed)), GpuRules())  # type: ignore[arg-type]
    assert fault is not None
    assert fault.slug == slug


class Boasting(Between):
    """A driver that says of simulated GPUs that they are production ones."""

    async def list(self, *, timeout: float) -> tuple[GpuInfo, ...]:
        return tuple(replace(info, cc_environment="prod") for info in await self._gpus.list(timeout=timeout))


def test_10_a_simulated_gpu_that_claims_to_be_a_production_one_is_known_by_its_root(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process, wrap=Boasting, allow_simulated=False) as here:
            await here.tick()
            assert (here.state, here.reason, await here.ready()) == ("not-ready", "GPU_SIMULATED", False)
            assert here.phases == ["rejected", "rejected"]

    asyncio.run(scenario())


# 13: the gate does not stay open over a crash


def test_13_a_start_closes_first_and_reports_a_ready_state_that_it_did_not_set(process: GpuProcess) -> None:
    async def scenario() -> None:
        meddled = Meddled()
        async with site(process, wrap=meddled, started=False) as here:
            await here.outside.set_ready(True, timeout=PATIENCE)  # an agent that crashed left it so
            await here.sessions.start()
            assert await here.ready() is False
            assert meddled.gpus.calls == ["ready", "close"]
            await here.tick()
            assert here.log.records == ["dropped GPU_READY_FOREIGN", "attested 2"]
            assert [problem.slug for problem in here.sessions.problems()] == ["GPU_READY_FOREIGN"]

    asyncio.run(scenario())


def test_13_a_start_closes_though_the_ready_state_cannot_be_read(process: GpuProcess) -> None:
    async def scenario() -> None:
        meddled = Meddled()

        async def broken() -> None:
            raise DeviceFault("GPU_ERROR", "no answer")

        async with site(process, wrap=meddled, started=False) as here:
            await here.outside.set_ready(True, timeout=PATIENCE)
            meddled.gpus.before["ready"] = broken
            await here.sessions.start()
            assert await here.ready() is False

    asyncio.run(scenario())


def test_13_a_device_swapped_while_no_agent_ran_is_attested_like_any_other(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.tick()
        async with site(process, started=False) as here:  # the first agent is gone without a word
            await here.bad("other-chain", 2)
            assert await here.ready() is True
            await here.sessions.start()
            await here.tick()
            assert (here.state, await here.ready()) == ("not-ready", False)

    asyncio.run(scenario())


def test_13_a_ready_state_that_somebody_else_sets_is_cleared_and_reported(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.bad("cc-off", 1)
            await here.tick()
            await here.outside.set_ready(True, timeout=PATIENCE)
            await here.tick(1.0)
            assert await here.ready() is False
            assert "GPU_READY_FOREIGN" in [problem.slug for problem in here.sessions.problems()]
            assert "dropped GPU_READY_FOREIGN" in here.log.records

    asyncio.run(scenario())


def test_13_suspend_and_resume_drop(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.tick()
            here.clock.pass_by(120.0)  # less than the verdict's time
            await here.sessions.tick()
            assert here.log.records == ["attested 2", "dropped RESUMED"]
            await here.sessions.settled()

    asyncio.run(scenario())


def test_13_a_gate_that_cannot_be_closed_is_said_and_tried_until_it_is(process: GpuProcess) -> None:
    async def scenario() -> None:
        meddled = Meddled()

        async def broken() -> None:
            raise DeviceFault("GPU_TIMEOUT", "no answer")

        async with site(process, wrap=meddled) as here:
            await here.tick()
            meddled.gpus.before["close"] = broken
            await here.sessions.on_event(GpuEvent("driver-reloaded", None, ""))
            assert here.state == "not-ready"
            assert "GPU_GATE_STUCK" in [problem.slug for problem in here.sessions.problems()]
            here.clock.pass_by(1.0)
            await here.sessions.tick()
            assert await here.ready() is False
            assert "GPU_GATE_STUCK" not in [problem.slug for problem in here.sessions.problems()]

    asyncio.run(scenario())


# 19: nobody stops the others by asking


def test_19_asking_in_a_loop_attests_rarely_and_drops_nothing(process: GpuProcess) -> None:
    async def scenario() -> None:
        meddled = Meddled()
        async with site(process, wrap=meddled) as here:
            await here.tick()
            epoch, asked = here.sessions.trust_epoch, meddled.gpus.calls.count("evidence")
            for _ in range(200):
                with pytest.raises(Exhausted):
                    await here.sessions.attest()
            assert meddled.gpus.calls.count("evidence") == asked
            here.clock.pass_by(31.0)
            await asyncio.gather(*(here.sessions.attest() for _ in range(50)))
            assert meddled.gpus.calls.count("evidence") == asked + 2
            assert meddled.gpus.calls.count("close") == 1  # that of the start
            assert (here.state, here.sessions.trust_epoch) == ("ready", epoch)
            assert here.log.records == ["attested 2"]

    asyncio.run(scenario())


def test_19_an_attestation_that_runs_leaves_the_gpus_open(process: GpuProcess) -> None:
    async def scenario() -> None:
        meddled = Meddled()
        seen: list[bool | None] = []

        async with site(process, wrap=meddled) as here:
            await here.tick()

            async def look() -> None:
                seen.append(await here.ready())

            meddled.gpus.before["evidence"] = look
            here.clock.pass_by(31.0)
            await here.sessions.attest()
            assert seen == [True]

    asyncio.run(scenario())


def test_19_attesting_needs_a_grant() -> None:
    assert Action.GPU_ATTEST not in OPEN


def test_19_an_applications_own_errors_stop_nobody(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.tick()
            epoch = here.sessions.trust_epoch
            for number in (13, 31, 43, 45):
                await here.sessions.on_event(GpuEvent("xid", "0000:01:00.0", f"XID {number}"))
            assert (here.state, await here.ready(), here.sessions.trust_epoch) == ("ready", True, epoch)

    asyncio.run(scenario())


def test_19_one_callers_reports_do_not_crowd_out_the_agents_own(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.tick()
            uuid = here.sessions.view().sessions[0].info.uuid
            here.clock.pass_by(31.0)
            flood = [asyncio.create_task(here.sessions.report(1000, uuid, bytes(32))) for _ in range(200)]
            await here.sessions.attest()
            found = await asyncio.gather(*flood, return_exceptions=True)
            refused = [each for each in found if isinstance(each, Exhausted)]
            assert len(refused) > 150
            assert here.state == "ready"

    asyncio.run(scenario())


# 22: nothing that came between verdict and ready state stays in


async def _vanish(here: Site) -> None:
    await here.bad("vanish", 2)


async def _swap(here: Site) -> None:
    await here.bad("other-device", 2)


async def _debug(here: Site) -> None:
    await here.bad("dev-tools", 2)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("change", [_vanish, _swap, _debug])
def test_22_a_device_that_changes_around_the_opening_is_shut_out(
    process: GpuProcess, moment: str, change: Callable[[Site], Awaitable[None]]
) -> None:
    async def scenario() -> None:
        meddled = Meddled()
        async with site(process, wrap=meddled) as here:
            getattr(meddled.gpus, moment)["open"] = lambda: change(here)
            await here.tick()
            assert (here.state, here.reason) == ("not-ready", "GPU_INVENTORY_CHANGED")
            assert await here.ready() is False
            assert meddled.gpus.calls[-1] == "close"

    asyncio.run(scenario())


def test_22_a_device_that_appears_around_the_opening_is_shut_out(process: GpuProcess) -> None:
    async def scenario() -> None:
        meddled = Meddled()
        async with site(process, wrap=meddled) as here:
            await here.bad("vanish", 2)
            meddled.gpus.after["open"] = here.good
            await here.tick()
            assert (here.state, await here.ready()) == ("not-ready", False)
            await here.tick(12.0)
            assert (here.state, here.phases) == ("ready", ["trusted", "trusted"])

    asyncio.run(scenario())


@pytest.mark.parametrize("call", ["evidence", "open"])
def test_22_an_event_during_an_attestation_voids_it(process: GpuProcess, call: str) -> None:
    async def scenario() -> None:
        meddled = Meddled()
        async with site(process, wrap=meddled) as here:

            async def event() -> None:
                # As the listening task would: it may have to wait for the device, the doubt does not.
                asyncio.get_running_loop().create_task(here.sessions.on_event(GpuEvent("driver-reloaded", None, "")))
                await asyncio.sleep(0.05)

            meddled.gpus.after[call] = event
            await here.tick()
            assert (here.state, here.reason) == ("not-ready", "GPU_DRIVER_RELOADED")
            assert await here.ready() is False

    asyncio.run(scenario())


def test_22_a_doubt_while_the_verdict_is_recorded_opens_nothing_even_for_a_moment(process: GpuProcess) -> None:
    async def scenario() -> None:
        meddled = Meddled()
        async with site(process, wrap=meddled) as here:
            here.log.meanwhile = lambda: here.sessions.on_event(GpuEvent("driver-reloaded", None, ""))
            await here.tick()
            assert "open" not in meddled.gpus.calls
            assert (here.state, here.reason) == ("not-ready", "GPU_DRIVER_RELOADED")
            assert here.log.records == ["attested 2", "dropped GPU_DRIVER_RELOADED"]

    asyncio.run(scenario())


def test_22_a_device_that_changes_during_a_renewal_is_shut_out_at_its_end(process: GpuProcess) -> None:
    async def scenario() -> None:
        meddled = Meddled()
        async with site(process, wrap=meddled) as here:
            await here.tick()
            meddled.gpus.after["evidence"] = lambda: _debug(here)
            here.clock.pass_by(31.0)
            await here.sessions.attest()
            assert (here.state, here.reason) == ("not-ready", "GPU_INVENTORY_CHANGED")
            assert await here.ready() is False

    asyncio.run(scenario())


def test_22_every_drop_is_another_epoch(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.tick()
            epochs = [here.sessions.trust_epoch]
            for kind in ("driver-reloaded", "vanished", "watch-lost"):
                await here.sessions.on_event(GpuEvent(kind, None, ""))  # type: ignore[arg-type]
                epochs.append(here.sessions.trust_epoch)
                await here.tick()
                assert here.state == "ready"
            assert len(set(epochs)) == len(epochs)

    asyncio.run(scenario())


def test_22_a_verdict_that_cannot_be_recorded_opens_nothing(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process) as here:

            async def full() -> None:
                raise Unavailable("AGENT_LOG_FULL", "no more room")

            here.log.meanwhile = full
            await here.tick()
            assert (here.state, here.reason) == ("not-ready", "AGENT_LOG_FULL")
            assert await here.ready() is False

    asyncio.run(scenario())


# 35: nobody but the agent opens


def test_35_no_request_carries_a_wish_to_open_or_close() -> None:
    messages = gpus_pb2.DESCRIPTOR.message_types_by_name
    wishes = {name: [field.name for field in messages[name].fields] for name in messages if name.endswith("Request")}
    assert wishes == {
        "ListGpusRequest": [],
        "AttestGpusRequest": [],
        "WatchGpusRequest": [],
        "GetGpuReportRequest": ["uuid", "nonce"],
        "GetRawGpuReportRequest": ["uuid", "nonce"],
    }


def test_35_anybody_may_close_and_the_agent_attests_before_it_opens_again(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.tick()
            await here.outside.set_ready(False, timeout=PATIENCE)
            here.clock.pass_by(1.0)
            await here.sessions.tick()
            assert (here.state, here.log.records[-1]) == ("not-ready", "dropped GPU_READY_CLEARED")
            await here.tick()
            assert (here.state, here.log.records[-1]) == ("ready", "attested 2")

    asyncio.run(scenario())
