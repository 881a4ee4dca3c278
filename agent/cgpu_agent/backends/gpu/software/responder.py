"""The responder's half of SPDM 1.2: one GPU on one connection, one message at a time, at most one session."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Protocol

from cryptography.hazmat.primitives.asymmetric import ec

from cgpu_agent.backends.gpu.software.ecdh import agree, encode_point
from cgpu_agent.backends.gpu.software.make import Device
from cgpu_agent.backends.gpu.software.sealing import Lanes
from cgpu_agent.errors import HostileInput
from cgpu_agent.wire import spdm12, spdm12keys
from cgpu_agent.wire import spdm12session as session
from cgpu_agent.wire.spdm import Measurement
from cgpu_agent.wire.spdm12 import Code, ErrorCode

_PORTION: Final = 1024


class _State(IntEnum):
    START = 0
    VERSION = 1
    CAPABILITIES = 2
    NEGOTIATED = 3


class _Refusal(Exception):
    def __init__(self, code: ErrorCode) -> None:
        super().__init__(code.name)
        self.code = code


class Inside(Protocol):
    """What a session can be asked, from the moment that it is open."""

    def vendor(self, payload: bytes) -> bytes:
        """Answer the payload of a vendor-defined request. Raises ``HostileInput`` for a bad one."""

    def close(self) -> None:
        """The session is over."""


@dataclass(slots=True)
class _Session:
    """A session being made (``secret`` and ``finished`` are set) or open (both empty, and ``inside`` is set).

    ``unverified``: its keys are new, and the requester has not shown yet that it has them, too.
    """

    number: int
    lanes: Lanes
    transcript: spdm12keys.Transcript
    secret: bytes
    finished: bytes
    inside: Inside | None = None
    unverified: bool = False


class Responder:
    """Answers SPDM messages. Whatever is wrong with one is answered with ERROR, and changes nothing.

    Args:
        device: whose certificates and key.
        blocks: what it measured, asked anew each time.
        vendor: answers the payload of a vendor-defined request; raises ``HostileInput`` for a bad one.
        alter: bends a signed MEASUREMENTS on its way out.
        within: makes what answers vendor-defined requests in a session of this number and Export Master Secret;
            without it ``vendor`` does.
    """

    def __init__(
        self,
        device: Device,
        blocks: Callable[[], list[Measurement]],
        vendor: Callable[[bytes], bytes],
        alter: Callable[[bytes], bytes] = bytes,
        within: Callable[[int, bytes], Inside] | None = None,
    ) -> None:
        self.device: Final = device
        self._blocks: Final = blocks
        self._vendor: Final = vendor
        self._alter: Final = alter
        self._within: Final = within
        self._state = _State.START
        self._vca = spdm12keys.Transcript()
        self._measuring: spdm12keys.Transcript | None = None
        self._session: _Session | None = None

    def answer(self, message: bytes) -> bytes:
        """The answer to a message in the clear."""
        try:
            code = spdm12.code_of(message)
            if code != Code.GET_MEASUREMENTS:
                self._measuring = None
            return self._dispatch(code, message)
        except _Refusal as refusal:
            return spdm12.encode_error(refusal.code)
        except HostileInput as error:
            other = error.slug == "SPDM_VERSION"
            return spdm12.encode_error(ErrorCode.VERSION_MISMATCH if other else ErrorCode.INVALID_REQUEST)

    def answer_record(self, record: bytes) -> bytes | None:
        """The answer to a sealed message: a record. ``None``: the record was bad, and the session is over."""
        active = self._session
        try:
            if active is None:
                return None
            lanes = active.lanes
            return lanes.send.seal(self._answer_sealed(active, lanes.receive.open(record)))
        except HostileInput:
            self.close()
            return None

    def close(self) -> None:
        """End the session, if there is one."""
        active, self._session = self._session, None
        if active is not None and active.inside is not None:
            active.inside.close()

    def _dispatch(self, code: int, message: bytes) -> bytes:
        if code == Code.GET_VERSION:
            return self._version(message)
        if code == Code.VENDOR_DEFINED_REQUEST:
            return self._vendor_defined(message)
        negotiation = {
            Code.GET_CAPABILITIES: (_State.VERSION, spdm12.GET_CAPABILITIES, spdm12.CAPABILITIES),
            Code.NEGOTIATE_ALGORITHMS: (_State.CAPABILITIES, spdm12.NEGOTIATE_ALGORITHMS, spdm12.ALGORITHMS),
        }
        if code in negotiation:
            return self._negotiate(message, *negotiation[Code(code)])
        later: dict[int, Callable[[bytes], bytes]] = {
            Code.GET_DIGESTS: self._digests,
            Code.GET_CERTIFICATE: self._certificate,
            Code.GET_MEASUREMENTS: self._measurements,
            Code.KEY_EXCHANGE: self._key_exchange,
        }
        if code in (Code.FINISH, Code.KEY_UPDATE, Code.END_SESSION):
            raise _Refusal(ErrorCode.UNEXPECTED_REQUEST)  # only ever within a session
        if code not in later:
            raise _Refusal(ErrorCode.UNSUPPORTED_REQUEST)
        if self._state is not _State.NEGOTIATED:
            raise _Refusal(ErrorCode.UNEXPECTED_REQUEST)
        return later[code](message)

    def _version(self, message: bytes) -> bytes:
        spdm12.require_exactly(message, spdm12.GET_VERSION)
        self.close()
        self._vca = spdm12keys.Transcript(message + spdm12.VERSION_RESPONSE)
        self._state = _State.VERSION
        return spdm12.VERSION_RESPONSE

    def _negotiate(self, message: bytes, needed: _State, expected: bytes, response: bytes) -> bytes:
        if self._state is not needed:
            raise _Refusal(ErrorCode.UNEXPECTED_REQUEST)
        spdm12.require_exactly(message, expected)
        self._vca.add(message, response)
        self._state = _State(needed + 1)
        return response

    def _vendor_defined(self, message: bytes, inside: Inside | None = None) -> bytes:
        payload = spdm12.parse_vendor(message, response=False)
        answer = inside.vendor(payload) if inside is not None else self._vendor(payload)
        return spdm12.encode_vendor(answer, response=True)

    def _digests(self, message: bytes) -> bytes:
        spdm12.require_exactly(message, spdm12.GET_DIGESTS)
        return spdm12.encode_digests(self.device.chain)

    def _certificate(self, message: bytes) -> bytes:
        asked = spdm12.GetCertificate.parse(message)
        chain = self.device.chain
        if asked.offset >= len(chain):
            raise _Refusal(ErrorCode.INVALID_REQUEST)
        portion = chain[asked.offset : asked.offset + min(asked.length, _PORTION)]
        return spdm12.CertificatePortion(portion, len(chain) - asked.offset - len(portion)).encode()

    def _measurements(self, message: bytes) -> bytes:
        asked = spdm12.GetMeasurements.parse(message)
        blocks = self._blocks()
        chosen = tuple(each for each in blocks if asked.operation in (each.index, spdm12.ALL_BLOCKS))
        if asked.operation and not chosen:
            raise _Refusal(ErrorCode.INVALID_REQUEST)
        total = 0 if asked.operation else len(blocks)
        unsigned = spdm12.Measurements(total, chosen, os.urandom(spdm12.NONCE_SIZE), None).encode()
        transcript = self._measuring or self._vca.copy()
        transcript.add(message, unsigned)
        self._measuring = transcript if asked.nonce is None else None
        if asked.nonce is None:
            return unsigned
        signed = spdm12keys.to_be_signed(spdm12keys.MEASUREMENTS_CONTEXT, transcript.digest())
        return self._alter(unsigned) + self.device.leaf.sign(signed)

    def _key_exchange(self, message: bytes) -> bytes:
        if self._session is not None:
            raise _Refusal(ErrorCode.SESSION_LIMIT_EXCEEDED)
        asked = session.KeyExchange.parse(message)
        key = ec.generate_private_key(ec.SECP384R1())
        shared = agree(key, asked.exchange)
        ours, random = 1 + secrets.randbelow(0xFFFF), os.urandom(32)
        unsigned = session.KeyExchangeResponse.unsigned(ours, random, encode_point(key.public_key()))
        transcript = self._vca.copy()
        transcript.add(hashlib.sha384(self.device.chain).digest(), message, unsigned)
        signature = self.device.leaf.sign(
            spdm12keys.to_be_signed(spdm12keys.KEY_EXCHANGE_CONTEXT, transcript.digest())
        )
        transcript.add(signature)
        secret, th1 = spdm12keys.handshake_secret(shared), transcript.digest()
        keys = spdm12keys.handshake_keys(secret, th1)
        verify = spdm12keys.verify_data(keys.responder.finished, th1)
        transcript.add(verify)
        number = ours << 16 | asked.session
        lanes = Lanes(number, keys, requester=False)
        self._session = _Session(number, lanes, transcript, secret, keys.requester.finished)
        return unsigned + signature + verify

    def _answer_sealed(self, active: _Session, message: bytes) -> bytes:
        code = spdm12.code_of(message)
        if active.secret:
            return self._finish(active, message)
        if active.unverified or code == Code.KEY_UPDATE:
            return self._key_update(active, message)
        if code == Code.END_SESSION:
            spdm12.require_exactly(message, session.END_SESSION)
            self.close()
            return session.END_SESSION_ACK
        if code == Code.VENDOR_DEFINED_REQUEST:
            return self._vendor_defined(message, active.inside)
        return spdm12.encode_error(ErrorCode.UNSUPPORTED_REQUEST)

    def _key_update(self, active: _Session, message: bytes) -> bytes:
        """Raises ``HostileInput``, which ends the session, for anything but an update and then its verification."""
        asked = session.KeyUpdate.parse(message)
        if active.unverified != (asked.operation is session.KeyOperation.VERIFY_NEW_KEY):
            raise HostileInput("BAD_KEY_UPDATE", "SPDM KEY_UPDATE: not the operation whose turn it is")
        if not active.unverified:
            active.lanes.receive.update()
            active.lanes.send.update()
        active.unverified = not active.unverified
        return asked.acknowledgement()

    def _finish(self, active: _Session, message: bytes) -> bytes:
        """Raises ``HostileInput``, which ends the session, unless the requester proves the handshake's keys."""
        verify = session.parse_finish(message)
        active.transcript.add(session.FINISH_HEADER)
        expected = spdm12keys.verify_data(active.finished, active.transcript.digest())
        if not hmac.compare_digest(verify, expected):
            raise HostileInput("BAD_VERIFY_DATA", "SPDM FINISH: the requester does not hold the handshake's keys")
        active.transcript.add(verify, session.FINISH_RESPONSE)
        keys = spdm12keys.application_keys(active.secret, active.transcript.digest())
        active.lanes = Lanes(active.number, keys, requester=False)
        active.secret = active.finished = b""
        if self._within is not None:
            active.inside = self._within(active.number, keys.exporter)
        return session.FINISH_RESPONSE
