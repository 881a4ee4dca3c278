"""The few TPM commands that running an emulated TPM takes, as bytes with empty passwords and without the TSS.

Source: TCG "TPM 2.0 Library", Part 3 (commands) and Part 1, 18 (command structure).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from cgpu_agent.backends.tpm.keys import sized
from cgpu_agent.wire.tpm import HASH_ALGS, HASH_SIZES
from cgpu_agent.wire.tpmpolicy import NvIndex

OWNER: Final = 0x40000001
PLATFORM: Final = 0x4000000C
_NO_SESSIONS: Final = b"\x80\x01"
_SESSIONS: Final = b"\x80\x02"
_EMPTY_PASSWORD: Final = bytes.fromhex("40000009 0000 00 0000")
"""TPMS_AUTH_COMMAND: TPM_RS_PW, no nonce, no attributes, empty auth."""

_BANKS: Final = {size: HASH_ALGS[name] for name, size in HASH_SIZES.items()}


def shutdown_clear() -> bytes:
    """TPM2_Shutdown(CLEAR): an orderly end, which does not count against the dictionary attack limit."""
    return _command(0x145, b"\0\0")


def read_clock() -> bytes:
    """TPM2_ReadClock."""
    return _command(0x181, b"")


def pcr_extend(index: int, digests: Iterable[bytes]) -> bytes:
    """TPM2_PCR_Extend; the size of a digest names its bank. Raises ``ValueError`` for other sizes."""
    values = []
    for digest in digests:
        if len(digest) not in _BANKS:
            raise ValueError(f"no PCR bank has digests of {len(digest)} bytes")
        values.append(_BANKS[len(digest)].to_bytes(2, "big") + digest)
    return _authorised(0x182, [index], len(values).to_bytes(4, "big") + b"".join(values))


def nv_define(index: int, size: int, attributes: int, hierarchy: int) -> bytes:
    """TPM2_NV_DefineSpace with an empty auth and no policy."""
    return _authorised(0x12A, [hierarchy], sized(b"") + sized(NvIndex(index, attributes, b"", size).public()))


def nv_write(index: int, data: bytes, offset: int, hierarchy: int) -> bytes:
    """TPM2_NV_Write authorised by a hierarchy."""
    return _authorised(0x137, [hierarchy, index], sized(data) + offset.to_bytes(2, "big"))


def disable_hierarchy(hierarchy: int) -> bytes:
    """TPM2_HierarchyControl: off until the next reset."""
    return _authorised(0x121, [hierarchy], hierarchy.to_bytes(4, "big") + b"\0")


def _authorised(code: int, handles: list[int], parameters: bytes) -> bytes:
    area = b"".join(handle.to_bytes(4, "big") for handle in handles)
    auth = len(_EMPTY_PASSWORD).to_bytes(4, "big") + _EMPTY_PASSWORD
    return _command(code, area + auth + parameters, _SESSIONS)


def _command(code: int, body: bytes, tag: bytes = _NO_SESSIONS) -> bytes:
    size = 10 + len(body)
    return tag + size.to_bytes(4, "big") + code.to_bytes(4, "big") + body
