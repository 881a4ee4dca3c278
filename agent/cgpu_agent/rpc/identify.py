"""From an accepted socket to a ``Caller``, and later: is it still the same process?

Who called is what the kernel says, never what the caller says. Facts from /proc count only when the caller's pidfd is
still alive *after* they were read: a pid in use cannot have been recycled.
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from dataclasses import dataclass

from cgpu_agent.domain.caller import Caller
from cgpu_agent.errors import Denied, Unavailable
from cgpu_agent.rpc import peer
from cgpu_agent.rpc.cgroups import NO_NAMES, cgroup2_path, owner_in, trusted_names
from cgpu_agent.rpc.environment import IdentityCapabilities


@dataclass(frozen=True, slots=True)
class Facts:
    """What a caller must keep to stay the caller. ``None`` where this kernel or sandbox cannot tell."""

    ids: peer.Ids | None
    cgroup_id: int | None
    cgroup_path: str | None
    executable: peer.FileId | None
    start_time: int | None


class Identified:
    """One identified process behind one connection; owns its pidfd. Any thread may ask it.

    A handler may ask while the connection is being closed, and a closed descriptor's number is soon another file's:
    hence the lock, and "closed" counts as dead for ever.

    Attributes:
        caller: who it is, fixed.
        facts: what was true when it was identified.
        pidfd_inode: identity of the process itself, or ``None`` where pidfd inodes are not unique.
        remembered_digest: of the program (``exe_digest``), with the state of the file it was made of.
    """

    def __init__(self, caller: Caller, facts: Facts, pidfd: int | None, capabilities: IdentityCapabilities) -> None:
        self.caller = caller
        self.facts = facts
        comparable = capabilities.peer_pidfd and capabilities.unique_pidfd_inode
        self.pidfd_inode = os.fstat(pidfd).st_ino if pidfd is not None and comparable else None
        self.remembered_digest: tuple[peer.FileState, str] | None = None
        self._capabilities = capabilities
        self._lock = threading.Lock()
        self._pidfd = pidfd
        self._closed = False

    @property
    def pidfd(self) -> int | None:
        """The pidfd, to be watched by the thread that also closes it; ``None`` on kernels without, or once closed."""
        return self._pidfd

    def alive(self) -> bool:
        """Whether the connecting process lives. False once closed."""
        with self._lock:
            return self._alive()

    def still_the_same(self) -> None:
        """Check, now, that the process lives and kept its ids, its cgroup and its program.

        With strength ``pid`` this is best effort: start time and ids of whatever has that pid now.

        Raises:
            Denied: ``CALLER_GONE`` (dead, or its connection is closed) or ``CALLER_CHANGED``.
            Unavailable: ``CALLER_UNCHECKED`` when this process is out of descriptors.
        """
        caller = self.caller
        with self._lock:
            if self._closed:
                raise _gone()
            try:
                facts = _facts(caller.pid, self._pidfd, self._capabilities, self.facts)
            except OSError as error:
                raise Unavailable("CALLER_UNCHECKED", "the caller cannot be checked now", retry_after=1.0) from error
            if not self._alive() or facts.start_time != self.facts.start_time:
                raise _gone()
        # The ids at connect too: between connect and identification a process can already have changed them.
        ids = facts.ids
        as_connected = ids is None or (ids.uids[1], ids.gids[1]) == (caller.uid, caller.gid)
        if facts != self.facts or not as_connected:
            raise Denied(
                "CALLER_CHANGED", "the calling process changed its user, cgroup or program since it connected"
            )

    def is_same_process(self, other: Identified) -> bool:
        """Whether two connections come from one process of one user, now.

        Where pidfd inodes are not unique: equal pids, both pidfds alive. Without pidfds, never.
        """
        if self.caller.uid != other.caller.uid or self.caller.pid != other.caller.pid:
            return False
        if self.caller.identity_strength != "pidfd" or other.caller.identity_strength != "pidfd":
            return False
        return self.pidfd_inode == other.pidfd_inode and self.alive() and other.alive()

    def kept(self) -> Identified:
        """The same process, for whoever outlives the connection; to be closed, too.

        Raises ``Denied`` (``CALLER_GONE``), ``Unavailable`` (``CALLER_UNCHECKED``).
        """
        with self._lock:
            if self._closed:
                raise _gone()
            try:
                pidfd = None if self._pidfd is None else os.dup(self._pidfd)
            except OSError as error:
                raise Unavailable("CALLER_UNCHECKED", "the caller cannot be checked now", retry_after=1.0) from error
        return Identified(self.caller, self.facts, pidfd, self._capabilities)

    def mark(self) -> str:
        """32 hex digits: the same for the same process while it is what it was, also in another run of the agent."""
        caller = self.caller
        told = repr((caller.uid, caller.gid, caller.pid, self.pidfd_inode, self.facts))
        return hashlib.sha256(told.encode()).hexdigest()[:32]

    def close(self) -> None:
        """Give the pidfd up; from here on the caller counts as gone. Idempotent."""
        with self._lock:
            self._closed = True
            if self._pidfd is not None:
                os.close(self._pidfd)
                self._pidfd = None

    def _alive(self) -> bool:
        if self._closed:
            return False
        if self._pidfd is not None:
            return not peer.has_exited(self._pidfd)
        started = peer.start_time(self.caller.pid)
        return started is not None and started == self.facts.start_time


class Identifier:
    """Reads identities with the means that ``capabilities`` found.

    What the kernel can do is measured once and not concluded from a failing call: before Linux 6.10 a dead peer and
    a kernel without ``SO_PEERPIDFD`` fail alike, and dying must not turn a caller into one of strength ``pid``.
    """

    def __init__(self, capabilities: IdentityCapabilities) -> None:
        self.capabilities = capabilities

    def require_identity(self, credentials: peer.Credentials) -> None:
        """Refuse ids that stand for "unknown here".

        Raises:
            Denied: ``CALLER_UNIDENTIFIED`` for pid 0 (outside this pid namespace) and the overflow uid or gid.
        """
        overflow = (
            credentials.uid == self.capabilities.overflow_uid or credentials.gid == self.capabilities.overflow_gid
        )
        if credentials.pid <= 0 or overflow:
            raise Denied("CALLER_UNIDENTIFIED", "the kernel has no user, group or process id for this caller here")

    def identify(self, sock: socket.socket, credentials: peer.Credentials) -> Identified:
        """Identify the process that connected.

        Args:
            sock: an accepted unix stream socket.
            credentials: its ``SO_PEERCRED``.

        Raises:
            Denied: ``CALLER_UNIDENTIFIED``, see ``require_identity``; ``CALLER_GONE`` when the process is dead.
            OSError: this process is out of descriptors or memory.
        """
        self.require_identity(credentials)
        pidfd = self._pidfd(sock, credentials.pid)
        try:
            return self._identify(sock, credentials, pidfd)
        except BaseException:
            if pidfd is not None:
                os.close(pidfd)
            raise

    def _identify(self, sock: socket.socket, credentials: peer.Credentials, pidfd: int | None) -> Identified:
        facts = _facts(credentials.pid, pidfd, self.capabilities)
        names = NO_NAMES
        if facts.cgroup_path is not None and self.capabilities.cgroup_mount is not None:
            names = trusted_names(facts.cgroup_path, owner_in(self.capabilities.cgroup_mount))
        if facts.start_time is None if pidfd is None else peer.has_exited(pidfd):
            raise _gone()
        caller = Caller(
            uid=credentials.uid,
            gid=credentials.gid,
            groups=peer.groups(sock),
            pid=credentials.pid,
            unit=names.unit,
            container=names.container,
            cgroup=names.cgroup,
            exe_at_identify=None,
            identity_strength=self.capabilities.identity_strength,
        )
        return Identified(caller, facts, pidfd, self.capabilities)

    def _pidfd(self, sock: socket.socket, pid: int) -> int | None:
        """The connector's pidfd; of strength ``pid`` one of whoever has that pid now, good for noticing its death."""
        try:
            return peer.pidfd(sock) if self.capabilities.peer_pidfd else os.pidfd_open(pid)
        except OSError as error:
            if error.errno in peer.OUT_OF_RESOURCES:
                raise
            if self.capabilities.peer_pidfd or isinstance(error, ProcessLookupError):
                raise _gone() from error
            return None


def _facts(pid: int, pidfd: int | None, capabilities: IdentityCapabilities, known: Facts | None = None) -> Facts:
    """Read what can be read of the process that has this pid now. The caller must check the pidfd *afterwards*.

    ``known``: facts read before. A cgroup's id is never used again and its directory cannot be renamed (cgroup v2),
    so the same id saves reading the path.
    """
    if not capabilities.peer_pidfd:
        return Facts(peer.status_ids(pid), None, None, None, peer.start_time(pid))
    info = None if pidfd is None or not capabilities.pidfd_info else peer.pidfd_info(pidfd)
    program = peer.executable(pid)
    if info is not None and known is not None and info.cgroup_id == known.cgroup_id:
        path = known.cgroup_path
    else:
        cgroup = peer.proc_file(pid, "cgroup")
        path = None if cgroup is None else cgroup2_path(cgroup)
    return Facts(
        ids=peer.status_ids(pid) if info is None else info.ids,
        cgroup_id=None if info is None else info.cgroup_id,
        cgroup_path=path,
        executable=None if program is None else program.id,
        start_time=None,
    )


def _gone() -> Denied:
    return Denied("CALLER_GONE", "the process that opened this connection is gone")
