"""What a container sees of the agent, without a container engine: a read-only mount, and mapped uids."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fixtures.daemon import Daemon, booted_daemon
from fixtures.workload import ask

pytestmark = [
    pytest.mark.swtpm,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become other users"),
]

UID = 20001
# In a mount namespace of its own, as a container engine makes one: the folder is there, and read-only.
MOUNTED = """
import json, subprocess, sys
sys.path[:0] = sys.argv[3].split(":")
from fixtures.workload import ask
source, target = sys.argv[1:3]
subprocess.run(["mount", "--bind", source, target], check=True)
subprocess.run(["mount", "-o", "remount,bind,ro", target], check=True)
made = subprocess.run(["touch", f"{target}/x"], capture_output=True, text=True)
print(json.dumps([made.stderr, ask(f"{target}/agent.sock", "claims", uid=int(sys.argv[4]))]))
"""


@pytest.fixture(scope="module")
def served() -> Iterator[Daemon]:
    """One whose socket for workloads is alone in a folder, and linked to (recipes/sidecar/containers.conf)."""
    with booted_daemon() as agent, socket.socket(socket.AF_UNIX) as listener:
        folder = agent.folder / "api"
        folder.mkdir(mode=0o755)
        listener.bind(str(folder / "agent.sock"))
        (folder / "agent.sock").chmod(0o666)
        listener.listen()
        Path(agent.socket).symlink_to(folder / "agent.sock")
        agent.start(listeners=[("api", listener)])
        yield agent


def test_the_link_in_the_old_place_leads_to_the_agent(served: Daemon) -> None:
    assert ask(served.socket, "claims", uid=UID)["uid"] == UID


@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare is not installed")
def test_a_read_only_mount_of_the_folder_is_enough(served: Daemon, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    target = served.folder / "mounted"
    target.mkdir()
    paths = ":".join(part for part in sys.path if part)
    arguments = [served.folder / "api", target, paths, str(UID)]
    command = ["unshare", "--mount", "--propagation=private", sys.executable, "-c", MOUNTED, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "unshare failed" in ran.stderr or "permission denied" in ran.stderr.lower():
        pytest.skip("no mounts may be made here")
    assert ran.returncode == 0, ran.stderr
    assert "Read-only file system" in ran.stdout
    assert f'"uid": {UID}' in ran.stdout
    assert [path.name for path in (served.folder / "api").iterdir()] == ["agent.sock"]


def test_root_of_a_user_namespace_is_the_uid_that_it_is_outside(served: Daemon) -> None:
    try:
        claims = ask(served.socket, "claims", uid=UID, mapped=True)
    except subprocess.CalledProcessError:
        pytest.skip("no user namespaces may be made here")
    assert (claims["uid"], claims["gid"]) == (UID, UID)
