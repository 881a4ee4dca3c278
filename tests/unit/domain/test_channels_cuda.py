"""Channels to GPUs whose driver encrypts the link: the service over CUDA, with the trust of software GPUs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator

import pytest

from cgpu_agent.backends.gpu.cudamemory import CudaMemory
from cgpu_agent.domain.channels import Range
from cgpu_agent.domain.gpustate import Reason
from cgpu_agent.domain.transfers import PIECE
from fixtures.channels import MIB, Ground, running, sealed, slug
from fixtures.cuda import FakeCuda, eventually, fake_cuda
from fixtures.leases import until
from fixtures.softwaregpu import GpuProcess, running_gpus

ECC = 214


class Driver:
    """GPUs of the CUDA driver."""

    async def establish_transfers(self, uuid: str, *, timeout: float) -> CudaMemory:
        return await CudaMemory.establish(uuid, timeout=timeout)


@pytest.fixture(scope="module")
def gpus() -> Iterator[GpuProcess]:
    with running_gpus("--count", "2") as process:
        yield process


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda() as cuda:
        yield cuda
        assert cuda.count("faults") == 0
        eventually(cuda.has_nothing)


def over_cuda(gpus: GpuProcess, cuda: FakeCuda, scenario: Callable[[Ground], Awaitable[None]]) -> None:
    async def placed(ground: Ground) -> None:
        cuda.plug(*ground.uuids)
        ground.channels._devices = Driver()
        await scenario(ground)

    running(gpus, placed)


def test_what_is_put_is_got(gpus: GpuProcess, cuda: FakeCuda) -> None:
    async def scenario(ground: Ground) -> None:
        channel, work = await ground.open(gpu=1), await ground.lease(20 * MIB)
        assert cuda.chosen() == 1
        for size in (1, 4095, PIECE + 3):
            data = os.urandom(size)
            handle = await ground.put(channel, work, data)
            work.view[:size] = bytes(size)
            await ground.copy(channel, work.range(handle, to_device=False, size=size))
            assert work.view[:size] == data
            await ground.channels.free(ground.me, channel.id, handle)
        many = [Range(True, work.id, 0, await ground.allocate(channel, 64), place, 1) for place in range(64)]
        assert (await ground.copy(channel, *many)).done == 64
        await ground.channels.close(ground.me, channel.id)
        assert cuda.count("left") == 0

    over_cuda(gpus, cuda, scenario)


def test_an_object_is_opened_into_device_memory_and_wiped_with_the_channel(gpus: GpuProcess, cuda: FakeCuda) -> None:
    async def scenario(ground: Ground) -> None:
        channel, plain = await ground.open(), os.urandom(5000)
        handle = await ground.allocate(channel, 5000)
        await ground.wait(channel, await ground.load(channel, sealed(plain), handle))
        assert await asyncio.to_thread(ground.peek, channel, handle, 5000) == plain
        assert cuda.holds(plain[:64], device=True, freed=False)
        await ground.channels.close(ground.me, channel.id)
        assert not any(cuda.holds(plain[:64], device=device, freed=True) for device in (True, False))

    over_cuda(gpus, cuda, scenario)


def test_a_doubt_ends_the_channel_and_wipes_what_it_had(gpus: GpuProcess, cuda: FakeCuda) -> None:
    async def scenario(ground: Ground) -> None:
        channel, work = await ground.open(), await ground.lease(8 * MIB)
        handle, secret = await ground.allocate(channel, 8 * MIB), os.urandom(64)
        work.view[:] = secret * (8 * MIB // 64)
        cuda.delay(50_000)
        transfer = ground.submit(channel, *[work.range(handle)] * 8)
        await until(lambda: transfer.progress().done > 0)
        ground.site.sessions.state.doubt(Reason("GPU_XID", "the driver reported an error"))
        await ground.site.tick(0.0)
        await ground.ended()
        assert transfer.progress().state == "failed"
        assert cuda.has_nothing()
        assert not any(cuda.holds(secret, device=device, freed=True) for device in (True, False))

    over_cuda(gpus, cuda, scenario)


def test_an_error_of_the_gpu_ends_the_channel_with_its_reason(gpus: GpuProcess, cuda: FakeCuda) -> None:
    async def scenario(ground: Ground) -> None:
        channel, work = await ground.open(), await ground.lease(MIB)
        handle = await ground.allocate(channel, MIB)
        cuda.poison(ECC)
        assert await slug(ground.copy(channel, work.range(handle))) == "GPU_ERROR"
        await ground.ended()
        assert cuda.has_nothing()

    over_cuda(gpus, cuda, scenario)


def test_a_gpu_without_room_and_one_that_cuda_does_not_see(gpus: GpuProcess, cuda: FakeCuda) -> None:
    async def scenario(ground: Ground) -> None:
        channel = await ground.open()
        cuda.capacity(MIB)
        assert await slug(ground.allocate(channel, MIB + 1)) == "DEVICE_MEMORY"
        await ground.allocate(channel, MIB)
        await ground.channels.close(ground.me, channel.id)
        cuda.plug(ground.uuids[1])
        assert await slug(ground.open()) == "GPU_LOST"

    over_cuda(gpus, cuda, scenario)
