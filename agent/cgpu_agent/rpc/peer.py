"""What the kernel says of the process behind a socket or a pidfd: one function for each question, no judgement.

Numbers are those of x86-64 and arm64 (``asm-generic/socket.h``, ``linux/pidfd.h``, ``linux/stat.h``). Nothing here
waits for another process: executables are looked at without asking the file system that holds them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
from dataclasses import dataclass

SO_PEERGROUPS = 59
SO_PEERPIDFD = 77
SO_PASSRIGHTS = 83

OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Errors that say something of this process or machine, not of the peer."""

_UCRED = struct.Struct("=iII")
# _IOWR(0xFF, 11, struct pidfd_info) at its first size, 64 bytes; asked for: pid, credentials, cgroup id.
_PIDFD_GET_INFO = 0xC0000000 | 64 << 16 | 0xFF << 8 | 11
_PIDFD_INFO = struct.Struct("=QQ11Ii")
_PIDFD_INFO_WANTED = 0b111

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_STATX_DONT_SYNC = 0x4000
_STATX_BASIC_AND_BIRTH = 0xFFF
_STATX_SIZE = 256
_PROC_FILE_LIMIT = 64 * 1024
_STAT_PARENT = 1
_STAT_START_TIME = 19
"""Places of ``ppid`` and ``starttime`` (fields 4 and 22) behind the command name, which ends field 2."""

# PyDLL keeps the GIL: the three calls made through it never wait (statx with DONT_SYNC, poll with no time-out, this
# ioctl), each is made for every RPC, and giving the GIL away and getting it back costs many times the call.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc_statx = getattr(_libc, "statx", None)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)


class _PollFd(ctypes.Structure):
    """``struct pollfd``."""

    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))


@dataclass(frozen=True, slots=True)
class Credentials:
    """``struct ucred``: the connector's process and effective ids at connect, in the reader's namespaces."""

    pid: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Ids:
    """A process's ids as they are now, each tuple in the order real, effective, saved, file system."""

    uids: tuple[int, ...]
    gids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PidfdInfo:
    """``struct pidfd_info`` (Linux 6.13): cannot be about a recycled pid."""

    pid: int
    cgroup_id: int
    ids: Ids


@dataclass(frozen=True, slots=True)
class FileId:
    """One file: ``born_ns`` tells an inode number that was freed and used again apart from the old one."""

    device: int
    inode: int
    born_ns: int


@dataclass(frozen=True, slots=True)
class FileState:
    """A file and the state of its content, as far as its owner does not forge it."""

    id: FileId
    size: int
    mtime_ns: int


def credentials(sock: socket.socket) -> Credentials:
    """``SO_PEERCRED``. Raises ``OSError``."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return Credentials(*_UCRED.unpack(raw))


def groups(sock: socket.socket) -> tuple[int, ...] | None:
    """``SO_PEERGROUPS`` ascending; ``None`` where unknown: no such option, or more than the 256 Python can read."""
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024)
    except OSError:
        return None
    return tuple(sorted(struct.unpack(f"={len(raw) // 4}I", raw)))


def pidfd(sock: socket.socket) -> int:
    """``SO_PEERPIDFD``: a new, not inheritable descriptor. Raises ``OSError``, also where the peer was reaped."""
    return sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)


def has_exited(fd: int) -> bool:
    """Whether the process of this pidfd is dead (a zombie is)."""
    watched = _PollFd(fd, select.POLLIN, 0)
    count: int = _libc.poll(ctypes.byref(watched), 1, 0)
    if count < 0:
        raise OSError(ctypes.get_errno(), "poll")
    return bool(count)


def pidfd_info(fd: int) -> PidfdInfo | None:
    """``PIDFD_GET_INFO``; ``None`` before Linux 6.13, for a dead process, or where any part of it is not given."""
    raw = ctypes.create_string_buffer(_PIDFD_INFO.size)
    struct.pack_into("=Q", raw, 0, _PIDFD_INFO_WANTED)
    if _libc.ioctl(fd, _PIDFD_GET_INFO, raw) != 0:
        return None
    mask, cgroup_id, _pid, tgid, _ppid, *ids, _exit = _PIDFD_INFO.unpack(raw)
    if mask & _PIDFD_INFO_WANTED != _PIDFD_INFO_WANTED:
        return None
    return PidfdInfo(tgid, cgroup_id, Ids(tuple(ids[0::2]), tuple(ids[1::2])))


def proc_file(pid: int, name: str) -> bytes | None:
    """Content of ``/proc/PID/NAME``, or ``None`` where it is gone, hidden or larger than 64 KiB.

    Raises ``OSError`` when this process is out of resources: that must not look like a hidden file.
    """
    try:
        descriptor = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = _read_whole(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in OUT_OF_RESOURCES:
            raise
        return None
    return data if len(data) <= _PROC_FILE_LIMIT else None


def _read_whole(descriptor: int) -> bytes:
    data = b""
    while len(data) <= _PROC_FILE_LIMIT and (part := os.read(descriptor, _PROC_FILE_LIMIT + 1)):
        data += part
    return data


def status_ids(pid: int) -> Ids | None:
    """The ids in ``/proc/PID/status``; only a pidfd that is alive *afterwards* says whose they are."""
    status = proc_file(pid, "status")
    if status is None:
        return None
    lines = dict(line.partition(b":")[::2] for line in status.splitlines())
    uids = tuple(int(field) for field in lines.get(b"Uid", b"").split())
    gids = tuple(int(field) for field in lines.get(b"Gid", b"").split())
    return Ids(uids, gids) if len(uids) == len(gids) == 4 else None


def start_time(pid: int) -> int | None:
    """Clock ticks from boot to the process's start: tells a recycled pid apart, unless both started in one tick."""
    return _stat_field(pid, _STAT_START_TIME)


def parent(pid: int) -> int | None:
    """The parent's pid."""
    return _stat_field(pid, _STAT_PARENT)


def _stat_field(pid: int, place: int) -> int | None:
    stat = proc_file(pid, "stat")
    if stat is None:
        return None
    fields = stat[stat.rfind(b")") + 1 :].split()
    return int(fields[place]) if len(fields) > place else None


def executable(pid: int) -> FileState | None:
    """The program file of a process; ``None`` where it may not be seen (needs the same uid, or CAP_SYS_PTRACE).

    ``AT_STATX_DONT_SYNC``: a plain ``stat`` would ask a FUSE server, which the caller may own, and never return.
    """
    return _statx(_AT_FDCWD, f"/proc/{pid}/exe".encode(), _AT_STATX_DONT_SYNC)


def file_state(fd: int) -> FileState | None:
    """The same of an open file, with the file system asked."""
    return _statx(fd, b"", _AT_EMPTY_PATH)


def _statx(directory: int, path: bytes, flags: int) -> FileState | None:
    raw = ctypes.create_string_buffer(_STATX_SIZE)
    if _libc_statx is None or _libc_statx(directory, path, flags, _STATX_BASIC_AND_BIRTH, raw) != 0:
        return None
    inode, size = struct.unpack_from("=QQ", raw, 32)
    born, born_ns = struct.unpack_from("=qI", raw, 80)
    changed, changed_ns = struct.unpack_from("=qI", raw, 112)
    major, minor = struct.unpack_from("=II", raw, 136)
    file = FileId(os.makedev(major, minor), inode, born * 10**9 + born_ns)
    return FileState(file, size, changed * 10**9 + changed_ns)


def refuse_descriptors(sock: socket.socket) -> None:
    """Let nobody send descriptors over this socket, or over those that it accepts (Linux 6.16; nothing before it).

    Whoever receives drops the ones that it makes no room for, and dropping the last one of a file may wait for its
    file system, which can be the sender's own, and never answer.
    """
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
