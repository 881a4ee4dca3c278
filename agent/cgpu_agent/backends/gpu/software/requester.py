"""The requester's half of SPDM 1.2, over a link to one GPU.

It judges nothing: certificates and measurements are fetched, not verified. The one signature checked here is the one
over a key exchange, without which there is no session; with whom it was made is for the caller to compare.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cgpu_agent.backends.gpu.software.ecdh import agree, encode_point
from cgpu_agent.backends.gpu.software.frames import Kind
from cgpu_agent.backends.gpu.software.link import Link
from cgpu_agent.backends.gpu.software.pki import pem
from cgpu_agent.backends.gpu.software.sealing import Lanes
from cgpu_agent.errors import DeviceFault, HostileInput
from cgpu_agent.wire import spdm12, spdm12keys
from cgpu_agent.wire import spdm12session as messages
from cgpu_agent.wire.spdm import SIGNATURE_SIZE

T = TypeVar("T")

RECORDS_PER_KEY: Final = 1 << 16
"""At most 4097 blocks each: below 2^29 under one key, an advantage of less than 2^-71 in telling them from noise."""
_MAX_CHAIN: Final = 0xFFFF


@dataclass(frozen=True, slots=True)
class SignedMeasurements:
    """What GET_MEASUREMENTS gave.

    Attributes:
        measurements: blocks and signature.
        signed: the bytes that the leaf key should have signed (ECDSA, SHA-384).
    """

    measurements: spdm12.Measurements
    signed: bytes


class Requester:
    """A conversation with one GPU; negotiates at its beginning, which its maker must await: ``connect``.

    Every method takes a ``time.monotonic`` deadline and raises ``DeviceFault`` as ``Link.exchange``; ``GPU_ERROR``
    also for answers that break SPDM.
    """

    def __init__(self, link: Link) -> None:
        self.link: Final = link
        self._vca: Final = spdm12keys.Transcript()

    @classmethod
    async def connect(cls, link: Link, deadline: float) -> Requester:
        """GET_VERSION, GET_CAPABILITIES, NEGOTIATE_ALGORITHMS."""
        made = cls(link)
        await made._read(spdm12.GET_VERSION, deadline, spdm12.require_version, record=True)
        for request, response in (
            (spdm12.GET_CAPABILITIES, spdm12.CAPABILITIES),
            (spdm12.NEGOTIATE_ALGORITHMS, spdm12.ALGORITHMS),
        ):
            await made._read(request, deadline, _exactly(response), record=True)
        return made

    async def chain(self, deadline: float) -> bytes:
        """GET_DIGESTS, and as many GET_CERTIFICATE as it takes: the chain as the slot holds it."""
        digest = await self._read(spdm12.GET_DIGESTS, deadline, spdm12.parse_digests)
        found = b""
        while True:
            asked = spdm12.GetCertificate(len(found), _MAX_CHAIN - len(found))
            got = await self._read(asked.encode(), deadline, spdm12.CertificatePortion.parse)
            found += got.portion
            if len(got.portion) > asked.length or (got.remainder and not got.portion):
                raise self._broken(HostileInput("BAD_CHAIN", "SPDM: more than was asked for, or no end in sight"))
            if not got.remainder:
                break
        if not hmac.compare_digest(hashlib.sha384(found).digest(), digest):
            raise self._broken(HostileInput("BAD_CHAIN", "SPDM: the chain is not the one of the digest"))
        return found

    async def measurements(self, nonce: bytes, deadline: float) -> SignedMeasurements:
        """GET_MEASUREMENTS of all blocks, signed over 32 bytes of nonce."""
        request = spdm12.GetMeasurements(spdm12.ALL_BLOCKS, nonce).encode()
        answer = await self.link.spdm(request, deadline)
        found = self._parse(answer, lambda data: spdm12.Measurements.parse(data, signed=True))
        transcript = self._vca.copy()
        transcript.add(request, answer[:-SIGNATURE_SIZE])
        signed = spdm12keys.to_be_signed(spdm12keys.MEASUREMENTS_CONTEXT, transcript.digest())
        return SignedMeasurements(found, signed)

    async def session(self, deadline: float) -> Session:
        """KEY_EXCHANGE and FINISH. The link belongs to the session afterwards."""
        chain = await self.chain(deadline)
        key = ec.generate_private_key(ec.SECP384R1())
        ours = 1 + secrets.randbelow(0xFFFF)
        request = messages.KeyExchange(ours, os.urandom(32), encode_point(key.public_key())).encode()
        answer = await self._read(request, deadline, messages.KeyExchangeResponse.parse)
        transcript = self._vca.copy()
        unsigned = answer.unsigned(answer.session, answer.random, answer.exchange)
        transcript.add(hashlib.sha384(chain).digest(), request, unsigned)
        try:
            certificates = _load(chain)
            signed = spdm12keys.to_be_signed(spdm12keys.KEY_EXCHANGE_CONTEXT, transcript.digest())
            _require_signature(certificates[0], answer.signature, signed)
            transcript.add(answer.signature)
            secret, th1 = spdm12keys.handshake_secret(agree(key, answer.exchange)), transcript.digest()
            keys = spdm12keys.handshake_keys(secret, th1)
            if not hmac.compare_digest(spdm12keys.verify_data(keys.responder.finished, th1), answer.verify):
                raise HostileInput("BAD_VERIFY_DATA", "SPDM: the GPU does not hold the handshake's keys")
        except HostileInput as error:
            raise self._broken(error) from error
        transcript.add(answer.verify)
        number = answer.session << 16 | ours
        lanes = Lanes(number, keys, requester=True)
        transcript.add(messages.FINISH_HEADER)
        verify = spdm12keys.verify_data(keys.requester.finished, transcript.digest())
        finished = await _exchange(self.link, lanes, messages.encode_finish(verify), deadline)
        self._parse(finished, _exactly(messages.FINISH_RESPONSE))
        transcript.add(verify, messages.FINISH_RESPONSE)
        application = spdm12keys.application_keys(secret, transcript.digest())
        return Session(self.link, number, application, pem(certificates))

    async def _read(self, request: bytes, deadline: float, parse: Callable[[bytes], T], *, record: bool = False) -> T:
        answer = await self.link.spdm(request, deadline)
        found = self._parse(answer, parse)
        if record:
            self._vca.add(request, answer)
        return found

    def _parse(self, answer: bytes, parse: Callable[[bytes], T]) -> T:
        try:
            return parse(answer)
        except HostileInput as error:
            raise self._broken(error) from error

    def _broken(self, error: HostileInput) -> DeviceFault:
        self.link.close()
        fault = DeviceFault("GPU_ERROR", "the GPU broke the SPDM protocol")
        fault.__cause__ = error
        return fault


class Session:
    """An open SPDM session with one GPU: sealed messages, one after the other, and keys for others to use.

    Attributes:
        number: its 32-bit id.
        exporter: Export Master Secret, 48 bytes (DSP0274 1.2.1, 12.8): derive keys from it, never use it as one.
        chain: PEM, leaf first, of the GPU that signed the key exchange. Nobody verified it: it must be the chain of
            evidence that was accepted.
    """

    def __init__(self, link: Link, number: int, keys: spdm12keys.Secrets, chain: bytes) -> None:
        self._link: Final = link
        self._lanes: Final = Lanes(number, keys, requester=True)
        self.number: Final = number
        self.exporter: Final = keys.exporter
        self.chain: Final = chain

    async def update_keys(self, deadline: float) -> None:
        """Seal under new keys from now on, both ways (DSP0274 1.2.1, KEY_UPDATE). A failure ends the session.

        Old keys cannot be found from new ones. ``exporter`` stays as it is. Raises as ``vendor``.
        """
        for operation, changed in (
            (messages.KeyOperation.UPDATE_ALL_KEYS, self._lanes.receive),
            (messages.KeyOperation.VERIFY_NEW_KEY, self._lanes.send),
        ):
            changed.update()
            asked = messages.KeyUpdate(operation, secrets.randbelow(256))
            answer = await _exchange(self._link, self._lanes, asked.encode(), deadline)
            try:
                spdm12.require_exactly(answer, asked.acknowledgement())
            except HostileInput as error:
                self._link.close()
                raise DeviceFault("GPU_ERROR", "the GPU did not update the keys of the session") from error

    async def vendor(self, payload: bytes, deadline: float) -> bytes:
        """Exchange payloads of vendor-defined messages, sealed. A failure ends the session.

        Raises ``DeviceFault`` as ``Link.exchange``; ``GPU_ERROR`` also where a record was altered or repeated.
        """
        if self._lanes.send.sequence >= RECORDS_PER_KEY:
            await self.update_keys(deadline)
        answer = await _exchange(self._link, self._lanes, spdm12.encode_vendor(payload, response=False), deadline)
        try:
            return spdm12.parse_vendor(answer, response=True)
        except HostileInput as error:
            self._link.close()
            raise DeviceFault("GPU_ERROR", "the GPU refused a request, or answered another") from error

    async def end(self, deadline: float) -> None:
        """END_SESSION, then hang up; a GPU that does not answer is left all the same."""
        try:
            await _exchange(self._link, self._lanes, messages.END_SESSION, deadline)
        finally:
            self._link.close()


async def _exchange(link: Link, lanes: Lanes, message: bytes, deadline: float) -> bytes:
    try:
        answer = await link.exchange(Kind.SECURED, lanes.send.seal(message), deadline)
        if answer.kind is not Kind.SECURED:
            raise HostileInput("SESSION_ENDED", "SPDM: the GPU ended the session")
        return lanes.receive.open(answer.payload)
    except HostileInput as error:
        link.close()
        raise DeviceFault("GPU_ERROR", "the SPDM session with the GPU is over") from error


def _exactly(expected: bytes) -> Callable[[bytes], None]:
    return lambda data: spdm12.require_exactly(data, expected)


def _load(chain: bytes) -> list[x509.Certificate]:
    """Certificates, leaf first. Raises ``HostileInput`` (``BAD_CHAIN``)."""
    try:
        return [x509.load_der_x509_certificate(der) for der in reversed(spdm12.parse_chain(chain))]
    except ValueError as error:
        raise HostileInput("BAD_CHAIN", "SPDM: a certificate that is none") from error


def chain_pem(chain: bytes) -> bytes:
    """A slot's chain as NVML gives it: PEM, leaf first. Raises ``HostileInput`` (``BAD_CHAIN``)."""
    return pem(_load(chain))


def _require_signature(leaf: x509.Certificate, signature: bytes, signed: bytes) -> None:
    half = len(signature) // 2
    r, s = (int.from_bytes(part, "big") for part in (signature[:half], signature[half:]))
    try:
        key = leaf.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
            raise HostileInput("WEAK_KEY", "SPDM: the leaf key is not on P-384")
        key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError, TypeError) as error:
        raise HostileInput("BAD_SIGNATURE", "SPDM: the key exchange is not signed by the leaf key") from error
