"""The file of keys sealed to one TPM: strict JSON <-> dataclass, and the NV indices and policies that follow."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final

from cgpu_agent.wire import approval, strictjson, tpmpolicy
from cgpu_agent.wire.strictjson import Fields, b64
from cgpu_agent.wire.tpm import KeyBlob
from cgpu_agent.wire.tpmpolicy import NvIndex

FORMAT: Final = "cgpu-keys/0"
MAX_KEYS: Final = 512
"""Generations of keys, all together."""
MAX_FILE: Final = 1 << 20

OPEN: Final = bytes(7) + b"\1"
CLOSED: Final = bytes(8)
LATCH_ATTRIBUTES: Final = tpmpolicy.POLICY_WRITE | tpmpolicy.AUTH_READ | tpmpolicy.NO_DA | tpmpolicy.CLEAR_STCLEAR
LATCH_HANDLE: Final = 0x018C6701
HEAD_HANDLE: Final = 0x018C6702
_HEAD_ATTRIBUTES: Final = tpmpolicy.POLICY_WRITE | tpmpolicy.AUTH_READ | tpmpolicy.NO_DA

_MAX_TIME: Final = 1 << 40
_MAX_GENERATION: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """What may be told of a key.

    Attributes:
        generation: larger is newer; no two keys of a store ever have the same one, removed ones included.
        created: seconds since the epoch, by the host's clock.
    """

    id: str
    generation: int
    group: str
    created: int


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The file.

    Attributes:
        generation: of the last change.
        fleet, authority: whose approvals count: the name of the VMs, and the owner's DER SubjectPublicKeyInfo.
        parent: Name of the TPM's storage key.
        setter: the key that signs writes of the latch and of the ring's digest.
        keys: all generations of all keys.
    """

    generation: int
    fleet: str
    authority: bytes
    parent: bytes
    setter: KeyBlob
    keys: tuple[tuple[KeyInfo, KeyBlob], ...]

    @property
    def write_policy(self) -> bytes:
        return tpmpolicy.policy_signed(tpmpolicy.START, tpmpolicy.name_of(self.setter.public))

    @property
    def latch(self) -> NvIndex:
        return NvIndex(LATCH_HANDLE, LATCH_ATTRIBUTES, self.write_policy, len(OPEN))

    @property
    def head(self) -> NvIndex:
        return NvIndex(HEAD_HANDLE, _HEAD_ATTRIBUTES, self.write_policy, 32)

    def policy(self, group: str) -> bytes:
        """authPolicy of a group's keys: the latch comes after the approval, so that no approval can leave it out."""
        approved = approved_policy(self.authority, self.fleet, group)
        return tpmpolicy.policy_nv(approved, self.latch.name(), OPEN, tpmpolicy.EQUAL)

    @property
    def digest(self) -> bytes:
        """What the TPM remembers of the file."""
        return hashlib.sha256(self.encode()).digest()

    def encode(self) -> bytes:
        return strictjson.dumps(
            {
                "authority": b64(self.authority),
                "fleet": self.fleet,
                "format": FORMAT,
                "generation": self.generation,
                "keys": [
                    {
                        "created": info.created,
                        "generation": info.generation,
                        "group": info.group,
                        "id": info.id,
                        **_blob_json(blob),
                    }
                    for info, blob in self.keys
                ],
                "parent": self.parent.hex(),
                "setter": _blob_json(self.setter),
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> KeyRing:
        """Read it back. Raises ``HostileInput``."""
        fields = Fields(strictjson.loads(data, "keys", MAX_FILE), "keys")
        if fields.raw("format") != FORMAT:
            raise fields.fail(f"the format is not {FORMAT!r}")
        setter = fields.fields("setter")
        ring = cls(
            fields.integer("generation", 1, _MAX_GENERATION),
            fields.text("fleet", 64),
            fields.base64("authority", 128),
            fields.hex("parent", 34, 34),
            _blob(setter),
            tuple(_key(item) for item in fields.items("keys", MAX_KEYS)),
        )
        setter.end()
        fields.end()
        tpmpolicy.authority_public(ring.authority)
        return ring


def approved_policy(authority: bytes, fleet: str, group: str) -> bytes:
    """authPolicy of what opens in any boot that this authority approves for a group of a fleet."""
    name = tpmpolicy.name_of(tpmpolicy.authority_public(authority))
    return tpmpolicy.policy_authorize(name, approval.policy_ref(fleet, group))


def _blob_json(blob: KeyBlob) -> dict[str, str]:
    return {"private": b64(blob.private), "public": b64(blob.public)}


def _blob(fields: Fields) -> KeyBlob:
    return KeyBlob(fields.base64("public", 1024), fields.base64("private", 1024))


def _key(item: Any) -> tuple[KeyInfo, KeyBlob]:
    fields = Fields(item, "keys.keys")
    info = KeyInfo(
        fields.text("id", 64),
        fields.integer("generation", 1, _MAX_GENERATION),
        fields.text("group", 64),
        fields.integer("created", 0, _MAX_TIME),
    )
    blob = _blob(fields)
    fields.end()
    return info, blob
