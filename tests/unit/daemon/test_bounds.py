"""A unit's MemoryMax= that is less than callers may take is told before one of them takes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cgpu_agent.daemon.bounds import OWN, shortage
from cgpu_agent.daemon.config import Limits

LIMITS = replace(Limits(), lease_mib_in_all=4096)
ENOUGH = (4096 << 20) + OWN


def process(tmp_path: Path, own: str | None, above: str | None = None, cgroup: str = "/a.slice/b.service") -> Path:
    """What /proc says of a process in a cgroup with these bounds."""
    group = tmp_path / "cgroup" / "a.slice" / "b.service"
    group.mkdir(parents=True)
    for folder, bound in ((group, own), (group.parent, above)):
        if bound is not None:
            (folder / "memory.max").write_text(f"{bound}\n")
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "mountinfo").write_text(f"30 23 0:26 / {tmp_path}/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n")
    (proc / "cgroup").write_text(f"0::{cgroup}\n")
    return proc


@pytest.mark.parametrize(("own", "above"), [(ENOUGH - 1, "max"), ("max", ENOUGH - 1), (ENOUGH, ENOUGH - 1)])
def test_too_little_is_told(tmp_path: Path, own: str, above: str) -> None:
    told = shortage(LIMITS, process(tmp_path, own, above))
    assert told is not None
    assert "4096 MiB" in told
    assert f"{(ENOUGH - 1) >> 20} MiB the kernel" in told


@pytest.mark.parametrize(("own", "above"), [(ENOUGH, "max"), ("max", None), (None, None), (ENOUGH, None)])
def test_enough_is_not(tmp_path: Path, own: str, above: str) -> None:
    assert shortage(LIMITS, process(tmp_path, own, above)) is None


@pytest.mark.parametrize(("own", "cgroup"), [("nonsense", "/a.slice/b.service"), ("1", "/../b"), ("1", "/other")])
def test_what_cannot_be_told_is_not(tmp_path: Path, own: str, cgroup: str) -> None:
    assert shortage(LIMITS, process(tmp_path, own, cgroup=cgroup)) is None
    assert shortage(LIMITS, tmp_path / "none") is None
