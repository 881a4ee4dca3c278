"""The owner's approval of a boot: with these PCR values, and this epoch not over, keys of these groups may be opened.

The file is JSON, parsed as strictly as evidence:

    {"authority": base64 of a DER SubjectPublicKeyInfo (P-256), "epoch": 1 to 2^63-1, "fleet": text,
     "format": "cgpu-approval/0", "pcrs": {"7": 64 hex digits, ...},
     "signatures": {group: base64 of r || s (32 bytes each), ...}}

Each signature is ECDSA-SHA256 over approved policy || policyRef (``signed_bytes``), as TPM2_PolicyAuthorize wants it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire import strictjson, tpmpolicy
from cgpu_agent.wire.strictjson import Fields, b64
from cgpu_agent.wire.tpmpolicy import NvIndex

FORMAT: Final = "cgpu-approval/0"
MAX_APPROVAL: Final = 64 << 10
MAX_GROUPS: Final = 64
MAX_EPOCH: Final = (1 << 63) - 1

LATCH_GROUP: Final = "latch"
"""The group of the key that sets the latch; no key of a workload may be in it."""

EPOCH: Final = NvIndex(
    0x018C6700, tpmpolicy.AUTH_WRITE | tpmpolicy.AUTH_READ | tpmpolicy.COUNTER | tpmpolicy.NO_DA, b"", 8
)
"""The counter of epochs. Equal in all VMs, so that an owner approves a boot for a whole fleet at once.

Whoever has access to the TPM may raise it: that denies service, which is theirs anyway; nobody can lower it, not even
by defining it anew (Part 3, 31.8).
"""

_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_PCR: Final = re.compile(r"0|1[0-9]?|2[0-3]?|[3-9]")


@dataclass(frozen=True, slots=True)
class Approval:
    """One approved boot.

    Attributes:
        authority: DER SubjectPublicKeyInfo of the owner's P-256 key.
        fleet: which VMs: the name that their keys were made for.
        pcrs: PCR index -> value of the SHA-256 bank.
        epoch: the last value of the epoch counter with which it is good.
        signatures: group -> r || s.
    """

    authority: bytes
    fleet: str
    pcrs: Mapping[int, bytes]
    epoch: int
    signatures: Mapping[str, bytes]

    def encode(self) -> bytes:
        """The file, for people to read: sorted, one value a line."""
        document = {
            "authority": b64(self.authority),
            "epoch": self.epoch,
            "fleet": self.fleet,
            "format": FORMAT,
            "pcrs": {str(index): value.hex() for index, value in sorted(self.pcrs.items())},
            "signatures": {group: b64(signature) for group, signature in self.signatures.items()},
        }
        return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def is_name(text: str) -> bool:
    """Whether a fleet, group or key may be called so: 1 to 64 of ``a-z 0-9 . _ -``, alphanumeric at the ends."""
    return _NAME.fullmatch(text) is not None


def policy_ref(fleet: str, group: str) -> bytes:
    """The policyRef of a group: never empty, and no fleet's is another's."""
    parts = [len(text.encode()).to_bytes(2, "big") + text.encode() for text in (fleet, group)]
    return hashlib.sha256(b"cgpu/boot/1" + b"".join(parts)).digest()


def approved_policy(pcrs: Mapping[int, bytes], epoch: int) -> bytes:
    """PolicyPCR and PolicyNV(epoch counter <= epoch), in this order."""
    digest = tpmpolicy.policy_pcr(tpmpolicy.START, pcrs)
    return tpmpolicy.policy_nv(digest, EPOCH.name(), epoch.to_bytes(8, "big"), tpmpolicy.AT_MOST)


def signed_bytes(pcrs: Mapping[int, bytes], epoch: int, fleet: str, group: str) -> bytes:
    """What the owner signs for one group."""
    return tpmpolicy.to_authorize(approved_policy(pcrs, epoch), policy_ref(fleet, group))


def parse_approval(data: bytes) -> Approval:
    """Parse an approval file. Signatures are for the TPM to judge.

    Raises:
        HostileInput: ``BAD_FORMAT``, ``TOO_LARGE``, ``BAD_JSON``, ``DUPLICATE_KEY``, ``UNKNOWN_KEY``, ``BAD_FIELD``,
            ``BAD_KEY``.
    """
    fields = Fields(strictjson.loads(data, "approval", MAX_APPROVAL), "approval")
    if fields.raw("format") != FORMAT:
        raise HostileInput("BAD_FORMAT", f"approval: the format is not {FORMAT!r}; another version made this file")
    authority = fields.base64("authority", 128)
    tpmpolicy.authority_public(authority)
    fleet = fields.text("fleet", 64)
    if not is_name(fleet):
        raise fields.fail("fleet is not a name")
    approval = Approval(
        authority,
        fleet,
        _pcrs(fields.fields("pcrs")),
        fields.integer("epoch", 1, MAX_EPOCH),
        _signatures(fields.fields("signatures")),
    )
    fields.end()
    return approval


def _pcrs(fields: Fields) -> dict[int, bytes]:
    found = {}
    for name in fields.keys():  # noqa: SIM118 - a method of ours, not a dict's
        if not _PCR.fullmatch(name):
            raise fields.fail("a key is not a PCR index of 0-23")
        found[int(name)] = fields.hex(name, 32, 32)
    if not found:
        raise fields.fail("it selects no PCR, so every boot would do")
    return found


def _signatures(fields: Fields) -> dict[str, bytes]:
    groups = fields.keys()
    if not 1 <= len(groups) <= MAX_GROUPS or not all(map(is_name, groups)):
        raise fields.fail(f"not 1 to {MAX_GROUPS} groups with names")
    found = {group: fields.base64(group, 64) for group in groups}
    if any(len(signature) != 64 for signature in found.values()):
        raise fields.fail("a signature has not 64 bytes")
    return found
