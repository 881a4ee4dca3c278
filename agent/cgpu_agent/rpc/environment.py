"""Whether this kernel and this sandbox let the daemon know its callers; asked once, at start."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from cgpu_agent.domain.caller import IdentityStrength
from cgpu_agent.errors import Unavailable
from cgpu_agent.rpc import peer
from cgpu_agent.rpc.cgroups import cgroup2_mount

_IDENTITY_MAP = ["0", "0", "4294967295"]
_DEFAULT_OVERFLOW_ID = 65534


@dataclass(frozen=True, slots=True)
class IdentityCapabilities:
    """What identity can rest on here.

    Attributes:
        peer_pidfd: ``SO_PEERPIDFD`` works (Linux 6.5). Without it callers have strength ``pid`` and no names.
        unique_pidfd_inode: pidfds of different processes have different inodes (Linux 6.9). Before that a comparison
            says "same" of everybody.
        pidfd_info: ``PIDFD_GET_INFO`` works (Linux 6.13). Before that a re-check reads /proc.
        processes_visible: /proc shows processes of other uids. Where ``hidepid`` (systemd: ``ProtectProc=``) hides
            them, callers have no unit, container or cgroup.
        executables_visible: /proc/PID/exe of other uids can be read (CAP_SYS_PTRACE). Otherwise it goes unnoticed
            when a caller executes another program, and it has no ``exe_at_identify``.
        cgroup_mount: where the cgroup2 hierarchy is mounted; ``None``: no unit, container or cgroup.
        overflow_uid, overflow_gid: ids that stand for "has no id here"; nobody may use them as an identity.
    """

    peer_pidfd: bool
    unique_pidfd_inode: bool
    pidfd_info: bool
    processes_visible: bool
    executables_visible: bool
    cgroup_mount: str | None
    overflow_uid: int = _DEFAULT_OVERFLOW_ID
    overflow_gid: int = _DEFAULT_OVERFLOW_ID

    @property
    def identity_strength(self) -> IdentityStrength:
        """The strength that every identified caller has here."""
        return "pidfd" if self.peer_pidfd else "pid"

    def shortcomings(self) -> tuple[str, ...]:
        """What is missing, one sentence each, for ``doctor`` and the status line."""
        findings = (
            (self.peer_pidfd, "SO_PEERPIDFD is missing (Linux 6.5): callers have no unit, container or executable"),
            (self.unique_pidfd_inode, "pidfd inodes are not unique (Linux 6.9): processes are compared by pid"),
            (self.pidfd_info, "PIDFD_GET_INFO is missing (Linux 6.13): callers are re-checked through /proc"),
            (
                self.processes_visible,
                "/proc hides processes of other users (hidepid): callers have no unit or container",
            ),
            (self.executables_visible, "/proc/PID/exe of other users is not readable: no executable digest"),
            (self.cgroup_mount is not None, "no cgroup2 hierarchy is mounted: callers have no unit or container"),
        )
        return tuple(sentence for present, sentence in findings if not present)


def self_check_environment() -> IdentityCapabilities:
    """Refuse to know callers where the kernel cannot name them, and report what it can do.

    In a user namespace with a partial map every foreign caller is the overflow id, so all of them would be one
    (``PrivateUsers=yes`` does that).

    Raises:
        Unavailable: ``USER_NAMESPACE`` unless uid_map and gid_map are the full identity.
    """
    for name in ("uid_map", "gid_map"):
        # Split into words, the whole map is exactly one line that maps everything to itself.
        if _read(f"/proc/self/{name}").split() != _IDENTITY_MAP:
            raise Unavailable(
                "USER_NAMESPACE", f"this process's {name} is not the full identity map: callers cannot be told apart"
            )
    return IdentityCapabilities(
        peer_pidfd=_has_peer_pidfd(),
        unique_pidfd_inode=_has_unique_pidfd_inodes(),
        pidfd_info=_has_pidfd_info(),
        processes_visible=peer.proc_file(1, "cgroup") is not None,
        executables_visible=peer.executable(1) is not None,
        cgroup_mount=cgroup2_mount(_read("/proc/self/mountinfo")),
        overflow_uid=_overflow_id("overflowuid"),
        overflow_gid=_overflow_id("overflowgid"),
    )


def _has_peer_pidfd() -> bool:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            os.close(peer.pidfd(ours))
        except OSError:
            return False
    return True


def _has_unique_pidfd_inodes() -> bool:
    """Compare init and this process. Init itself has nobody to compare with, so it says no."""
    try:
        init, own = os.pidfd_open(1), os.pidfd_open(os.getpid())
    except OSError:
        return False
    try:
        return os.getpid() != 1 and os.fstat(init).st_ino != os.fstat(own).st_ino
    finally:
        os.close(init)
        os.close(own)


def _has_pidfd_info() -> bool:
    try:
        own = os.pidfd_open(os.getpid())
    except OSError:
        return False
    try:
        return peer.pidfd_info(own) is not None
    finally:
        os.close(own)


def _overflow_id(name: str) -> int:
    text = _read(f"/proc/sys/kernel/{name}").strip()
    return int(text) if text.isdecimal() else _DEFAULT_OVERFLOW_ID


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
