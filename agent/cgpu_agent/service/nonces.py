"""Challenges that need no memory: a nonce says when it was made, and its tag says that a replica made it.

    nonce = 01 || issued at, seconds since the epoch (u64 big-endian) || 16 random bytes || tag (32 bytes)

The tag covers the service's own name, so a nonce of one service is none of another. Nothing remembers a nonce that
was used: whoever posts a bundle twice gets the same token twice, same ``jti``, same end.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Final

from cgpu_agent.errors import HostileInput
from cgpu_agent.service.replica import TAG_SIZE, ReplicaKeys
from cgpu_agent.wire.reader import Reader

VERSION: Final = 1
RANDOM_SIZE: Final = 16
SIZE: Final = 1 + 8 + RANDOM_SIZE + TAG_SIZE
SKEW_SECONDS: Final = 30
"""How far the clocks of two replicas may be apart."""

_LABEL: Final = "cgpu/nonce/1"


def issue(keys: ReplicaKeys, audience: str, *, now: int, random: Callable[[int], bytes] = os.urandom) -> bytes:
    """A fresh nonce of 57 bytes.

    Args:
        audience: this service's own name.
        now: seconds since the epoch by this replica's clock.
    """
    body = bytes([VERSION]) + now.to_bytes(8, "big") + random(RANDOM_SIZE)
    return body + keys.tag(_LABEL, audience.encode(), body)


def issued_at(keys: ReplicaKeys, nonce: bytes, audience: str, *, now: int, max_age: int) -> int:
    """When a replica made this nonce, in seconds since the epoch.

    Raises ``HostileInput``: ``NONCE_UNKNOWN`` (no replica made it for this audience), ``NONCE_EXPIRED`` (older than
    ``max_age`` seconds), ``NONCE_FROM_FUTURE`` (the clocks of the replicas disagree).
    """
    if len(nonce) != SIZE or not keys.recognise(nonce[-TAG_SIZE:], _LABEL, audience.encode(), nonce[:-TAG_SIZE]):
        raise HostileInput("NONCE_UNKNOWN", "the nonce is not one that this service handed out")
    reader = Reader(nonce[:-TAG_SIZE], "nonce")
    if reader.u8("version") != VERSION:
        raise HostileInput("NONCE_UNKNOWN", "the nonce is of another version")
    made = reader.u64("issued at")
    if made > now + SKEW_SECONDS:
        raise HostileInput("NONCE_FROM_FUTURE", "the nonce was made later than now: the replicas' clocks disagree")
    if now - made > max_age:
        raise HostileInput("NONCE_EXPIRED", f"the nonce is older than {max_age} seconds")
    return made


def token_id(nonce: bytes, leaf: bytes) -> str:
    """The ``jti`` of the token for one statement: hex of SHA-256("cgpu/jti/1" || 00 || nonce || leaf hash).

    Args:
        nonce: as issued, so of one size.
        leaf: the statement's leaf hash (``wire.merkle.leaf_hash``).
    """
    return hashlib.sha256(b"cgpu/jti/1\0" + nonce + leaf).hexdigest()
