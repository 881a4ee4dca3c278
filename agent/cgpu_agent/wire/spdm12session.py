"""SPDM 1.2 messages that open a session, change its keys and end it, in the profile of ``spdm12``.

Sources: DMTF DSP0274 1.2.1, clauses 10.16 to 10.21; DSP0277 1.1, clause 6, for the opaque data.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from cgpu_agent.wire.spdm12 import EXCHANGE_SIZE, HASH_SIZE, SIGNATURE_SIZE, SLOT, Code, Message, header

# Secured messages 1.1: as the requester offers it, and as the responder chooses it.
_OFFER: Final = bytes.fromhex("01000000 00000500 0101010011 000000")
_CHOICE: Final = bytes.fromhex("01000000 00000400 01000011")


@dataclass(frozen=True, slots=True)
class KeyExchange:
    """KEY_EXCHANGE (10.16): no measurement summary, slot 0, secured messages 1.1.

    Attributes:
        session: ReqSessionID, 16 bits.
        random: 32 bytes.
        exchange: the requester's ephemeral point.
    """

    session: int
    random: bytes
    exchange: bytes

    def encode(self) -> bytes:
        body = self.session.to_bytes(2, "little") + b"\0\0" + self.random + self.exchange
        return header(Code.KEY_EXCHANGE, 0, SLOT) + body + len(_OFFER).to_bytes(2, "little") + _OFFER

    @classmethod
    def parse(cls, data: bytes) -> KeyExchange:
        message = Message(data, Code.KEY_EXCHANGE)
        message.parameters(0, SLOT)
        session = message.reader.u16("session id")
        message.fixed(b"\0\0", "session policy")
        random, exchange = message.reader.take(32, "random"), message.reader.take(EXCHANGE_SIZE, "exchange data")
        message.fixed(len(_OFFER).to_bytes(2, "little") + _OFFER, "opaque data")
        message.reader.end()
        return cls(session, random, exchange)


@dataclass(frozen=True, slots=True)
class KeyExchangeResponse:
    """KEY_EXCHANGE_RSP: no heartbeat, no mutual authentication.

    Attributes:
        session: RspSessionID, 16 bits.
        random: 32 bytes.
        exchange: the responder's ephemeral point.
        signature: r || s over the transcript.
        verify: HMAC over the transcript with the signature.
    """

    session: int
    random: bytes
    exchange: bytes
    signature: bytes
    verify: bytes

    @staticmethod
    def unsigned(session: int, random: bytes, exchange: bytes) -> bytes:
        """All of the message before the signature."""
        body = session.to_bytes(2, "little") + b"\0\0" + random + exchange
        return header(Code.KEY_EXCHANGE_RSP) + body + len(_CHOICE).to_bytes(2, "little") + _CHOICE

    def encode(self) -> bytes:
        return self.unsigned(self.session, self.random, self.exchange) + self.signature + self.verify

    @classmethod
    def parse(cls, data: bytes) -> KeyExchangeResponse:
        message = Message(data, Code.KEY_EXCHANGE_RSP)
        message.parameters()
        reader = message.reader
        session = reader.u16("session id")
        message.fixed(b"\0\0", "mutual authentication")
        random, exchange = reader.take(32, "random"), reader.take(EXCHANGE_SIZE, "exchange data")
        message.fixed(len(_CHOICE).to_bytes(2, "little") + _CHOICE, "opaque data")
        signature, verify = reader.take(SIGNATURE_SIZE, "signature"), reader.take(HASH_SIZE, "verify data")
        reader.end()
        return cls(session, random, exchange, signature, verify)


FINISH_HEADER: Final = header(Code.FINISH)


def encode_finish(verify: bytes) -> bytes:
    """FINISH without a signature (10.17)."""
    return FINISH_HEADER + verify


def parse_finish(data: bytes) -> bytes:
    """RequesterVerifyData of a FINISH. Raises ``HostileInput``."""
    message = Message(data, Code.FINISH)
    message.parameters()
    verify = message.reader.take(HASH_SIZE, "verify data")
    message.reader.end()
    return verify


FINISH_RESPONSE: Final = header(Code.FINISH_RSP)
END_SESSION: Final = header(Code.END_SESSION)
END_SESSION_ACK: Final = header(Code.END_SESSION_ACK)


class KeyOperation(IntEnum):
    """What KEY_UPDATE asks for. The profile does without the update of one direction alone."""

    UPDATE_ALL_KEYS = 2
    VERIFY_NEW_KEY = 3


@dataclass(frozen=True, slots=True)
class KeyUpdate:
    """KEY_UPDATE. It is sent under the requester's old key to update, under its new one to verify.

    Attributes:
        tag: 8 bits, that the answer repeats.
    """

    operation: KeyOperation
    tag: int

    def encode(self) -> bytes:
        return header(Code.KEY_UPDATE, self.operation, self.tag)

    def acknowledgement(self) -> bytes:
        """KEY_UPDATE_ACK, which is sent under the responder's new key in either case."""
        return header(Code.KEY_UPDATE_ACK, self.operation, self.tag)

    @classmethod
    def parse(cls, data: bytes) -> KeyUpdate:
        message = Message(data, Code.KEY_UPDATE)
        message.reader.end()
        if message.first not in set(KeyOperation):
            raise message.reader.fail("SPDM_PROFILE", f"operation {message.first} is not of the profile spoken here")
        return cls(KeyOperation(message.first), message.second)
