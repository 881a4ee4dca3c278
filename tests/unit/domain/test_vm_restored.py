"""A hypervisor that says it restored or copied the machine: what was found out before is trusted no more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from cgpu_agent.wire.bundle import parse_bundle
from cgpu_agent.wire.manifest import parse_manifest
from fixtures.gpusessions import site
from fixtures.machine import WORKLOAD, Machine, request
from fixtures.softwaregpu import GpuProcess, running_gpus

pytestmark = pytest.mark.swtpm


@pytest.fixture(scope="module")
def gpus() -> Iterator[GpuProcess]:
    with running_gpus() as process:
        yield process


@pytest.mark.parametrize("generations", [(3, 4), (3, 2), (None, 1), (3, None)])
def test_the_gpus_are_dropped_at_once(
    machine: Machine, gpus: GpuProcess, generations: tuple[int | None, int | None]
) -> None:
    async def scenario() -> None:
        async with site(gpus) as found, machine.agent() as core:
            core.gpus = found.sessions
            core.vm_generation = lambda: generations[0]
            assert not await core.watch_vm()
            await found.tick()
            assert found.state == "ready"
            assert not await core.watch_vm()
            core.vm_generation = lambda: generations[1]
            assert await core.watch_vm()
            assert (found.state, found.reason) == ("not-ready", "VM_RESTORED")
            assert await found.ready() is False
            assert not await core.watch_vm()

    asyncio.run(scenario())


@pytest.mark.parametrize("generation", [None, 0, (1 << 64) - 1])
def test_every_manifest_tells_it(machine: Machine, generation: int | None) -> None:
    async def scenario() -> bytes:
        async with machine.agent() as core:
            core.vm_generation = lambda: generation
            await core.establish()
            return await core.evidence.get(WORKLOAD, request())

    assert parse_manifest(parse_bundle(asyncio.run(scenario())).manifest).vm_generation == generation
