"""NVIDIA's real library and driver below ``NvmlGpus``: what they say, what they refuse, and errors as they happen."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from cgpu_agent.backends.base import GpuEvent, GpuInfo
from cgpu_agent.backends.gpu.nvmlgpus import NvmlGpus
from cgpu_agent.backends.gpu.sysfs import loaded_driver
from cgpu_agent.errors import AgentError
from cgpu_agent.wire.spdm import NONCE_SIZE
from fixtures.cuda import PATIENCE
from metal.conftest import Card

STRAY = Path(__file__).with_name("stray.py")
MMU_FAULT = "XID 31"


def first(gpus: NvmlGpus, card: Card) -> GpuInfo:
    (found,) = (gpu for gpu in asyncio.run(gpus.list(timeout=PATIENCE)) if gpu.uuid == card.uuid)
    return found


@pytest.fixture
def gpus() -> NvmlGpus:
    return NvmlGpus(poll=0.1)


def test_what_it_says_is_what_nvidias_tool_says(card: Card, gpus: NvmlGpus) -> None:
    found = first(gpus, card)
    assert (found.bdf, found.model, found.vbios, found.driver) == (card.bdf, card.model, card.vbios, card.driver)
    assert found.architecture in ("ampere", "hopper", "blackwell", "other")
    gpus.close()


def test_the_kernel_sees_the_same_device_and_driver(card: Card, gpus: NvmlGpus) -> None:
    assert card.bdf in asyncio.run(gpus.pci(timeout=PATIENCE))
    driver = loaded_driver()
    assert driver is not None
    assert driver.version == card.driver
    gpus.close()


def test_a_gpu_without_confidential_computing_is_not_vouched_for(card: Card, gpus: NvmlGpus) -> None:
    """In that mode it would sign, and what it signs is judged elsewhere."""
    if first(gpus, card).cc:
        pytest.skip("this GPU is in confidential-computing mode")
    with pytest.raises(AgentError) as caught:
        asyncio.run(gpus.evidence(card.uuid, bytes(NONCE_SIZE), timeout=PATIENCE))
    assert caught.value.slug == "GPU_UNSUPPORTED"
    assert asyncio.run(gpus.ready(timeout=PATIENCE)) is None
    gpus.close()


def test_an_error_of_the_gpu_is_heard_and_says_whose_it_is(card: Card, gpus: NvmlGpus) -> None:
    async def heard() -> list[GpuEvent]:
        found = []
        events = gpus.events()
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(1.0)  # the driver's watch is open by then
        stray = await asyncio.create_subprocess_exec(sys.executable, STRAY, card.uuid, stderr=subprocess.DEVNULL)
        assert await stray.wait() == 0
        while not any(event.kind == "xid" for event in found):
            found.append(await asyncio.wait_for(waiting, PATIENCE))
            waiting = asyncio.ensure_future(anext(events))
        waiting.cancel()
        return found

    found = asyncio.run(heard())
    gpus.close()
    assert [(event.bdf, event.detail) for event in found if event.kind == "xid"] == [(card.bdf, MMU_FAULT)]
    assert "lost" not in {event.kind for event in found}
