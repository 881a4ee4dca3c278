"""Public templates of the keys this package makes in a TPM, as marshalled TPMT_PUBLIC.

Sources: TCG "TPM 2.0 Library", Part 2, 12.2.4 (TPMT_PUBLIC) and 13.4 (TPMA_NV); TCG "EK Credential Profile for TPM
Family 2.0", rev 2.5, B.3.3 and B.3.4 (templates L-1 and L-2). Keys of ours carry noDA: somebody else's wrong auth
cannot lock them.
"""

from __future__ import annotations

from typing import Final

from cgpu_agent.backends.base import AkAlgorithm
from cgpu_agent.wire.tpm import (
    ALG_ECC,
    ALG_ECDSA,
    ALG_NULL,
    ALG_RSA,
    ALG_RSASSA,
    ALG_SHA256,
    ObjectAttributes,
)

_CURVE_P256: Final = 0x0003
_ALG_KEYEDHASH: Final = 0x0008
_AES128_CFB: Final = bytes.fromhex("000600800043")
"""TPMT_SYM_DEF_OBJECT: AES, 128 bits, CFB."""

_OWN: Final = (
    ObjectAttributes.FIXED_TPM
    | ObjectAttributes.FIXED_PARENT
    | ObjectAttributes.SENSITIVE_DATA_ORIGIN
    | ObjectAttributes.USER_WITH_AUTH
    | ObjectAttributes.NO_DA
    | ObjectAttributes.RESTRICTED
)
_EK: Final = 0x000300B2
"""fixedTPM, fixedParent, sensitiveDataOrigin, adminWithPolicy, restricted, decrypt."""
_EK_POLICY: Final = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
"""TPM2_PolicySecret(TPM_RH_ENDORSEMENT): PolicyA of the profile."""

EK_HANDLES: Final = {"rsa": 0x81010001, "ecc": 0x81010016}
"""Where platforms persist an EK. The ECC one is often P-384; that is then the one its certificate names."""
STORAGE_HANDLE: Final = 0x8100C670
"""Where we keep the owner hierarchy's storage key that sealed keys lie below: with an owner password set, it could
not be made again at each use."""
EK_TEMPLATE_INDICES: Final = {"rsa": 0x01C00004, "ecc": 0x01C0000C}
EK_NONCE_INDICES: Final = {"rsa": 0x01C00003, "ecc": 0x01C0000B}

OWNER_INDEX: Final = 1 << 1 | 1 << 2 | 1 << 17 | 1 << 18
"""TPMA_NV: OWNERWRITE, AUTHWRITE, OWNERREAD, AUTHREAD."""
ANYBODYS_INDEX: Final = 1 << 18 | 1 << 25
"""TPMA_NV: AUTHREAD, NO_DA. Such an index can be read where the owner has a password; trying costs nothing."""


def signing_key(algorithm: AkAlgorithm) -> bytes:
    """A restricted signing key: RSA-2048 RSASSA-SHA256, or ECC P-256 ECDSA-SHA256."""
    attributes = _OWN | ObjectAttributes.SIGN
    if algorithm == "rsa":
        return _rsa(_head(ALG_RSA, attributes), u16(ALG_NULL), u16(ALG_RSASSA, ALG_SHA256), b"")
    return _ecc(_head(ALG_ECC, attributes), u16(ALG_NULL), u16(ALG_ECDSA, ALG_SHA256), (b"", b""))


def setter_key(policy: bytes) -> bytes:
    """A signing key, ECC P-256 ECDSA-SHA256, that signs whatever it is given, but only where its policy holds."""
    attributes = (_OWN | ObjectAttributes.SIGN) & ~(ObjectAttributes.RESTRICTED | ObjectAttributes.USER_WITH_AUTH)
    head = _head(ALG_ECC, attributes, policy)
    return _ecc(head, u16(ALG_NULL), u16(ALG_ECDSA, ALG_SHA256), (b"", b""))


def sealed_data(policy: bytes) -> bytes:
    """A data object (TPM_ALG_KEYEDHASH) that opens by its policy alone: without userWithAuth no password does."""
    attributes = ObjectAttributes.FIXED_TPM | ObjectAttributes.FIXED_PARENT | ObjectAttributes.NO_DA
    return _head(_ALG_KEYEDHASH, attributes, policy) + u16(ALG_NULL) + sized(b"")


def storage_parent() -> bytes:
    """The TCG storage key template, ECC P-256 with AES-128-CFB."""
    head = _head(ALG_ECC, _OWN | ObjectAttributes.DECRYPT)
    return _ecc(head, _AES128_CFB, u16(ALG_NULL), (bytes(32), bytes(32)))


def decryption_key(policy: bytes, unique: bytes) -> bytes:
    """An RSA-2048 key that decrypts by any scheme, under ``policy`` alone; ``unique``: 256 bytes.

    The attributes are those of the key that Microsoft's guest attestation certifies.
    """
    attributes = _OWN & ~(ObjectAttributes.USER_WITH_AUTH | ObjectAttributes.RESTRICTED) | ObjectAttributes.DECRYPT
    return _rsa(_head(ALG_RSA, attributes, policy), u16(ALG_NULL), u16(ALG_NULL), unique)


def endorsement_key(algorithm: AkAlgorithm, nonce: bytes = b"") -> bytes:
    """Template L-1 (RSA-2048) or L-2 (ECC P-256). A manufacturer's ``nonce`` (at most 32 bytes) fills ``unique``."""
    if algorithm == "rsa":
        head = _head(ALG_RSA, _EK, _EK_POLICY)
        return _rsa(head, _AES128_CFB, u16(ALG_NULL), nonce.ljust(256, b"\0"))
    head = _head(ALG_ECC, _EK, _EK_POLICY)
    return _ecc(head, _AES128_CFB, u16(ALG_NULL), (nonce.ljust(32, b"\0"), bytes(32)))


def sized(content: bytes) -> bytes:
    """A TPM2B: 16-bit length, then the content."""
    size = len(content)
    return size.to_bytes(2, "big") + content


def _rsa(head: bytes, symmetric: bytes, scheme: bytes, unique: bytes) -> bytes:
    exponent = bytes(4)  # 0 stands for 65537
    return head + symmetric + scheme + u16(2048) + exponent + sized(unique)


def _ecc(head: bytes, symmetric: bytes, scheme: bytes, unique: tuple[bytes, bytes]) -> bytes:
    x, y = unique
    return head + symmetric + scheme + u16(_CURVE_P256, ALG_NULL) + sized(x) + sized(y)


def _head(kind: int, attributes: int, policy: bytes = b"") -> bytes:
    return u16(kind, ALG_SHA256) + int(attributes).to_bytes(4, "big") + sized(policy)


def u16(*values: int) -> bytes:
    """16-bit numbers, one after the other."""
    return b"".join(value.to_bytes(2, "big") for value in values)
