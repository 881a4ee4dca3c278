"""Evidence with GPUs: one report of each serves everybody who waits, and the devices stood still meanwhile."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import pytest

from cgpu_agent.backends.base import GpuEvent, GpuEvidence
from cgpu_agent.backends.gpu.software.client import SoftwareGpus
from cgpu_agent.domain.core import Core
from cgpu_agent.domain.evidence import Request
from cgpu_agent.errors import AgentError, DeviceFault, Unavailable
from cgpu_agent.wire.bundle import parse_bundle
from cgpu_agent.wire.gpuinventory import GpuInventory
from cgpu_agent.wire.manifest import parse_manifest
from fixtures.gpusessions import Site, site
from fixtures.machine import WORKLOAD, Machine, judge, request
from fixtures.softwaregpu import GpuProcess, party_of, running_gpus

pytestmark = pytest.mark.swtpm

T = TypeVar("T")


@pytest.fixture(scope="module")
def gpus() -> Iterator[GpuProcess]:
    with running_gpus("--count", "2") as process:
        yield process


def with_gpus() -> Request:
    return dataclasses.replace(request(), gpus=True)


class Counting(SoftwareGpus):
    """A driver that counts reports, and lets a test do something while one is made."""

    reports = 0
    meanwhile: Callable[[], Awaitable[None]] | None = None

    def __init__(self, process: GpuProcess) -> None:
        super().__init__(process.socket, interval=0.02)
        self.asked = asyncio.Event()

    async def evidence(self, uuid: str, nonce: bytes, *, timeout: float) -> GpuEvidence:
        self.reports += 1
        self.asked.set()
        if self.meanwhile is not None:
            await self.meanwhile()
        return await super().evidence(uuid, nonce, timeout=timeout)


@asynccontextmanager
async def agent(machine: Machine, gpus: GpuProcess) -> AsyncIterator[tuple[Core, Site, Counting]]:
    driver = Counting(gpus)
    try:
        async with site(gpus, wrap=lambda _inside: driver) as found, machine.agent() as core:
            core.gpus = found.sessions
            await core.establish()
            yield core, found, driver
    finally:
        driver.close()


def run(machine: Machine, gpus: GpuProcess, work: Callable[[Core, Site, Counting], Awaitable[T]]) -> T:
    async def scenario() -> T:
        async with agent(machine, gpus) as parts:
            return await work(*parts)

    return asyncio.run(scenario())


def inventory_of(bundle: bytes) -> GpuInventory:
    found = parse_manifest(parse_bundle(bundle).manifest).gpus
    assert found is not None
    return found


def test_a_bundle_with_gpus_verifies(machine: Machine, gpus: GpuProcess) -> None:
    async def work(core: Core, found: Site, _driver: Counting) -> tuple[bytes, bytes, dict[str, bytes]]:
        await found.tick()
        asked = with_gpus()
        return await core.evidence.get(WORKLOAD, asked), asked.nonce, await found.outside.collateral(timeout=10)

    bundle, nonce, files = run(machine, gpus, work)
    result = judge(bundle, nonce, gpu_party=party_of(files), gpu_count=2)
    assert result.accepted, result.refusal
    assert result.simulated_gpus
    inventory = inventory_of(bundle)
    assert (inventory.backend, inventory.kernel, inventory.ready) == ("software", 2, True)
    assert [device.trusted for device in inventory.devices] == [True, True]
    assert [device.bdf for device in inventory.devices] == sorted(device.bdf for device in inventory.devices)


def test_gpus_that_the_agent_does_not_trust_are_shown_as_such(machine: Machine, gpus: GpuProcess) -> None:
    async def work(core: Core, _found: Site, _driver: Counting) -> bytes:
        return await core.evidence.get(WORKLOAD, with_gpus())

    inventory = inventory_of(run(machine, gpus, work))
    assert not inventory.ready
    assert [device.trusted for device in inventory.devices] == [False, False]


def test_boot_evidence_asks_no_gpu(machine: Machine, gpus: GpuProcess) -> None:
    async def work(core: Core, _found: Site, driver: Counting) -> tuple[bytes, int]:
        return await core.evidence.get(WORKLOAD, request()), driver.reports

    bundle, reports = run(machine, gpus, work)
    assert reports == 0
    assert parse_bundle(bundle).gpus is None
    assert parse_manifest(parse_bundle(bundle).manifest).gpus is None


def test_one_report_of_each_serves_everybody_who_waits(machine: Machine, gpus: GpuProcess) -> None:
    async def work(core: Core, _found: Site, driver: Counting) -> tuple[int, list[bytes]]:
        released = asyncio.Event()
        driver.meanwhile = released.wait  # type: ignore[assignment]
        first = asyncio.create_task(core.evidence.get(WORKLOAD, with_gpus()))
        await driver.asked.wait()
        later = [asyncio.create_task(core.evidence.get(WORKLOAD, with_gpus())) for _ in range(6)]
        await asyncio.sleep(0)
        released.set()
        await first
        bundles = list(await asyncio.gather(*later))
        return driver.reports, bundles

    reports, bundles = run(machine, gpus, work)
    assert len({parse_bundle(each).manifest for each in bundles}) == 1
    assert reports == 4


def test_boot_evidence_never_waits_for_a_gpu(machine: Machine, gpus: GpuProcess) -> None:
    async def work(core: Core, _found: Site, driver: Counting) -> bool:
        never = asyncio.Event()
        driver.meanwhile = never.wait  # type: ignore[assignment]
        slow = asyncio.create_task(core.evidence.get(WORKLOAD, with_gpus()))
        await driver.asked.wait()
        await core.evidence.get(WORKLOAD, request())
        waits = not slow.done()
        never.set()
        await slow
        return waits

    assert run(machine, gpus, work)


def test_without_gpus_the_reason_is_clear(machine: Machine) -> None:
    async def scenario() -> None:
        async with machine.serving() as core:
            await core.evidence.get(WORKLOAD, with_gpus())

    with pytest.raises(Unavailable) as raised:
        asyncio.run(scenario())
    assert raised.value.slug == "NO_GPUS"


def failing(machine: Machine, gpus: GpuProcess, spoil: Callable[[Site, Counting], Awaitable[None]]) -> AgentError:
    """What a batch fails with; the next one, with everything mended, succeeds."""

    async def work(core: Core, found: Site, driver: Counting) -> AgentError:
        await found.tick()
        await spoil(found, driver)
        error: AgentError | None = None
        try:
            await core.evidence.get(WORKLOAD, with_gpus())
        except AgentError as raised:
            error = raised
        driver.meanwhile = None
        await found.good()
        with suppress(AgentError):
            await found.tick()
        await core.evidence.get(WORKLOAD, with_gpus())
        assert error is not None
        return error

    return run(machine, gpus, work)


def test_one_gpu_that_does_not_answer_fails_the_batch_and_no_later_one(machine: Machine, gpus: GpuProcess) -> None:
    async def hang(found: Site, _driver: Counting) -> None:
        await found.bad("hang", gpu=2)

    error = failing(machine, gpus, hang)
    assert isinstance(error, DeviceFault)
    assert error.slug == "GPU_TIMEOUT"


def test_a_gpu_that_vanishes_meanwhile_fails_the_batch(machine: Machine, gpus: GpuProcess) -> None:
    async def vanish(found: Site, driver: Counting) -> None:
        driver.meanwhile = lambda: found.bad("vanish", gpu=2)

    assert failing(machine, gpus, vanish).slug in ("GPU_LOST", "GPU_INVENTORY", "GPU_INVENTORY_CHANGED")


def test_a_gpu_that_is_gone_leaves_the_others_which_are_not_ready(machine: Machine, gpus: GpuProcess) -> None:
    async def work(core: Core, found: Site, _driver: Counting) -> bytes:
        await found.tick()
        await found.bad("vanish", gpu=2)
        return await core.evidence.get(WORKLOAD, with_gpus())

    inventory = inventory_of(run(machine, gpus, work))
    assert (inventory.kernel, inventory.ready) == (1, False)


def test_whatever_happens_to_the_gpus_meanwhile_fails_the_batch(machine: Machine, gpus: GpuProcess) -> None:
    """The manifest says "ready", and before the quote somebody plugged in a device."""

    async def plug(found: Site, driver: Counting) -> None:
        async def meanwhile() -> None:
            await found.sessions.on_event(GpuEvent("appeared", "0000:99:00.0", "test"))

        driver.meanwhile = meanwhile

    error = failing(machine, gpus, plug)
    assert isinstance(error, Unavailable)
    assert error.slug == "GPU_INVENTORY_CHANGED"
    assert error.retry_after is not None


def test_a_doubt_between_the_reports_and_the_quote_fails_the_batch(machine: Machine, gpus: GpuProcess) -> None:
    async def work(core: Core, found: Site, _driver: Counting) -> AgentError:
        await found.tick()
        collect = found.sessions.collect

        async def doubted(nonce: bytes) -> object:
            collection = await collect(nonce)
            await found.sessions.on_event(GpuEvent("xid", None, "XID 79"))
            return collection

        found.sessions.collect = doubted  # type: ignore[assignment, method-assign]
        with pytest.raises(Unavailable) as raised:
            await core.evidence.get(WORKLOAD, with_gpus())
        return raised.value

    assert run(machine, gpus, work).slug == "GPU_INVENTORY_CHANGED"


def test_a_driver_that_says_what_no_reader_takes_in_fails_the_batch(machine: Machine, gpus: GpuProcess) -> None:
    async def work(core: Core, _found: Site, driver: Counting) -> AgentError:
        listed = driver.list

        async def strange(*, timeout: float) -> object:
            return tuple(dataclasses.replace(info, vbios="\u202e96") for info in await listed(timeout=timeout))

        driver.list = strange  # type: ignore[assignment, method-assign]
        with pytest.raises(Unavailable) as raised:
            await core.evidence.get(WORKLOAD, with_gpus())
        return raised.value

    assert run(machine, gpus, work).slug == "GPU_WORDS"
