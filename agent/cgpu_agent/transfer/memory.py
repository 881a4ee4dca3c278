"""Memory that the host does not see: locked, left out of core dumps, wiped when done; and copies to and from it.

``ctypes.memmove`` is used for large copies as it lets other threads run meanwhile, which assigning slices does not.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Final

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def address_of(buffer: mmap.mmap | memoryview | bytearray) -> int:
    """Where a writable buffer begins. It must be kept alive, and open, as long as the address is used."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def copy(target: int, source: int, size: int) -> None:
    """Copy between addresses, without the GIL."""
    ctypes.memmove(target, source, size)


def clear(target: int, size: int) -> None:
    """Overwrite what is at an address with zeros, without the GIL."""
    ctypes.memset(target, 0, size)


class PrivateMemory:
    """An anonymous private mapping, populated at once. It goes when nobody refers to it any more.

    Args:
        size: bytes.
        lock: keep it off swap; needs RLIMIT_MEMLOCK.

    Attributes:
        address: where it begins.
        view: all of it.
        locked: whether it can be swapped out after all (``False``). Inside a TEE swap is the host's to read.
    """

    __slots__ = ("_map", "address", "locked", "view")

    def __init__(self, size: int, *, lock: bool) -> None:
        self._map: Final = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        self._map.madvise(mmap.MADV_DONTDUMP)
        self._map.madvise(mmap.MADV_DONTFORK)
        self.address: Final = address_of(self._map)
        self.locked: Final = lock and _LIBC.mlock(ctypes.c_void_p(self.address), ctypes.c_size_t(size)) == 0
        self.view: Final = memoryview(self._map)

    def __len__(self) -> int:
        return len(self.view)

    def wipe(self) -> None:
        """Overwrite it with zeros."""
        clear(self.address, len(self.view))
