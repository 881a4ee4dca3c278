"""Which process is the agent, read from the real /proc and the real cgroup file system."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cgpu_agent.ready.identity import UNIT, is_main_process
from cgpu_agent.rpc.cgroups import cgroup2_mount, cgroup2_path

ME = os.getpid()


def mount() -> Path | None:
    found = cgroup2_mount(Path("/proc/self/mountinfo").read_text())
    return None if found is None else Path(found)


@contextmanager
def cgroup(path: str, owner: int = 0) -> Iterator[Path]:
    """A cgroup of this path, made by root in a slice of the test's own."""
    root = mount()
    if root is None or os.geteuid() != 0 or not os.access(root, os.W_OK):
        pytest.skip("needs root, and a cgroup2 hierarchy that can be written")
    made: list[Path] = []
    try:
        folder = root / f"cgpu-test-{ME}.slice"
        for part in ["", *path.split("/")]:
            folder = folder / part
            if not folder.exists():
                try:
                    folder.mkdir()
                except OSError:
                    pytest.skip("no cgroup can be made here")
                made.append(folder)
        os.chown(folder, owner, owner)
        yield folder
    finally:
        for each in reversed(made):
            each.rmdir()


@contextmanager
def process_in(folder: Path) -> Iterator[int]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            (folder / "cgroup.procs").write_text(str(process.pid))
            yield process.pid
        finally:
            process.kill()


def test_a_process_outside_of_the_unit_is_not_the_agent() -> None:
    assert not is_main_process(ME, manager=os.getppid())
    assert not is_main_process(1, manager=0)


def test_a_process_that_is_gone_is_not_the_agent() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert not is_main_process(process.pid)


def test_the_managers_child_in_the_units_cgroup_is_the_agent() -> None:
    with cgroup(UNIT) as folder, process_in(folder) as pid:
        assert cgroup2_path(Path(f"/proc/{pid}/cgroup").read_bytes()) == f"/{folder.relative_to(str(mount()))}"
        assert is_main_process(pid, manager=ME)
        assert not is_main_process(pid, "cgpu-agent2.service", manager=ME)


def test_a_child_of_the_unit_that_systemd_did_not_start_is_not_the_agent() -> None:
    with cgroup(UNIT) as folder, process_in(folder) as pid:
        assert not is_main_process(pid)


@pytest.mark.parametrize(
    "path",
    [
        f"{UNIT}/inner",
        f"{UNIT}/{UNIT}",
        f"user@1000.service/{UNIT}",
        f"docker-{'ab' * 32}.scope/{UNIT}",
        f"{UNIT}.service",
        f"x-{UNIT}",
    ],
)
def test_a_name_elsewhere_in_the_path_is_not_the_unit(path: str) -> None:
    with cgroup(path) as folder, process_in(folder) as pid:
        assert not is_main_process(pid, manager=ME)


def test_a_tenants_directory_of_that_name_is_not_the_unit() -> None:
    with cgroup("tenant.slice", owner=1000), cgroup(f"tenant.slice/{UNIT}") as folder, process_in(folder) as pid:
        assert not is_main_process(pid, manager=ME)
