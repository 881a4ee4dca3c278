"""The key that all replicas of a service share: what one of them handed out, every other one recognises.

A service that keeps no state gives its state away, under a tag that only its replicas can make (HMAC, RFC 2104).
"""

from __future__ import annotations

import hmac
import re
import secrets
from dataclasses import dataclass, field
from typing import Final

from cgpu_agent.errors import Misuse

KEY_SIZE: Final = 32
TAG_SIZE: Final = 32
MAX_KEYS: Final = 8


@dataclass(frozen=True, slots=True)
class ReplicaKeys:
    """One to eight keys of 32 bytes. The first makes tags, all of them recognise: that is how a key is exchanged."""

    keys: tuple[bytes, ...] = field(repr=False)

    def __post_init__(self) -> None:
        """Raises ``Misuse`` (``BAD_REPLICA_KEY``)."""
        if not 1 <= len(self.keys) <= MAX_KEYS or any(len(key) != KEY_SIZE for key in self.keys):
            raise Misuse("BAD_REPLICA_KEY", f"a replica key file holds 1 to {MAX_KEYS} keys of {KEY_SIZE} bytes")

    def tag(self, label: str, *parts: bytes) -> bytes:
        """The 32-byte tag of these parts. ``label`` names the use: a tag made for one means nothing in another."""
        return _tag(self.keys[0], label, parts)

    def recognise(self, tag: bytes, label: str, *parts: bytes) -> bool:
        """Whether a replica made this tag."""
        return any(hmac.compare_digest(tag, _tag(key, label, parts)) for key in self.keys)


def _tag(key: bytes, label: str, parts: tuple[bytes, ...]) -> bytes:
    framed = b"".join(len(part).to_bytes(4, "big") + part for part in (label.encode("ascii"), *parts))
    return hmac.digest(key, framed, "sha256")


def parse(data: bytes) -> ReplicaKeys:
    """Read a key file: a line of 64 lower-case hex digits for each key. Raises ``Misuse`` (``BAD_REPLICA_KEY``)."""
    lines = data.split()
    if not all(re.fullmatch(rb"[0-9a-f]{64}", line) for line in lines):
        raise Misuse("BAD_REPLICA_KEY", "a replica key is a line of 64 lower-case hex digits")
    return ReplicaKeys(tuple(bytes.fromhex(line.decode("ascii")) for line in lines))


def generate() -> bytes:
    """A key file with one new key."""
    return secrets.token_hex(KEY_SIZE).encode("ascii") + b"\n"
