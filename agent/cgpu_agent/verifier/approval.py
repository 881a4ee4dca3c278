"""Approve a boot for sealed keys: on the owner's machine, with the owner's key, without a TPM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from cgpu_agent.errors import Misuse
from cgpu_agent.verifier.coverage import coverage_by
from cgpu_agent.verifier.reference import Reference
from cgpu_agent.wire.approval import LATCH_GROUP, MAX_EPOCH, MAX_GROUPS, Approval, is_name, signed_bytes

_COMMAND_LINE_PCRS: Final = frozenset({8, 9, 11, 12})
"""Where a kernel's command line is measured: by GRUB, by the kernel's own stub, by systemd's (built in, or given)."""


def pcrs_to_approve(
    reference: Reference, pcrs: Iterable[int] | None = None, *, uncovered_root: bool = False
) -> dict[int, bytes]:
    """The PCR values of the one boot that a reference describes.

    Keys approved for a boot that does not measure the root file system open for whoever edits that file system on the
    host's disk, the agent included. So the reference must pin command lines that demand dm-verity for it, and a PCR
    that holds the command line must be among the approved ones.

    Args:
        reference: one allowed value for each PCR: an approval is about one boot.
        pcrs: which of its PCRs; ``None`` = all.
        uncovered_root: approve it all the same.

    Raises:
        Misuse: ``NO_PCRS``, ``PCR_NOT_IN_REFERENCE``, ``AMBIGUOUS_REFERENCE``, ``ROOT_NOT_COVERED``.
    """
    chosen = sorted(set(reference.pcrs if pcrs is None else pcrs))
    if not chosen:
        raise Misuse("NO_PCRS", "no PCR is selected, so every boot would do")
    values = {}
    for index in chosen:
        allowed = reference.pcrs.get(index)
        if allowed is None:
            raise Misuse("PCR_NOT_IN_REFERENCE", f"the reference has no value of PCR {index}")
        if len(allowed) != 1:
            raise Misuse(
                "AMBIGUOUS_REFERENCE", f"the reference allows several values of PCR {index}: approve each boot"
            )
        (values[index],) = allowed
    if not uncovered_root:
        _require_root(reference, chosen)
    return values


def sign_approval(
    key_pem: bytes, *, fleet: str, groups: Iterable[str], pcrs: Mapping[int, bytes], epoch: int
) -> Approval:
    """Approve a boot for groups of keys, and for the latch, without which none of them opens.

    Args:
        key_pem: unencrypted PEM private key on P-256.
        fleet: name that the keys were created for.
        pcrs: PCR index -> 32 bytes.
        epoch: the last value of the epoch counter with which the approval is good.

    Raises:
        Misuse: ``BAD_APPROVAL_KEY``, ``BAD_APPROVAL`` for anything that no approval could hold.
    """
    names = sorted({*groups, LATCH_GROUP})
    if not all(map(is_name, (fleet, *names))) or len(names) > MAX_GROUPS:
        raise Misuse("BAD_APPROVAL", f"a fleet and at most {MAX_GROUPS} groups with names of a-z, 0-9, '.', '_', '-'")
    if not pcrs or not all(0 <= index < 24 and len(value) == 32 for index, value in pcrs.items()):
        raise Misuse("BAD_APPROVAL", "an approval is about SHA-256 values of PCRs 0-23, at least one")
    if not 1 <= epoch <= MAX_EPOCH:
        raise Misuse("BAD_APPROVAL", "an epoch is a positive number")
    key = _load_key(key_pem)
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    signatures = {group: _sign(key, signed_bytes(pcrs, epoch, fleet, group)) for group in names}
    return Approval(spki, fleet, dict(pcrs), epoch, signatures)


def _require_root(reference: Reference, pcrs: Iterable[int]) -> None:
    lines = reference.command_lines or frozenset()
    if not lines or any(coverage_by(line).kind != "verity-root" for line in lines):
        raise Misuse("ROOT_NOT_COVERED", "the reference pins no command line that demands dm-verity for the root")
    if not _COMMAND_LINE_PCRS & set(pcrs):
        raise Misuse("ROOT_NOT_COVERED", "no approved PCR holds the kernel command line (8, 9, 11 or 12)")


def _load_key(pem: bytes) -> EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Misuse("BAD_APPROVAL_KEY", "not an unencrypted PEM private key") from error
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP256R1):
        raise Misuse("BAD_APPROVAL_KEY", "the key that approves boots must be on P-256")
    return key


def _sign(key: EllipticCurvePrivateKey, data: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(data, ECDSA(SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")
