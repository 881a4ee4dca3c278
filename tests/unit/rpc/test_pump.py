"""A flow moves everything in order, holds one buffer at most, and ends only when all is delivered."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest

from cgpu_agent.rpc.pump import Flow, Moved

Ends = tuple[socket.socket, Flow, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """A writer, a flow, and a reader at its other end."""
    writer, source = socket.socketpair()
    sink, reader = socket.socketpair()
    for sock in (writer, source, sink, reader):
        sock.setblocking(False)
    with writer, source, sink, reader:
        yield writer, Flow(source, sink), reader


def buffer(size: int = 4096) -> memoryview:
    return memoryview(bytearray(size))


def test_moves_what_is_there_and_waits_for_more(ends: Ends) -> None:
    writer, flow, reader = ends
    assert flow.move(buffer(), 1 << 20) is Moved.BLOCKED
    writer.send(b"first")
    assert flow.move(buffer(), 1 << 20) is Moved.BLOCKED
    writer.send(b"second")
    assert flow.move(buffer(), 1 << 20) is Moved.BLOCKED
    assert reader.recv(100) == b"firstsecond"
    assert flow.held == 0


def test_everything_arrives_in_order_through_a_reader_that_is_slow(ends: Ends) -> None:
    writer, flow, reader = ends
    sent, received, scratch = 0, bytearray(), buffer(50_000)
    original = os.urandom(3_000_000)
    while len(received) < len(original):
        with suppress(BlockingIOError):
            sent += writer.send(original[sent : sent + 30_000])
        flow.move(scratch, 1 << 20)
        assert flow.held <= len(scratch)
        with suppress(BlockingIOError):
            received += reader.recv(7_000)
    assert received == original
    assert flow.held == 0


def test_reads_no_more_while_the_sink_is_full(ends: Ends) -> None:
    writer, flow, reader = ends
    scratch = buffer(100_000)
    while flow.held == 0:
        writer.send(bytes(10_000))
        flow.move(scratch, 1 << 20)
    held = flow.held
    writer.send(b"later")
    assert flow.move(scratch, 1 << 20) is Moved.BLOCKED
    assert flow.held == held
    assert flow.source.recv(100, socket.MSG_PEEK) == b"later"
    while flow.held:
        reader.recv(1 << 20)
        flow.move(scratch, 1 << 20)


def test_what_is_kept_does_not_lie_in_the_shared_buffer(ends: Ends) -> None:
    writer, flow, reader = ends
    scratch = buffer(100_000)
    total = 0
    while flow.held == 0:
        total += writer.send(b"a" * 10_000)
        flow.move(scratch, 1 << 20)
    scratch[:] = b"X" * len(scratch)
    received = bytearray()
    while len(received) < total:
        received += reader.recv(1 << 20)
        flow.move(scratch, 1 << 20)
    assert bytes(received) == b"a" * total


def test_a_budget_stops_a_fast_sender(ends: Ends) -> None:
    writer, flow, reader = ends
    writer.send(bytes(20_000))
    assert flow.move(buffer(1000), 5000) is Moved.MORE
    assert len(reader.recv(1 << 20)) == 5000
    assert flow.move(buffer(1000), 1 << 20) is Moved.BLOCKED
    assert len(reader.recv(1 << 20)) == 15_000


def test_the_end_comes_after_everything_else(ends: Ends) -> None:
    writer, flow, reader = ends
    scratch = buffer(100_000)
    while flow.held == 0:
        writer.send(bytes(10_000))
        flow.move(scratch, 1 << 20)
    writer.close()
    assert flow.move(scratch, 1 << 20) is Moved.BLOCKED
    moved = Moved.BLOCKED
    while moved is not Moved.ENDED:
        reader.recv(1 << 20)
        moved = flow.move(scratch, 1 << 20)
    assert flow.held == 0


def test_a_reader_that_is_gone_ends_the_flow(ends: Ends) -> None:
    writer, flow, reader = ends
    reader.close()
    writer.send(b"x")
    assert flow.move(buffer(), 1 << 20) is Moved.ENDED
