"""In a user namespace with a partial map all foreign callers share one uid, so nobody may be served there."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cgpu_agent.rpc.environment import self_check_environment
from frontdoor_kit import needs_root

SELF_CHECK = """
from cgpu_agent.errors import Unavailable
from cgpu_agent.rpc.environment import self_check_environment
try:
    self_check_environment()
    print("SERVES")
except Unavailable as error:
    print(error.slug)
"""

IDENTIFY_ONE = """
import socket, sys
from cgpu_agent.errors import Denied
from cgpu_agent.rpc import peer
from cgpu_agent.rpc.environment import IdentityCapabilities
from cgpu_agent.rpc.identify import Identifier
listener = socket.socket(fileno=int(sys.argv[1]))
accepted, _ = listener.accept()
found = peer.credentials(accepted)
try:
    Identifier(IdentityCapabilities(True, True, True, True, True, None)).identify(accepted, found)
    print("IDENTIFIED", found.uid)
except Denied as error:
    print(error.slug, found.uid)
"""


def in_user_namespace(program: str, *arguments: str, pass_fds: tuple[int, ...] = ()) -> subprocess.Popen[str]:
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=pass_fds)


def said(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=60)
    if process.returncode != 0:
        pytest.skip("user namespaces cannot be made here")
    return output.strip()


def test_the_self_check_refuses_a_partial_uid_map() -> None:
    assert said(in_user_namespace(SELF_CHECK)) == "USER_NAMESPACE"


@needs_root
def test_a_foreign_uid_seen_as_the_overflow_id_is_nobody() -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    path = folder / "s"
    connect_as_1234 = (
        "import os, socket, sys; s = socket.socket(1); os.setuid(1234); s.connect(sys.argv[1]); s.recv(1)"
    )
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            path.chmod(0o666)
            listener.listen()
            server = in_user_namespace(IDENTIFY_ONE, str(listener.fileno()), pass_fds=(listener.fileno(),))
            client = subprocess.Popen([sys.executable, "-c", connect_as_1234, str(path)])
            try:
                assert said(server) == "CALLER_UNIDENTIFIED 65534"
            finally:
                client.kill()
                client.wait()
    finally:
        path.unlink()
        folder.rmdir()


def test_the_self_check_reports_what_this_kernel_can_do() -> None:
    found = self_check_environment()
    assert found.identity_strength == ("pidfd" if found.peer_pidfd else "pid")
    assert len(found.shortcomings()) == sum(
        not present
        for present in (
            found.peer_pidfd,
            found.unique_pidfd_inode,
            found.pidfd_info,
            found.processes_visible,
            found.executables_visible,
            found.cgroup_mount,
        )
    )
