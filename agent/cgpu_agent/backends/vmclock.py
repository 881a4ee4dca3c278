"""The virtual machine's generation, by which an honest hypervisor says that it restored or copied the machine.

A machine that was copied has a twin with the same keys, and one that was restored does again what it has done. Linux
tells programs of either in the page of a vmclock device alone, and from version 7.0 on. A hostile hypervisor says
nothing. Source: ``include/uapi/linux/vmclock-abi.h``.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final

VMCLOCK: Final = Path("/dev/vmclock0")

_MAGIC: Final = 0x4B4C4356  # "VCLK"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<IIHBBI")  # magic, size, version, counter_id, time_type, seq_count
_FLAGS: Final = 24
_HAS_GENERATION: Final = 1 << 8
_GENERATION: Final = 104
_SIZE: Final = _GENERATION + 8
_ATTEMPTS: Final = 8


def vm_generation(path: Path = VMCLOCK) -> int | None:
    """The counter, or ``None`` where this machine has none. Never raises."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        for _ in range(_ATTEMPTS):
            page, again = os.pread(descriptor, _SIZE, 0), os.pread(descriptor, _HEADER.size, 0)
            if len(page) < _SIZE:
                return None
            magic, size, version, _, _, sequence = _HEADER.unpack_from(page)
            flags, counter = (int.from_bytes(page[at : at + 8], "little") for at in (_FLAGS, _GENERATION))
            if magic != _MAGIC or version != _VERSION or size < _SIZE or not flags & _HAS_GENERATION:
                return None
            if sequence % 2 == 0 and again == page[: _HEADER.size]:  # else the hypervisor was writing meanwhile
                return counter
    except OSError:
        pass
    finally:
        os.close(descriptor)
    return None
