"""Certificate chains of NVIDIA devices and reference values: fixed order, fixed algorithms, a pinned root key.

Not a search like ``chain``: these chains come complete and in order, so each certificate must be signed by the next.
The pin is the root's public key and not a certificate, because NVIDIA has issued several root certificates for one
key. All of them are ECDSA on P-384 with SHA-384, down to the device.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtensionOID, NameOID

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.verifier.certificate import CertificateFacts, require_signed, require_valid
from cgpu_agent.verifier.chain import CertificatePath, PathCertificate
from cgpu_agent.verifier.keys import certificate_key
from cgpu_agent.wire.text import printable

NVIDIA_DEVICE_ROOT: Final = bytes.fromhex("a90c4eb5acfd3e3d03a25db6a26b84f720ad0503196c627c21ddd48dd85b06a4")
"""SHA-256 of the SubjectPublicKeyInfo of "NVIDIA Device Identity CA", as in NVIDIA's verifiers (nvtrust 2.7.3) and in
the root that docs.ndis.nvidia.com publishes."""
NVIDIA_RIM_ROOT: Final = bytes.fromhex("dec1dc316477aa851eebdf51327ae9f864bc8d89254657ed1e7eb9168af1e1a3")
"""The same of "NVIDIA CoRIM signing Root CA", as in NVIDIA's verifiers (nvtrust 2.7.3)."""

DEVICE_CHAIN_LENGTH: Final = 5
"""Device firmware, boot ROM, provisioner, chip family, root."""

_KNOWN_CRITICAL: Final = frozenset({ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE})
_DEVICE_NAME_OID: Final = x509.ObjectIdentifier("1.3.6.1.4.1.412.274.1")  # DMTF: device information
_DEVICE_NAME = re.compile(rb"\x0c.NVIDIA:(?P<chip>[A-Z0-9_]{2,8}):(?P<id>[0-9A-F]{16})", re.DOTALL)
"""A DER UTF8String, whose length X.509 parsing has checked."""
_SERIAL_SIZE: Final = 9  # of the boot ROM's certificate: a type byte, then the device's PDI


@dataclass(frozen=True, slots=True)
class PinnedRoots:
    """Root keys that a relying party trusts: SHA-256 digests of their SubjectPublicKeyInfo. Never empty."""

    spki: frozenset[bytes]

    def __post_init__(self) -> None:
        """Raises ``Misuse`` (``NO_ROOTS``)."""
        if not self.spki:
            raise Misuse("NO_ROOTS", "no root key is configured, so no certificate can be trusted")

    @classmethod
    def of(cls, certificates: Sequence[x509.Certificate]) -> PinnedRoots:
        """The keys of these certificates, whatever else they say."""
        return cls(frozenset(spki_digest(each) for each in certificates))


NVIDIA_DEVICE_ROOTS: Final = PinnedRoots(frozenset({NVIDIA_DEVICE_ROOT}))
NVIDIA_RIM_ROOTS: Final = PinnedRoots(frozenset({NVIDIA_RIM_ROOT}))


@dataclass(frozen=True, slots=True)
class PinnedPath:
    """A verified chain: the leaf first, a certificate of a pinned root key last."""

    facts: tuple[CertificateFacts, ...]
    root: bytes

    @property
    def leaf(self) -> x509.Certificate:
        """The certificate of the key that signs evidence."""
        return self.facts[0].certificate

    @property
    def leaf_key(self) -> EllipticCurvePublicKey:
        """Its key, on P-384."""
        return _p384_key(self.facts[0])

    @property
    def path(self) -> CertificatePath:
        """The same for people and JSON."""
        return CertificatePath(
            tuple(PathCertificate(each.subject_text, each.sha256.hex(), each.not_after) for each in self.facts)
        )


def spki_digest(certificate: x509.Certificate) -> bytes:
    """SHA-256 of a certificate's SubjectPublicKeyInfo. Raises as ``certificate_key`` does."""
    key = certificate_key(certificate)
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def verify_pinned_chain(
    certificates: Sequence[x509.Certificate], *, roots: PinnedRoots, length: range, at: datetime
) -> PinnedPath:
    """Verify a complete chain, leaf first.

    Every certificate: valid at ``at``, P-384, signed by the next with SHA-384, no unknown critical extension. The
    leaf: signs, and is no CA. The others: CAs, path length kept. The last: of a pinned key, and signed by it.

    Args:
        certificates: all of them, in order.
        roots: the keys of which the last must hold one.
        length: allowed number of certificates. A root alone verifies against itself, so it counts.
        at: the moment of judgement, with a time zone.

    Raises:
        HostileInput: ``CHAIN_LENGTH``, ``UNKNOWN_ROOT``, ``WRONG_ISSUER``, ``BAD_CERTIFICATE_SIGNATURE``,
            ``WEAK_HASH``, ``WEAK_KEY``, ``NOT_A_CA``, ``WRONG_PURPOSE``, ``PATH_TOO_LONG``,
            ``UNKNOWN_CRITICAL_EXTENSION``, ``CERTIFICATE_NOT_YET_VALID``, ``CERTIFICATE_EXPIRED``,
            ``BAD_CERTIFICATE``.
    """
    if len(certificates) not in length:
        allowed = str(length.start) if len(length) == 1 else f"{length.start} to {length.stop - 1}"
        raise HostileInput("CHAIN_LENGTH", f"{len(certificates)} certificates, {allowed} are expected")
    facts = tuple(CertificateFacts.of(each) for each in certificates)
    root = spki_digest(certificates[-1])
    if root not in roots.spki:
        raise HostileInput("UNKNOWN_ROOT", f"{facts[-1].subject_text} does not hold a trusted root key")
    for position, (child, issuer) in enumerate(zip(facts, (*facts[1:], facts[-1]), strict=True)):
        _require_sound(child)
        _require_role(child, position)
        if child.issuer != issuer.subject:
            raise HostileInput("WRONG_ISSUER", f"{child.subject_text} was not issued by {issuer.subject_text}")
        require_signed(child, issuer)
        require_valid(child, at)
    return PinnedPath(facts, root)


def _p384_key(facts: CertificateFacts) -> EllipticCurvePublicKey:
    key = certificate_key(facts.certificate)
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise HostileInput("WEAK_KEY", f"{facts.subject_text} has a key that is not on P-384")
    return key


def _require_sound(facts: CertificateFacts) -> None:
    _p384_key(facts)
    if facts.signature_hash != "sha384":
        raise HostileInput("WEAK_HASH", f"{facts.subject_text} is not signed over SHA-384")
    unknown = facts.critical - _KNOWN_CRITICAL
    if unknown or facts.constrains_names:
        raise HostileInput("UNKNOWN_CRITICAL_EXTENSION", f"{facts.subject_text} has constraints not known here")


def _require_role(facts: CertificateFacts, position: int) -> None:
    usage = facts.key_usage
    if position == 0:
        if facts.ca or usage is None or not usage.digital_signature:
            raise HostileInput("WRONG_PURPOSE", f"{facts.subject_text} is not the certificate of a signing key")
        return
    if not facts.ca or usage is None or not usage.key_cert_sign:
        raise HostileInput("NOT_A_CA", f"{facts.subject_text} may not issue certificates")
    if facts.path_length is not None and position - 1 > facts.path_length:
        raise HostileInput("PATH_TOO_LONG", f"{facts.subject_text} may not have {position - 1} CAs below it")


@dataclass(frozen=True, slots=True)
class DeviceIdentity:
    """Who a device is, by the certificates that a pinned root vouches for.

    Attributes:
        chip: ``GH100``, ``GB100``, ``GB20X``, ``LS_10``.
        device_id: 16 hex digits, unique to the device.
        ueid: serial number of the leaf, decimal, as NVIDIA names devices.
        hwmodel: common name of the boot ROM's certificate.
        pdi: identifier within an NVLink fabric: the last 8 bytes of the boot ROM certificate's serial number;
            ``None`` where that has another length. Seen to be so on every public GH100 and LS10.
        keys: digests of the keys of leaf and boot ROM. The leaf's changes with its firmware, the boot ROM's never.
    """

    chip: str
    device_id: str
    ueid: str
    hwmodel: str
    pdi: bytes | None
    keys: tuple[bytes, bytes]


def device_identity(path: PinnedPath) -> DeviceIdentity:
    """Read a device's identity from its verified chain. Raises ``HostileInput`` (``BAD_DEVICE_NAME``)."""
    boot_rom = path.facts[1].certificate
    chip, device_id = _device_name(path.leaf)
    names = boot_rom.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1:
        raise HostileInput("BAD_DEVICE_NAME", "the boot ROM's certificate has no single common name")
    serial = boot_rom.serial_number
    fits = (serial.bit_length() + 7) // 8 == _SERIAL_SIZE
    return DeviceIdentity(
        chip=chip,
        device_id=device_id,
        ueid=str(path.leaf.serial_number),
        hwmodel=printable(str(names[0].value), 64),
        pdi=serial.to_bytes(_SERIAL_SIZE, "big")[1:] if fits else None,
        keys=(spki_digest(path.leaf), spki_digest(boot_rom)),
    )


def _device_name(leaf: x509.Certificate) -> tuple[str, str]:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        found = [each for each in names.get_values_for_type(x509.OtherName) if each.type_id == _DEVICE_NAME_OID]
    except (x509.ExtensionNotFound, ValueError) as error:
        raise HostileInput("BAD_DEVICE_NAME", "the leaf certificate does not name its device") from error
    if len(found) != 1:
        raise HostileInput("BAD_DEVICE_NAME", "the leaf certificate does not name exactly one device")
    match = _DEVICE_NAME.fullmatch(found[0].value)
    if match is None:
        raise HostileInput("BAD_DEVICE_NAME", "the device's name in the leaf certificate is malformed")
    return match["chip"].decode("ascii"), match["id"].decode("ascii")
