"""Whether a process is the agent: the main process of its unit, by what root and systemd alone can arrange."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cgpu_agent.rpc import peer
from cgpu_agent.rpc.cgroups import cgroup2_mount, cgroup2_path, owner_in, trusted_names

UNIT: Final = "cgpu-agent.service"
_SYSTEMD: Final = 1


def is_main_process(pid: int, unit: str = UNIT, *, manager: int = _SYSTEMD) -> bool:
    """Whether this process is in the unit's own cgroup, and the manager's own child.

    The caller must check *afterwards* that the process still lives: a pid in use cannot have been recycled.

    Raises ``OSError`` when this process is out of resources.
    """
    mount = cgroup2_mount(Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape"))
    cgroup = peer.proc_file(pid, "cgroup")
    path = None if cgroup is None else cgroup2_path(cgroup)
    if path is None or mount is None or peer.parent(pid) != manager:
        return False
    names = trusted_names(path, owner_in(mount))
    # A cgroup below the unit's own is another one, whoever made it.
    return names.unit == unit and names.cgroup == path and not path.partition(f"/{unit}")[2]
