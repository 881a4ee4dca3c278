"""What systemd hands over at a start: listening sockets by name, the leases that it kept, and nothing else."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field

import structlog

from cgpu_agent.backends.notify import Notifier
from cgpu_agent.errors import Misuse
from cgpu_agent.rpc.addresses import Listener, adopt_listener, bind_listener
from cgpu_agent.rpc.keptleases import PREFIX, KeptLease, take_back

SYSTEMD_LOG = "systemd-log"
_KNOWN = frozenset({"api", "admin", "lease", "metrics", SYSTEMD_LOG})

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Handover:
    """Descriptors of this start, by ``FileDescriptorName=``; and leases of the run before."""

    named: dict[str, int] = field(default_factory=dict)
    leases: list[KeptLease] = field(default_factory=list)

    def listener(self, name: str, path: str, mode: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> Listener:
        """The socket from systemd, or one bound here."""
        passed = self.named.get(name)
        return (
            bind_listener(path, mode, kind) if passed is None else adopt_listener(socket.socket(fileno=passed), kind)
        )


def take_over(passed: Iterable[tuple[str, int]], notifier: Notifier) -> Handover:
    """Sort out what was passed; what nobody knows is closed, and systemd told to let go of it.

    Raises ``Misuse`` (``BAD_CONFIG``): a listening socket that nobody asked for, so its callers would wait for ever.
    """
    found = Handover()
    others: dict[str, list[int]] = {}
    for name, fd in passed:
        if name in _KNOWN and name not in found.named:
            found.named[name] = fd
        elif _listens(fd):
            raise Misuse("BAD_CONFIG", f"systemd handed over what nobody asked for: {name}")
        else:
            others.setdefault(name, []).append(fd)
    for name, fds in others.items():
        lease = take_back(name, fds) if name.startswith(PREFIX) else None
        if lease is not None:
            found.leases.append(lease)
            continue
        if not name.startswith(PREFIX):
            for fd in fds:
                os.close(fd)
        notifier.forget(name)
        log.warning("closed what systemd had kept and the agent does not know", name=name, descriptors=len(fds))
    return found


def _listens(fd: int) -> bool:
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return False
    with contextlib.closing(socket.socket(fileno=os.dup(fd))) as sock:
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
