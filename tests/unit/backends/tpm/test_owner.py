"""One thread, one job at a time, and no caller waits longer than it said."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from cgpu_agent.backends.base import TpmCommands
from cgpu_agent.backends.tpm import owner as owner_module
from cgpu_agent.backends.tpm.owner import TpmOwner
from cgpu_agent.backends.tpm.software import Swtpm
from cgpu_agent.backends.tpm.transport import Transport, UnixPerCommand
from cgpu_agent.errors import DeviceFault, Unavailable

pytestmark = pytest.mark.swtpm


@asynccontextmanager
async def owning(open_transport: Callable[[], Transport], **options: int) -> AsyncIterator[TpmOwner]:
    owner = TpmOwner(open_transport, **options)
    try:
        yield owner
    finally:
        owner.close()


class Blocker:
    """A job that holds the owner's thread until it is released."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.release = threading.Event()

    def __call__(self, tpm: TpmCommands) -> str:
        self.started.set()
        assert self.release.wait(30)
        return "released"

    async def begin(self, owner: TpmOwner, *, timeout: float = 30, idempotent: bool = True) -> asyncio.Task[str]:
        task = asyncio.create_task(owner.run(self, timeout=timeout, idempotent=idempotent))
        await asyncio.to_thread(self.started.wait)
        return task


def test_job_returns_what_it_computed(swtpm: Swtpm) -> None:
    async def scenario() -> None:
        async with owning(swtpm.transport) as owner:
            assert len(await owner.run(lambda tpm: tpm.random(8), timeout=30)) == 8

    asyncio.run(scenario())


def test_error_of_a_job_reaches_its_caller_and_nobody_else(swtpm: Swtpm) -> None:
    async def scenario() -> None:
        async with owning(swtpm.transport) as owner:
            outcome = await asyncio.gather(owner.run(lambda _: 1 // 0, timeout=30), return_exceptions=True)
            assert isinstance(outcome[0], ZeroDivisionError)
            assert len(await owner.run(lambda tpm: tpm.random(8), timeout=30)) == 8

    asyncio.run(scenario())


def test_jobs_run_in_order_on_one_thread(swtpm: Swtpm) -> None:
    seen: list[tuple[int, int]] = []

    async def scenario() -> None:
        async with owning(swtpm.transport) as owner:
            jobs = [
                owner.run(lambda _, n=number: seen.append((n, threading.get_ident())), timeout=30)
                for number in range(50)
            ]
            await asyncio.gather(*jobs)

    asyncio.run(scenario())
    assert [number for number, _ in seen] == list(range(50))
    assert len({thread for _, thread in seen}) == 1
    assert seen[0][1] != threading.get_ident()


def test_full_queue_is_refused_at_once(swtpm: Swtpm) -> None:
    async def scenario() -> None:
        async with owning(swtpm.transport, queue_limit=2) as owner:
            blocker = Blocker()
            running = await blocker.begin(owner)
            waiting = [asyncio.create_task(owner.run(lambda tpm: tpm.random(4), timeout=30)) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(Unavailable) as caught:
                await owner.run(lambda tpm: tpm.random(4), timeout=30)
            assert caught.value.slug == "TPM_QUEUE_FULL"
            blocker.release.set()
            assert await running == "released"
            assert [len(data) for data in await asyncio.gather(*waiting)] == [4, 4]

    asyncio.run(scenario())


def test_cancelled_job_never_runs(swtpm: Swtpm) -> None:
    ran = []

    async def scenario() -> None:
        async with owning(swtpm.transport) as owner:
            blocker = Blocker()
            running = await blocker.begin(owner)
            waiting = asyncio.create_task(owner.run(lambda _: ran.append("cancelled"), timeout=30))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            blocker.release.set()
            await running
            await owner.run(lambda _: ran.append("after"), timeout=30)

    asyncio.run(scenario())
    assert ran == ["after"]


def test_job_that_expired_in_the_queue_never_runs(swtpm: Swtpm) -> None:
    ran = []

    async def scenario() -> None:
        async with owning(swtpm.transport) as owner:
            blocker = Blocker()
            running = await blocker.begin(owner)
            with pytest.raises(DeviceFault) as caught:
                await owner.run(lambda _: ran.append("expired"), timeout=0.01, idempotent=False)
            assert caught.value.slug == "TPM_TIMEOUT"
            assert not caught.value.outcome_unknown
            blocker.release.set()
            await running
            await owner.run(lambda _: ran.append("after"), timeout=30)

    asyncio.run(scenario())
    assert ran == ["after"]


@pytest.mark.parametrize("idempotent", [True, False])
def test_job_that_expires_while_it_runs_says_whether_its_outcome_is_known(swtpm: Swtpm, idempotent: bool) -> None:
    async def scenario() -> None:
        async with owning(swtpm.transport) as owner:
            blocker = Blocker()
            running = await blocker.begin(owner, timeout=0.05, idempotent=idempotent)
            with pytest.raises(DeviceFault) as caught:
                await running
            assert caught.value.slug == "TPM_TIMEOUT"
            assert caught.value.outcome_unknown is not idempotent
            blocker.release.set()
            assert len(await owner.run(lambda tpm: tpm.random(4), timeout=30)) == 4

    asyncio.run(scenario())


def test_heart_beats_while_idle(swtpm: Swtpm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_module, "_IDLE_BEAT", 0.001)

    async def scenario() -> None:
        async with owning(swtpm.transport) as owner:
            later = time.monotonic() + 0.05
            while owner.heartbeat_age(later) > 0:  # noqa: ASYNC110 - the heart is no asyncio event
                await asyncio.sleep(0.001)

    asyncio.run(scenario())


def test_heart_stops_only_when_a_job_overruns_its_deadline(swtpm: Swtpm) -> None:
    async def scenario() -> None:
        async with owning(swtpm.transport) as owner:
            blocker = Blocker()
            before = time.monotonic()
            running = await blocker.begin(owner, timeout=100)
            after = time.monotonic()
            assert owner.heartbeat_age(before + 99) == 0
            assert owner.heartbeat_age(after + 142) >= 42
            blocker.release.set()
            await running

    asyncio.run(scenario())


def test_heart_of_a_closed_owner_no_longer_beats(swtpm: Swtpm) -> None:
    async def scenario() -> None:
        async with owning(swtpm.transport) as owner:
            owner.close()
            assert owner.heartbeat_age(time.monotonic() + 60) >= 60

    asyncio.run(scenario())


def test_close_fails_what_waits_and_lets_the_running_job_end(swtpm: Swtpm) -> None:
    async def scenario() -> None:
        async with owning(swtpm.transport) as owner:
            blocker = Blocker()
            running = await blocker.begin(owner)
            waiting = asyncio.create_task(owner.run(lambda tpm: tpm.random(4), timeout=30))
            await asyncio.sleep(0)
            closing = asyncio.create_task(asyncio.to_thread(owner.close))
            with pytest.raises(DeviceFault) as caught:
                await waiting
            assert caught.value.slug == "TPM_CLOSED"
            blocker.release.set()
            assert await running == "released"
            await closing

    asyncio.run(scenario())


def test_closed_owner_refuses_jobs_and_closes_twice(swtpm: Swtpm) -> None:
    async def scenario() -> None:
        async with owning(swtpm.transport) as owner:
            await owner.run(lambda tpm: tpm.random(4), timeout=30)
            owner.close()
            owner.close()
            with pytest.raises(DeviceFault) as caught:
                await owner.run(lambda tpm: tpm.random(4), timeout=30)
            assert caught.value.slug == "TPM_CLOSED"

    asyncio.run(scenario())


def test_failure_to_open_fails_one_job_and_the_next_tries_again(swtpm: Swtpm) -> None:
    swtpm.kill()

    async def scenario() -> None:
        async with owning(swtpm.transport) as owner:
            with pytest.raises(DeviceFault) as caught:
                await owner.run(lambda tpm: tpm.random(4), timeout=30, idempotent=False)
            assert caught.value.slug == "TPM_IO"
            assert not caught.value.outcome_unknown, "the job never began"
            swtpm.start()
            assert len(await owner.run(lambda tpm: tpm.random(4), timeout=30)) == 4

    asyncio.run(scenario())


class Supervised:
    """Opens a TPM, started again if it died, and counts how often."""

    def __init__(self, tpm: Swtpm) -> None:
        self._tpm = tpm
        self.opened = 0

    def __call__(self) -> UnixPerCommand:
        self.opened += 1
        self._tpm.start()
        return self._tpm.transport()


def test_idempotent_job_runs_once_more_on_a_new_context(swtpm: Swtpm) -> None:
    attempts = []

    def die_once(tpm: TpmCommands) -> int:
        attempts.append(tpm)
        if len(attempts) == 1:
            swtpm.kill()
        return len(tpm.random(4))

    async def scenario() -> None:
        opener = Supervised(swtpm)
        async with owning(opener) as owner:
            assert await owner.run(die_once, timeout=30) == 4
        assert opener.opened == 2

    asyncio.run(scenario())
    assert len(attempts) == 2
    assert attempts[0] is not attempts[1]


def test_idempotent_job_is_not_repeated_for_ever(swtpm: Swtpm) -> None:
    attempts = []

    def die_always(tpm: TpmCommands) -> bytes:
        attempts.append(tpm)
        swtpm.kill()
        return tpm.random(4)

    async def scenario() -> None:
        async with owning(Supervised(swtpm)) as owner:
            with pytest.raises(DeviceFault) as caught:
                await owner.run(die_always, timeout=30)
            assert caught.value.slug == "TPM_IO"
            assert len(await owner.run(lambda tpm: tpm.random(4), timeout=30)) == 4

    asyncio.run(scenario())
    assert len(attempts) == 2


def test_job_that_changes_state_is_never_repeated(swtpm: Swtpm) -> None:
    attempts = []

    def die(tpm: TpmCommands) -> None:
        attempts.append(tpm)
        swtpm.kill()
        tpm.pcr_extend(13, bytes(32))

    async def scenario() -> None:
        async with owning(Supervised(swtpm)) as owner:
            with pytest.raises(DeviceFault) as caught:
                await owner.run(die, timeout=30, idempotent=False)
            assert caught.value.slug == "TPM_IO"
            assert caught.value.outcome_unknown
            assert len(await owner.run(lambda tpm: tpm.random(4), timeout=30)) == 4

    asyncio.run(scenario())
    assert len(attempts) == 1


def test_context_is_replaced_also_when_the_job_hid_the_failure(swtpm: Swtpm) -> None:
    def swallow(tpm: TpmCommands) -> str:
        swtpm.kill()
        try:
            tpm.random(4)
        except DeviceFault:
            return "hidden"
        return "no failure"

    async def scenario() -> None:
        async with owning(Supervised(swtpm)) as owner:
            assert await owner.run(swallow, timeout=30) == "hidden"
            assert len(await owner.run(lambda tpm: tpm.random(4), timeout=30)) == 4

    asyncio.run(scenario())


def test_caller_whose_loop_is_gone_does_no_harm(swtpm: Swtpm) -> None:
    blocker = Blocker()
    owner = TpmOwner(swtpm.transport)

    async def leave() -> None:
        task = await blocker.begin(owner)
        task.cancel()

    asyncio.run(leave())
    blocker.release.set()
    assert len(asyncio.run(owner.run(lambda tpm: tpm.random(4), timeout=30))) == 4
    owner.close()
