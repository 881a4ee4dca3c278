"""What the kernel says of NVIDIA devices, whatever the driver says: PCI functions, and which driver is loaded.

Only ``/sys`` is read, no configuration space: it answers also while a device or its driver hangs, and it stays
visible with ``ProcSubset=pid``, which hides ``/proc/driver``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cgpu_agent.errors import DeviceFault

SYSFS: Final = Path("/sys")
MAX_FUNCTIONS: Final = 4096
"""PCI functions that are looked at. The host plugs them in, so their number is its choice."""

_NVIDIA: Final = 0x10DE
_DISPLAY: Final = 0x03
"""Base class of GPUs, with and without video output (PCI Code and ID Assignment, 1.4)."""
_BRIDGE_OTHER: Final = 0x0680
"""Class and subclass of NVSwitches."""
_MAX_ATTRIBUTE: Final = 256
_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_NUMBER = re.compile(rb"0x([0-9a-f]{1,8})\n?")


@dataclass(frozen=True, slots=True)
class LoadedDriver:
    """One loading of the kernel module. A module that was removed and inserted again is another one.

    Attributes:
        inode: of the module's directory; the kernel numbers each anew.
        version: what the module says, or nothing.
    """

    inode: int
    version: str


def pci_address(domain: int, bus: int, device: int, function: int = 0) -> str:
    """The address as Linux writes it: ``0000:01:00.0``, and more digits for a domain that needs them."""
    return f"{domain:04x}:{bus:02x}:{device:02x}.{function}"


def nvidia_functions(sysfs: Path = SYSFS) -> dict[str, int]:
    """Every NVIDIA GPU and NVSwitch on the PCI buses: addresses, ascending, each with the inode of its directory.

    The kernel numbers inodes anew, so that a device that was swapped for another at the same address shows.

    Raises ``DeviceFault`` (``GPU_ERROR``) when that cannot be told: an inventory that may lack one is worth nothing.
    """
    folder = sysfs / "bus" / "pci" / "devices"
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208 - names, not paths
    except OSError as error:
        raise _unknown("the kernel's list of PCI devices cannot be read") from error
    if len(names) > MAX_FUNCTIONS:
        raise _unknown(f"there are more than {MAX_FUNCTIONS} PCI devices")
    inodes = {name: _inode(folder / name) for name in names}
    return {name: inode for name, inode in inodes.items() if inode is not None}


def loaded_driver(sysfs: Path = SYSFS) -> LoadedDriver | None:
    """The NVIDIA kernel module that is loaded now, or ``None``."""
    folder = sysfs / "module" / "nvidia"
    try:
        inode = folder.stat().st_ino
    except OSError:
        return None
    try:
        version = _read(folder / "version")
    except OSError:
        version = b""
    return LoadedDriver(inode, version.decode("ascii", "replace").strip())


def _inode(folder: Path) -> int | None:
    """Inode of an NVIDIA device's directory; ``None`` when it is another's, or left while we looked."""
    try:
        inode = folder.stat().st_ino
        vendor, kind = _number(folder / "vendor"), _number(folder / "class")
    except OSError as error:
        if not folder.exists():
            return None
        raise _unknown("a PCI device cannot be looked at") from error
    if vendor != _NVIDIA or not (kind >> 16 == _DISPLAY or kind >> 8 == _BRIDGE_OTHER):
        return None
    if not _ADDRESS.fullmatch(folder.name):
        raise _unknown("a PCI device has a name that is no address")
    return inode


def _number(path: Path) -> int:
    match = _NUMBER.fullmatch(_read(path))
    if match is None:
        raise _unknown("a PCI device has an identifier that is no number")
    return int(match[1], 16)


def _read(path: Path) -> bytes:
    with path.open("rb", buffering=0) as file:
        return file.read(_MAX_ATTRIBUTE)


def _unknown(message: str) -> DeviceFault:
    return DeviceFault("GPU_ERROR", message)
