"""The front door's two addresses: a public socket bound without surprises, and a directory nobody else enters."""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from cgpu_agent.errors import Misuse, Unavailable

_SUN_PATH_BYTES = 108
_NAME_BYTES = 12
# grpc's context.peer() percent-encodes everything else, and then no connection would be found again.
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9._/-]+")


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening unix socket.

    Attributes:
        sock: non-blocking.
        path: the socket file to remove at the end; ``None`` for a socket that systemd owns.
        inode: (device, inode) of that file, to remove it only while it is still this one.
    """

    sock: socket.socket
    path: str | None
    inode: tuple[int, int] | None

    def close(self) -> None:
        """Close the socket, and remove its file if this process bound it. Idempotent."""
        self.sock.close()
        if self.path is not None and _inode(self.path) == self.inode:
            Path(self.path).unlink(missing_ok=True)


def adopt_listener(sock: socket.socket, kind: socket.SocketKind = socket.SOCK_STREAM) -> Listener:
    """Take over a listening socket, from systemd.

    Raises:
        Unavailable: ``LISTENER_INVALID`` unless it is a listening unix socket of that kind.
    """
    if (
        sock.family != socket.AF_UNIX
        or sock.type != kind
        or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        raise Unavailable(
            "LISTENER_INVALID", "the inherited descriptor is not a listening unix socket of the right kind"
        )
    sock.setblocking(False)
    return Listener(sock, None, None)


def bind_listener(
    path: str, mode: int, kind: socket.SocketKind = socket.SOCK_STREAM, *, backlog: int = 1024
) -> Listener:
    """Bind and listen. A socket file that nobody answers is replaced; anything else in the way is left alone.

    Args:
        path: absolute; its directory must belong to root or this user, and nobody else may write there.
        mode: permission bits of the socket file, whatever the umask; nobody can connect before they are set.

    Raises:
        Misuse: ``SOCKET_PATH_INVALID``.
        Unavailable: ``SOCKET_DIRECTORY_UNSAFE``, ``SOCKET_PATH_TAKEN`` (not a socket: also a link to one),
            ``SOCKET_IN_USE`` (another server answers) or ``SOCKET_BIND_FAILED``.
    """
    if not path.startswith("/") or "\0" in path or len(os.fsencode(path)) >= _SUN_PATH_BYTES:
        raise Misuse("SOCKET_PATH_INVALID", "a socket path must be absolute and shorter than 108 bytes")
    directory = _lstat(str(Path(path).parent))
    shared = directory is not None and bool(directory.st_mode & 0o022)
    if (
        directory is None
        or not stat.S_ISDIR(directory.st_mode)
        or shared
        or directory.st_uid not in {0, os.geteuid()}
    ):
        raise Unavailable(
            "SOCKET_DIRECTORY_UNSAFE", "the public socket's directory is writable for others, or a link"
        )
    _remove_stale(path, kind)
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        sock.bind(path)
        Path(path).chmod(mode)
        sock.listen(backlog)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise Unavailable("SOCKET_BIND_FAILED", "the public socket could not be bound") from error
    return Listener(sock, path, _inode(path))


def _remove_stale(path: str, kind: socket.SocketKind) -> None:
    found = _lstat(path)
    if found is None:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise Unavailable("SOCKET_PATH_TAKEN", "something that is not a socket is in the public socket's place")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        if probe.connect_ex(path) != errno.ECONNREFUSED:
            raise Unavailable("SOCKET_IN_USE", "another server answers at the public socket")
    Path(path).unlink(missing_ok=True)


class PrivateDirectory:
    """The directory that holds the inner server's socket and the names of the door's connections to it.

    Nobody else may enter it: who can bind a name in it can speak as any caller.

    Args:
        inner: absolute path of the inner server's socket; its directory is this one.

    Raises:
        Misuse: ``SOCKET_PATH_INVALID``: characters that grpc would escape, or no room for the names.
        Unavailable: ``SOCKET_DIRECTORY_UNSAFE`` unless the directory is this user's, mode 0700, and no link.
    """

    def __init__(self, inner: str) -> None:
        self.inner = inner
        self.path = str(Path(inner).parent)
        longest = max(len(inner), len(self.path) + 1 + 2 * _NAME_BYTES)
        if not _PLAIN_PATH.fullmatch(inner) or inner.endswith("/") or longest >= _SUN_PATH_BYTES:
            raise Misuse("SOCKET_PATH_INVALID", "the inner socket's path must be short, of [A-Za-z0-9._/-] only")
        self.verify()

    def verify(self) -> None:
        """Check owner and mode (again)."""
        found = _lstat(self.path)
        if (
            found is None
            or not stat.S_ISDIR(found.st_mode)
            or found.st_uid != os.geteuid()
            or stat.S_IMODE(found.st_mode) != 0o700
        ):
            raise Unavailable(
                "SOCKET_DIRECTORY_UNSAFE", "the inner socket's directory must be the daemon's, mode 0700"
            )

    def fresh_name(self) -> str:
        """A path in the directory that nobody can guess (96 random bits)."""
        return f"{self.path}/{secrets.token_hex(_NAME_BYTES)}"


def _lstat(path: str) -> os.stat_result | None:
    try:
        return Path(path).lstat()
    except OSError:
        return None


def _inode(path: str) -> tuple[int, int] | None:
    found = _lstat(path)
    return None if found is None else (found.st_dev, found.st_ino)
