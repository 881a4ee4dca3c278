"""What systemd keeps of leases over a restart of the agent, and what of it may be taken for one.

Two descriptors by one name: the connection, and the memory. There is no table beside them that could disagree: the
name holds the lease's id and a mark of its holder, the memory knows its size, its kind, and whether it is whole. Who
the holder is, the kernel says anew. The sealed object's descriptor is never kept: systemd looks at what it is given
and closes it, and the file system behind this one can be the caller's own, and never answer.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from cgpu_agent.backends.keptmemory import adopted
from cgpu_agent.backends.memory import SharedMemory
from cgpu_agent.backends.workmemory import WorkMemory
from cgpu_agent.errors import AgentError

PREFIX: Final = "lease-"
PER_LEASE: Final = 2
"""Descriptors."""
_NAME: Final = re.compile(PREFIX + r"([0-9a-f]{32})-([0-9a-f]{32})")


class Store(Protocol):
    """Who keeps descriptors."""

    def keep(self, name: str, fds: Sequence[int]) -> None:
        """Keep copies beyond this process."""

    def forget(self, name: str) -> None:
        """Close all of this name."""


@dataclass(frozen=True, slots=True)
class KeptLease:
    """A lease of an earlier run.

    Attributes:
        name: it is kept by this.
        id: of the lease; ``mark``: of its holder (``Identified.mark``).
        connection: accepted by that run.
        memory: zeros, where the agent was filling it when that run ended.
    """

    name: str
    id: bytes
    mark: str
    connection: socket.socket
    memory: SharedMemory | WorkMemory


def kept_name(lease: bytes, mark: str) -> str:
    """The name to keep a lease by."""
    return f"{PREFIX}{lease.hex()}-{mark}"


def take_back(name: str, fds: Sequence[int]) -> KeptLease | None:
    """What came back by one name. Takes the descriptors; ``None``: no lease, all of it is wiped and closed."""
    sockets: list[socket.socket] = []
    memories: list[SharedMemory | WorkMemory] = []
    for fd in fds:
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            sockets.append(socket.socket(fileno=fd))
        else:
            with contextlib.suppress(AgentError):  # which has closed it
                memories.append(adopted(fd))
    found = _NAME.fullmatch(name)
    if found and len(sockets) == len(memories) == 1 and len(fds) == PER_LEASE and _is_connection(sockets[0]):
        sockets[0].setblocking(False)
        return KeptLease(name, bytes.fromhex(found[1]), found[2], sockets[0], memories[0])
    for sock in sockets:
        sock.close()
    for memory in memories:
        memory.close()
    return None


def _is_connection(sock: socket.socket) -> bool:
    listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    return sock.family == socket.AF_UNIX and sock.type == socket.SOCK_SEQPACKET and not listens
