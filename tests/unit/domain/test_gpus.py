"""The GPU sessions against software GPUs in a process of their own: ready is earned, and lost at the first doubt."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from cgpu_agent.backends.base import GpuEvent, GpuInfo
from cgpu_agent.backends.gpu.software.client import SoftwareGpus
from cgpu_agent.domain.gpurules import APPLICATION_XIDS
from cgpu_agent.domain.gpustate import Reason
from cgpu_agent.domain.store import Store
from cgpu_agent.domain.timefloor import MAX_STEP, TimeFloor
from cgpu_agent.errors import Exhausted, Misuse, Unavailable
from cgpu_agent.wire.spdm import parse_report
from fixtures.gpusessions import MovableClock, judge_of, site
from fixtures.softwaregpu import PATIENCE, GpuProcess, running_gpus


@pytest.fixture(scope="module")
def process() -> Iterator[GpuProcess]:
    with running_gpus("--count", "2") as gpus:
        yield gpus


def test_gpus_become_ready_once_all_of_them_passed(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            assert here.state == "not-ready"  # nobody has looked yet
            assert await here.ready() is False
            await here.tick()
            assert (here.state, here.reason, here.phases) == ("ready", None, ["trusted", "trusted"])
            assert await here.ready() is True
            assert here.log.records == ["attested 2"]
            assert here.sessions.view().line == "2/2 simulated GPUs trusted"
            assert here.sessions.problems() == []
            identities = {each.verdict.identity for each in here.sessions.view().sessions if each.verdict}
            assert len(identities) == 2

    asyncio.run(scenario())


class Unseen:
    """The same devices, of which kernel and driver see none."""

    def __init__(self, gpus: SoftwareGpus) -> None:
        self._gpus = gpus

    def __getattr__(self, name: str) -> object:
        return getattr(self._gpus, name)

    async def pci(self, *, timeout: float) -> tuple[str, ...]:
        return ()

    async def list(self, *, timeout: float) -> tuple[GpuInfo, ...]:
        return ()


@pytest.mark.parametrize(("count", "state"), [(0, "none"), (2, "not-ready")])
def test_gpus_that_must_be_there_are_not_none(process: GpuProcess, count: int, state: str) -> None:
    async def scenario() -> None:
        async with site(process, wrap=Unseen, count=count) as here:  # type: ignore[arg-type]
            assert here.state == "not-ready"
            await here.tick()
            assert here.state == state

    asyncio.run(scenario())


def test_stopping_closes_the_gpus(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.tick()
            assert await here.ready() is True
            await here.sessions.stop()
            assert await here.ready() is False
            assert here.log.records == ["attested 2", "dropped AGENT_STOPPED"]
            await here.sessions.stop()
            await here.tick()
            assert await here.ready() is False

    asyncio.run(scenario())


BAD = {
    "wrong-nonce": "NONCE_MISMATCH",
    "edited-measurement": "BAD_SIGNATURE",
    "other-firmware": "MEASUREMENT_MISMATCH",
    "other-chain": "UNKNOWN_ROOT",
    "duplicate": "DUPLICATE_DEVICE",
    "cc-off": "GPU_CC_OFF",
    "dev-tools": "GPU_DEV_TOOLS",
    "hang": "GPU_TIMEOUT",
}


@pytest.mark.parametrize("name", BAD)
def test_one_bad_gpu_keeps_all_closed_and_is_named(process: GpuProcess, name: str) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.bad(name, 2)
            await here.tick()
            assert (here.state, here.reason) == ("not-ready", BAD[name])
            assert await here.ready() is False
            assert "trusted" not in here.phases
            if name != "duplicate":
                assert here.phases == ["stale", "rejected"]
            assert here.log.records == []
            assert [problem.slug for problem in here.sessions.problems()] == [BAD[name]]

    asyncio.run(scenario())


def test_simulated_gpus_are_refused_unless_allowed(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process, allow_simulated=False) as here:
            await here.tick()
            assert here.reason == "GPU_CC_NOT_PRODUCTION"
            assert await here.ready() is False

    asyncio.run(scenario())


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_gpus_than_demanded_is_refused(process: GpuProcess, count: int) -> None:
    async def scenario() -> None:
        async with site(process, count=count) as here:
            await here.tick()
            assert (here.state, here.reason) == ("not-ready", "WRONG_COUNT")
            assert await here.ready() is False

    asyncio.run(scenario())


def test_gpus_that_mend_are_attested_again(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.bad("cc-off", 1)
            await here.tick()
            assert here.state == "not-ready"
            await here.good()
            await here.tick()
            assert here.state == "ready"

    asyncio.run(scenario())


def test_a_verdict_is_renewed_before_it_ends_and_nothing_is_dropped(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process, reattest_seconds=120.0) as here:
            await here.tick()
            epoch, first = here.sessions.trust_epoch, here.sessions.view().sessions[0].verdict
            for _ in range(20):
                await here.tick(10.0)
                assert here.state == "ready"
            assert here.sessions.trust_epoch == epoch
            assert here.log.records == ["attested 2"]
            last = here.sessions.view().sessions[0].verdict
            assert first is not None
            assert last is not None
            assert last.until > first.until

    asyncio.run(scenario())


def test_standing_still_ends_every_verdict(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.tick()
            epoch = here.sessions.trust_epoch
            here.clock.pass_by(600.0)
            await here.sessions.tick()
            assert here.sessions.trust_epoch > epoch
            assert here.log.records[:2] == ["attested 2", "dropped RESUMED"]
            await here.sessions.settled()

    asyncio.run(scenario())


def test_a_failed_renewal_drops_at_once(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.tick()
            await here.bad("wrong-nonce", 1)
            here.clock.pass_by(31.0)
            await here.sessions.attest()
            assert (here.state, here.reason) == ("not-ready", "NONCE_MISMATCH")
            assert await here.ready() is False
            assert here.log.records == ["attested 2", "dropped NONCE_MISMATCH"]

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", ["appeared", "vanished", "driver-reloaded", "watch-lost"])
def test_an_event_drops_before_anything_else(process: GpuProcess, kind: str) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.tick()
            epoch = here.sessions.trust_epoch
            await here.sessions.on_event(GpuEvent(kind, "0000:01:00.0", ""))  # type: ignore[arg-type]
            assert here.state == "not-ready"
            assert await here.ready() is False
            assert here.sessions.trust_epoch == epoch + 1
            await here.tick()
            assert here.state == "ready"

    asyncio.run(scenario())


@pytest.mark.parametrize("number", [48, 74, 79, 95, 119, 154])
def test_a_grave_xid_drops(process: GpuProcess, number: int) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.tick()
            await here.sessions.on_event(GpuEvent("xid", "0000:01:00.0", f"XID {number}"))
            assert (here.reason, await here.ready()) == ("GPU_XID", False)

    asyncio.run(scenario())


def test_an_xid_that_cannot_be_read_drops(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.tick()
            await here.sessions.on_event(GpuEvent("xid", None, ""))
            assert (here.reason, await here.ready()) == ("GPU_XID", False)

    asyncio.run(scenario())


def test_devices_that_come_and_go_without_an_event_are_found(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.tick()
            await here.bad("vanish", 2)
            here.clock.pass_by(1.0)
            await here.sessions.tick()
            assert await here.ready() is False
            assert here.phases == ["discovered", "lost"]
            await here.tick()
            assert here.sessions.view().line == "1/2 simulated GPUs trusted"
            await here.good()
            here.clock.pass_by(1.0)
            await here.sessions.tick()
            assert await here.ready() is False
            await here.tick()
            assert here.sessions.view().line == "2/2 simulated GPUs trusted"
            assert here.log.records == [
                "attested 2",
                "dropped GPU_INVENTORY_CHANGED",
                "attested 1",
                "dropped GPU_INVENTORY_CHANGED",
                "attested 2",
            ]

    asyncio.run(scenario())


def test_changed_trust_drops_first(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.tick()
            await here.sessions.use(await judge_of(here.outside))
            assert (here.reason, await here.ready()) == ("GPU_TRUST_CHANGED", False)
            await here.tick()
            assert here.state == "ready"

    asyncio.run(scenario())


@pytest.mark.parametrize("seconds", [-MAX_STEP - 1, MAX_STEP + 1])
def test_a_clock_that_is_moved_drops(process: GpuProcess, seconds: float) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.tick()
            here.clock.wall += seconds
            here.clock.pass_by(1.0)
            await here.sessions.tick()
            assert here.log.records == ["attested 2", "dropped CLOCK_STEPPED"]
            await here.sessions.settled()

    asyncio.run(scenario())


def test_before_the_floor_nothing_is_judged(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.tick()
            here.clock.wall -= 365 * 86400.0  # the reference values were signed later
            await here.tick()
            assert (here.reason, await here.ready()) == ("CLOCK_BEFORE_FLOOR", False)

    asyncio.run(scenario())


def test_the_floor_outlives_a_restart(tmp_path: Path) -> None:
    clock = MovableClock()
    first = TimeFloor(clock, Store(tmp_path / "state"))
    first.rise(first.now())
    clock.wall -= 10.0
    with pytest.raises(Unavailable) as caught:
        TimeFloor(clock, Store(tmp_path / "state")).now()
    assert caught.value.slug == "CLOCK_BEFORE_FLOOR"


@pytest.mark.parametrize("damage", [b"", b"x", b"-5", b"9" * 40, b"\xff"])
def test_a_damaged_floor_is_no_floor(tmp_path: Path, damage: bytes) -> None:
    store, clock = Store(tmp_path / "state"), MovableClock()
    store.write("time-floor", damage)
    assert TimeFloor(clock, store).now().timestamp() == pytest.approx(clock.wall)


def test_a_caller_joins_and_is_limited(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.tick()
            with pytest.raises(Exhausted) as caught:
                await here.sessions.attest()
            assert caught.value.slug == "GPU_ATTEST_LIMIT"
            assert caught.value.retry_after
            here.clock.pass_by(31.0)
            await asyncio.gather(*(here.sessions.attest() for _ in range(20)))
            assert here.state == "ready"
            assert here.log.records == ["attested 2"]

    asyncio.run(scenario())


def test_a_caller_who_leaves_stops_nothing(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.sessions.distrust(Reason("TEST", ""))
            here.clock.pass_by(60.0)
            await here.sessions.tick()
            caller = asyncio.create_task(here.sessions.attest())
            await asyncio.sleep(0.005)  # into the middle of it
            assert here.sessions.view().attesting
            caller.cancel()
            await here.sessions.settled()
            assert here.state == "ready"

    asyncio.run(scenario())


def test_a_report_answers_exactly_the_nonce(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.tick()
            uuid = here.sessions.view().sessions[0].info.uuid
            found = await here.sessions.report(1000, uuid, bytes(range(32)))
            assert parse_report(found.report).nonce == bytes(range(32))
            for bad in (b"", bytes(31), bytes(33)):
                with pytest.raises(Misuse):
                    await here.sessions.report(1000, uuid, bad)
            with pytest.raises(Misuse):
                await here.sessions.report(1000, "GPU-unknown", bytes(32))

    asyncio.run(scenario())


def test_watchers_see_the_state_now_and_each_change(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            await here.tick()
            views = here.sessions.watch()
            assert (await views.__anext__()).state == "ready"
            await here.sessions.distrust(Reason("TEST", "for a test"))
            view = await asyncio.wait_for(views.__anext__(), PATIENCE)
            assert (view.state, view.reason) == ("not-ready", Reason("TEST", "for a test"))
            await here.sessions.stop()
            rest = [view.reason async for view in views]
            assert [reason.slug for reason in rest if reason] == ["AGENT_STOPPED"]

    asyncio.run(scenario())


def test_the_tasks_react_to_the_drivers_own_events(process: GpuProcess) -> None:
    async def scenario() -> None:
        async with site(process) as here:
            running = asyncio.create_task(here.sessions.run())
            async for view in here.sessions.watch():
                if view.state == "ready":
                    break
            await here.bad("other-device", 1)
            async for view in here.sessions.watch():
                if view.state == "not-ready":
                    break
            assert await here.ready() is False
            await here.sessions.stop()
            await running  # the tasks end by themselves

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_driver_that_is_gone_is_a_state_and_no_crash(process: GpuProcess) -> None:
    async def scenario() -> None:
        with running_gpus("--count", "1") as own:
            async with site(own) as here:
                await here.tick()
                assert here.state == "ready"
                own.stop()
                await here.tick()
                assert (here.state, here.reason) == ("not-ready", "GPU_DRIVER")
                epoch = here.sessions.trust_epoch
                await here.tick()
                assert here.sessions.trust_epoch == epoch
                own.start()
                await here.tick()
                await here.tick(300.0)
                assert here.state == "not-ready"  # another seed: other identities, roots that nobody pinned

    asyncio.run(scenario())


def test_application_errors_are_no_doubt() -> None:
    assert {13, 31, 43, 45} == APPLICATION_XIDS
