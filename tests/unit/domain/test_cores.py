"""A uid with many channels gets no more of the cores than one with few, and none is kept from going on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from cgpu_agent.domain import cores
from cgpu_agent.domain.cores import Cores
from cgpu_agent.errors import Unavailable
from fixtures.cuda import eventually

MANY, FEW = 1000, 2000


def nothing() -> None:
    """Goes on."""


class Work:
    """Pieces of work in threads, each of which holds its core until it is told to let go."""

    def __init__(self, cores: Cores, pool: ThreadPoolExecutor) -> None:
        self.running: list[int] = []
        self._cores = cores
        self._pool = pool
        self._release = threading.Semaphore(0)

    def begin(self, uid: int, count: int, require: Callable[[], None] = nothing) -> None:
        def piece() -> None:
            with self._cores.turn(uid, require):
                self.running.append(uid)
                self._release.acquire()
                self.running.remove(uid)

        for _ in range(count):
            self._pool.submit(piece)

    def end(self, count: int) -> None:
        for _ in range(count):
            self._release.release()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "PATIENCE", 1e9)


def test_who_is_alone_waits_for_nobody(patient: None) -> None:
    with ThreadPoolExecutor(8) as pool:
        work = Work(Cores(2), pool)
        work.begin(MANY, 6)
        eventually(lambda: work.running == [MANY] * 6)
        work.end(6)


def test_two_uids_have_as_many_each_whatever_their_channels(patient: None) -> None:
    with ThreadPoolExecutor(16) as pool:
        work = Work(Cores(4), pool)
        work.begin(FEW, 1)
        eventually(lambda: work.running == [FEW])
        work.begin(MANY, 8)
        eventually(lambda: sorted(work.running) == [MANY, MANY, FEW])
        work.begin(FEW, 3)
        eventually(lambda: sorted(work.running) == [MANY, MANY, FEW, FEW])
        work.end(12)


def test_more_uids_than_cores_have_one_each(patient: None) -> None:
    with ThreadPoolExecutor(16) as pool:
        work = Work(Cores(2), pool)
        for uid in range(5):
            work.begin(uid, 1)
        eventually(lambda: len(work.running) == 5)
        work.begin(0, 3)
        work.end(1)
        eventually(lambda: len(work.running) in (4, 5))
        assert work.running.count(0) <= 1
        work.end(7)


def test_one_that_is_stuck_keeps_the_others_of_its_uid_waiting_only_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "PATIENCE", 0.1)
    with ThreadPoolExecutor(4) as pool:
        work = Work(Cores(1), pool)
        work.begin(FEW, 1)
        work.begin(MANY, 2)
        eventually(lambda: sorted(work.running) == [MANY, MANY, FEW])
        work.end(3)


def test_who_waits_in_vain_is_told(patient: None) -> None:
    stopped = threading.Event()

    def require() -> None:
        if stopped.is_set():
            raise Unavailable("TRANSFER_STOPPED", "closed")

    shared = Cores(1)
    with ThreadPoolExecutor(4) as pool:
        work = Work(shared, pool)
        work.begin(FEW, 1)
        work.begin(MANY, 1)
        eventually(lambda: sorted(work.running) == [MANY, FEW])

        def waits() -> None:
            with shared.turn(MANY, require):
                raise AssertionError

        waiting = pool.submit(waits)
        stopped.set()
        with pytest.raises(Unavailable):
            waiting.result()
        work.end(2)


def test_uids_that_are_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    shared = Cores(2, lambda: now)
    for uid in range(100):
        now += 1.0
        with shared.turn(uid, nothing):
            pass
    assert len(shared._busy_until) == 1
    assert len(shared._running) == 1
