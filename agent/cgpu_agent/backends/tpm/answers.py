"""Parse what a TPM answered outside of evidence: capabilities, NV public areas, digest lists, time.

Source: TCG "TPM 2.0 Library", Part 2; section numbers stand at each parser. Errors: ``HostileInput``.
"""

from __future__ import annotations

from dataclasses import dataclass

from cgpu_agent.wire.reader import Reader
from cgpu_agent.wire.tpm import ClockInfo

CAP_HANDLES = 0x00000001
CAP_TPM_PROPERTIES = 0x00000006
PT_MANUFACTURER = 0x105
PT_VENDOR_STRINGS = range(0x106, 0x10A)
PT_FIRMWARE_VERSION_1 = 0x10B
PT_FIRMWARE_VERSION_2 = 0x10C
PT_NV_BUFFER_MAX = 0x12C

_MAX_ENTRIES = 512


@dataclass(frozen=True, slots=True)
class NvPublic:
    """TPMS_NV_PUBLIC (13.6), the fields this package reads."""

    index: int
    attributes: int
    policy: bytes
    size: int


def parse_properties(data: bytes) -> dict[int, int]:
    """TPMS_CAPABILITY_DATA (10.10.2) of TPM_CAP_TPM_PROPERTIES: property -> value."""
    reader = _capability(data, CAP_TPM_PROPERTIES)
    found = {}
    for _ in range(_count(reader)):
        name = reader.u32("property")
        found[name] = reader.u32("value")
    reader.end()
    return found


def parse_handles(data: bytes) -> tuple[int, ...]:
    """TPMS_CAPABILITY_DATA (10.10.2) of TPM_CAP_HANDLES."""
    reader = _capability(data, CAP_HANDLES)
    handles = tuple(reader.u32("handle") for _ in range(_count(reader)))
    reader.end()
    return handles


def parse_nv_public(data: bytes) -> NvPublic:
    """TPM2B_NV_PUBLIC (13.7)."""
    outer = Reader(data, "TPM2B_NV_PUBLIC")
    reader = Reader(outer.sized16("nvPublic"), "TPMS_NV_PUBLIC")
    outer.end()
    index = reader.u32("nvIndex")
    reader.u16("nameAlg")
    attributes = reader.u32("attributes")
    policy = reader.sized16("authPolicy", 64)
    size = reader.u16("dataSize")
    reader.end()
    return NvPublic(index, attributes, policy, size)


def parse_digests(data: bytes) -> tuple[bytes, ...]:
    """TPML_DIGEST (10.9.4), at most eight."""
    reader = Reader(data, "TPML_DIGEST")
    count = reader.u32("count")
    if count > 8:
        raise reader.fail("TOO_LARGE", f"{count} digests, at most 8 are allowed")
    digests = tuple(reader.sized16("digest", 64) for _ in range(count))
    reader.end()
    return digests


def parse_time_info(data: bytes) -> ClockInfo:
    """TPMS_TIME_INFO (10.11.6): its TPMS_CLOCK_INFO."""
    reader = Reader(data, "TPMS_TIME_INFO")
    reader.u64("time")
    clock, resets, restarts = reader.u64("clock"), reader.u32("resetCount"), reader.u32("restartCount")
    safe = reader.u8("safe")
    if safe > 1:
        raise reader.fail("BAD_VALUE", f"safe is {safe}, not 0 or 1")
    reader.end()
    return ClockInfo(clock, resets, restarts, bool(safe))


def parse_sized(data: bytes, what: str) -> bytes:
    """Content of a TPM2B, without its size."""
    reader = Reader(data, what)
    content = reader.sized16("content")
    reader.end()
    return content


def text_of(*words: int) -> str:
    """Text that a TPM reports four bytes a property; anything but printable ASCII becomes ``?``."""
    raw = b"".join(word.to_bytes(4, "big") for word in words).rstrip(b"\0 ")
    return "".join(chr(byte) if 0x20 <= byte < 0x7F else "?" for byte in raw)


def _capability(data: bytes, expected: int) -> Reader:
    reader = Reader(data, "TPMS_CAPABILITY_DATA")
    kind = reader.u32("capability")
    if kind != expected:
        raise reader.fail("WRONG_TYPE", f"capability 0x{kind:x}, not 0x{expected:x}")
    return reader


def _count(reader: Reader) -> int:
    count = reader.u32("count")
    if count > _MAX_ENTRIES:
        raise reader.fail("TOO_LARGE", f"{count} entries, at most {_MAX_ENTRIES} are allowed")
    return count
