"""What Microsoft's attestation service is asked about a guest, and the sealed form in which it answers.

Source: guest attestation protocol 2.0, as Microsoft's public clients speak it. The quote has no nonce of the service:
its answer is encrypted to a key that the same TPM certifies, and repeats the client's payload; nothing else makes
it fresh. Base64 is the standard one in some members and the URL one in others, as those clients have it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.eventlog import MAX_LOG_SIZE
from cgpu_agent.wire.hcl import HclReport, ReportType
from cgpu_agent.wire.strictjson import Fields, b64, unb64url
from cgpu_agent.wire.tpm import ALG_RSASSA, parse_attest, parse_public, parse_signature

GUEST_PATH: Final = "/attest/AzureGuest?api-version=2020-10-01"
KEYS_PATH: Final = "/certs"
LINUX_PCRS: Final = tuple(range(8))
"""What its Linux clients quote, SHA-256."""
TRANSPORT_AAD: Final = b"Transport Key"
"""Additional data of AES-GCM in every answer."""
MAX_ANSWER: Final = 256 << 10

_NONCE = re.compile(r"[0-9A-Za-z_-]{16,128}")
_KEY_SIZE: Final = 256
_MAX_TOKEN: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class GuestOs:
    """What the guest says of itself; the service copies it into its token, and believes none of it."""

    distribution: str
    major: int
    minor: int

    @classmethod
    def of(cls, release: Mapping[str, str]) -> GuestOs:
        """From os-release(5). Versions that are no numbers count as 0, as other clients have it."""
        numbers = [int(part) if part.isdecimal() else 0 for part in release.get("VERSION_ID", "").split(".")]
        major, minor = (*numbers, 0)[:2]
        return cls(release.get("NAME", "Linux"), major, minor)


@dataclass(frozen=True, slots=True)
class GuestTpm:
    """What the TPM says, all of one moment.

    Attributes:
        ak: TPMT_PUBLIC of the platform AK.
        ak_certificate: DER.
        quote: TPMS_ATTEST over ``pcrs`` without qualifying data; ``quote_signature``: TPMT_SIGNATURE.
        pcrs: SHA-256 values.
        key: TPMT_PUBLIC of the key that the answer is encrypted to.
        certify: TPMS_ATTEST of it by the AK without qualifying data; ``certify_signature``: TPMT_SIGNATURE.
    """

    ak: bytes
    ak_certificate: bytes
    quote: bytes
    quote_signature: bytes
    pcrs: Mapping[int, bytes]
    key: bytes
    certify: bytes
    certify_signature: bytes


@dataclass(frozen=True, slots=True)
class Isolation:
    """What stands below the vTPM. ``proof``: AMD's certificates as PEM, the chip's first, or the TD quote."""

    report: HclReport
    proof: bytes


@dataclass(frozen=True, slots=True)
class SealedToken:
    """The answer: a token under AES-GCM, whose key is under RSAES-PKCS1-v1_5 to the TPM's key."""

    wrapped_key: bytes
    iv: bytes
    ciphertext: bytes
    """With its tag behind it."""


def encode_request(os: GuestOs, tpm: GuestTpm, isolation: Isolation | None, *, boot_log: bytes, nonce: str) -> bytes:
    """Body of the POST; the same bytes for the same arguments.

    Args:
        isolation: ``None``: Trusted Launch, which has no hardware report.
        boot_log: the firmware's log; empty where there is none.
        nonce: 16 to 128 characters of base64url; the token repeats it as its client payload.

    Raises:
        Misuse: ``BAD_NONCE``.
        HostileInput: ``TOO_LARGE``, ``UNKNOWN_ALGORITHM`` (a signature other than RSASSA), and ``wire.tpm``'s.
    """
    if _NONCE.fullmatch(nonce) is None:
        raise Misuse("BAD_NONCE", "a nonce for the attestation service is 16 to 128 characters of base64url")
    if len(boot_log) > MAX_LOG_SIZE:
        raise HostileInput("TOO_LARGE", f"an event log of more than {MAX_LOG_SIZE} bytes")
    told = {
        "AttestationProtocolVersion": "2.0",
        "ClientPayload": {"nonce": b64(nonce.encode("ascii"))},
        "IsolationInfo": {"Type": "TrustedLaunch"} if isolation is None else _isolation(isolation),
        "OSBuild": b64(b"NotApplication"),
        "OSDistro": b64(os.distribution.encode("utf-8")),
        "OSType": b64(b"Linux"),
        "OSVersionMajor": os.major,
        "OSVersionMinor": os.minor,
        "TcgLogs": b64(boot_log),
        "TpmInfo": _tpm(tpm),
    }
    return strictjson.dumps({"AttestationInfo": b64url(strictjson.dumps(told))})


def _tpm(tpm: GuestTpm) -> dict[str, object]:
    for attest in (tpm.quote, tpm.certify):
        parse_attest(attest)
    return {
        "AikCert": b64(tpm.ak_certificate),
        "AikPub": b64(_public(tpm.ak)),
        "EncKeyCertifyInfo": b64(tpm.certify),
        "EncKeyCertifyInfoSignature": b64(_bare(tpm.certify_signature)),
        "EncKeyPub": b64(_public(tpm.key)),
        "PCRs": [{"Digest": b64(value), "Index": index} for index, value in sorted(tpm.pcrs.items())],
        "PcrQuote": b64(tpm.quote),
        "PcrSet": sorted(tpm.pcrs),
        "PcrSignature": b64(_bare(tpm.quote_signature)),
    }


def _public(public: bytes) -> bytes:
    """A TPM2B_PUBLIC."""
    parse_public(public)
    return len(public).to_bytes(2, "big") + public


def _bare(signature: bytes) -> bytes:
    """The signature alone: the service knows of one scheme only."""
    parsed = parse_signature(signature)
    if (parsed.algorithm, parsed.hash) != (ALG_RSASSA, "sha256"):
        raise HostileInput("UNKNOWN_ALGORITHM", "the attestation service takes signatures by RSASSA and SHA-256 only")
    return parsed.signature


def _isolation(isolation: Isolation) -> dict[str, object]:
    report = isolation.report
    if report.kind is ReportType.TDX:
        return {"Evidence": {"Proof": b64(isolation.proof), "RunTimeData": b64(report.claims)}, "Type": "Tdx"}
    proof = {"SnpReport": b64url(report.hardware), "VcekCertChain": b64url(isolation.proof)}
    evidence = {"Proof": b64url(strictjson.dumps(proof)), "RunTimeData": b64url(report.claims)}
    return {"Evidence": evidence, "Type": "SevSnp"}


def parse_answer(body: bytes) -> SealedToken:
    """Read the answer; members that are not needed may be there.

    Raises:
        HostileInput: ``TOO_LARGE``, ``BAD_JSON``, ``DUPLICATE_KEY``, ``BAD_FIELD``.
    """
    outer = Fields(strictjson.loads(body, "attestation answer", MAX_ANSWER), "attestation answer")
    try:
        inner = unb64url(outer.text("token", MAX_ANSWER).rstrip("="))
    except ValueError:
        raise outer.fail("token is not base64url") from None
    fields = Fields(strictjson.loads(inner, "sealed token", MAX_ANSWER), "sealed token")
    # The leading zero of a big-endian number may be there.
    wrapped = fields.base64("EncryptedInnerKey", _KEY_SIZE + 1)
    wrapped = wrapped[1:] if len(wrapped) > _KEY_SIZE and wrapped[0] == 0 else wrapped
    iv = fields.fields("EncryptionParams").base64("Iv", 12)
    tag = fields.base64("AuthenticationData", 16)
    ciphertext = fields.base64("Jwt", _MAX_TOKEN)
    if (len(wrapped), len(iv), len(tag)) != (_KEY_SIZE, 12, 16):
        raise fields.fail("key, IV or tag have another size")
    return SealedToken(wrapped, iv, ciphertext + tag)


def b64url(data: bytes) -> str:
    """base64url without padding (RFC 7515, 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")
