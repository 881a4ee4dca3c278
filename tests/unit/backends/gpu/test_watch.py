"""Devices that come, go or are swapped, drivers that are loaded anew, XIDs: each is an event, and so is blindness."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from cgpu_agent.backends.base import GpuEvent
from cgpu_agent.backends.gpu import watch as watch_module
from cgpu_agent.backends.gpu.nvmlgpus import NvmlGpus
from fixtures.nvml import FakeDriver, fake_driver

BDF, OTHER = "0000:01:00.0", "0000:02:00.0"
INIT, WAIT = "nvmlInitWithFlags", "nvmlEventSetWait_v2"


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[FakeDriver]:
    with fake_driver(tmp_path) as driver:
        yield driver


@pytest.fixture
def gpus(driver: FakeDriver) -> Iterator[NvmlGpus]:
    gpus = NvmlGpus(sysfs=driver.sysfs, poll=0.01, retry=0.01)
    yield gpus
    driver.release()
    gpus.close()


async def until(events: AsyncIterator[GpuEvent], *wanted: tuple[str, str | None]) -> list[GpuEvent]:
    """Events up to the one that completes ``wanted`` (kind, address), in its order."""
    seen: list[GpuEvent] = []
    for each in wanted:
        while not seen or (seen[-1].kind, seen[-1].bdf) != each:
            seen.append(await asyncio.wait_for(anext(events), 30))
    return seen


async def calls(driver: FakeDriver, call: str, count: int) -> None:
    """Until the driver was called so often."""
    while driver.calls().count(call) < count:  # noqa: ASYNC110 - another thread calls
        await asyncio.sleep(0.002)


def test_a_device_that_comes_is_told_and_then_listed(driver: FakeDriver, gpus: NvmlGpus) -> None:
    async def scenario() -> None:
        events = gpus.events()
        assert len(await gpus.list(timeout=30)) == 1
        driver.plug(1)
        await until(events, ("appeared", OTHER))
        assert await gpus.pci(timeout=30) == (BDF, OTHER)
        await calls(driver, INIT, 2)
        assert [gpu.bdf for gpu in await gpus.list(timeout=30)] == [BDF, OTHER]

    asyncio.run(scenario())


def test_a_device_that_goes_is_told(driver: FakeDriver, gpus: NvmlGpus) -> None:
    async def scenario() -> None:
        events = gpus.events()
        driver.unplug(BDF)
        await until(events, ("vanished", BDF))
        assert await gpus.pci(timeout=30) == ()

    asyncio.run(scenario())


def test_a_device_that_was_swapped_between_two_looks_is_told(driver: FakeDriver) -> None:
    gpus = NvmlGpus(sysfs=driver.sysfs, poll=0.2)

    async def scenario() -> None:
        events = gpus.events()
        staged = driver.sysfs / BDF
        driver.plug_function("0000:03:00.0", kind="0x040300")
        (driver.sysfs / "bus/pci/devices/0000:03:00.0").rename(staged)
        (staged / "class").write_text("0x030200\n")
        driver.unplug(BDF)
        staged.rename(driver.sysfs / "bus/pci/devices" / BDF)
        await until(events, ("vanished", BDF), ("appeared", BDF))

    asyncio.run(scenario())
    gpus.close()


def test_a_bus_that_cannot_be_read_is_told_once_and_what_changed_meanwhile_after_it(
    driver: FakeDriver, gpus: NvmlGpus
) -> None:
    async def scenario() -> None:
        events = gpus.events()
        bus = driver.sysfs / "bus"
        bus.rename(driver.sysfs / "hidden")
        (lost,) = [event for event in await until(events, ("watch-lost", None)) if "PCI" in event.detail]
        assert lost.detail == "the kernel's list of PCI devices cannot be read"
        await asyncio.sleep(0.05)
        (driver.sysfs / "hidden" / "pci" / "devices" / BDF).rename(driver.sysfs / "gone")
        (driver.sysfs / "hidden").rename(bus)
        assert [event.kind for event in await until(events, ("vanished", BDF))] == ["vanished"]

    asyncio.run(scenario())


def test_a_driver_that_is_loaded_anew_is_told_and_used(driver: FakeDriver, gpus: NvmlGpus) -> None:
    async def scenario() -> None:
        events = gpus.events()
        assert (await gpus.list(timeout=30))[0].driver == "550.90.07"
        driver.load("second", "555.42.02")
        reloaded = GpuEvent("driver-reloaded", None, "the GPU driver is version 555.42.02")
        while await asyncio.wait_for(anext(events), 30) != reloaded:
            pass  # Between two drivers there may be none.
        assert (await gpus.list(timeout=30))[0].driver == "555.42.02"

    asyncio.run(scenario())


def test_a_driver_that_is_unloaded_is_told(driver: FakeDriver, gpus: NvmlGpus) -> None:
    async def scenario() -> None:
        events = gpus.events()
        (driver.sysfs / "module" / "nvidia").rename(driver.sysfs / "unloaded")
        seen = await until(events, ("driver-reloaded", None))
        assert seen[-1].detail == "the GPU driver is not loaded"

    asyncio.run(scenario())


def test_an_xid_is_told_with_its_device(driver: FakeDriver) -> None:
    driver.plug(1)
    gpus = NvmlGpus(sysfs=driver.sysfs, poll=0.01)

    async def scenario() -> None:
        events = gpus.events()
        await calls(driver, WAIT, 1)
        assert driver.calls().count("nvmlDeviceRegisterEvents") == 2
        driver.say("xid", "1 79")
        assert await until(events, ("xid", OTHER)) == [GpuEvent("xid", OTHER, "XID 79")]
        driver.say("xid", "0 18446744073709551615")
        assert await until(events, ("xid", BDF)) == [GpuEvent("xid", BDF, "XID 18446744073709551615")]

    asyncio.run(scenario())
    gpus.close()


def test_an_xid_of_an_unknown_device_is_told_without_address(driver: FakeDriver, gpus: NvmlGpus) -> None:
    async def scenario() -> None:
        events = gpus.events()
        await calls(driver, WAIT, 1)
        driver.say("xid", "9 79")
        await until(events, ("xid", None))

    asyncio.run(scenario())


def test_a_device_without_xids_is_watched_by_the_kernel_alone(driver: FakeDriver) -> None:
    driver.forget("gpu0/events")
    gpus = NvmlGpus(sysfs=driver.sysfs, poll=0.01)
    asyncio.run(calls(driver, WAIT, 1))
    assert "nvmlDeviceRegisterEvents" not in driver.calls()
    gpus.close()


@pytest.mark.parametrize(("call", "code"), [(WAIT, 15), (WAIT, 999), (INIT, 9), ("nvmlEventSetCreate", 13)])
def test_a_watch_that_fails_is_told_once_and_taken_up_again(
    driver: FakeDriver, gpus: NvmlGpus, call: str, code: int
) -> None:
    async def scenario() -> None:
        await calls(driver, WAIT, 1)
        events = gpus.events()
        driver.fail(call, code)
        driver.fail("nvmlEventSetWait_v2", 15 if code == 15 else 999)
        await until(events, ("watch-lost", None))
        await asyncio.sleep(0.05)
        driver.forget(f"{call}.error")
        if call != WAIT:
            driver.forget("nvmlEventSetWait_v2.error")
        driver.say("xid", "0 48")
        assert [event.kind for event in await until(events, ("xid", BDF))] == ["xid"]
        late = gpus.events()
        driver.say("xid", "0 48")
        assert [event.kind for event in await until(late, ("xid", BDF))] == ["xid"]

    asyncio.run(scenario())


def test_an_event_wait_that_hangs_is_told_and_does_not_hide_the_bus(
    driver: FakeDriver, gpus: NvmlGpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "_XID_STUCK", 0.05)

    async def scenario() -> None:
        events = gpus.events()
        driver.hang(WAIT)
        seen = await until(events, ("watch-lost", None))
        assert seen[-1].detail == "the GPU driver hangs, its errors are not seen"
        driver.plug(1)
        await until(events, ("appeared", OTHER))

    asyncio.run(scenario())


def test_without_a_driver_blindness_is_the_first_event(tmp_path: Path) -> None:
    with fake_driver(tmp_path) as driver:
        driver.forget("boot")
        gpus = NvmlGpus(sysfs=driver.sysfs, poll=0.01, retry=0.01)

        async def scenario() -> None:
            await until(gpus.events(), ("watch-lost", None))
            seen = await until(gpus.events(), ("watch-lost", None))
            assert seen[0].detail.startswith("the GPU driver is not loaded")

        asyncio.run(scenario())
        gpus.close()
