"""What encrypted transfers cost beside the bare cipher inside them, on the same cold source."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from online import in_turns
from ratios import Pair, per_second, seconds_each

from cgpu_agent.transfer.channel import Channel
from cgpu_agent.transfer.duplex import ChannelName, Duplex
from cgpu_agent.transfer.ring import End, Ring, make_ring
from cgpu_agent.wire.transfer import DEPTH, SLOT_SIZE, TAG_SIZE, Direction, Hint, Kind, hint_index
from fixtures.softwaregpu import running_gpus
from fixtures.transfer import session

SIZE = 64 << 20
"""Twice what a large last-level cache holds, so that the source is read from memory."""


class SealSide:
    """A sealer whose slots are taken at once: what the agent's half costs when the device is no limit."""

    def __init__(self) -> None:
        fd = make_ring()
        self._ring = Ring(fd)
        os.close(fd)
        line, self._other = socket.socketpair()
        self._duplex = Duplex(
            End(self._ring, os.eventfd(0), os.eventfd(0), line), bytes(48), ChannelName(1, 1), Direction.TO_DEVICE
        )
        self._head = hint_index(Direction.TO_DEVICE, Hint.HEAD)
        self._count = 0

    def seal(self, source: memoryview) -> None:
        send = self._duplex.sealer.send
        left = len(source)
        for start in range(0, len(source), SLOT_SIZE):
            if self._count % DEPTH == 0:
                self._ring.words[self._head] = self._count
            self._count += 1
            piece = source[start : start + SLOT_SIZE]
            send(Kind.WRITE, 1, piece, left=left)
            left -= len(piece)

    def close(self) -> None:
        self._duplex.kill()
        self._other.close()


def transfers(*, rounds: int, seconds: float, times: int) -> list[Pair]:
    """GB/s and round trips. A source of 64 MiB, slots of 256 KiB, everything populated."""
    source = memoryview(os.urandom(1 << 20) * (SIZE >> 20))
    cipher, targets = AESGCM(bytes(32)), [memoryview(bytearray(SLOT_SIZE + TAG_SIZE)) for _ in range(2)]

    def bare(number: int) -> None:
        for start in range(0, SIZE, SLOT_SIZE):
            cipher.encrypt_into(bytes(12), source[start : start + SLOT_SIZE], None, targets[number])

    def floor(size: int) -> Callable[[], None]:
        sealed, plain = memoryview(bytearray(size + TAG_SIZE)), memoryview(bytearray(size))

        def work() -> None:
            cipher.encrypt_into(bytes(12), source[:size], None, sealed)
            cipher.decrypt_into(bytes(12), sealed, None, plain)

        return work

    sides = [SealSide(), SealSide()]
    with running_gpus() as process, session(process) as site, ThreadPoolExecutor(2) as pool:
        handle, channels = site.allocate(2 * SIZE), [site.channel(), site.channel()]

        def both(work: Callable[[int], None]) -> Callable[[], None]:
            return lambda: [each.result() for each in wait([pool.submit(work, 0), pool.submit(work, 1)]).done]  # type: ignore[return-value, func-returns-value]

        def write(number: int) -> None:
            channels[number].write(handle, number * SIZE, source)

        fast = {
            "bare": (lambda: bare(0), 1),
            "bare, two": (both(bare), 2),
            "seal": (lambda: sides[0].seal(source), 1),
            "seal, two": (both(lambda number: sides[number].seal(source)), 2),
            "whole": (lambda: write(0), 1),
            "whole, two": (both(write), 2),
        }
        found = in_turns(
            rounds,
            {
                name: lambda work=work, n=n: per_second(work, seconds) * n * SIZE / 1e9
                for name, (work, n) in fast.items()
            },  # type: ignore[misc]
        )
        short = {
            **{f"{size}": _round_trip(channels[0], handle, source[:size]) for size in (4096, 1 << 20)},
            **{f"{size} alone": floor(size) for size in (4096, 1 << 20)},
        }
        waited = in_turns(rounds, {name: lambda work=work: seconds_each(work, times) for name, work in short.items()})  # type: ignore[misc]
    for side in sides:
        side.close()
    against = "AES-256-GCM alone"
    return [
        Pair.of("transfer: seal side", against, "GB/s", found["seal"], found["bare"], ">= 0.8"),
        Pair.of("transfer: to another process, opened", against, "GB/s", found["whole"], found["bare"], ">= 0.7"),
        Pair.of("AES-256-GCM alone, two threads", "one", "GB/s", found["bare, two"], found["bare"]),
        Pair.of("transfer: seal side, two channels", "one", "GB/s", found["seal, two"], found["seal"], ">= 1.6"),
        Pair.of("transfer: two channels, opened", "one", "GB/s", found["whole, two"], found["whole"]),
        Pair.of("transfer: 4 KiB, acknowledged", "seal and open alone", "s", waited["4096"], waited["4096 alone"]),
        Pair.of(
            "transfer: 1 MiB, acknowledged", "seal and open alone", "s", waited["1048576"], waited["1048576 alone"]
        ),
    ]


def _round_trip(channel: Channel, handle: int, data: memoryview) -> Callable[[], None]:
    return lambda: channel.write(handle, 0, data)
