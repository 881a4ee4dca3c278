"""Both directions of a channel as one end has them: slots are sealed and opened here, and nowhere else.

The cipher works on private memory only. A host that writes to what is being encrypted can have altered ciphertext
tagged, and one that writes to what is being decrypted can have altered plaintext accepted: on some processors that
was seen.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cgpu_agent.errors import HostileInput
from cgpu_agent.transfer.keys import SLOTS_PER_KEY, SlotKeys
from cgpu_agent.transfer.memory import PrivateMemory, clear, copy
from cgpu_agent.transfer.ring import End
from cgpu_agent.wire.transfer import (
    DEPTH,
    HEADER_SIZE,
    SLOT_SIZE,
    TAG_SIZE,
    Direction,
    Hint,
    Kind,
    SlotHeader,
    encode_header,
    hint_index,
    iv,
    slot_offset,
)

STALL: Final = 10.0
"""Seconds that the other end may take for one slot."""

_BATCH: Final = DEPTH // 2
"""Slots for which an end that fell asleep in the middle of a transfer is woken. To wake it costs the other end as
much as a slot does; woken for each, it sleeps again before the next, and both stay slow."""
_STAGING: Final = HEADER_SIZE + SLOT_SIZE + TAG_SIZE
_NOTHING: Final = memoryview(b"")
_FREE: Final = nullcontext()


@dataclass(frozen=True, slots=True)
class ChannelName:
    """Which channel: the number of the GPU session, and the channel's within it."""

    session: int
    channel: int


class Sealer:
    """Fills the slots of one direction. After any exception the channel must be killed."""

    def __init__(self, end: End, name: ChannelName, direction: Direction, keys: SlotKeys, stall: float) -> None:
        self._end: Final = end
        self._name: Final = name
        self._direction: Final = direction
        self._keys: Final = keys
        self._stall: Final = stall
        self._slots: Final = _slots(end, direction)
        self._tail_hint: Final = hint_index(direction, Hint.TAIL)
        self._head_hint: Final = hint_index(direction, Hint.HEAD)
        self._reader_sleeps: Final = hint_index(direction, Hint.READER_SLEEPS)
        self._writer_sleeps: Final = hint_index(direction, Hint.WRITER_SLEEPS)
        self.staging: Final = PrivateMemory(_STAGING, lock=True)
        self._header: Final = self.staging.view[:HEADER_SIZE]
        self.body: Final = self.staging.view[HEADER_SIZE : HEADER_SIZE + SLOT_SIZE]
        """Where a caller may put together what the next slot holds."""

    def send(
        self,
        kind: Kind,
        transfer: int,
        plain: memoryview = _NOTHING,
        *,
        handle: int = 0,
        offset: int = 0,
        left: int = 0,
        detail: int = 0,
        guard: AbstractContextManager[object] = _FREE,
    ) -> None:
        """Seal ``plain``, at most ``SLOT_SIZE`` bytes, into the next slot. Who else writes to it harms only itself.

        Args:
            guard: held while ``plain`` is read, not while the slot is waited for.

        Raises as ``End.wait``; ``Unavailable`` (``TRANSFER_DEAD``) when keys are used up.
        """
        end, name, direction, next_one = self._end, self._name, self._direction, self._keys.counter
        end.require_running()
        room, hint = end.ring.room, self._head_hint
        if not room(hint, next_one):
            enough = next_one - DEPTH + _BATCH
            end.wait(lambda: room(hint, next_one), self._writer_sleeps, enough, self._stall)
        cipher, epoch, counter = self._keys.next()
        length = len(plain)
        head = encode_header(
            kind, direction, detail, epoch, name.channel, name.session, transfer, counter, offset, left,
            length, handle,
        )  # fmt: skip
        self._header[:] = head
        size = HEADER_SIZE + length + TAG_SIZE
        sealed = self.staging.view[HEADER_SIZE:size]
        with guard:
            cipher.encrypt_into(iv(name.channel, direction, counter), plain, head, sealed)
        copy(self._slots[counter % DEPTH], self.staging.address, size)
        end.announce(self._tail_hint, counter + 1, self._reader_sleeps)


class Opener:
    """Empties the slots of the other direction. After any exception the channel must be killed.

    Attributes:
        locked: whether its staging stays off swap.
    """

    def __init__(self, end: End, name: ChannelName, direction: Direction, keys: SlotKeys, stall: float) -> None:
        self._end: Final = end
        self._name: Final = name
        self._direction: Final = direction
        self._keys: Final = keys
        self._stall: Final = stall
        self._slots: Final = _slots(end, direction)
        self._tail_hint: Final = hint_index(direction, Hint.TAIL)
        self._head_hint: Final = hint_index(direction, Hint.HEAD)
        self._reader_sleeps: Final = hint_index(direction, Hint.READER_SLEEPS)
        self._writer_sleeps: Final = hint_index(direction, Hint.WRITER_SLEEPS)
        self.staging: Final = PrivateMemory(_STAGING, lock=True)
        self._header: Final = self.staging.view[:HEADER_SIZE]
        self.address: Final = self.staging.address + HEADER_SIZE

    def receive(self, *, patient: bool = False) -> SlotHeader:
        """Open the next slot. Its plaintext is at ``address`` until the next call.

        Args:
            patient: wait for as long as the other end lives.

        Raises:
            HostileInput: ``BAD_SLOT``, ``SLOT_ORDER`` (replayed, dropped or reordered), ``SLOT_FOREIGN`` (of another
                channel, session or key), ``SLOT_ALTERED``, ``RING_HINT``.
            and as ``End.wait``.
        """
        self._wait(None if patient else self._stall, 1)
        cipher, epoch, counter = self._keys.next()
        copy(self.staging.address, self._slots[counter % DEPTH], HEADER_SIZE)
        head = bytes(self._header)
        found = SlotHeader.parse(head)
        self._require_ours(found, epoch, counter)
        # The length was copied once and is bounded: what the host writes over it now is never read.
        self._take(counter, HEADER_SIZE, found.length + TAG_SIZE)
        self._open(cipher, counter, head, self.plain(found.length), _FREE)
        return found

    def expect(
        self,
        kind: Kind,
        transfer: int,
        length: int,
        *,
        handle: int,
        offset: int,
        left: int,
        into: memoryview | None = None,
        guard: AbstractContextManager[object] = _FREE,
    ) -> None:
        """Open the next slot, which must be this piece of a transfer that has begun.

        Args:
            into: where its plaintext goes, ``length`` private bytes; by default to ``address``, as by ``receive``.
                Where the tag does not fit, they are zero afterwards.
            guard: held while ``into`` has bytes that are not verified yet: who reads there must hold it, too.

        Raises:
            HostileInput: ``BAD_TRANSFER`` (any other slot), ``SLOT_ALTERED``, ``RING_HINT``.
            and as ``End.wait``.
        """
        self._wait(self._stall, min(-(-left // SLOT_SIZE), _BATCH))
        cipher, epoch, counter = self._keys.next()
        name = self._name
        head = encode_header(
            kind, self._direction, 0, epoch, name.channel, name.session, transfer, counter, offset, left,
            length, handle,
        )  # fmt: skip
        self._take(counter, 0, HEADER_SIZE + length + TAG_SIZE)
        if bytes(self._header) != head:
            raise HostileInput("BAD_TRANSFER", "a slot does not go on where the one before it ended")
        self._open(cipher, counter, head, self.plain(length) if into is None else into, guard)

    def plain(self, length: int) -> memoryview:
        """The plaintext of the slot just opened."""
        return self.staging.view[HEADER_SIZE : HEADER_SIZE + length]

    def _wait(self, stall: float | None, worthwhile: int) -> None:
        """Wait for the next slot; once asleep, for as many as are worth being woken for."""
        end, counter = self._end, self._keys.counter
        end.require_running()
        filled, hint = end.ring.filled, self._tail_hint
        if not filled(hint, counter):
            end.wait(lambda: filled(hint, counter), self._reader_sleeps, counter + worthwhile, stall)

    def _take(self, counter: int, start: int, size: int) -> None:
        """Copy ``size`` bytes of slot ``counter`` from ``start`` on, its last ones, and give it back."""
        slot = self._slots[counter % DEPTH] + start
        copy(self.staging.address + start, slot, size)
        # Not for secrecy: lines that one core has alone, and dirty, another one takes over faster than shared ones,
        # three times as fast where the two cores have no cache in common.
        clear(slot, size)
        self._end.announce(self._head_hint, counter + 1, self._writer_sleeps)

    def _open(
        self, cipher: AESGCM, counter: int, head: bytes, out: memoryview, guard: AbstractContextManager[object]
    ) -> None:
        """Open what was taken of slot ``counter``."""
        sealed = self.staging.view[HEADER_SIZE : HEADER_SIZE + len(out) + TAG_SIZE]
        with guard:
            try:
                cipher.decrypt_into(iv(self._name.channel, self._direction, counter), sealed, head, out)
            except BaseException as error:
                out[:] = bytes(len(out))  # it holds plaintext that nobody vouches for
                self.staging.wipe()
                if not isinstance(error, InvalidTag):
                    raise
                raise HostileInput("SLOT_ALTERED", "transfer slot: altered, or sealed under another key") from error

    def _require_ours(self, found: SlotHeader, epoch: int, counter: int) -> None:
        """Only gives the refusal its name: the tag would not fit either."""
        mine = (self._direction, self._name.channel, self._name.session)
        if (found.direction, found.channel, found.session) != mine:
            raise HostileInput("SLOT_FOREIGN", "transfer slot: of another channel, session or direction")
        if (found.counter, found.epoch) != (counter, epoch):
            raise HostileInput("SLOT_ORDER", "transfer slot: not the next one; replayed, dropped or reordered")


def _slots(end: End, direction: Direction) -> tuple[int, ...]:
    """Where the slots of a direction are."""
    return tuple(end.ring.address + slot_offset(direction, number) for number in range(DEPTH))


class Duplex:
    """One end of a channel. Dies as a whole, and stays dead.

    Args:
        end: taken over; closed by ``kill``, and when this fails.
        exporter: 48 secret bytes of the session, from which both keys come.
        outward: the direction in which this end seals.

    Raises as ``SlotKeys``.
    """

    def __init__(
        self,
        end: End,
        exporter: bytes | bytearray,
        name: ChannelName,
        outward: Direction,
        *,
        stall: float = STALL,
        slots_per_key: int = SLOTS_PER_KEY,
    ) -> None:
        self.end: Final = end
        inward = Direction(1 - outward)
        try:
            out, inn = (
                SlotKeys(
                    exporter,
                    session=name.session,
                    channel=name.channel,
                    direction=direction,
                    slots_per_key=slots_per_key,
                )
                for direction in (outward, inward)
            )
            self._keys: Final = (out, inn)
            self.sealer: Final = Sealer(end, name, outward, out, stall)
            self.opener: Final = Opener(end, name, inward, inn, stall)
        except BaseException:
            end.close()
            raise

    @property
    def locked(self) -> bool:
        """Whether plaintext in staging stays off swap."""
        return self.sealer.staging.locked and self.opener.staging.locked

    def kill(self) -> None:
        """Forget keys and plaintext, and hang up. Idempotent; only from the thread that uses this end."""
        for keys in self._keys:
            keys.wipe()
        self.sealer.staging.wipe()
        self.opener.staging.wipe()
        self.end.close()
