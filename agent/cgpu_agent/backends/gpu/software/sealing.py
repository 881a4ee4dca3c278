"""One direction of an SPDM session: seals or opens records under one key, in strict order (DSP0277 1.1)."""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.spdm12keys import (
    TAG_SIZE,
    DirectionKeys,
    Secrets,
    encode_plain,
    parse_plain,
    parse_record,
    record_header,
)

_SPDM: Final = b"\x05"  # the message type within a record, as MCTP has it (DSP0276)


class Lane:
    """A key and its next sequence number. Used by one side to send, by the other to receive, never for both.

    Attributes:
        sequence: how many records its present key has seen.
    """

    __slots__ = ("_aead", "_keys", "_session", "sequence")

    def __init__(self, session: int, keys: DirectionKeys) -> None:
        self._session: Final = session
        self._take(keys)

    def update(self) -> None:
        """Go on under the key after this one, which cannot be found from that."""
        self._take(self._keys.update())

    def _take(self, keys: DirectionKeys) -> None:
        self._keys = keys
        self._aead = AESGCM(keys.key)
        self.sequence = 0

    def seal(self, message: bytes) -> bytes:
        """The record of an SPDM message. Raises ``HostileInput``: ``TOO_LARGE``, ``SEQUENCE_EXHAUSTED``."""
        plain = encode_plain(_SPDM + message)
        header = record_header(self._session, self.sequence, len(plain) + TAG_SIZE)
        sealed = self._aead.encrypt(self._keys.nonce(self.sequence), plain, header)
        self.sequence += 1
        return header + sealed

    def open(self, record: bytes) -> bytes:
        """The SPDM message of a record, which must be the next one.

        Raises:
            HostileInput: ``BAD_RECORD`` (altered, or under another key), ``WRONG_SESSION``, ``WRONG_SEQUENCE``,
                ``SEQUENCE_EXHAUSTED``, lengths.
        """
        sealed = parse_record(record, self._session, self.sequence)
        header = record_header(self._session, self.sequence, len(sealed))
        try:
            plain = self._aead.decrypt(self._keys.nonce(self.sequence), sealed, header)
        except InvalidTag as error:
            raise HostileInput("BAD_RECORD", "SPDM record: altered, or sealed under another key") from error
        self.sequence += 1
        message = parse_plain(plain)
        if message[:1] != _SPDM:
            raise HostileInput("BAD_RECORD", "SPDM record: it holds something other than an SPDM message")
        return message[1:]


class Lanes:
    """Both directions of one phase, as one side sees them."""

    __slots__ = ("receive", "send")

    def __init__(self, session: int, secrets: Secrets, *, requester: bool) -> None:
        ours, theirs = secrets.requester, secrets.responder
        if not requester:
            ours, theirs = theirs, ours
        self.send: Final = Lane(session, ours)
        self.receive: Final = Lane(session, theirs)
