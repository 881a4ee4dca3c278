"""TPM 2.0 structures as they appear in evidence: TPMS_ATTEST, TPMT_SIGNATURE, TPMT_PUBLIC, PCR selections.

Source: TCG "Trusted Platform Module Library", Part 2 (Structures), rev 1.59; section numbers stand at each parser.
All integers are big-endian. Every parser refuses trailing bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntFlag

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.reader import Reader

ALG_RSA = 0x0001
ALG_SHA1 = 0x0004
ALG_AES = 0x0006
ALG_SHA256 = 0x000B
ALG_SHA384 = 0x000C
ALG_SHA512 = 0x000D
ALG_NULL = 0x0010
ALG_RSASSA = 0x0014
ALG_RSAES = 0x0015
ALG_RSAPSS = 0x0016
ALG_OAEP = 0x0017
ALG_ECDSA = 0x0018
ALG_ECDH = 0x0019
ALG_ECC = 0x0023
ALG_CFB = 0x0043

HASH_NAMES: Mapping[int, str] = {
    ALG_SHA1: "sha1",
    ALG_SHA256: "sha256",
    ALG_SHA384: "sha384",
    ALG_SHA512: "sha512",
}
"""TPM_ALG_ID -> hashlib name, for every hash this package understands."""

HASH_ALGS: Mapping[str, int] = {name: alg for alg, name in HASH_NAMES.items()}
HASH_SIZES: Mapping[str, int] = {"sha1": 20, "sha256": 32, "sha384": 48, "sha512": 64}

ECC_CURVES: Mapping[int, tuple[str, int]] = {
    0x0003: ("secp256r1", 32),
    0x0004: ("secp384r1", 48),
    0x0005: ("secp521r1", 66),
}
"""TPM_ECC_CURVE -> (name, coordinate size in bytes)."""

_COORDINATE_SIZES = frozenset(size for _, size in ECC_CURVES.values())

TPM_GENERATED = 0xFF544347
ST_ATTEST_QUOTE = 0x8018
ST_ATTEST_CERTIFY = 0x8017

PCR_COUNT = 24
_CC_POLICY_PCR = (0x17F).to_bytes(4, "big")
_MAX_SELECTIONS = 16


class ObjectAttributes(IntFlag):
    """TPMA_OBJECT (Part 2, 8.3): the bits this package reads."""

    FIXED_TPM = 0x2
    FIXED_PARENT = 0x10
    SENSITIVE_DATA_ORIGIN = 0x20
    USER_WITH_AUTH = 0x40
    NO_DA = 0x400
    RESTRICTED = 0x10000
    DECRYPT = 0x20000
    SIGN = 0x40000


@dataclass(frozen=True, slots=True)
class PcrSelection:
    """One TPMS_PCR_SELECTION (Part 2, 10.6.2): a bank and its PCR indices in ascending order."""

    bank: str
    pcrs: tuple[int, ...]

    @classmethod
    def of(cls, bank: str, pcrs: Iterable[int]) -> PcrSelection:
        """Build a selection. Raises ``ValueError`` for an unknown bank or an index outside 0-23."""
        indices = tuple(sorted(set(pcrs)))
        if bank not in HASH_ALGS:
            raise ValueError(f"unknown PCR bank {bank!r}")
        if any(not 0 <= i < PCR_COUNT for i in indices):
            raise ValueError("a PCR index must be within 0-23")
        return cls(bank, indices)

    def marshal(self) -> bytes:
        """TPML_PCR_SELECTION with this single entry."""
        bitmap = bytearray(3)
        for index in self.pcrs:
            bitmap[index // 8] |= 1 << (index % 8)
        return b"\0\0\0\1" + HASH_ALGS[self.bank].to_bytes(2, "big") + b"\3" + bytes(bitmap)


@dataclass(frozen=True, slots=True)
class ClockInfo:
    """TPMS_CLOCK_INFO (Part 2, 10.11.1); ``clock`` is milliseconds of powered time."""

    clock: int
    reset_count: int
    restart_count: int
    safe: bool


@dataclass(frozen=True, slots=True)
class Quoted:
    """TPMS_QUOTE_INFO (Part 2, 10.12.1)."""

    selections: tuple[PcrSelection, ...]
    pcr_digest: bytes


@dataclass(frozen=True, slots=True)
class Certified:
    """TPMS_CERTIFY_INFO (Part 2, 10.12.2)."""

    name: bytes
    qualified_name: bytes


@dataclass(frozen=True, slots=True)
class Attest:
    """TPMS_ATTEST (Part 2, 10.12.8) of type quote or certify."""

    qualified_signer: bytes
    extra_data: bytes
    clock_info: ClockInfo
    firmware_version: int
    attested: Quoted | Certified
    raw: bytes


@dataclass(frozen=True, slots=True)
class Signature:
    """TPMT_SIGNATURE (Part 2, 11.3.4).

    ``signature`` is the RSA signature, or for ECDSA the DER ``ECDSA-Sig-Value`` that X.509 libraries expect.
    """

    algorithm: int
    hash: str
    signature: bytes


@dataclass(frozen=True, slots=True)
class RsaKey:
    modulus: int
    exponent: int
    bits: int


@dataclass(frozen=True, slots=True)
class EccKey:
    curve: str
    x: int
    y: int


@dataclass(frozen=True, slots=True)
class Public:
    """TPMT_PUBLIC (Part 2, 12.2.4) of an RSA or ECC key.

    ``scheme`` and ``scheme_hash`` are ``None`` when the key leaves the choice to the caller (TPM_ALG_NULL).
    ``symmetric`` is the cipher a storage key protects its children with (``None`` for other keys);
    ``symmetric_bits`` and ``symmetric_mode`` are then its key size in bits and its TPM_ALG_ID of a mode.
    """

    name_alg: str
    attributes: ObjectAttributes
    auth_policy: bytes
    symmetric: int | None
    scheme: int | None
    scheme_hash: str | None
    key: RsaKey | EccKey
    raw: bytes
    symmetric_bits: int | None = None
    symmetric_mode: int | None = None

    @property
    def name(self) -> bytes:
        """The object's Name: nameAlg || H(TPMT_PUBLIC) (Part 1, 16)."""
        return HASH_ALGS[self.name_alg].to_bytes(2, "big") + hashlib.new(self.name_alg, self.raw).digest()


@dataclass(frozen=True, slots=True)
class KeyBlob:
    """A key that only this TPM can load again; ``private`` is encrypted by its parent inside the TPM."""

    public: bytes
    """TPM2B_PUBLIC content, i.e. a TPMT_PUBLIC."""
    private: bytes
    """TPM2B_PRIVATE content."""


def _hash_name(reader: Reader, field: str) -> str:
    alg = reader.u16(field)
    try:
        return HASH_NAMES[alg]
    except KeyError:
        raise reader.fail("UNKNOWN_ALGORITHM", f"{field} 0x{alg:04x} is not a known hash") from None


def _selections(reader: Reader) -> tuple[PcrSelection, ...]:
    count = reader.u32("PCR selection count")
    if count > _MAX_SELECTIONS:
        raise reader.fail("TOO_LARGE", f"{count} PCR selections, at most {_MAX_SELECTIONS} are allowed")
    found: list[PcrSelection] = []
    for _ in range(count):
        bank = _hash_name(reader, "PCR bank")
        size = reader.u8("PCR bitmap size")
        if not 1 <= size <= 4:
            raise reader.fail("BAD_VALUE", f"PCR bitmap of {size} bytes")
        bitmap = reader.take(size, "PCR bitmap")
        pcrs = tuple(8 * i + k for i, byte in enumerate(bitmap) for k in range(8) if byte >> k & 1)
        if pcrs and pcrs[-1] >= PCR_COUNT:
            raise reader.fail("BAD_VALUE", f"PCR {pcrs[-1]} does not exist")
        if any(bank == other.bank for other in found):
            raise reader.fail("BAD_VALUE", f"bank {bank} is selected twice")
        found.append(PcrSelection(bank, pcrs))
    return tuple(found)


def parse_attest(data: bytes) -> Attest:
    """Parse a TPMS_ATTEST (no size prefix).

    Raises ``HostileInput``: wrong magic (``NOT_TPM_GENERATED``), a type other than quote or certify, bad lengths.
    """
    reader = Reader(data, "TPMS_ATTEST")
    magic = reader.u32("magic")
    if magic != TPM_GENERATED:
        raise reader.fail("NOT_TPM_GENERATED", f"magic is 0x{magic:08x}, not 0x{TPM_GENERATED:08x}")
    kind = reader.u16("type")
    if kind not in (ST_ATTEST_QUOTE, ST_ATTEST_CERTIFY):
        raise reader.fail("WRONG_TYPE", f"type 0x{kind:04x} is neither a quote nor a certify")
    signer = reader.sized16("qualifiedSigner", 68)
    extra = reader.sized16("extraData", 64)
    clock = reader.u64("clock")
    resets, restarts = reader.u32("resetCount"), reader.u32("restartCount")
    safe = reader.u8("safe")
    if safe > 1:
        raise reader.fail("BAD_VALUE", f"safe is {safe}, not 0 or 1")
    firmware = reader.u64("firmwareVersion")
    attested: Quoted | Certified
    if kind == ST_ATTEST_QUOTE:
        attested = Quoted(_selections(reader), reader.sized16("pcrDigest", 64))
    else:
        attested = Certified(reader.sized16("name", 68), reader.sized16("qualifiedName", 68))
    reader.end()
    return Attest(signer, extra, ClockInfo(clock, resets, restarts, bool(safe)), firmware, attested, bytes(data))


def _der_integer(value: bytes) -> bytes:
    body = value.lstrip(b"\0") or b"\0"
    if body[0] & 0x80:
        body = b"\0" + body
    return b"\x02" + bytes([len(body)]) + body


def _der_ecdsa(r: bytes, s: bytes) -> bytes:
    body = _der_integer(r) + _der_integer(s)
    length = bytes([len(body)]) if len(body) < 0x80 else bytes([0x81, len(body)])
    return b"\x30" + length + body


def parse_signature(data: bytes) -> Signature:
    """Parse a TPMT_SIGNATURE. Raises ``HostileInput`` for an unknown scheme, hash, or a bad length."""
    reader = Reader(data, "TPMT_SIGNATURE")
    algorithm = reader.u16("sigAlg")
    if algorithm in (ALG_RSASSA, ALG_RSAPSS):
        hash_name = _hash_name(reader, "hash")
        signature = reader.sized16("sig", 512)
    elif algorithm == ALG_ECDSA:
        hash_name = _hash_name(reader, "hash")
        # A TPM pads r and s to the size of the curve, so a leading zero is no second encoding; 66 is P-521.
        r, s = reader.sized16("signatureR", 66), reader.sized16("signatureS", 66)
        if len(r) != len(s) or len(r) not in _COORDINATE_SIZES:
            raise reader.fail("BAD_VALUE", "signatureR and signatureS are not both of the size of a known curve")
        signature = _der_ecdsa(r, s)
    else:
        raise reader.fail("UNKNOWN_ALGORITHM", f"signature scheme 0x{algorithm:04x}")
    reader.end()
    return Signature(algorithm, hash_name, signature)


def _symmetric(reader: Reader) -> tuple[int | None, int | None, int | None]:
    algorithm = reader.u16("symmetric")
    if algorithm == ALG_NULL:
        return None, None, None
    return algorithm, reader.u16("symmetric keyBits"), reader.u16("symmetric mode")


_SCHEMES: Mapping[int, frozenset[int]] = {
    ALG_RSA: frozenset({ALG_RSASSA, ALG_RSAPSS, ALG_RSAES, ALG_OAEP}),
    ALG_ECC: frozenset({ALG_ECDSA, ALG_ECDH}),
}
"""Key type -> schemes of a known layout. ECDAA, for one, has one field more: a guess would misread the key."""


def _scheme(reader: Reader, kind: int) -> tuple[int | None, str | None]:
    scheme = reader.u16("scheme")
    if scheme == ALG_NULL:
        return None, None
    if scheme not in _SCHEMES[kind]:
        raise reader.fail("UNKNOWN_ALGORITHM", f"scheme 0x{scheme:04x} for a key of type 0x{kind:04x}")
    if scheme == ALG_RSAES:
        return scheme, None
    return scheme, _hash_name(reader, "scheme hash")


def _rsa_key(reader: Reader) -> RsaKey:
    bits, exponent = reader.u16("keyBits"), reader.u32("exponent")
    modulus = reader.sized16("modulus", 512)
    if bits % 8 or len(modulus) * 8 != bits or bits < 1024:
        raise reader.fail("BAD_VALUE", f"RSA modulus of {len(modulus)} bytes for a {bits}-bit key")
    return RsaKey(int.from_bytes(modulus, "big"), exponent or 65537, bits)


def _ecc_key(reader: Reader) -> EccKey:
    curve = reader.u16("curve")
    if curve not in ECC_CURVES:
        raise reader.fail("UNKNOWN_ALGORITHM", f"curve 0x{curve:04x}")
    name, size = ECC_CURVES[curve]
    if reader.u16("kdf") != ALG_NULL:
        raise reader.fail("BAD_VALUE", "a signing or storage key with a KDF scheme")
    x, y = reader.sized16("x", size), reader.sized16("y", size)
    return EccKey(name, int.from_bytes(x, "big"), int.from_bytes(y, "big"))


def parse_public(data: bytes) -> Public:
    """Parse a TPMT_PUBLIC (no size prefix) of an RSA or ECC key.

    Raises ``HostileInput`` for other object types, unknown algorithms and bad lengths.
    """
    reader = Reader(data, "TPMT_PUBLIC")
    kind = reader.u16("type")
    if kind not in (ALG_RSA, ALG_ECC):
        raise reader.fail("WRONG_TYPE", f"type 0x{kind:04x} is neither RSA nor ECC")
    name_alg = _hash_name(reader, "nameAlg")
    attributes = ObjectAttributes(reader.u32("objectAttributes"))
    policy = reader.sized16("authPolicy", 64)
    symmetric, symmetric_bits, symmetric_mode = _symmetric(reader)
    scheme, scheme_hash = _scheme(reader, kind)
    key = _rsa_key(reader) if kind == ALG_RSA else _ecc_key(reader)
    reader.end()
    return Public(
        name_alg=name_alg,
        attributes=attributes,
        auth_policy=policy,
        symmetric=symmetric,
        scheme=scheme,
        scheme_hash=scheme_hash,
        key=key,
        raw=bytes(data),
        symmetric_bits=symmetric_bits,
        symmetric_mode=symmetric_mode,
    )


def parse_public_any(data: bytes) -> Public:
    """Parse a TPMT_PUBLIC or a TPM2B_PUBLIC (16-bit size in front).

    The two cannot be confused: read as a TPM2B, the type at the head of a TPMT_PUBLIC is a size of 1 or 35, and what
    follows is then a nameAlg, which is no key type.
    """
    if len(data) >= 2 and int.from_bytes(data[:2], "big") == len(data) - 2:
        return parse_public(data[2:])
    return parse_public(data)


def pcr_digest(values: Mapping[int, bytes], pcrs: Iterable[int], hash_name: str) -> bytes:
    """The pcrDigest of a quote: the signing scheme's hash over the PCR values in ascending order.

    Raises ``HostileInput``: ``MISSING_PCR`` when a selected PCR has no value, ``BAD_VALUE`` when the values are not
    digests of one size (the result covers only their concatenation, so bytes could move from one PCR to the next).
    """
    selected = sorted(set(pcrs))
    for index in selected:
        if index not in values:
            raise HostileInput("MISSING_PCR", f"no value for PCR {index}, which the quote covers")
    sizes = {len(values[index]) for index in selected}
    if len(sizes) > 1 or not sizes <= set(HASH_SIZES.values()):
        raise HostileInput("BAD_VALUE", "the PCR values are not digests of one size")
    digest = hashlib.new(hash_name)
    for index in selected:
        digest.update(values[index])
    return digest.digest()


def pcr_policy(selection: PcrSelection, values: Mapping[int, bytes]) -> bytes:
    """authPolicy (SHA-256) of an object that TPM2_PolicyPCR alone opens, at these values (Part 3, 23.7).

    Raises ``HostileInput``: as ``pcr_digest``.
    """
    said = _CC_POLICY_PCR + selection.marshal() + pcr_digest(values, selection.pcrs, "sha256")
    return hashlib.sha256(bytes(32) + said).digest()


def extend(hash_name: str, value: bytes, digest: bytes) -> bytes:
    """PCR extend (Part 1, 17.3): new = H(old || digest)."""
    return hashlib.new(hash_name, value + digest).digest()
