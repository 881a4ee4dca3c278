"""Agent and root helper as processes of their own, over the fake driver: whichever dies, the GPUs are closed."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cgpu_agent.backends.gpu.nvmlgpus import NvmlGpus
from cgpu_agent.domain.gpujudge import GpuJudge
from cgpu_agent.domain.gpurules import GpuRules
from cgpu_agent.domain.gpus import GpuSessions
from cgpu_agent.domain.timefloor import TimeFloor
from cgpu_agent.errors import DeviceFault, Unavailable
from fixtures.gpu import NONCE
from fixtures.gpujudge import GPU, RIMS, VENDOR
from fixtures.gpusessions import Log, MovableClock
from fixtures.nvml import FakeDriver, fake_driver
from fixtures.pki import NOW
from fixtures.readyhelper import PATIENCE, HelperProcess, environment, running_helper

SET_READY = "nvmlSystemSetConfComputeGpusReadyState"

AGENT = """
import asyncio, sys
from pathlib import Path
from cgpu_agent.backends.gpu.nvmlgpus import NvmlGpus

async def main(sysfs, helper):
    gpus = NvmlGpus(sysfs=Path(sysfs), helper=Path(helper))
    sys.stdin.readline()
    await gpus.set_ready(True, timeout=60)
    print(await gpus.ready(timeout=60), flush=True)
    await asyncio.sleep(1000)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[FakeDriver]:
    with fake_driver(tmp_path) as driver:
        driver.hold(0, GPU, NONCE)
        yield driver


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ready-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def helper(driver: FakeDriver, folder: Path) -> Iterator[HelperProcess]:
    with running_helper(driver, folder) as process:
        yield process


@asynccontextmanager
async def using(driver: FakeDriver, path: Path) -> AsyncIterator[NvmlGpus]:
    gpus = NvmlGpus(sysfs=driver.sysfs, poll=0.05, helper=path)
    try:
        yield gpus
    finally:
        driver.release()
        gpus.close()


@asynccontextmanager
async def sessions(gpus: NvmlGpus) -> AsyncIterator[GpuSessions]:
    """The agent's sessions, at work, with the real judge; the GPU answers this nonce, and is ready in the end."""
    clock = MovableClock()
    clock.wall = NOW.timestamp()
    judge = GpuJudge(device_roots=VENDOR.device_roots, rim_roots=VENDOR.rim_roots, collateral=RIMS)
    made = GpuSessions(
        gpus, judge, Log(), clock, TimeFloor(clock, None), GpuRules(allow_simulated=True), nonce=lambda: NONCE
    )
    await made.start()
    running = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        running.cancel()
        await asyncio.wait([running])
        await made.stop()


async def until(made: GpuSessions, state: str) -> str | None:
    """Wait until the GPUs are in this state; the reason why they are not ready."""
    async for view in made.watch():
        if view.state == state:
            return None if view.reason is None else view.reason.slug
    raise AssertionError("the sessions ended")


def test_an_agent_that_is_killed_leaves_the_gpus_closed(helper: HelperProcess) -> None:
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, helper.driver.sysfs, helper.socket],
        env=environment(helper.driver),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    helper.is_agent(agent.pid)
    assert agent.stdin is not None
    assert agent.stdout is not None
    agent.stdin.write("\n")
    agent.stdin.flush()
    assert agent.stdout.readline() == "True\n"
    assert helper.ready
    agent.kill()
    agent.communicate()
    assert helper.cleared()
    assert helper.process.poll() is None


def test_setting_clearing_and_leaving(helper: HelperProcess) -> None:
    async def scenario() -> None:
        async with using(helper.driver, helper.socket) as gpus:
            for _ in range(2):
                await gpus.set_ready(True, timeout=PATIENCE)
                assert await gpus.ready(timeout=PATIENCE) is True
                await gpus.set_ready(True, timeout=PATIENCE)
                assert await gpus.ready(timeout=PATIENCE) is True
                await gpus.set_ready(False, timeout=PATIENCE)
                assert await gpus.ready(timeout=PATIENCE) is False
            await gpus.set_ready(True, timeout=PATIENCE)
        assert helper.cleared()

    asyncio.run(scenario())


def test_the_agent_notices_at_once_that_its_helper_is_gone(helper: HelperProcess) -> None:
    async def scenario() -> None:
        async with using(helper.driver, helper.socket) as gpus, sessions(gpus) as made:
            await until(made, "ready")
            assert helper.ready
            helper.process.kill()
            assert await until(made, "not-ready") == "GPU_READY_CLEARED"
            await made.tick()
            assert "GPU_GATE_STUCK" in [problem.slug for problem in made.problems()]
            # systemd starts another one when the agent asks.
            with running_helper(helper.driver, helper.folder) as second:
                assert not second.ready
                await made.tick()
                assert "GPU_GATE_STUCK" not in [problem.slug for problem in made.problems()]

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


def test_a_helper_that_is_restarted_costs_one_attestation(helper: HelperProcess) -> None:
    async def scenario() -> None:
        async with using(helper.driver, helper.socket) as gpus, sessions(gpus) as made:
            await until(made, "ready")
            epoch = made.trust_epoch
            helper.stop()
            with running_helper(helper.driver, helper.folder) as second:
                assert await until(made, "not-ready") == "GPU_READY_CLEARED"
                while made.view().state != "ready":
                    made._clock.pass_by(6)  # type: ignore[attr-defined]
                    await made.tick()
                    await made.settled()
                assert second.ready
                assert made.trust_epoch > epoch
                assert made.problems() == []

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


def test_a_start_clears_and_names_a_ready_state_of_somebody_elses(helper: HelperProcess) -> None:
    helper.driver.say("ready", "1")

    async def scenario() -> None:
        async with using(helper.driver, helper.socket) as gpus, sessions(gpus) as made:
            assert not helper.ready
            await until(made, "ready")
            assert [problem.slug for problem in made.problems()] == ["GPU_READY_FOREIGN"]
        assert not helper.ready

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


def failure(driver: FakeDriver, path: Path, ready: bool, timeout: float = PATIENCE) -> DeviceFault | Unavailable:
    async def scenario() -> DeviceFault | Unavailable:
        async with using(driver, path) as gpus:
            with pytest.raises((DeviceFault, Unavailable)) as caught:
                await gpus.set_ready(ready, timeout=timeout)
            return caught.value

    return asyncio.run(scenario())


def test_what_the_driver_says_comes_through(helper: HelperProcess) -> None:
    for code, slug, word in ((2, "GPU_ERROR", "restart the VM"), (3, "GPU_UNSUPPORTED", ""), (12, "GPU_DRIVER", "")):
        helper.driver.fail(SET_READY, code)
        for ready in (True, False):
            fault = failure(helper.driver, helper.socket, ready)
            assert (fault.slug, word in fault.message) == (slug, True)


def test_an_agent_that_the_helper_does_not_know_is_told_so(helper: HelperProcess) -> None:
    helper.is_agent()
    fault = failure(helper.driver, helper.socket, True)
    assert (fault.slug, "refused" in fault.message) == ("GPU_ERROR", True)
    assert not helper.ready


def test_without_a_helper_it_says_so(driver: FakeDriver, folder: Path) -> None:
    assert "does not answer" in failure(driver, folder / "nowhere", False).message


def test_a_helper_that_hangs_or_babbles_is_given_up(driver: FakeDriver, folder: Path) -> None:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen(1)
        assert failure(driver, path, False, timeout=0.1).slug == "GPU_TIMEOUT"

        def babble() -> None:
            listener.accept()[0].close()  # that of the one before
            with listener.accept()[0] as sock:
                sock.send(b"nvml 0, more or less")

        babbler = threading.Thread(target=babble)
        babbler.start()
        assert "does not answer" in failure(driver, path, True).message
        babbler.join()


def test_where_no_driver_is_loaded_no_helper_is_asked(driver: FakeDriver, helper: HelperProcess) -> None:
    calls = driver.calls().count(SET_READY)
    (driver.sysfs / "module" / "nvidia").rename(driver.sysfs / "unloaded")
    assert failure(driver, helper.socket, False).slug == "GPU_DRIVER"
    assert driver.calls().count(SET_READY) == calls
