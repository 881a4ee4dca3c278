"""Whether the kernel's bound on the agent's memory has room for what its configuration lets callers have on lease."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cgpu_agent.daemon.config import Limits
from cgpu_agent.rpc.cgroups import cgroup2_mount, cgroup2_path

OWN: Final = 1 << 30
"""Bytes that the agent may need for itself, when many callers do not read their answers."""
_MAX_NUMBER: Final = 32


def shortage(limits: Limits, proc: Path = Path("/proc/self")) -> str | None:
    """Why a caller who takes all he may would have the agent killed; ``None`` if not, or if nobody can tell."""
    bound = _bound(proc)
    leases = limits.lease_mib_in_all << 20
    if bound is None or bound >= leases + OWN:
        return None
    had = f"callers may lease {leases >> 20} MiB (limits.lease_mib_in_all)"
    return f"{had}, and at {bound >> 20} MiB the kernel ends the agent"


def _bound(proc: Path) -> int | None:
    """The least ``memory.max`` of this process's cgroup and those above it."""
    try:
        mount = cgroup2_mount((proc / "mountinfo").read_text())
        path = cgroup2_path((proc / "cgroup").read_bytes())
        if mount is None or path is None or ".." in path:
            return None
        group = Path(mount + path)
        folders = [group, *group.parents][: len(Path(path).parts)]
        return min((found for found in map(_memory_max, folders) if found is not None), default=None)
    except (OSError, ValueError):
        return None


def _memory_max(folder: Path) -> int | None:
    try:
        with (folder / "memory.max").open() as file:
            text = file.read(_MAX_NUMBER).strip()
    except FileNotFoundError:  # the root has none, nor has a hierarchy without this controller
        return None
    return None if text == "max" else int(text)
