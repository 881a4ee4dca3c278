"""A driver that hangs holds its own thread only, and one that was restarted is found again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cgpu_agent.backends.base import GpuEvidence
from cgpu_agent.backends.gpu import nvml as nvml_module
from cgpu_agent.backends.gpu.nvmlgpus import NvmlGpus
from cgpu_agent.errors import AgentError, DeviceFault
from fixtures.gpu import NONCE
from fixtures.gpujudge import GPU
from fixtures.nvml import FakeDriver, fake_driver, uuid_of

INIT, COUNT = "nvmlInitWithFlags", "nvmlDeviceGetCount_v2"
REPORT = "nvmlDeviceGetConfComputeGpuAttestationReport"
SET_READY = "nvmlSystemSetConfComputeGpusReadyState"


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[FakeDriver]:
    with fake_driver(tmp_path) as driver:
        driver.hold(0, GPU, NONCE)
        yield driver


@asynccontextmanager
async def owning(driver: FakeDriver, **options: int) -> AsyncIterator[NvmlGpus]:
    # Without the watch's wait in the driver, whose calls would be counted with those of the test.
    driver.fail("nvmlEventSetCreate", 3)
    gpus = NvmlGpus(sysfs=driver.sysfs, poll=0.01, retry=60, **options)
    try:
        yield gpus
    finally:
        driver.release()
        gpus.close()


async def called(driver: FakeDriver, call: str) -> None:
    while call not in driver.calls():  # noqa: ASYNC110 - another thread calls
        await asyncio.sleep(0.002)


def evidence(gpus: NvmlGpus, timeout: float = 30) -> asyncio.Task[GpuEvidence]:
    return asyncio.create_task(gpus.evidence(uuid_of(0), NONCE, timeout=timeout))


def test_a_hung_report_is_given_up_and_everything_else_goes_on(driver: FakeDriver) -> None:
    async def scenario() -> None:
        async with owning(driver) as gpus:
            driver.hang(REPORT)
            hung = evidence(gpus, timeout=0.2)
            await called(driver, REPORT)
            await gpus.set_ready(True, timeout=30)
            assert await gpus.ready(timeout=30) is True
            assert await gpus.pci(timeout=30) == ("0000:01:00.0",)
            with pytest.raises(DeviceFault) as caught:
                await hung
            assert caught.value.slug == "GPU_TIMEOUT"
            await gpus.set_ready(False, timeout=30)
            driver.release()
            assert (await evidence(gpus)).chain == GPU.chain

    asyncio.run(scenario())


def test_the_ready_state_is_dropped_though_a_hung_call_keeps_the_library_from_opening_anew(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml_module, "_PATIENCE", 0.01)
    driver.say("ready", "1")

    async def scenario() -> None:
        async with owning(driver) as gpus:
            driver.hang(REPORT)
            hung = evidence(gpus)
            await called(driver, REPORT)
            events = gpus.events()
            driver.plug(1)
            while (await anext(events)).kind != "appeared":
                pass
            await gpus.set_ready(False, timeout=30)
            assert (driver.folder / "ready").read_text() == "0"
            assert "nvmlShutdown" not in driver.calls()
            driver.release()
            await hung
            assert len(await gpus.list(timeout=30)) == 2

    asyncio.run(scenario())


def test_a_call_that_waited_out_its_time_is_never_made(driver: FakeDriver) -> None:
    async def scenario() -> None:
        async with owning(driver) as gpus:
            driver.hang("nvmlSystemGetConfComputeGpusReadyState")
            hung = asyncio.create_task(gpus.ready(timeout=30))
            await called(driver, "nvmlSystemGetConfComputeGpusReadyState")
            with pytest.raises(DeviceFault) as caught:
                await gpus.set_ready(True, timeout=0.05)
            assert caught.value.slug == "GPU_TIMEOUT"
            assert not caught.value.outcome_unknown
            driver.release()
            assert await hung is False
            assert await gpus.ready(timeout=30) is False
            assert SET_READY not in driver.calls()

    asyncio.run(scenario())


def test_a_ready_state_whose_setting_hangs_may_be_set(driver: FakeDriver) -> None:
    async def scenario() -> None:
        async with owning(driver) as gpus:
            driver.hang(SET_READY)
            with pytest.raises(DeviceFault) as caught:
                await gpus.set_ready(True, timeout=0.2)
            assert (caught.value.slug, caught.value.outcome_unknown) == ("GPU_TIMEOUT", True)

    asyncio.run(scenario())


def test_a_list_that_takes_too_long_ends_between_two_gpus(driver: FakeDriver) -> None:
    driver.plug(1)

    async def scenario() -> None:
        async with owning(driver) as gpus:
            driver.hang("nvmlDeviceGetVbiosVersion")
            with pytest.raises(DeviceFault) as caught:
                await gpus.list(timeout=0.2)
            assert caught.value.slug == "GPU_TIMEOUT"
            driver.release()
            await evidence(gpus)
            assert driver.calls().count("nvmlDeviceGetVbiosVersion") == 1

    asyncio.run(scenario())


def test_the_heart_stops_only_past_the_deadline_of_a_hung_call(driver: FakeDriver) -> None:
    async def scenario() -> None:
        async with owning(driver) as gpus:
            driver.hang(COUNT)
            began = time.monotonic()
            hung = asyncio.create_task(gpus.list(timeout=5))
            await called(driver, COUNT)
            assert gpus.heartbeat_age(began + 4) < 4.5
            assert gpus.heartbeat_age(began + 1000) > 990
            driver.release()
            await hung

    asyncio.run(scenario())


def test_a_driver_that_hangs_as_it_is_opened_holds_no_caller(driver: FakeDriver) -> None:
    driver.hang(INIT)

    async def scenario() -> None:
        async with owning(driver) as gpus:
            for call in (gpus.list(timeout=0.05), gpus.set_ready(True, timeout=0.05), gpus.ready(timeout=0.05)):
                with pytest.raises(DeviceFault) as caught:
                    await call
                assert caught.value.slug == "GPU_TIMEOUT"
            assert await gpus.pci(timeout=30)
            driver.release()
            assert len(await gpus.list(timeout=30)) == 1
            assert await gpus.ready(timeout=30) is False
            assert SET_READY not in driver.calls()

    asyncio.run(scenario())


def test_a_driver_that_forgot_us_is_opened_again_unnoticed(driver: FakeDriver) -> None:
    async def scenario() -> None:
        async with owning(driver) as gpus:
            await gpus.list(timeout=30)
            opened = driver.calls().count(INIT)
            driver.say("boot", "without a new module")
            assert len(await gpus.list(timeout=30)) == 1
            await gpus.set_ready(True, timeout=30)
            assert driver.calls().count(INIT) == opened + 1

    asyncio.run(scenario())


def test_a_driver_that_forgets_us_each_time_is_given_up(driver: FakeDriver) -> None:
    driver.fail(COUNT, 1)

    async def scenario() -> None:
        async with owning(driver) as gpus:
            with pytest.raises(DeviceFault) as caught:
                await gpus.list(timeout=30)
            assert caught.value.slug == "GPU_DRIVER"
            assert driver.calls().count(COUNT) == 2

    asyncio.run(scenario())


def test_a_driver_that_comes_late_is_used(driver: FakeDriver) -> None:
    driver.forget("boot")

    async def scenario() -> None:
        async with owning(driver) as gpus:
            with pytest.raises(DeviceFault) as caught:
                await gpus.list(timeout=30)
            assert caught.value.slug == "GPU_DRIVER"
            assert await gpus.pci(timeout=30) == ("0000:01:00.0",)
            driver.say("boot", "late")
            assert len(await gpus.list(timeout=30)) == 1

    asyncio.run(scenario())


def test_too_many_waiting_calls_are_turned_away(driver: FakeDriver) -> None:
    async def scenario() -> None:
        async with owning(driver, queue_limit=1) as gpus:
            driver.hang(REPORT)
            hung = evidence(gpus)
            await called(driver, REPORT)
            waiting = evidence(gpus)
            await asyncio.sleep(0)
            with pytest.raises(AgentError) as caught:
                await evidence(gpus)
            assert caught.value.slug == "GPU_QUEUE_FULL"
            driver.release()
            await asyncio.gather(hung, waiting)

    asyncio.run(scenario())


def test_after_closing_nothing_is_asked_and_the_ready_state_stays(driver: FakeDriver) -> None:
    async def scenario() -> None:
        async with owning(driver) as gpus:
            await gpus.set_ready(True, timeout=30)
            events = gpus.events()
            gpus.close()
            gpus.close()
            with pytest.raises(DeviceFault) as caught:
                await gpus.list(timeout=30)
            assert caught.value.slug == "GPU_CLOSED"
            assert [event.kind async for event in events] in ([], ["watch-lost"])
            assert (driver.folder / "ready").read_text() == "1"
            assert "nvmlShutdown" in driver.calls()

    asyncio.run(scenario())
