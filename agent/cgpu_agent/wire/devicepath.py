"""UEFI device paths as text, and the two structures that carry one: an image load event and a Boot#### option.

Source: UEFI 2.10, sections 10.3 (nodes), 10.6 (text form), 3.1.3 (EFI_LOAD_OPTION); TCG PC Client Platform Firmware
Profile, section 10 (UEFI_IMAGE_LOAD_EVENT). A node whose inside is not understood is still named by its type and
subtype.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from cgpu_agent.wire.reader import Reader
from cgpu_agent.wire.text import utf16_field

_MAX_NODES: Final = 64
_END: Final = (0x7F, 0xFF)
_FILE_PATH: Final = (0x04, 0x04)
_ACPI_PCI_ROOTS: Final = (0x0A0341D0, 0x0A0841D0)  # PNP0A03, PNP0A08 as compressed EISA ids


@dataclass(frozen=True, slots=True)
class DevicePath:
    """``text`` is the whole path; ``file`` joins its file path nodes, ``None`` when it has none."""

    text: str
    file: str | None


@dataclass(frozen=True, slots=True)
class ImageLoad:
    """UEFI_IMAGE_LOAD_EVENT: where an image lay in memory (bytes) and where it came from.

    ``path`` is ``None`` where the loader gave no device path. None of this is under the digest, which is the image's
    Authenticode hash.
    """

    address: int
    length: int
    path: DevicePath | None


@dataclass(frozen=True, slots=True)
class LoadOption:
    """EFI_LOAD_OPTION, the value of a Boot#### variable. ``optional`` is the data handed to the image."""

    active: bool
    description: str
    path: DevicePath
    optional: bytes


def _pci(body: bytes) -> str:
    function, device = struct.unpack("<BB", body)
    return f"Pci(0x{device:x},0x{function:x})"


def _acpi(body: bytes) -> str:
    hid, uid = struct.unpack("<II", body)
    return f"PciRoot(0x{uid:x})" if hid in _ACPI_PCI_ROOTS else f"Acpi(0x{hid:08x},0x{uid:x})"


def _hard_drive(body: bytes) -> str:
    number, start, size, signature, _, kind = struct.unpack("<IQQ16sBB", body)
    if kind == 2:
        return f"HD({number},GPT,{uuid.UUID(bytes_le=signature)},0x{start:x},0x{size:x})"
    return f"HD({number},MBR,0x{signature[:4][::-1].hex()},0x{start:x},0x{size:x})"


def _guid(name: str) -> Callable[[bytes], str]:
    return lambda body: f"{name}({uuid.UUID(bytes_le=body)})"


def _numbers(name: str, layout: str) -> Callable[[bytes], str]:
    return lambda body: f"{name}({','.join(f'0x{value:x}' for value in struct.unpack(layout, body))})"


def _nvme(body: bytes) -> str:
    namespace, eui = struct.unpack("<I8s", body)
    return f"NVMe(0x{namespace:x},{'-'.join(f'{byte:02X}' for byte in eui)})"


_NODES: Final[Mapping[tuple[int, int], Callable[[bytes], str]]] = {
    (0x01, 0x01): _pci,
    (0x02, 0x01): _acpi,
    (0x03, 0x02): _numbers("Scsi", "<HH"),
    (0x03, 0x05): _numbers("USB", "<BB"),
    (0x03, 0x12): _numbers("Sata", "<HHH"),
    (0x03, 0x17): _nvme,
    (0x04, 0x01): _hard_drive,
    (0x04, 0x06): _guid("FvFile"),
    (0x04, 0x07): _guid("Fv"),
}


def parse_device_path(data: bytes) -> DevicePath:
    """Parse a device path up to and including its end node.

    Raises ``HostileInput``: ``TRUNCATED``, ``TRAILING_BYTES``, ``TOO_LARGE`` (more than 64 nodes), ``BAD_VALUE`` (a
    node shorter than its header), ``BAD_TEXT`` (a file name that is not UTF-16).
    """
    reader = Reader(data, "device path", "little")
    nodes: list[str] = []
    files: list[str] = []
    for _ in range(_MAX_NODES):
        kind = (reader.u8("node type"), reader.u8("node subtype"))
        size = reader.u16("node length")
        if size < 4:
            raise reader.fail("BAD_VALUE", f"node of {size} bytes")
        body = reader.take(size - 4, "node")
        if kind == _END:
            reader.end()
            return DevicePath("/".join(nodes), "".join(files) or None)
        if kind == _FILE_PATH:
            files.append(_joined(files, utf16_field(body, "file path")))
            nodes.append(utf16_field(body, "file path"))
        else:
            nodes.append(_describe(kind, body))
    raise reader.fail("TOO_LARGE", f"more than {_MAX_NODES} nodes")


def _joined(files: list[str], name: str) -> str:
    # A file name may be split over nodes, with or without the backslash between them (UEFI, "File Path Media").
    if not files or name.startswith("\\") or files[-1].endswith("\\"):
        return name
    return "\\" + name


def _describe(kind: tuple[int, int], body: bytes) -> str:
    try:
        return _NODES[kind](body)
    except (KeyError, struct.error, ValueError):
        return f"Node(0x{kind[0]:02x},0x{kind[1]:02x},{len(body)} bytes)"


def parse_image_load(data: bytes) -> ImageLoad:
    """Parse a UEFI_IMAGE_LOAD_EVENT.

    Raises ``HostileInput`` as ``parse_device_path`` does. Some loaders announce no device path and leave stray memory
    there: refused too.
    """
    reader = Reader(data, "UEFI_IMAGE_LOAD_EVENT", "little")
    address, length = reader.u64("image location"), reader.u64("image length")
    reader.u64("link-time address")
    path = reader.take(reader.u64("device path length"), "device path")
    reader.end()
    return ImageLoad(address, length, parse_device_path(path) if path else None)


def parse_load_option(data: bytes) -> LoadOption:
    """Parse an EFI_LOAD_OPTION (first device path only). Raises ``HostileInput`` for bad lengths or text."""
    reader = Reader(data, "EFI_LOAD_OPTION", "little")
    attributes, path_size = reader.u32("attributes"), reader.u16("device path length")
    rest = reader.rest()
    end = _utf16_end(rest)
    if end < 0 or len(rest) < end + 2 + path_size:
        raise reader.fail("TRUNCATED", "description or device path runs past the end")
    description = utf16_field(rest[: end + 2], "description")
    path = parse_device_path(rest[end + 2 : end + 2 + path_size])
    return LoadOption(bool(attributes & 1), description, path, rest[end + 2 + path_size :])


def _utf16_end(data: bytes) -> int:
    end = data.find(b"\0\0")
    while end >= 0 and end % 2:
        end = data.find(b"\0\0", end + 1)
    return end
