"""TPM 2.0 policy digests and Names in software, so that a policy can be made and approved where there is no TPM.

Sources: TCG "TPM 2.0 Library", Part 1, 19.7 (policies) and 16 (Names); Part 3, 23 (policy commands) and 31 (NV).
Every digest is SHA-256. ``old`` is the digest of the policy so far, ``START`` for none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.tpm import ALG_ECC, ALG_ECDSA, ALG_NULL, ALG_SHA256, ObjectAttributes, PcrSelection, pcr_digest

START: Final = bytes(32)

CC_NV_WRITE: Final = 0x137
_CC_POLICY_NV: Final = 0x149
_CC_POLICY_SECRET: Final = 0x151
_CC_POLICY_SIGNED: Final = 0x160
_CC_POLICY_AUTHORIZE: Final = 0x16A
_CC_POLICY_PCR: Final = 0x17F

EQUAL: Final = 0x0000
AT_MOST: Final = 0x0009
"""TPM_EO (Part 2, 6.8): the index equals the operand; the index, unsigned, is not above it."""

# TPMA_NV (Part 2, 13.4).
AUTH_WRITE: Final = 1 << 2
POLICY_WRITE: Final = 1 << 3
COUNTER: Final = 1 << 4
AUTH_READ: Final = 1 << 18
NO_DA: Final = 1 << 25
CLEAR_STCLEAR: Final = 1 << 27
WRITTEN: Final = 1 << 29

_P256_SPKI: Final = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004")
"""DER SubjectPublicKeyInfo of a P-256 key up to its x: algorithm, curve, an uncompressed point."""
_CURVE_P256: Final = 0x0003


@dataclass(frozen=True, slots=True)
class NvIndex:
    """An NV index as it is defined: its Name says who may write it, which an auth value would not.

    Attributes:
        index: handle.
        attributes: TPMA_NV, without what the TPM sets by itself (WRITTEN).
        policy: authPolicy, of 0 or 32 bytes.
        size: of its data, in bytes.
    """

    index: int
    attributes: int
    policy: bytes
    size: int

    def public(self, *, written: bool = False) -> bytes:
        """TPMS_NV_PUBLIC (Part 2, 13.6)."""
        attributes = self.attributes | (WRITTEN if written else 0)
        head = self.index.to_bytes(4, "big") + _u16(ALG_SHA256) + attributes.to_bytes(4, "big")
        return head + _sized(self.policy) + _u16(self.size)

    def name(self, *, written: bool = True) -> bytes:
        """Its Name: nameAlg || H(TPMS_NV_PUBLIC). It changes with the first write."""
        return name_of(self.public(written=written))


def name_of(public: bytes) -> bytes:
    """Name of what has this public area, a TPMT_PUBLIC or TPMS_NV_PUBLIC with nameAlg SHA-256."""
    return _u16(ALG_SHA256) + _hash(public)


def authority_public(spki: bytes) -> bytes:
    """TPMT_PUBLIC of a P-256 key that only verifies ECDSA-SHA256: what TPM2_LoadExternal takes.

    Every field of it is part of the key's Name, and so of each policy that names the key: none may ever change.

    Args:
        spki: DER SubjectPublicKeyInfo with an uncompressed point; that the point is on the curve the TPM checks.

    Raises:
        HostileInput: ``BAD_KEY`` for any other bytes.
    """
    if len(spki) != len(_P256_SPKI) + 64 or not spki.startswith(_P256_SPKI):
        raise HostileInput("BAD_KEY", "not the SubjectPublicKeyInfo of a P-256 key")
    x, y = spki[-64:-32], spki[-32:]
    attributes = ObjectAttributes.USER_WITH_AUTH | ObjectAttributes.SIGN
    head = _u16(ALG_ECC, ALG_SHA256) + int(attributes).to_bytes(4, "big") + _sized(b"")
    scheme = _u16(ALG_NULL, ALG_ECDSA, ALG_SHA256)
    return head + scheme + _u16(_CURVE_P256, ALG_NULL) + _sized(x) + _sized(y)


def policy_pcr(old: bytes, values: Mapping[int, bytes]) -> bytes:
    """TPM2_PolicyPCR (23.7) over values of the SHA-256 bank. Raises ``HostileInput``: ``BAD_VALUE``."""
    selection = PcrSelection.of("sha256", values).marshal()
    return _hash(old, _u32(_CC_POLICY_PCR), selection, pcr_digest(values, values, "sha256"))


def policy_nv(old: bytes, name: bytes, operand: bytes, operation: int) -> bytes:
    """TPM2_PolicyNV (23.9) from offset 0."""
    arguments = _hash(operand, _u16(0, operation))
    return _hash(old, _u32(_CC_POLICY_NV), arguments, name)


def policy_signed(old: bytes, key_name: bytes, ref: bytes = b"") -> bytes:
    """TPM2_PolicySigned (23.3)."""
    return _update(old, _CC_POLICY_SIGNED, key_name, ref)


def policy_secret(old: bytes, name: bytes, ref: bytes = b"") -> bytes:
    """TPM2_PolicySecret (23.4)."""
    return _update(old, _CC_POLICY_SECRET, name, ref)


def policy_authorize(key_name: bytes, ref: bytes) -> bytes:
    """TPM2_PolicyAuthorize (23.16): forgets all that was before it, so there is no ``old``."""
    return _update(START, _CC_POLICY_AUTHORIZE, key_name, ref)


def to_authorize(approved: bytes, ref: bytes) -> bytes:
    """What an authority signs to approve a policy (aHash is its SHA-256)."""
    return approved + ref


def signed_hash(nonce: bytes, cp_hash: bytes) -> bytes:
    """What TPM2_PolicySigned wants signed (aHash) for one session and one command; no expiration, no policyRef."""
    return _hash(nonce, bytes(4), cp_hash)


def nv_write_hash(name: bytes, data: bytes) -> bytes:
    """cpHash of TPM2_NV_Write of ``data`` at offset 0, authorised by the index itself (Part 1, 18.7)."""
    return _hash(_u32(CC_NV_WRITE), name, name, _sized(data), _u16(0))


def _update(old: bytes, command: int, name: bytes, ref: bytes) -> bytes:
    """PolicyUpdate() of Part 3, 23.2.3: the reference is hashed in even where it is empty."""
    return _hash(_hash(old, _u32(command), name), ref)


def _hash(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def _u16(*values: int) -> bytes:
    return b"".join(value.to_bytes(2, "big") for value in values)


def _u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def _sized(content: bytes) -> bytes:
    return _u16(len(content)) + content
