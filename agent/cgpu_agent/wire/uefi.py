"""What boot events carry: UEFI variables, signature lists, GPT, firmware blobs, tags, the start-up locality.

Source: TCG "PC Client Platform Firmware Profile", section 10 (UEFI_VARIABLE_DATA, UEFI_GPT_DATA,
UEFI_PLATFORM_FIRMWARE_BLOB and _BLOB2, TCG_PCClientTaggedEvent, TCG_EfiStartupLocalityEvent); UEFI 2.10, sections
32.4.1 (EFI_SIGNATURE_LIST) and 5.3 (GPT). All integers are little-endian; all parsers refuse trailing bytes unless
they say otherwise.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Final

from cgpu_agent.wire.reader import Reader
from cgpu_agent.wire.text import utf8_field, utf16_field

GLOBAL_VARIABLE: Final = uuid.UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
IMAGE_SECURITY: Final = uuid.UUID("d719b2cb-3d3a-4596-a3bc-dad00e67656f")
SHIM_LOCK: Final = uuid.UUID("605dab50-e046-4300-abb6-3dd810dd8b23")

SIGNATURE_KINDS: Final = {
    uuid.UUID("a5c059a1-94e4-4aa7-87b5-ab155c2bf072"): "x509",
    uuid.UUID("c1c41626-504c-4092-aca9-41f936934328"): "sha256",
    uuid.UUID("ff3e5307-9fd0-48c9-85f1-8ad56c701e01"): "sha384",
    uuid.UUID("093e0fae-a6c4-4f50-9f1b-d41e2b89c19a"): "sha512",
    uuid.UUID("3bd2a492-96c0-4079-b420-fcf98ef103ed"): "x509-sha256",
    uuid.UUID("7076876e-80c2-4ee6-aad2-28b349a6865b"): "x509-sha384",
    uuid.UUID("446dbf63-2502-4cda-bcfa-2465d2b0fe9d"): "x509-sha512",
}
"""SignatureType GUID -> short name, for the types in use."""

_MAX_SIGNATURES: Final = 65536
_MAX_PARTITIONS: Final = 1024
_GPT_HEADER_SIZE: Final = 92
_STARTUP_LOCALITY: Final = b"StartupLocality\0"


@dataclass(frozen=True, slots=True)
class Variable:
    """UEFI_VARIABLE_DATA. ``slack`` counts bytes after the value (see ``parse_variable``)."""

    guid: uuid.UUID
    name: str
    data: bytes
    slack: int = 0


@dataclass(frozen=True, slots=True)
class Signature:
    """One EFI_SIGNATURE_DATA: ``kind`` from ``SIGNATURE_KINDS``, or the type's GUID; ``data`` is DER for ``x509``."""

    kind: str
    owner: uuid.UUID
    data: bytes


@dataclass(frozen=True, slots=True)
class FirmwareBlob:
    """A firmware volume in memory: first byte and length; ``description`` only in the newer form."""

    base: int
    length: int
    description: str


@dataclass(frozen=True, slots=True)
class Partition:
    """A GPT entry; ``first`` and ``last`` are logical blocks, both inclusive."""

    type: uuid.UUID
    unique: uuid.UUID
    first: int
    last: int
    name: str


@dataclass(frozen=True, slots=True)
class Gpt:
    disk: uuid.UUID
    partitions: tuple[Partition, ...]


@dataclass(frozen=True, slots=True)
class Tag:
    """TCG_PCClientTaggedEvent: an id whose meaning its writer chose."""

    id: int
    data: bytes


def guid(reader: Reader, field: str) -> uuid.UUID:
    """An EFI_GUID: its first three parts are little-endian."""
    return uuid.UUID(bytes_le=reader.take(16, field))


def parse_variable(data: bytes, *, slack: int = 0) -> Variable:
    """Parse a UEFI_VARIABLE_DATA.

    Args:
        data: event data.
        slack: how many bytes may follow the value. Old versions of shim measured a few bytes too many, because they
            took the padded size of the C structure.

    Raises ``HostileInput``: ``TRUNCATED``, ``TRAILING_BYTES``, ``BAD_TEXT``.
    """
    reader = Reader(data, "UEFI_VARIABLE_DATA", "little")
    owner = guid(reader, "VariableName")
    characters, size = reader.u64("UnicodeNameLength"), reader.u64("VariableDataLength")
    name = utf16_field(reader.take(2 * characters, "UnicodeName"), "UnicodeName")
    value = reader.take(size, "VariableData")
    extra = reader.remaining
    if extra > slack:
        reader.end()
    return Variable(owner, name, value, extra)


def parse_signature_lists(data: bytes) -> tuple[Signature, ...]:
    """Parse zero or more EFI_SIGNATURE_LISTs; no bytes at all is an empty database.

    Raises ``HostileInput``: ``TRUNCATED``, ``BAD_VALUE`` (sizes that do not add up), ``TOO_LARGE``.
    """
    reader = Reader(data, "EFI_SIGNATURE_LIST", "little")
    found: list[Signature] = []
    while reader.remaining:
        kind = guid(reader, "SignatureType")
        list_size, header_size = reader.u32("SignatureListSize"), reader.u32("SignatureHeaderSize")
        entry_size = reader.u32("SignatureSize")
        body = list_size - 28 - header_size
        if body < 0 or entry_size < 16 or body % entry_size:
            raise reader.fail("BAD_VALUE", f"list of {list_size} bytes with entries of {entry_size}")
        if len(found) + body // entry_size > _MAX_SIGNATURES:
            raise reader.fail("TOO_LARGE", f"more than {_MAX_SIGNATURES} signatures")
        reader.take(header_size, "SignatureHeader")
        entries = Reader(reader.take(body, "Signatures"), "EFI_SIGNATURE_DATA", "little")
        name = SIGNATURE_KINDS.get(kind, str(kind))
        while entries.remaining:
            owner = guid(entries, "SignatureOwner")
            found.append(Signature(name, owner, entries.take(entry_size - 16, "SignatureData")))
    return tuple(found)


def parse_firmware_blob(data: bytes) -> FirmwareBlob:
    """Parse a UEFI_PLATFORM_FIRMWARE_BLOB (two addresses) or _BLOB2 (a description first); sizes tell them apart."""
    reader = Reader(data, "UEFI_PLATFORM_FIRMWARE_BLOB", "little")
    description = ""
    if len(data) != 16:
        description = utf8_field(reader.take(reader.u8("description size"), "description"), "description")
    base, length = reader.u64("BlobBase"), reader.u64("BlobLength")
    reader.end()
    return FirmwareBlob(base, length, description)


def parse_gpt(data: bytes) -> Gpt:
    """Parse a UEFI_GPT_DATA: the disk's partition table header and its used entries."""
    reader = Reader(data, "UEFI_GPT_DATA", "little")
    header = Reader(reader.take(_GPT_HEADER_SIZE, "header"), "GPT header", "little")
    if header.take(8, "signature") != b"EFI PART":
        raise reader.fail("BAD_VALUE", "no GPT signature")
    header.take(48, "sizes and block addresses")
    disk = guid(header, "DiskGUID")
    header.take(12, "entry array address and size")
    entry_size = header.u32("SizeOfPartitionEntry")
    count = reader.u64("NumberOfPartitions")
    if entry_size < 128 or count > _MAX_PARTITIONS:
        raise reader.fail("BAD_VALUE", f"{count} partitions of {entry_size} bytes")
    partitions = tuple(_partition(reader.take(entry_size, "partition")) for _ in range(count))
    reader.end()
    return Gpt(disk, partitions)


def _partition(data: bytes) -> Partition:
    reader = Reader(data, "GPT entry", "little")
    kind, unique = guid(reader, "type"), guid(reader, "unique")
    first, last = reader.u64("first block"), reader.u64("last block")
    reader.u64("attributes")
    raw = reader.take(72, "name")
    # The field has a fixed size: the name ends at its first NUL character.
    end = next((i for i in range(0, 72, 2) if raw[i : i + 2] == b"\0\0"), 72)
    return Partition(kind, unique, first, last, utf16_field(raw[:end], "partition name"))


def parse_tag(data: bytes) -> Tag:
    """Parse a TCG_PCClientTaggedEvent with a single tag."""
    reader = Reader(data, "tagged event", "little")
    tag = reader.u32("taggedEventID")
    content = reader.take(reader.u32("taggedEventDataSize"), "taggedEventData")
    reader.end()
    return Tag(tag, content)


def parse_startup_locality(data: bytes) -> int | None:
    """The locality of TPM2_Startup in an EV_NO_ACTION record, or ``None`` when the record is about something else.

    Raises ``HostileInput``: ``TRUNCATED``, ``TRAILING_BYTES``, ``BAD_LOCALITY`` (not 0, 3, or 4 for an H-CRTM).
    """
    if not data.startswith(_STARTUP_LOCALITY):
        return None
    reader = Reader(data, "StartupLocality", "little")
    reader.take(len(_STARTUP_LOCALITY), "signature")
    locality = reader.u8("locality")
    reader.end()
    if locality not in (0, 3, 4):
        raise reader.fail("BAD_LOCALITY", f"locality {locality}, only 0, 3 and 4 (H-CRTM) exist at start-up")
    return locality
