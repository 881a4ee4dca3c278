"""Descriptors, timers and the bell, and what happens when one callback ends another's descriptor."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from cgpu_agent.rpc.reactor import Reactor


@pytest.fixture
def rung() -> list[int]:
    return []


@pytest.fixture
def reactor(rung: list[int]) -> Iterator[Reactor]:
    made = Reactor(lambda: rung.append(1))
    yield made
    made.close()


def test_a_bell_from_another_thread_ends_the_sleep(reactor: Reactor, rung: list[int]) -> None:
    threading.Timer(0.05, reactor.ring).start()
    reactor.turn(wait=True)
    assert rung == [1]
    reactor.turn(wait=False)
    assert rung == [1]


def test_a_closed_reactor_cannot_be_rung(reactor: Reactor) -> None:
    assert reactor.ring()
    reactor.close()
    reactor.close()
    assert not reactor.ring()


def test_timers_come_in_the_order_of_their_times(reactor: Reactor) -> None:
    order: list[str] = []
    reactor.after(0.02, lambda: order.append("second"))
    reactor.after(0.01, lambda: order.append("first"))
    reactor.after(1000.0, lambda: order.append("never"))
    while len(order) < 2:
        reactor.turn(wait=True)
    assert order == ["first", "second"]


def test_a_descriptor_forgotten_within_a_batch_is_not_called(reactor: Reactor) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    called: list[int] = []

    def ready(which: int) -> None:
        called.append(which)
        reactor.unwatch(pairs[1 - which][0].fileno())
        reactor.unwatch(pairs[1 - which][0].fileno())

    for which, (ours, theirs) in enumerate(pairs):
        reactor.watch(ours.fileno(), select.EPOLLIN, lambda _events, which=which: ready(which))
        theirs.send(b"x")
    reactor.turn(wait=False)
    assert len(called) == 1
    for ours, theirs in pairs:
        ours.close()
        theirs.close()


def test_knows_how_long_a_turn_has_been_at_work(reactor: Reactor) -> None:
    seen: list[float] = []
    assert reactor.busy_for(time.monotonic()) == 0.0
    reactor.after(0.0, lambda: seen.append(reactor.busy_for(time.monotonic() + 5)))
    reactor.turn(wait=True)
    assert seen[0] >= 5
