"""Enrolment: an AK that nobody certified gets a short-lived certificate, once its TPM has shown that it holds it.

Two requests and no memory in between. The secret that ActivateCredential opens (TCG "Trusted Platform Module
Library", Part 1, rev 1.59, 24) is the replicas' own tag of the ticket: only a TPM that holds both keys learns it, and
whoever knows it shows with one value that the ticket is ours, unaltered, and was answered by that TPM.

    ticket = 01 || issued at (u64) || not after (u64) || 16 random bytes || SHA-256 of the EK certificate
             || EK class (u8 size || text) || TPMT_PUBLIC of the AK

Answered twice, a ticket gives the same certificate twice: same serial number, same end.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from cgpu_agent.errors import HostileInput
from cgpu_agent.service.replica import ReplicaKeys
from cgpu_agent.verifier.certificate import EK, load_certificate
from cgpu_agent.verifier.chain import verify_chain
from cgpu_agent.verifier.credential import make_credential
from cgpu_agent.verifier.ekclass import EkClass
from cgpu_agent.verifier.keys import (
    AttestationKey,
    certificate_key,
    key_of,
    load_attestation_key,
    require_restricted,
    same_key,
)
from cgpu_agent.wire.reader import Reader
from cgpu_agent.wire.tpm import parse_public_any

TICKET_SECONDS: Final = 300
"""How long a TPM may take to answer; the slowest need seconds."""
MAX_TICKET: Final = 1024
MAX_INTERMEDIATES: Final = 4

_VERSION: Final = 1
_LABEL: Final = "cgpu/enrol/1"
_MAX_PUBLIC: Final = 700
_END_OF_TIME: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class EkRoots:
    """Trust anchors for EK certificates of one class."""

    ek_class: EkClass
    roots: tuple[x509.Certificate, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """What a VM shows: public keys as TPMT_PUBLIC, certificates in DER."""

    ak_public: bytes
    ek_public: bytes
    ek_certificate: bytes
    intermediates: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Challenge:
    """What the VM's TPM has to open: contents of TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET."""

    ticket: bytes
    credential_blob: bytes
    encrypted_secret: bytes
    expires: int


@dataclass(frozen=True, slots=True)
class Enrolment:
    """An AK that was seen in the TPM of an EK.

    Attributes:
        ak: restricted, with TPMT_PUBLIC.
        ek_class: whose root the EK's certificate led to.
        ek_certificate_sha256: which EK that was; for the log.
        issued_at, not_after: seconds since the epoch: of the challenge, and the end of the EK's chain.
        serial: 19 bytes that follow from the ticket.
    """

    ak: AttestationKey
    ek_class: EkClass
    ek_certificate_sha256: bytes
    issued_at: int
    not_after: int
    serial: int


def challenge(
    request: Request,
    trust: Sequence[EkRoots],
    intermediates: Sequence[x509.Certificate],
    keys: ReplicaKeys,
    audience: str,
    *,
    now: int,
    random: Callable[[int], bytes] = os.urandom,
) -> Challenge:
    """Judge what the VM shows, and wrap the secret for its TPM.

    The AK is judged before its Name is used: a TPM also activates a credential for a key that signs anything, or that
    came from outside (attack 27).

    Args:
        trust: roots of all classes; they are tried in this order.
        intermediates: CA certificates that VMs do not bring along.
        audience: this service's own name.
        now: seconds since the epoch.

    Raises:
        HostileInput: ``AK_NOT_RESTRICTED``, ``AK_ATTRIBUTES_UNKNOWN``, ``EK_CERTIFICATE_MISMATCH``,
            ``EK_NOT_SUITABLE``, ``NO_ROOTS``, and what the loaders, ``verify_chain`` and ``make_credential`` raise.
    """
    ak = load_attestation_key(request.ak_public)
    require_restricted(ak)
    if ak.public is None or ak.name is None or len(ak.public.raw) > _MAX_PUBLIC:
        raise HostileInput("AK_ATTRIBUTES_UNKNOWN", "the AK came without a TPMT_PUBLIC of usual size")
    ek = parse_public_any(request.ek_public)
    certificate = load_certificate(request.ek_certificate)
    if not same_key(certificate_key(certificate), key_of(ek)):
        raise HostileInput("EK_CERTIFICATE_MISMATCH", "the EK certificate is for another key than the EK")
    brought = [load_certificate(each) for each in request.intermediates[:MAX_INTERMEDIATES]]
    ek_class, not_after = _classify(certificate, [*brought, *intermediates], trust, now)
    text = ek_class.text.encode("ascii")
    ticket = b"".join(
        (
            bytes([_VERSION]),
            now.to_bytes(8, "big"),
            not_after.to_bytes(8, "big"),
            random(16),
            certificate.fingerprint(SHA256()),
            bytes([len(text)]),
            text,
            ak.public.raw,
        )
    )
    secret = keys.tag(_LABEL, audience.encode(), ticket)
    credential_blob, encrypted_secret = make_credential(ek, ak.name, secret, random=random)
    return Challenge(ticket, credential_blob, encrypted_secret, now + TICKET_SECONDS)


def _classify(
    certificate: x509.Certificate, intermediates: Sequence[x509.Certificate], trust: Sequence[EkRoots], now: int
) -> tuple[EkClass, int]:
    at = datetime.fromtimestamp(now, timezone.utc)
    refusal = HostileInput("NO_ROOTS", "no root for EK certificates is configured")
    for number, each in enumerate(trust):
        try:
            path = verify_chain(certificate, intermediates, each.roots, purpose=EK, at=at)
        except HostileInput as error:
            if number == 0 or error.slug != "UNKNOWN_ISSUER":
                refusal = error  # the one that says most: another class's roots merely do not know the issuer
        else:
            return each.ek_class, min(int(path.not_after.timestamp()), _END_OF_TIME)
    raise refusal


def complete(ticket: bytes, secret: bytes, keys: ReplicaKeys, audience: str, *, now: int) -> Enrolment:
    """Judge the TPM's answer.

    Raises ``HostileInput``: ``NOT_ACTIVATED`` (not our ticket, or not its secret), ``TICKET_EXPIRED``.
    """
    if not keys.recognise(secret, _LABEL, audience.encode(), ticket):
        raise HostileInput("NOT_ACTIVATED", "this is not the secret of this ticket: no TPM of ours answered it")
    reader = Reader(ticket, "ticket")
    if reader.u8("version") != _VERSION:
        raise HostileInput("NOT_ACTIVATED", "the ticket is of another version")
    issued_at, not_after = reader.u64("issued at"), reader.u64("not after")
    reader.take(16, "random")
    fingerprint = reader.take(32, "EK certificate")
    ek_class = EkClass(reader.take(reader.u8("class size"), "class").decode("ascii"))
    ak = load_attestation_key(reader.rest())
    if now - issued_at > TICKET_SECONDS:
        raise HostileInput("TICKET_EXPIRED", f"the challenge is older than {TICKET_SECONDS} seconds")
    serial = int.from_bytes(hashlib.sha256(b"cgpu/ak-serial/1\0" + ticket).digest()[:19], "big") | 1
    return Enrolment(ak, ek_class, fingerprint, issued_at, not_after, serial)
