"""Both directions of a channel as one end has them: slots are sealed and opened here, and nowhere else.

The cipher works on private memory only. A host that writes to what is being encrypted can have altered ciphertext
tagged, and one that writes to what is being decrypted can have altered plaintext accepted: on some processors that
was seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag

from cgpu_agent.errors import HostileInput
from cgpu_agent.transfer.keys import SLOTS_PER_KEY, SlotKeys
from cgpu_agent.transfer.memory import PrivateMemory, copy
from cgpu_agent.transfer.ring import End
from cgpu_agent.wire.transfer import (
    HEADER_SIZE,
    SLOT_SIZE,
    TAG_SIZE,
    Direction,
    Hint,
    Kind,
    SlotHeader,
    hint_index,
    iv,
    slot_offset,
)

STALL: Final = 10.0
"""Seconds that the other end may take for one slot."""

_STAGING: Final = HEADER_SIZE + SLOT_SIZE + TAG_SIZE
_NOTHING: Final = memoryview(b"")


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
        self._tail: Final = hint_index(direction, Hint.TAIL)
        self._reader_sleeps: Final = hint_index(direction, Hint.READER_SLEEPS)
        self._writer_sleeps: Final = hint_index(direction, Hint.WRITER_SLEEPS)
        self.staging: Final = PrivateMemory(_STAGING, lock=True)
        self._head: Final = self.staging.view[:HEADER_SIZE]
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
    ) -> None:
        """Seal ``plain``, at most ``SLOT_SIZE`` bytes, into the next slot. Who else writes to it harms only itself.

        Raises as ``End.wait``; ``Unavailable`` (``TRANSFER_DEAD``) when keys are used up.
        """
        end, counter = self._end, self._keys.counter
        end.require_running()
        if not end.ring.room(self._direction, counter):
            end.wait(lambda: end.ring.room(self._direction, counter), self._writer_sleeps, self._stall)
        cipher, epoch, counter = self._keys.next()
        length = len(plain)
        SlotHeader(
            kind, self._direction, detail, epoch, self._name.channel, self._name.session, transfer, counter, offset,
            left, length, handle,
        ).encode_into(self._head)  # fmt: skip
        sealed = self.staging.view[HEADER_SIZE : HEADER_SIZE + length + TAG_SIZE]
        cipher.encrypt_into(iv(self._name.channel, self._direction, counter), plain, self._head, sealed)
        slot = end.ring.address + slot_offset(self._direction, counter)
        copy(slot, self.staging.address, HEADER_SIZE + length + TAG_SIZE)
        end.announce(self._tail, counter + 1, self._reader_sleeps)


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
        self._head: Final = hint_index(direction, Hint.HEAD)
        self._reader_sleeps: Final = hint_index(direction, Hint.READER_SLEEPS)
        self._writer_sleeps: Final = hint_index(direction, Hint.WRITER_SLEEPS)
        self.staging: Final = PrivateMemory(_STAGING, lock=True)
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
        end, counter = self._end, self._keys.counter
        end.require_running()
        if not end.ring.filled(self._direction, counter):
            stall = None if patient else self._stall
            end.wait(lambda: end.ring.filled(self._direction, counter), self._reader_sleeps, stall)
        cipher, epoch, counter = self._keys.next()
        slot = end.ring.address + slot_offset(self._direction, counter)
        copy(self.staging.address, slot, HEADER_SIZE)
        head = bytes(self.staging.view[:HEADER_SIZE])
        found = SlotHeader.parse(head)
        self._require_ours(found, epoch, counter)
        # The length was copied once and is bounded: what the host writes over it now is never read.
        copy(self.address, slot + HEADER_SIZE, found.length + TAG_SIZE)
        end.announce(self._head, counter + 1, self._writer_sleeps)
        sealed = self.staging.view[HEADER_SIZE : HEADER_SIZE + found.length + TAG_SIZE]
        plain = sealed[: found.length]
        try:
            cipher.decrypt_into(iv(self._name.channel, self._direction, counter), sealed, head, plain)
        except InvalidTag as error:
            self.staging.wipe()  # it holds plaintext that nobody vouches for
            raise HostileInput("SLOT_ALTERED", "transfer slot: altered, or sealed under another key") from error
        return found

    def plain(self, length: int) -> memoryview:
        """The plaintext of the slot just opened."""
        return self.staging.view[HEADER_SIZE : HEADER_SIZE + length]

    def _require_ours(self, found: SlotHeader, epoch: int, counter: int) -> None:
        """Only gives the refusal its name: the tag would not fit either."""
        mine = (self._direction, self._name.channel, self._name.session)
        if (found.direction, found.channel, found.session) != mine:
            raise HostileInput("SLOT_FOREIGN", "transfer slot: of another channel, session or direction")
        if (found.counter, found.epoch) != (counter, epoch):
            raise HostileInput("SLOT_ORDER", "transfer slot: not the next one; replayed, dropped or reordered")


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
