"""Who called, as the kernel says it: a frozen value that travels from the front door to policy and evidence."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Literal

IdentityStrength = Literal["pidfd", "pid"]


@dataclass(frozen=True, slots=True)
class Caller:
    """The process at the other end of a connection, identified at connect time.

    Fields marked (pidfd) are known only with ``identity_strength == "pidfd"``: without a pidfd a recycled pid could
    lend its name to a stranger, so they are ``None`` and rules that ask for them deny.

    Attributes:
        uid, gid: effective ids at connect (``SO_PEERCRED``), in the initial user namespace.
        groups: supplementary groups (``SO_PEERGROUPS``), ascending; ``None`` when the kernel could not tell.
        pid: process id at connect, in the daemon's pid namespace.
        unit: systemd unit (pidfd), from the root-owned prefix of the cgroup path only.
        container: 64-hex container id (pidfd), from the same prefix.
        cgroup: the root-owned prefix of the cgroup path (pidfd), e.g. ``/system.slice/x.service``.
        exe_at_identify: SHA-256 hex of the executable (pidfd); only read where policy asks. Not an identity: a
            process can exec after it connected.
        identity_strength: ``pidfd`` or ``pid``.
    """

    uid: int
    gid: int
    groups: tuple[int, ...] | None
    pid: int
    unit: str | None
    container: str | None
    cgroup: str | None
    exe_at_identify: str | None
    identity_strength: IdentityStrength

    def claims(self) -> dict[str, object]:
        """The caller as evidence states it; keys are part of the evidence format."""
        return {
            "cgroup": self.cgroup,
            "container": self.container,
            "exe_at_identify": self.exe_at_identify,
            "gid": self.gid,
            "groups": None if self.groups is None else list(self.groups),
            "identity_strength": self.identity_strength,
            "pid": self.pid,
            "uid": self.uid,
            "unit": self.unit,
        }

    def claims_bytes(self) -> bytes:
        """``claims()`` as compact JSON with sorted keys: the exact bytes that get hashed and sent."""
        return json.dumps(self.claims(), sort_keys=True, separators=(",", ":")).encode()

    def digest(self) -> bytes:
        """SHA-256 of ``claims_bytes()``: names the caller in logs that others may read."""
        return hashlib.sha256(self.claims_bytes()).digest()

    def __str__(self) -> str:
        return f"uid {self.uid} pid {self.pid} ({self.unit or self.container or 'no unit'})"
