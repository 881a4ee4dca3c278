"""Attacks on encrypted transfers by the host, which sees and edits all that crosses the ring: it can stop them, only.

``INTERFERENCES`` says how many (``make hostile-host``); ``SEED`` which.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cgpu_agent.backends.gpu.software.transferdevice import Allocation, DeviceMemory, Peer
from cgpu_agent.errors import AgentError, Unavailable
from cgpu_agent.transfer import keys
from cgpu_agent.transfer.channel import Channel
from cgpu_agent.transfer.duplex import ChannelName, Duplex
from cgpu_agent.transfer.memory import address_of
from cgpu_agent.wire.transfer import (
    DEPTH,
    HEADER_SIZE,
    SLOT_SIZE,
    Direction,
    Hint,
    SlotHeader,
    slot_offset,
)
from fixtures.softwaregpu import PATIENCE, GpuProcess, running_gpus
from fixtures.transfer import LENGTH_AT, Edit, Host, Session, await_rings, both_ends, session

INTERFERENCES = int(os.environ.get("INTERFERENCES", "400"))
SEED = int(os.environ.get("SEED", "1"))
STALL = 0.1
ROOM = 12 * SLOT_SIZE
MARK = b"plaintext-planted-to-be-found-in-the-ring"
NO_VAES = ":~0x60000000000"  # the other code path of OpenSSL, on which reading twice does harm


def marked(rng: random.Random, size: int) -> bytes:
    """Bytes that hold the mark wherever 512 of them are."""
    body = b"".join(MARK + rng.randbytes(256 - len(MARK)) for _ in range(size // 256 + 1))
    return body[:size]


# --- what a host does to one slot: yields what it delivers instead ---


def flip(rng: random.Random, data: bytes, start: int = 0) -> bytes:
    at = rng.randrange(start, len(data))
    return data[:at] + bytes((data[at] ^ 1 << rng.randrange(8),)) + data[at + 1 :]


def flipped(rng: random.Random) -> Edit:
    return lambda host, direction, counter, data: iter([flip(rng, data)])


def flipped_tag(rng: random.Random) -> Edit:
    return lambda host, direction, counter, data: iter([flip(rng, data, len(data) - 16)])


def flipped_header(rng: random.Random) -> Edit:
    return lambda host, direction, counter, data: iter([flip(rng, data[:HEADER_SIZE]) + data[HEADER_SIZE:]])


def other_length(rng: random.Random) -> Edit:
    def edit(host: Host, direction: Direction, counter: int, data: bytes) -> Iterator[bytes]:
        genuine = len(data) - HEADER_SIZE - 16
        lie = rng.choice([0, genuine - 1, genuine + 1, genuine // 2, SLOT_SIZE, SLOT_SIZE + 1, 0xFFFFFFFF])
        if lie % (1 << 32) == genuine:
            lie += 1
        yield data[:LENGTH_AT] + (lie % (1 << 32)).to_bytes(4, "big") + data[LENGTH_AT + 4 :]

    return edit


def cut(rng: random.Random) -> Edit:
    """Its end is missing: what was in this place before shows instead, which is something else."""

    def edit(host: Host, direction: Direction, counter: int, data: bytes) -> Iterator[bytes]:
        size = rng.randrange(HEADER_SIZE, len(data))
        before = bytearray(rng.randbytes(len(data)))
        before[size] = data[size] ^ rng.randrange(1, 256)  # else one time in 256 the last byte would be there again
        host.sides(direction)[1].put(direction, counter, before)
        yield data[:size]

    return edit


def replayed(rng: random.Random) -> Edit:
    def edit(host: Host, direction: Direction, counter: int, data: bytes) -> Iterator[bytes]:
        yield host.history[direction, rng.randrange(counter)] if counter else flip(rng, data)

    return edit


def dropped(_rng: random.Random) -> Edit:
    return lambda host, direction, counter, data: iter(())


def doubled(_rng: random.Random) -> Edit:
    return lambda host, direction, counter, data: iter([data, data])


def swapped(rng: random.Random) -> Edit:
    """The next slot comes first, if there is one in time; otherwise nothing is swapped but the slot's halves."""

    def edit(host: Host, direction: Direction, counter: int, data: bytes) -> Iterator[bytes]:
        come, _ = host.sides(direction)
        until = time.monotonic() + 0.01
        while come.hint(direction, Hint.TAIL) <= counter + 1 and time.monotonic() < until:
            time.sleep(0.0002)
        if come.hint(direction, Hint.TAIL) > counter + 1:
            yield come.slot(direction, counter + 1)
            yield data
        else:
            middle = (len(data) + HEADER_SIZE) // 2
            yield data[:HEADER_SIZE] + data[middle:] + data[HEADER_SIZE:middle]

    return edit


def reflected(rng: random.Random) -> Edit:
    """A slot of the other direction, with the header that would be right, too."""

    def edit(host: Host, direction: Direction, counter: int, data: bytes) -> Iterator[bytes]:
        others = [slot for (way, _), slot in host.history.items() if way is not direction]
        other = rng.choice(others) if others else rng.randbytes(len(data))
        yield other if rng.random() < 0.5 else data[:HEADER_SIZE] + other[HEADER_SIZE:].ljust(len(data), b"\0")

    return edit


def made_up(rng: random.Random) -> Edit:
    """The genuine header, and noise; or noise."""

    def edit(host: Host, direction: Direction, counter: int, data: bytes) -> Iterator[bytes]:
        keep = rng.choice([0, HEADER_SIZE])
        yield data[:keep] + rng.randbytes(len(data) - keep)

    return edit


def redirected(rng: random.Random) -> Edit:
    """Another place, allocation or transfer; all else is genuine."""

    def edit(host: Host, direction: Direction, counter: int, data: bytes) -> Iterator[bytes]:
        header = SlotHeader.parse(data[:HEADER_SIZE])
        field = rng.choice(["offset", "handle", "transfer", "session", "channel", "epoch", "counter"])
        yield header._replace(**{field: getattr(header, field) ^ 1}).encode() + data[HEADER_SIZE:]

    return edit


def lied_tail(rng: random.Random) -> Edit:
    """The ring is said to hold more than it does, less, or nonsense."""

    def edit(host: Host, direction: Direction, counter: int, data: bytes) -> Iterator[bytes]:
        _, to = host.sides(direction)
        to.set_hint(
            direction, Hint.TAIL, rng.choice([counter + 2, counter + DEPTH, counter - 1, rng.getrandbits(64)])
        )
        host.ring_bells()
        yield data
        to.set_hint(direction, Hint.TAIL, rng.choice([0, counter + 2, counter + DEPTH + 9, rng.getrandbits(64)]))

    return edit


def lied_head(rng: random.Random) -> Edit:
    """Slots are said to be free that are not."""

    def edit(host: Host, direction: Direction, counter: int, data: bytes) -> Iterator[bytes]:
        come, _ = host.sides(direction)
        come.set_hint(direction, Hint.HEAD, rng.choice([counter + 1, counter + DEPTH, rng.getrandbits(64)]))
        time.sleep(0.002)
        yield data

    return edit


def late(rng: random.Random) -> Edit:
    """Only late, and with its own idea of who sleeps: must do no harm."""

    def edit(host: Host, direction: Direction, counter: int, data: bytes) -> Iterator[bytes]:
        time.sleep(rng.random() * 0.01)
        for ring in (host.agent, host.device):
            ring.set_hint(direction, Hint.READER_SLEEPS, rng.getrandbits(64))
            ring.set_hint(direction, Hint.WRITER_SLEEPS, rng.getrandbits(64))
        yield data

    return edit


def rewritten(rng: random.Random) -> Edit:
    """Genuine when it is announced, edited while it is opened."""

    def edit(host: Host, direction: Direction, counter: int, data: bytes) -> Iterator[bytes]:
        yield data
        _, to = host.sides(direction)
        at = slot_offset(direction, counter) + rng.randrange(len(data))
        until = time.monotonic() + 0.001
        while time.monotonic() < until:
            to.map[at] ^= 1

    return edit


FATAL: dict[str, Callable[[random.Random], Edit]] = {
    each.__name__: each
    for each in (
        flipped, flipped_tag, flipped_header, other_length, cut, replayed, dropped, doubled, swapped, reflected,
        made_up, redirected,
    )
}  # fmt: skip
"""Whoever is to read such a slot must notice. A slot that comes twice, only when it reads on."""
NUISANCES: dict[str, Callable[[random.Random], Edit]] = {
    each.__name__: each for each in (lied_tail, lied_head, late, rewritten)
}

SILENT = frozenset({"dropped", "lied_tail"})
"""After which an end may wait for something that never comes."""


def left_behind(data: bytes, before: bytes, offset: int) -> Iterator[bytes]:
    """What memory may be after a transfer that died: whole slots are there, from its beginning; and in place of the
    next one, unless it is the first, there may be zeros, where it was opened and rejected."""
    for size in (*range(0, len(data), SLOT_SIZE), len(data)):
        yield before[:offset] + data[:size] + before[offset + size :]
        rejected = min(SLOT_SIZE, len(data) - size) if size else 0
        yield before[:offset] + data[:size] + bytes(rejected) + before[offset + size + rejected :]


class Theatre:
    """A process, a session, a host, and an honest channel that must never notice any of it."""

    def __init__(self, site: Session, seed: int) -> None:
        self.rng = random.Random(seed)
        self.site = site
        self.host = Host()
        self.handle = site.allocate(ROOM)
        self.honest = site.channel()
        self.victim: Channel | None = None
        self.counters = dict.fromkeys(Direction, 0)
        self.memory = bytes(ROOM)
        self.tally: Counter[str] = Counter()

    def close(self) -> None:
        self.honest.close()
        if self.victim is not None:
            self.victim.close()
        self.host.close()

    def interfere(self) -> None:
        """One interference with one transfer, and a look at everything that must not have happened."""
        name = self.rng.choice([*FATAL, *NUISANCES])
        size = self.rng.choice([1, 100, 4096, 4096, 60000, SLOT_SIZE, SLOT_SIZE + 5, 3 * SLOT_SIZE])
        if name == "lied_head":
            size = ROOM  # more than the ring holds, so that somebody waits for room
        offset = self.rng.randrange(ROOM - size + 1)
        reading = self.rng.random() < 0.5
        if self.victim is None:
            self.host.rest()
            self.victim = self.site.channel(self.host, stall=STALL if name in SILENT else PATIENCE)
            self.counters = dict.fromkeys(Direction, 0)
        slots = -(-size // SLOT_SIZE)
        sent = {Direction.TO_DEVICE: 1 if reading else slots, Direction.TO_HOST: slots if reading else 1}
        direction = self.rng.choice(list(Direction))
        target = direction, self.counters[direction] + self.rng.randrange(sent[direction])
        self.host.work(target, (FATAL | NUISANCES)[name](self.rng))
        try:
            outcome = self._read(offset, size) if reading else self._write(offset, size)
        finally:
            self.host.pause()
        for way in Direction:
            self.counters[way] += sent[way]
        self.tally[f"{name}: {outcome}"] += 1
        assert self.host.meddled or outcome != "done"
        last = target[1] == self.counters[direction] - 1
        if name in FATAL and not (name == "doubled" and last):
            assert outcome != "done", f"{name} was accepted"
        if name == "late":
            assert outcome == "done"
        if name != "late" or self.rng.random() < 0.2:  # a lie that nobody looked at yet would be the next one's
            self.victim.close()
            self.victim = None
        if self.tally.total() % 8 == 0:  # what was there stays until its slot is used again
            for ring in (self.host.agent, self.host.device):
                assert ring.map.find(MARK) < 0, "plaintext is in the ring"

    def _write(self, offset: int, size: int) -> str:
        assert self.victim is not None
        data, before = marked(self.rng, size), self.memory
        outcome = self._outcome(lambda victim: victim.write(self.handle, offset, data))
        after = bytearray(ROOM)
        self.honest.read_into(self.handle, 0, after)
        written = before[:offset] + data + before[offset + size :]
        expected = [written] if outcome == "done" else left_behind(data, before, offset)
        assert any(after == each for each in expected), "device memory holds what nobody wrote"
        self.memory = bytes(after)
        return outcome

    def _read(self, offset: int, size: int) -> str:
        out = bytearray(b"\xa5" * size)
        outcome = self._outcome(lambda victim: victim.read_into(self.handle, offset, out))
        right, whole = self.memory[offset : offset + size], [*range(0, size, SLOT_SIZE), size]
        through = [size] if outcome == "done" else whole
        assert any(out == right[:part] + b"\xa5" * (size - part) for part in through), "altered bytes were delivered"
        return outcome

    def _outcome(self, work: Callable[[Channel], None]) -> str:
        victim = self.victim
        assert victim is not None
        try:
            work(victim)
        except AgentError as error:
            assert victim.dead is not None
            assert victim.dead.slug == error.slug  # noqa: PT017 -- some calls may succeed
            with pytest.raises(Unavailable, match="TRANSFER_DEAD"):
                victim.write(self.handle, 0, b"later")
            await_rings(self.site.process.pid, 1)  # what had come through was written until now
            return error.slug
        assert victim.dead is None
        return "done"


@pytest.fixture(scope="module")
def process() -> Iterator[GpuProcess]:
    with running_gpus() as gpus:
        yield gpus


def test_nothing_that_a_host_does_to_slots_is_accepted(process: GpuProcess) -> None:
    with session(process) as site:
        theatre = Theatre(site, SEED)
        try:
            for _ in range(INTERFERENCES):
                theatre.interfere()
        finally:
            theatre.close()
    print(dict(sorted(theatre.tally.items())))
    names = {outcome.partition(":")[0] for outcome in theatre.tally}
    assert INTERFERENCES < 1000 or names == {*FATAL, *NUISANCES}


@pytest.mark.parametrize("mask", ["", NO_VAES])
def test_slots_edited_while_they_are_sealed_and_opened(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process writes to the ring all the time; ``mask`` has the device use other instructions for AES."""
    monkeypatch.setenv("OPENSSL_ia32cap", mask) if mask else None
    rng = random.Random(SEED)
    with running_gpus() as process, session(process) as site:
        host = Host(apart=False)
        handle, honest = site.allocate(ROOM), site.channel()
        outcomes: Counter[str] = Counter()
        with hammering(host.agent.fd, SEED) as flips:
            for turn in range(max(20, INTERFERENCES // 20)):
                size = rng.choice([4096, 60000, SLOT_SIZE + 60000])
                data, before, after, out = marked(rng, size), bytearray(ROOM), bytearray(ROOM), bytearray(size)
                honest.read_into(handle, 0, before)
                host.rest()
                victim = site.channel(host)
                try:
                    victim.write(handle, 0, data)
                    outcomes["written"] += 1
                    victim.read_into(handle, 0, out)
                    assert out == data, f"altered bytes were read in turn {turn}"
                    outcomes["read"] += 1
                except AgentError as error:
                    outcomes[error.slug] += 1
                    assert victim.dead is not None
                    assert victim.dead.slug == error.slug  # noqa: PT017 -- some calls may succeed
                    await_rings(process.pid, 1)
                honest.read_into(handle, 0, after)
                if victim.dead is None:
                    assert after == data + before[size:]
                else:
                    assert any(after == each for each in left_behind(data, bytes(before), 0))
                assert host.agent.map.find(MARK) < 0
                victim.close()
        print(outcomes, flips)
        host.close()
    assert flips[0] > 10_000
    assert set(outcomes) > {"written"}


@contextlib.contextmanager
def hammering(fd: int, seed: int) -> Iterator[list[int]]:
    """How many bytes were flipped is in the list afterwards."""
    command = [sys.executable, str(Path(__file__).parents[1] / "fixtures" / "hammer.py"), str(fd), str(seed)]
    flips: list[int] = []
    with subprocess.Popen(command, pass_fds=[fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hammer:
        assert hammer.stdin is not None
        assert hammer.stdout is not None
        assert hammer.stdout.readline() == "ready\n"
        try:
            yield flips
        finally:
            hammer.stdin.close()
            flips.append(int(hammer.stdout.readline()))


def shared(buffer: object) -> bool:
    """Whether a writable buffer is in memory that other processes may have, too."""
    if not isinstance(buffer, (memoryview, bytearray)) or memoryview(buffer).readonly or not buffer:
        return False
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    for line in Path("/proc/self/maps").read_text().splitlines():
        area, modes, *_ = line.split()
        begin, end = (int(part, 16) for part in area.split("-"))
        if begin <= address < end:
            return "s" in modes
    raise AssertionError("memory that is nowhere")


class WatchedAead:
    """AES-GCM; notes calls whose buffers are shared."""

    calls = 0
    wrong = 0

    def __init__(self, key: bytearray) -> None:
        self._aead = AESGCM(key)

    def encrypt_into(self, *arguments: bytes) -> int:
        self._look(arguments)
        return self._aead.encrypt_into(*arguments)

    def decrypt_into(self, *arguments: bytes) -> int:
        self._look(arguments)
        return self._aead.decrypt_into(*arguments)

    @classmethod
    def _look(cls, arguments: tuple[object, ...]) -> None:
        cls.calls += 1
        cls.wrong += any(shared(each) for each in arguments)


def served(memory: DeviceMemory, number: int) -> Channel:
    """A channel whose device is a thread of this process."""
    fd, (agent, device) = both_ends()
    os.close(fd)
    name = ChannelName(1, number)
    Peer(Duplex(device, bytes(48), name, Direction.TO_HOST), memory).start()
    return Channel(Duplex(agent, bytes(48), name, Direction.TO_DEVICE))


def test_the_cipher_never_touches_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """At neither end."""
    monkeypatch.setattr(keys, "AESGCM", WatchedAead)
    with mmap.mmap(-1, 4096) as page:  # the look itself
        assert shared(memoryview(page))
    memory = DeviceMemory()
    handle = memory.allocate(ROOM)
    assert handle is not None
    channel, out = served(memory, 1), bytearray(3 * SLOT_SIZE)
    channel.write(handle, 0, bytearray(out))
    channel.write_many([(handle, 0, b"few"), (handle, 9, b"bytes")])
    channel.read_into(handle, 0, out)
    channel.close()
    assert (WatchedAead.calls, WatchedAead.wrong) == (2 * (3 + 1 + 1 + 1 + 1 + 3), 0)


class InPlace:
    """AES-GCM; of what is opened at one place in memory, a bit was flipped, and the tag takes its time."""

    target = 0
    opened = threading.Event()
    go_on = threading.Event()

    def __init__(self, key: bytearray) -> None:
        self._aead = AESGCM(key)
        self.encrypt_into = self._aead.encrypt_into

    def decrypt_into(self, nonce: bytes, sealed: memoryview, head: bytes, out: memoryview) -> int:
        if not out or address_of(out) != self.target:
            return self._aead.decrypt_into(nonce, sealed, head, out)
        try:
            return self._aead.decrypt_into(nonce, flip(random.Random(SEED), bytes(sealed)), head, out)
        finally:
            self.opened.set()
            self.go_on.wait(PATIENCE)


def test_nobody_reads_what_is_not_verified_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Altered bytes are in device memory for a moment; a channel that reads there waits, and finds zeros."""
    monkeypatch.setattr(keys, "AESGCM", InPlace)
    memory = DeviceMemory()
    handle = memory.allocate(2 * SLOT_SIZE)
    assert handle is not None
    place = memory.find(handle, 0, 1)
    assert isinstance(place, Allocation)
    channels = [served(memory, number) for number in range(2)]
    out, caught, data = bytearray(2 * SLOT_SIZE), list[str](), marked(random.Random(SEED), 2 * SLOT_SIZE)
    channels[1].write(handle, 0, bytes(2 * SLOT_SIZE))
    InPlace.target = place.address + SLOT_SIZE

    def write() -> None:
        with pytest.raises(AgentError) as error:
            channels[0].write(handle, 0, data)
        caught.append(error.value.slug)

    writing = threading.Thread(target=write)
    reading = threading.Thread(target=lambda: channels[1].read_into(handle, 0, out))
    writing.start()
    assert InPlace.opened.wait(PATIENCE)
    assert place.view[SLOT_SIZE:] not in (data[SLOT_SIZE:], bytes(SLOT_SIZE))
    reading.start()
    reading.join(0.3)
    InPlace.go_on.set()
    reading.join()
    writing.join()
    assert out == data[:SLOT_SIZE] + bytes(SLOT_SIZE)
    assert caught == ["TRANSFER_PEER_GONE"]
    for channel in channels:
        channel.close()
