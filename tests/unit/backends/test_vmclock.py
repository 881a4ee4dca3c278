"""The hypervisor's generation counter: read whole, or not at all."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from cgpu_agent.backends.vmclock import vm_generation


def page(
    *,
    magic: int = 0x4B4C4356,
    size: int = 4096,
    version: int = 1,
    sequence: int = 2,
    flags: int = 0x100,
    count: int = 7,
) -> bytes:
    """A vmclock page as the kernel hands it over."""
    header = struct.pack("<IIHBBIQQ", magic, size, version, 255, 0, sequence, 0, flags)
    return (header.ljust(104, b"\xff") + struct.pack("<Q", count)).ljust(4096, b"\0")


def test_the_counter_is_read(tmp_path: Path) -> None:
    device = tmp_path / "vmclock0"
    device.write_bytes(page())
    assert vm_generation(device) == 7
    device.write_bytes(page(count=(1 << 64) - 1))
    assert vm_generation(device) == (1 << 64) - 1


@pytest.mark.parametrize(
    "data",
    [
        page(magic=0),
        page(version=2),
        page(size=111),
        page(flags=0xFF),
        page(sequence=3),
        page()[:111],
        b"",
    ],
    ids=["magic", "version", "too old", "no counter", "being written", "cut short", "empty"],
)
def test_what_tells_no_generation_is_none(tmp_path: Path, data: bytes) -> None:
    device = tmp_path / "vmclock0"
    device.write_bytes(data)
    assert vm_generation(device) is None


def test_a_machine_without_the_device_has_none(tmp_path: Path) -> None:
    assert vm_generation(tmp_path / "none") is None
    assert vm_generation(tmp_path) is None
