"""Public keys that evidence rests on: loaded from any of their forms, refused when weak."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    SECP384R1,
    SECP521R1,
    EllipticCurve,
    EllipticCurvePublicKey,
    EllipticCurvePublicNumbers,
)
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey, RSAPublicNumbers
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.der import is_pem, pem_blocks, trim_der
from cgpu_agent.wire.tpm import ObjectAttributes, Public, RsaKey, parse_public_any

PublicKey = RSAPublicKey | EllipticCurvePublicKey

MIN_RSA_BITS: Final = 2048
MAX_RSA_BITS: Final = 8192
"""A larger modulus only costs the verifier time; no TPM and no CA of one has it."""
MIN_EXPONENT: Final = 65537

CURVES: Final[dict[str, EllipticCurve]] = {
    "secp256r1": SECP256R1(),
    "secp384r1": SECP384R1(),
    "secp521r1": SECP521R1(),
}

_AK_MUST: Final = (
    ObjectAttributes.RESTRICTED
    | ObjectAttributes.SIGN
    | ObjectAttributes.FIXED_TPM
    | ObjectAttributes.SENSITIVE_DATA_ORIGIN
)


@dataclass(frozen=True, slots=True)
class AttestationKey:
    """An attestation key (AK): the public key, and the TPM's description of it where one came along.

    Attributes:
        key: never weak: construction raises ``HostileInput("WEAK_KEY")``.
        public: TPMT_PUBLIC, or ``None`` for a bare key, of which nobody here can tell whether it is restricted.
    """

    key: PublicKey
    public: Public | None

    def __post_init__(self) -> None:
        require_strong(self.key)

    @property
    def attributes(self) -> Literal["restricted", "unrestricted", "unknown"]:
        """``restricted``: a TPM signs with it only what that TPM itself made (Part 1, 25.1.4)."""
        if self.public is None:
            return "unknown"
        found = self.public.attributes
        fits = found & _AK_MUST == _AK_MUST and not found & ObjectAttributes.DECRYPT
        return "restricted" if fits else "unrestricted"

    @property
    def name(self) -> bytes | None:
        """The object's Name, for a key with a TPMT_PUBLIC."""
        return None if self.public is None else self.public.name

    @property
    def spki(self) -> bytes:
        """DER SubjectPublicKeyInfo."""
        return self.key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def require_strong(key: object) -> PublicKey:
    """Return the key if it is RSA of at least 2048 bits or on P-256, P-384 or P-521.

    Raises ``HostileInput``: ``WEAK_KEY``, or ``UNKNOWN_ALGORITHM`` for another kind of key.
    """
    if isinstance(key, RSAPublicKey):
        if not MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
            raise HostileInput("WEAK_KEY", f"an RSA key of {key.key_size} bits")
        exponent = key.public_numbers().e
        if not MIN_EXPONENT <= exponent < 1 << 32:
            raise HostileInput("WEAK_KEY", "an RSA key with an unsuitable public exponent")
        return key
    if isinstance(key, EllipticCurvePublicKey):
        if key.curve.name not in CURVES:
            raise HostileInput("WEAK_KEY", "an EC key on a curve other than P-256, P-384 or P-521")
        return key
    raise HostileInput("UNKNOWN_ALGORITHM", "a key that is neither RSA nor EC")


def key_of(public: Public) -> PublicKey:
    """The public key of a TPMT_PUBLIC. Raises ``HostileInput``: ``BAD_KEY`` (a point off its curve), ``WEAK_KEY``."""
    numbers = public.key
    key: PublicKey
    try:
        if isinstance(numbers, RsaKey):
            key = RSAPublicNumbers(numbers.exponent, numbers.modulus).public_key()
        else:
            key = EllipticCurvePublicNumbers(numbers.x, numbers.y, CURVES[numbers.curve]).public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise HostileInput("BAD_KEY", "TPMT_PUBLIC: the numbers are no public key") from error
    if isinstance(numbers, RsaKey) and key.key_size != numbers.bits:
        raise HostileInput("BAD_KEY", f"TPMT_PUBLIC: a modulus of {key.key_size} bits in a {numbers.bits}-bit key")
    return require_strong(key)


def same_key(a: PublicKey, b: PublicKey) -> bool:
    """Whether two public keys are one."""
    if isinstance(a, RSAPublicKey) and isinstance(b, RSAPublicKey):
        return a.public_numbers() == b.public_numbers()
    if isinstance(a, EllipticCurvePublicKey) and isinstance(b, EllipticCurvePublicKey):
        return a.public_numbers() == b.public_numbers()
    return False


def certificate_from_der(der: bytes) -> x509.Certificate:
    """Parse one certificate without padding. Raises ``HostileInput("BAD_CERTIFICATE")``."""
    try:
        return x509.load_der_x509_certificate(der)
    except (ValueError, TypeError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        raise HostileInput("BAD_CERTIFICATE", "not an X.509 certificate") from error


def certificate_key(certificate: x509.Certificate) -> PublicKey:
    """The certified key. Raises ``HostileInput``: ``BAD_CERTIFICATE``, ``WEAK_KEY``, ``UNKNOWN_ALGORITHM``."""
    try:
        key = certificate.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise HostileInput("BAD_CERTIFICATE", "a certificate with an unreadable public key") from error
    return require_strong(key)


def _spki_key(der: bytes) -> PublicKey:
    try:
        key = load_der_public_key(der)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise HostileInput("BAD_KEY", "not a SubjectPublicKeyInfo") from error
    return require_strong(key)


def _certified_key(der: bytes) -> PublicKey:
    return certificate_key(certificate_from_der(trim_der(der)))


def _der_key(der: bytes) -> PublicKey:
    # Where a SubjectPublicKeyInfo has an OID, a certificate has a tag or a number: no bytes are both.
    try:
        return _spki_key(der)
    except HostileInput as error:
        if error.slug != "BAD_KEY":
            raise
    return _certified_key(der)


def load_attestation_key(data: bytes) -> AttestationKey:
    """Load an AK from PEM (public key or certificate), DER (likewise), TPMT_PUBLIC or TPM2B_PUBLIC.

    A key from a certificate is only that key: who certified it is for ``endorsement`` to judge.

    Raises ``HostileInput``: ``BAD_KEY``, ``BAD_CERTIFICATE``, ``BAD_PEM``, ``WEAK_KEY``, ``WEAK_HASH`` (a Name by
    SHA-1), and what ``trim_der`` and the wire parser of TPMT_PUBLIC raise.
    """
    if is_pem(data):
        blocks = pem_blocks(data)
        if len(blocks) != 1 or blocks[0][0] not in ("PUBLIC KEY", "CERTIFICATE"):
            raise HostileInput("BAD_KEY", "PEM: one public key or one certificate is wanted")
        label, der = blocks[0]
        return AttestationKey(_spki_key(der) if label == "PUBLIC KEY" else _certified_key(der), None)
    if data[:1] == b"\x30":
        return AttestationKey(_der_key(data), None)
    public = parse_public_any(data)
    if public.name_alg == "sha1":
        raise HostileInput("WEAK_HASH", "TPMT_PUBLIC: a Name by SHA-1")
    return AttestationKey(key_of(public), public)


def require_restricted(ak: AttestationKey) -> None:
    """Refuse an AK that could sign an attestation structure made up outside of the TPM.

    Demanded: restricted, sign, fixedTPM, sensitiveDataOrigin, and not decrypt (Part 2, 8.3; Part 1, 25.1.4).

    Raises ``HostileInput``: ``AK_NOT_RESTRICTED``, or ``AK_ATTRIBUTES_UNKNOWN`` for a bare key.
    """
    if ak.attributes == "unknown":
        raise HostileInput("AK_ATTRIBUTES_UNKNOWN", "the AK came without TPMT_PUBLIC, so its attributes are unknown")
    if ak.attributes != "restricted":
        raise HostileInput("AK_NOT_RESTRICTED", "the AK is not a restricted signing key made by and fixed to one TPM")
