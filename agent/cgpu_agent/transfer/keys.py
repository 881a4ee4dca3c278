"""Keys of one direction of a channel: derived from the session, counted, and replaced before they are used too much.

    secret 0     = HKDF-Expand-SHA384(exporter of the session, "secret" context)
    key e        = HKDF-Expand-SHA384(secret e, "key" context), 32 bytes
    secret e + 1 = HKDF-Expand-SHA384(secret e, "next" context of e + 1), 48 bytes; secret e is overwritten
    context      = direction u8 || channel u32be || session u64be || epoch u32be

Epoch e has the slots from e * SLOTS_PER_KEY on, so both ends change keys at the same slot and no word passes between
them.
"""

from __future__ import annotations

import struct
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from cgpu_agent.errors import Misuse, Unavailable
from cgpu_agent.wire.transfer import HEADER_SIZE, MAX_CHANNEL, MAX_COUNTER, SLOT_SIZE, Direction

SECRET_SIZE: Final = 48
KEY_SIZE: Final = 32
BLOCKS_PER_SLOT: Final = (SLOT_SIZE + HEADER_SIZE) // 16 + 2
"""Most blocks of 16 bytes that one slot costs its key: plaintext, AAD, lengths, and the block that masks the tag."""
MAX_BLOCKS: Final = 1 << 32
"""Blocks under one key. It keeps two bounds: an advantage of 2^-65 in telling ciphertext from noise (blocks^2 /
2^129, as AES permutes), and the 2^32 invocations of NIST SP 800-38D, 8.3, from which IVs like ours are exempt."""
SLOTS_PER_KEY: Final = 1 << 17
"""A power of two below ``MAX_BLOCKS / BLOCKS_PER_SLOT``."""

_CONTEXT: Final = struct.Struct(">BIQI")
_LAST_EPOCH: Final = (1 << 32) - 1


class SlotKeys:
    """Hands out each counter once, with its cipher. For one thread, and for sealing or opening, not both.

    Python cannot wipe all of it: the library copies what it derives from, and the session's exporter is ``bytes``.
    What is ours is overwritten; the key's schedule is cleansed by OpenSSL when its object goes.

    Args:
        exporter: 48 secret bytes of the session.
        session: its number, 64 bits.
        channel: 0 to ``MAX_CHANNEL``; a session uses each number once.
        direction: which way these keys go.
        slots_per_key: 1 to ``SLOTS_PER_KEY``; both ends must agree.

    Raises ``Misuse``: ``BAD_KEY``, ``BAD_CHANNEL``.
    """

    def __init__(
        self,
        exporter: bytes | bytearray,
        *,
        session: int,
        channel: int,
        direction: Direction,
        slots_per_key: int = SLOTS_PER_KEY,
    ) -> None:
        if len(exporter) != SECRET_SIZE or not 1 <= slots_per_key <= SLOTS_PER_KEY:
            raise Misuse("BAD_KEY", f"a channel's keys come from {SECRET_SIZE} bytes, and change often enough")
        if not 0 <= channel <= MAX_CHANNEL:
            raise Misuse("BAD_CHANNEL", "there is no channel of this number")
        self._direction: Final = direction
        self._channel: Final = channel
        self._session: Final = session
        self._slots_per_key: Final = slots_per_key
        self._secret: Final = bytearray(SECRET_SIZE)
        self._counter = 0
        self._epoch = 0
        self._expand(exporter, b"secret", self._secret)
        self._cipher: AESGCM | None = self._key()

    def next(self) -> tuple[AESGCM, int, int]:
        """Cipher, epoch and counter of the next slot. They are spent, whatever becomes of it.

        Raises ``Unavailable`` (``TRANSFER_DEAD``): wiped, or used up.
        """
        counter = self._counter
        if self._cipher is None or counter > MAX_COUNTER:
            raise Unavailable("TRANSFER_DEAD", "the keys of this transfer channel are gone")
        epoch = counter // self._slots_per_key
        if epoch != self._epoch:
            self._ratchet()
        self._counter = counter + 1
        return self._cipher, epoch, counter

    @property
    def counter(self) -> int:
        """The next slot's."""
        return self._counter

    def wipe(self) -> None:
        """Forget the keys. Idempotent."""
        self._cipher = None
        self._secret[:] = bytes(SECRET_SIZE)

    def _ratchet(self) -> None:
        if self._epoch == _LAST_EPOCH:
            self.wipe()
            raise Unavailable("TRANSFER_DEAD", "the keys of this transfer channel are used up")
        later = bytearray(SECRET_SIZE)
        self._epoch += 1
        self._expand(self._secret, b"next", later)
        self._secret[:] = later
        later[:] = bytes(SECRET_SIZE)
        self._cipher = self._key()

    def _key(self) -> AESGCM:
        key = bytearray(KEY_SIZE)
        self._expand(self._secret, b"key", key)
        cipher = AESGCM(key)
        key[:] = bytes(KEY_SIZE)
        return cipher

    def _expand(self, secret: bytes | bytearray, label: bytes, out: bytearray) -> None:
        context = _CONTEXT.pack(self._direction, self._channel, self._session, self._epoch)
        HKDFExpand(SHA384(), len(out), b"cgpu/transfer/1\0" + label + b"\0" + context).derive_into(secret, out)
