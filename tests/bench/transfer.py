"""What encrypted transfers cost beside the bare cipher inside them, on the same cold source."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import grpc
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from online import in_turns
from ratios import Pair, per_second, seconds_each
from streaming import METHOD, SERVICE, UNBOUNDED
from world import Helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cgpu_agent.transfer.duplex import ChannelName, Duplex
from cgpu_agent.transfer.engine import Engine
from cgpu_agent.transfer.ring import End, Ring, make_ring
from cgpu_agent.wire.transfer import DEPTH, SLOT_SIZE, TAG_SIZE, Direction, Hint, Kind, hint_index
from fixtures.softwaregpu import running_gpus
from fixtures.transfer import Session, session

SIZE = 64 << 20
"""Twice what a large last-level cache holds, so that the source is read from memory."""
A100_PREVIEW = 0.25
"""GB/s that Azure's preview of confidential A100s was said to move."""
NO_VAES = ":~0x60000000000"
_MESSAGE = 1 << 20
_CALLS = 20
"""Round trips for each of the times that other things are measured: the slow ones are to be among them."""


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


class Rates:
    """What can be done how fast, in GB/s: 64 MiB of shared memory, slots of 256 KiB, everything populated."""

    def __init__(self, site: Session, pool: ThreadPoolExecutor) -> None:
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE  # as memory on lease is: shmem
        self.source, self._out = (memoryview(mmap.mmap(-1, SIZE, flags=flags)) for _ in range(2))
        self.source[:] = os.urandom(1 << 20) * (SIZE >> 20)
        self.handle = site.allocate(2 * SIZE)
        self.channels = [site.channel() for _ in range(2)]
        self._pool = pool
        self._sides = [SealSide() for _ in range(2)]
        self._cipher = AESGCM(bytes(32))
        self._targets = [memoryview(bytearray(SLOT_SIZE + TAG_SIZE)) for _ in range(2)]

    def measures(self, names: list[str], seconds: float) -> dict[str, Callable[[], float]]:
        known = {
            "bare": (lambda: self._bare(0), 1),
            "bare, two": (self._both(self._bare), 2),
            "seal": (lambda: self._seal(0), 1),
            "seal, two": (self._both(self._seal), 2),
            "write": (lambda: self._write(0), 1),
            "write, two": (self._both(self._write), 2),
            "read": (lambda: self.channels[0].read_into(self.handle, 0, self._out), 1),
        }

        def rate(name: str) -> float:
            work, count = known[name]
            return per_second(work, seconds) * count * SIZE / 1e9

        return {name: lambda name=name: rate(name) for name in names}  # type: ignore[misc]

    def close(self) -> None:
        for side in self._sides:
            side.close()

    def _bare(self, number: int) -> None:
        for start in range(0, SIZE, SLOT_SIZE):
            self._cipher.encrypt_into(bytes(12), self.source[start : start + SLOT_SIZE], None, self._targets[number])

    def _seal(self, number: int) -> None:
        self._sides[number].seal(self.source)

    def _write(self, number: int) -> None:
        self.channels[number].write(self.handle, number * SIZE, self.source)

    def _both(self, work: Callable[[int], None]) -> Callable[[], None]:
        def run() -> None:
            for each in wait([self._pool.submit(work, 0), self._pool.submit(work, 1)]).done:
                each.result()

        return run


@contextlib.contextmanager
def _rates() -> Iterator[Rates]:
    with running_gpus() as process, session(process) as site, ThreadPoolExecutor(2) as pool:
        made = Rates(site, pool)
        try:
            yield made
        finally:
            made.close()


@contextlib.contextmanager
def _streamed(source: memoryview) -> Iterator[Callable[[], object]]:
    """Sends the same bytes to a process by gRPC over a Unix socket, in messages of 1 MiB."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder:
        server = Helper("streaming.py", f"{folder}/s", str(SIZE))
        server.says()
        try:
            with grpc.insecure_channel(f"unix:{folder}/s", options=UNBOUNDED) as channel:
                call = channel.stream_unary(f"/{SERVICE}/{METHOD}")
                pieces = range(0, SIZE, _MESSAGE)
                yield lambda: call(bytes(source[start : start + _MESSAGE]) for start in pieces)
        finally:
            server.stop()


def _without_vaes(rounds: int, seconds: float) -> dict[str, list[float]]:
    """The rates of other processes, which do without the fast instructions."""
    ran = subprocess.run(
        [sys.executable, __file__, str(rounds), str(seconds)],
        env={**os.environ, "OPENSSL_ia32cap": NO_VAES},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, list[float]] = json.loads(ran.stdout)
    return found


def transfers(*, rounds: int, seconds: float, times: int) -> list[Pair]:
    """Rates beside the cipher, beside gRPC and beside what others offer; and round trips."""
    with _rates() as rates, _streamed(rates.source) as stream:
        names = ["bare", "bare, two", "seal", "seal, two", "write", "write, two", "read"]
        measures = rates.measures(names, seconds)
        measures["stream"] = lambda: per_second(stream, seconds) * SIZE / 1e9
        found = in_turns(rounds, measures)
        waited = _round_trips(rates, rounds, times)
    plain = _without_vaes(rounds, seconds)
    preview = [A100_PREVIEW] * rounds
    against, masked = "AES-256-GCM alone", "transfer, without VAES"
    return [
        Pair.of("transfer: seal side", against, "GB/s", found["seal"], found["bare"], ">= 0.8"),
        Pair.of("transfer: to another process, opened", against, "GB/s", found["write"], found["bare"], ">= 0.7"),
        Pair.of("transfer: from another process, opened", against, "GB/s", found["read"], found["bare"]),
        Pair.of("AES-256-GCM alone, two threads", "one", "GB/s", found["bare, two"], found["bare"]),
        Pair.of("transfer: seal side, two channels", "one", "GB/s", found["seal, two"], found["seal"], ">= 1.6"),
        Pair.of("transfer: two channels, opened", "one", "GB/s", found["write, two"], found["write"]),
        Pair.of("transfer: to another process", "A100 preview, as told", "GB/s", found["write"], preview, ">= 4"),
        Pair.of("transfer: from another process", "A100 preview, as told", "GB/s", found["read"], preview),
        Pair.of("transfer: to another process", "gRPC stream, bare", "GB/s", found["write"], found["stream"], ">= 4"),
        Pair.of(f"{masked}: seal side", against, "GB/s", plain["seal"], plain["bare"]),
        Pair.of(f"{masked}: to another process", against, "GB/s", plain["write"], plain["bare"]),
        Pair.of(f"{masked}: from another process", against, "GB/s", plain["read"], plain["bare"]),
        Pair.of(f"{masked}: to another process", "A100 preview, as told", "GB/s", plain["write"], preview),
        *waited,
    ]


def _round_trips(rates: Rates, rounds: int, times: int) -> list[Pair]:
    """Writes that were acknowledged, p50 and p99; and the same through the engine."""
    cipher, channel, handle, engine = AESGCM(bytes(32)), rates.channels[0], rates.handle, Engine()
    engine.add(channel)
    pairs = []
    for size, title in ((4096, "4 KiB"), (1 << 20, "1 MiB")):
        data = rates.source[:size]
        sealed, plain = memoryview(bytearray(size + TAG_SIZE)), memoryview(bytearray(size))

        def alone(data: memoryview = data, sealed: memoryview = sealed, plain: memoryview = plain) -> None:
            cipher.encrypt_into(bytes(12), data, None, sealed)
            cipher.decrypt_into(bytes(12), sealed, None, plain)

        def write(data: memoryview = data) -> None:
            channel.write(handle, 0, data)

        def submit(work: Callable[[], None] = write) -> None:
            engine.submit(channel, lambda _: work()).result()

        found = in_turns(
            rounds,
            {
                "alone": lambda work=alone: [seconds_each(work, times)],  # type: ignore[misc]
                "write": lambda work=write: _quantiles(work, _CALLS * times),  # type: ignore[misc]
                "submit": lambda work=submit: _quantiles(work, _CALLS * times),  # type: ignore[misc]
            },
        )
        p50, p99 = ([each[index] for each in found["write"]] for index in range(2))
        floor, submitted = ([each[0] for each in found[name]] for name in ("alone", "submit"))
        cost = [through - call for through, call in zip(submitted, p50, strict=True)]
        pairs += [
            Pair.of(f"transfer: {title}, acknowledged, p50", "seal and open alone", "s", p50, floor),
            Pair.of(f"transfer: {title}, acknowledged, p99", "p50", "s", p99, p50),
            Pair.of(f"transfer: {title}, what Engine.submit adds", "p50", "s", cost, p50),
        ]
    engine.remove(channel)
    return pairs


def _quantiles(work: Callable[[], object], times: int) -> list[float]:
    """Median and 99th percentile of the time of one ``work``."""
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    cuts = statistics.quantiles(found, n=100)
    return [cuts[49], cuts[98]]


def main() -> None:
    """Rates as JSON: ROUNDS SECONDS."""
    with _rates() as rates:
        names = ["bare", "seal", "write", "read"]
        print(json.dumps(in_turns(int(sys.argv[1]), rates.measures(names, float(sys.argv[2])))))


if __name__ == "__main__":
    main()
