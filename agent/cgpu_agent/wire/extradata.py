"""Which bytes the agent's keys sign in extraData, each form apart from all others (docs/evidence-format.md)."""

from __future__ import annotations

import hashlib
from typing import Final

_MANIFEST_PREFIX: Final = b"\xc6\x01"
_QUOTE_PREFIX: Final = b"\xc6\x02"


def manifest_extra_data(manifest: bytes) -> bytes:
    """extraData of the quote that signs a manifest: C6 01 || SHA-256(manifest), 34 bytes."""
    return _MANIFEST_PREFIX + hashlib.sha256(manifest).digest()


def caller_quote_extra_data(caller_claims: bytes, nonce: bytes) -> bytes:
    """extraData of a plain quote: C6 02 || SHA-256("cgpu/quote/2" || 00 || u32be(len(claims)) || claims || nonce)."""
    framed = b"cgpu/quote/2\0" + len(caller_claims).to_bytes(4, "big") + caller_claims + nonce
    return _QUOTE_PREFIX + hashlib.sha256(framed).digest()


def agent_ak_qualifying_data(agent_ak_name: bytes) -> bytes:
    """extraData of the TPM2_Certify that vouches for the agent's AK: SHA-256("cgpu/agent-ak/1" || 00 || Name)."""
    return hashlib.sha256(b"cgpu/agent-ak/1\0" + agent_ak_name).digest()


def is_reserved_extra_data(data: bytes) -> bool:
    """Whether these bytes could be read as one of the agent's own extraData forms, in this or a later version."""
    return len(data) == 34 and data[0] == 0xC6
