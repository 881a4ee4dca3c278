"""Which part of a process's cgroup path may be believed: only names that root chose.

Whoever owns a cgroup directory makes directories in it and names them as it likes, so a tenant can build
``docker-<id>.scope/cgpu-agent.service`` below its own. A name counts while every directory above it is root's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_PATH_LIMIT = 4096
_CONTAINER_SCOPE = re.compile(r"(?:docker|cri-containerd|crio|libpod)-([0-9a-f]{64})\.scope")
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")


class TrustedNames(NamedTuple):
    """What a cgroup path says that is worth repeating; all ``None`` where nothing is."""

    cgroup: str | None
    unit: str | None
    container: str | None


NO_NAMES = TrustedNames(None, None, None)


def trusted_names(path: str, owner_of: Callable[[str], int | None]) -> TrustedNames:
    """Cut a cgroup path down to what root named, and read unit and container from that.

    The prefix ends with the first directory that root does not own (``user@1000.service``), or with the first
    container: a container whose root is the host's root owns directories below its own as root too.

    Args:
        path: path in the cgroup2 hierarchy, from its root (``/system.slice/x.service``).
        owner_of: uid that owns the directory at such a path, or ``None`` when that cannot be told.

    Returns:
        ``cgroup`` is the prefix. ``unit`` is its first component behind the slices, if a service or scope: that is
        systemd's own rule, and names further down are the unit's to choose. A container within a unit is not that
        unit. ``container`` is a 64-hex id.
    """
    if path == "/":
        return TrustedNames("/", None, None)
    if not path.startswith("/") or len(path) > _PATH_LIMIT or not (path.isascii() and path.isprintable()):
        return NO_NAMES
    prefix: list[str] = []
    container = None
    for component in path[1:].split("/"):
        # ".." stands for a cgroup outside the reader's cgroup namespace: such a path cannot be looked up.
        if component in {"", ".", ".."}:
            return NO_NAMES
        container = _container(component, prefix)
        prefix.append(component)
        owner = owner_of("/" + "/".join(prefix))
        if owner is None:
            return NO_NAMES
        if owner != 0 or container is not None:
            break
    unit = next((part for part in prefix if not part.endswith(".slice")), "")
    if not unit.endswith((".service", ".scope")) or (container is not None and unit != prefix[-1]):
        unit = ""
    return TrustedNames("/" + "/".join(prefix), unit or None, container)


def _container(component: str, above: list[str]) -> str | None:
    """The container id that a component names: by its scope, or bare below Docker's or Kubernetes' directory."""
    if scope := _CONTAINER_SCOPE.fullmatch(component):
        return scope.group(1)
    bare = _CONTAINER_ID.fullmatch(component)
    if bare and ((above and above[-1] == "docker") or any(part.startswith("kubepods") for part in above)):
        return component
    return None


def cgroup2_path(proc_cgroup: bytes) -> str | None:
    """The path in ``/proc/PID/cgroup`` within the cgroup2 hierarchy (the line ``0::``)."""
    for line in proc_cgroup.splitlines():
        if line.startswith(b"0::/"):
            return os.fsdecode(line[3:])
    return None


def cgroup2_mount(mountinfo: str) -> str | None:
    """Where the root of the cgroup2 hierarchy is mounted, by the text of ``/proc/self/mountinfo``.

    In the hybrid layout that is ``/sys/fs/cgroup/unified``. Of several mounts the last one is on top.
    """
    found = None
    for line in mountinfo.splitlines():
        mount, _, filesystem = line.partition(" - ")
        fields = mount.split(" ")
        if filesystem.startswith("cgroup2 ") and len(fields) > 4 and fields[3] == "/" and "\\" not in fields[4]:
            found = fields[4]
    return found


def owner_in(mount: str) -> Callable[[str], int | None]:
    """An ``owner_of`` for ``trusted_names`` that asks the cgroup2 file system mounted at ``mount``."""

    def owner_of(path: str) -> int | None:
        try:
            return Path(mount + path).lstat().st_uid
        except OSError:
            return None

    return owner_of
