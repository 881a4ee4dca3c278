"""Both ends of a channel in one process: order, keys that change, what an end refuses, and how waiting ends."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from cgpu_agent.errors import AgentError, DeviceFault, HostileInput, Misuse, Unavailable
from cgpu_agent.transfer import ring
from cgpu_agent.transfer.duplex import ChannelName, Duplex
from cgpu_agent.transfer.keys import SLOTS_PER_KEY
from cgpu_agent.transfer.memory import PrivateMemory
from cgpu_agent.transfer.ring import End, Ring, make_ring
from cgpu_agent.wire.transfer import DEPTH, HEADER_SIZE, RING_SIZE, SLOT_SIZE, Direction, Hint, Kind, SlotHeader
from fixtures.transfer import Shared, both_ends, descriptors, rings_of

EXPORTER = bytes(range(48))


class Both:
    """An agent's end and a device's, and the ring between them."""

    def __init__(self, *, stall: float = 5.0, slots_per_key: int = SLOTS_PER_KEY) -> None:
        fd, ends = both_ends()
        self.ring = Shared(fd)
        name = ChannelName(1, 2)
        self.agent, self.device = (
            Duplex(end, EXPORTER, name, way, stall=stall, slots_per_key=slots_per_key)
            for end, way in zip(ends, Direction, strict=True)
        )

    def write(self, data: bytes, transfer: int = 1) -> None:
        self.agent.sealer.send(Kind.WRITE, transfer, memoryview(data), left=len(data))

    def open(self) -> bytes:
        found = self.device.opener.receive()
        return bytes(self.device.opener.plain(found.length))

    def close(self) -> None:
        self.agent.kill()
        self.device.kill()
        self.ring.close()


@pytest.fixture
def both() -> Iterator[Both]:
    made = Both(stall=0.05)
    yield made
    made.close()


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(AgentError) as caught:
        work()
    return caught.value.slug


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.binary(min_size=1, max_size=99), st.just(bytes(SLOT_SIZE)), st.none()), max_size=40))
def test_what_goes_in_comes_out_in_order_over_changes_of_key(script: list[bytes | None]) -> None:
    """Any order of writes and reads that the ring has room for; ``None`` reads."""
    both = Both(slots_per_key=3)
    try:
        waiting: list[bytes] = []
        for step in script:
            if step is not None and len(waiting) < DEPTH:
                both.write(step)
                waiting.append(step)
            elif waiting:
                assert both.open() == waiting.pop(0)
        assert [both.open() for _ in waiting] == waiting
    finally:
        both.close()


def test_both_ends_change_keys_at_the_same_slot() -> None:
    both = Both(slots_per_key=2)
    try:
        epochs = []
        for number in range(7):
            both.write(b"%d" % number)
            at = 2 * 4096 + number * (SLOT_SIZE + 4096)
            epochs.append(SlotHeader.parse(both.ring.map[at : at + HEADER_SIZE]).epoch)
            assert both.open() == b"%d" % number
        assert epochs == [0, 0, 1, 1, 2, 2, 3]
    finally:
        both.close()


def test_what_the_library_leaves_behind_when_a_tag_is_wrong() -> None:
    """Why slots are opened in staging, and staging is wiped."""
    out = bytearray(5)
    sealed = bytearray(AESGCM(bytes(32)).encrypt(bytes(12), b"plain", None))
    sealed[-1] ^= 1
    with pytest.raises(InvalidTag):
        AESGCM(bytes(32)).decrypt_into(bytes(12), sealed, None, out)
    assert out == b"plain"


def test_a_bad_tag_leaves_nothing_behind(both: Both) -> None:
    both.write(b"a secret that nobody vouches for")
    both.ring.map[2 * 4096 + HEADER_SIZE] ^= 1
    assert refusal(both.open) == "SLOT_ALTERED"
    assert not any(both.device.opener.staging.view)


PIECE = {"handle": 3, "offset": 100, "left": 9}


def sent(both: Both) -> None:
    both.agent.sealer.send(Kind.WRITE, 5, memoryview(b"piece"), **PIECE)


def test_an_expected_piece_is_opened_where_it_is_to_be(both: Both) -> None:
    into = bytearray(b"\xa5" * 5)
    sent(both)
    both.device.opener.expect(Kind.WRITE, 5, 5, **PIECE, into=memoryview(into))
    assert into == b"piece"
    sent(both)
    both.device.opener.expect(Kind.WRITE, 5, 5, **PIECE)
    assert both.device.opener.plain(5) == b"piece"


@pytest.mark.parametrize(
    "other", [{"handle": 4}, {"offset": 101}, {"left": 8}, {"transfer": 6}, {"kind": Kind.PACKED}, {"length": 4}]
)
def test_another_piece_than_the_expected_one_is_not_opened(both: Both, other: dict[str, int]) -> None:
    into = bytearray(b"\xa5" * other.get("length", 5))
    arguments = {"kind": Kind.WRITE, "transfer": 5, "length": 5, **PIECE, **other}
    sent(both)
    assert refusal(lambda: both.device.opener.expect(**arguments, into=memoryview(into))) == "BAD_TRANSFER"
    assert set(into) == {0xA5}


def test_an_expected_piece_that_was_altered_leaves_zeros(both: Both) -> None:
    into = bytearray(b"\xa5" * 5)
    sent(both)
    both.ring.map[2 * 4096 + HEADER_SIZE] ^= 1
    expect = lambda: both.device.opener.expect(Kind.WRITE, 5, 5, **PIECE, into=memoryview(into))  # noqa: E731
    assert refusal(expect) == "SLOT_ALTERED"
    assert into == bytes(5)
    assert not any(both.device.opener.staging.view)


def test_a_guard_is_held_by_the_cipher_and_by_nobody_who_waits(both: Both) -> None:
    """Otherwise a channel that stalls would hold up the others."""
    guard, into = threading.Lock(), memoryview(bytearray(5))
    waiting = threading.Thread(
        target=lambda: both.device.opener.expect(Kind.WRITE, 5, 5, **PIECE, into=into, guard=guard)
    )
    waiting.start()
    while not both.ring.hint(Direction.TO_DEVICE, Hint.READER_SLEEPS):
        time.sleep(0.001)
    assert guard.acquire(timeout=5)
    sent(both)
    while both.ring.hint(Direction.TO_DEVICE, Hint.HEAD) == 0:
        time.sleep(0.001)
    waiting.join(0.02)
    assert waiting.is_alive()
    guard.release()
    waiting.join()
    assert into == b"piece"


def test_an_end_in_the_middle_of_a_transfer_is_woken_for_several_slots(both: Both) -> None:
    for left, slots in ((9, 1), (SLOT_SIZE + 1, 2), (100 * SLOT_SIZE, DEPTH // 2)):
        waiting = threading.Thread(
            target=lambda left=left: refusal(  # type: ignore[misc]
                lambda: both.device.opener.expect(Kind.WRITE, 5, 5, handle=3, offset=0, left=left)
            )
        )
        waiting.start()
        while not (until := both.ring.hint(Direction.TO_DEVICE, Hint.READER_SLEEPS)):
            time.sleep(0.001)
        assert until == slots
        waiting.join()
    for _ in range(DEPTH):
        both.write(b"data")
    waiting = threading.Thread(target=lambda: refusal(lambda: both.write(b"data")))
    waiting.start()
    while not (until := both.ring.hint(Direction.TO_DEVICE, Hint.WRITER_SLEEPS)):
        time.sleep(0.001)
    assert until == DEPTH // 2
    waiting.join()


def test_plaintext_is_not_in_the_ring(both: Both) -> None:
    both.write(b"a secret that must not be seen")
    assert both.ring.map.find(b"secret") < 0
    assert both.ring.hint(Direction.TO_DEVICE, Hint.TAIL) == 1


@pytest.mark.parametrize("tail", [DEPTH + 1, 1 << 63, (1 << 64) - 1])
def test_impossible_hints_to_a_reader(both: Both, tail: int) -> None:
    both.ring.set_hint(Direction.TO_DEVICE, Hint.TAIL, tail)
    assert refusal(both.open) == "RING_HINT"


@pytest.mark.parametrize("head", [1, 1 << 63, (1 << 64) - 1])
def test_impossible_hints_to_a_writer(both: Both, head: int) -> None:
    both.ring.set_hint(Direction.TO_DEVICE, Hint.HEAD, head)
    assert refusal(lambda: both.write(b"data")) == "RING_HINT"


def test_a_full_ring_that_nobody_empties(both: Both) -> None:
    for _ in range(DEPTH):
        both.write(b"data")
    assert refusal(lambda: both.write(b"data")) == "TRANSFER_STALLED"


def test_a_writer_that_stalls(both: Both) -> None:
    assert refusal(both.open) == "TRANSFER_STALLED"


def test_a_peer_that_hangs_up(both: Both) -> None:
    both.write(b"last words")
    both.agent.kill()
    assert both.open() == b"last words"
    with pytest.raises(DeviceFault, match="TRANSFER_PEER_GONE"):
        both.device.opener.receive(patient=True)


def test_stopping_one_who_waits(both: Both) -> None:
    caught: list[str] = []
    waiting = threading.Thread(
        target=lambda: caught.append(refusal(lambda: both.device.opener.receive(patient=True)))
    )
    waiting.start()
    both.device.end.stop()
    waiting.join()
    assert caught == ["TRANSFER_STOPPED"]
    assert refusal(lambda: both.device.sealer.send(Kind.DONE, 1)) == "TRANSFER_STOPPED"


def test_a_sleeper_is_woken(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its bell it would sleep on for hours; the flag says that it sleeps."""
    monkeypatch.setattr(ring, "_SHORT_NAP", 1 << 30)
    found: list[bytes] = []
    waiting = threading.Thread(target=lambda: found.append(both.open()))
    waiting.start()
    while not both.ring.hint(Direction.TO_DEVICE, Hint.READER_SLEEPS):
        time.sleep(0.001)
    time.sleep(0.01)
    both.write(b"data")
    waiting.join()
    assert found == [b"data"]
    assert not both.ring.hint(Direction.TO_DEVICE, Hint.READER_SLEEPS)


def test_death_forgets_and_lets_go() -> None:
    before = descriptors(), rings_of(os.getpid())
    both = Both()
    both.write(b"data")
    both.open()
    staging = both.device.opener.staging
    assert any(staging.view)
    both.close()
    both.agent.kill()
    both.agent.end.stop()
    assert not any(staging.view)
    assert (descriptors(), rings_of(os.getpid())) == before
    with pytest.raises(Unavailable, match="TRANSFER_DEAD"):
        both.agent._keys[0].next()


def test_bad_arguments_let_go() -> None:
    before = descriptors()
    fd = make_ring()
    line, other = socket.socketpair()
    end = End(Ring(fd), os.eventfd(0), os.eventfd(0), line)
    with pytest.raises(Misuse, match="BAD_KEY"):
        Duplex(end, b"short", ChannelName(1, 1), Direction.TO_DEVICE)
    os.close(fd)
    other.close()
    assert descriptors() == before


def test_rings_that_could_shrink_are_refused() -> None:
    fd = os.memfd_create("ring", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, RING_SIZE)
        with pytest.raises(HostileInput, match="BAD_RING"):
            Ring(fd)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        with pytest.raises(HostileInput, match="BAD_RING"):
            Ring(fd)
    finally:
        os.close(fd)
    with pytest.raises(HostileInput, match="BAD_RING"), Path("/dev/null").open() as other:
        Ring(other.fileno())


def test_our_rings_keep_their_size() -> None:
    fd = make_ring()
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        Ring(fd).close()
    finally:
        os.close(fd)


def test_rings_of_another_size_are_refused() -> None:
    fd = os.memfd_create("ring", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, RING_SIZE - 4096)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        with pytest.raises(HostileInput, match="BAD_RING"):
            Ring(fd)
    finally:
        os.close(fd)


def test_private_memory_is_locked_and_wiped() -> None:
    memory = PrivateMemory(1 << 16, lock=True)
    flags = next(line.split()[1:] for line in flags_after(memory.address) if line.startswith("VmFlags"))
    assert {"dd", "dc"} <= set(flags)  # neither dumped nor inherited
    assert memory.locked == ("lo" in flags)
    memory.view[:3] = b"abc"
    memory.wipe()
    assert not any(memory.view)


def flags_after(address: int) -> list[str]:
    """What the kernel says of the mapping at an address."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    for index, line in enumerate(lines):
        area = line.split()[0]
        if "-" in area and not area.endswith(":"):
            begin, end = (int(part, 16) for part in area.split("-"))
            if begin <= address < end:
                return lines[index:]
    raise AssertionError("not mapped")


def test_memory_that_cannot_be_locked_is_told() -> None:
    """In another process, without the capability that lifts the limit."""
    code = (
        "import ctypes, os, resource\n"
        "from cgpu_agent.transfer.memory import PrivateMemory\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))\n"
        "if os.getuid() == 0: os.setresuid(65534, 65534, 65534)\n"
        "print(PrivateMemory(4096, lock=True).locked)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == "False\n", ran.stderr
