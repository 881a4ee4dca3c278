"""Identities of real processes, with everything this kernel can do and with what older kernels lack."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cgpu_agent.errors import AgentError, Denied
from cgpu_agent.rpc import peer
from cgpu_agent.rpc.environment import IdentityCapabilities, self_check_environment
from cgpu_agent.rpc.exe_digest import ExeDigests
from cgpu_agent.rpc.identify import Identified, Identifier

HERE = self_check_environment()
OLD_KERNEL = dataclasses.replace(HERE, peer_pidfd=False, unique_pidfd_inode=False, pidfd_info=False)

needs_pidfd = pytest.mark.skipif(not HERE.peer_pidfd, reason="SO_PEERPIDFD needs Linux 6.5")

CONNECT = "import socket, sys; s = socket.socket(1); s.connect(sys.argv[1]); sys.stdin.read()"


@dataclasses.dataclass
class Peer:
    """A process that connected, and the socket that was accepted from it."""

    process: subprocess.Popen[bytes]
    sock: socket.socket

    def identify(self, capabilities: IdentityCapabilities = HERE) -> Identified:
        return Identifier(capabilities).identify(self.sock, peer.credentials(self.sock))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def connected(tmp_path: Path, command: tuple[str, ...] = (sys.executable, "-c", CONNECT)) -> Iterator[Peer]:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with subprocess.Popen([*command, path], stdin=subprocess.PIPE) as process:
            accepted, _ = listener.accept()
            try:
                with accepted:
                    yield Peer(process, accepted)
            finally:
                process.kill()
    Path(path).unlink()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Peer]:
    with connected(tmp_path) as found:
        yield found


def slug_of(action: Callable[[], object]) -> str:
    with pytest.raises(AgentError) as refused:
        action()
    return refused.value.slug


def open_descriptors() -> int:
    gc.collect()
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


# -- who


@needs_pidfd
def test_a_caller_is_the_process_that_connected(other: Peer) -> None:
    found = other.identify()
    try:
        assert found.caller.pid == other.process.pid
        assert (found.caller.uid, found.caller.gid) == (os.geteuid(), os.getegid())
        assert found.caller.groups == tuple(sorted(os.getgroups()))
        assert found.caller.identity_strength == "pidfd"
        assert found.alive()
        found.still_the_same()
    finally:
        found.close()


def test_without_peer_pidfd_there_are_ids_but_no_names(other: Peer) -> None:
    found = other.identify(OLD_KERNEL)
    try:
        caller = found.caller
        assert (caller.pid, caller.identity_strength) == (other.process.pid, "pid")
        assert (caller.unit, caller.container, caller.cgroup, caller.exe_at_identify) == (None,) * 4
        found.still_the_same()
    finally:
        found.close()


@pytest.mark.parametrize("change", [{"pid": 0}, {"uid": HERE.overflow_uid}, {"gid": HERE.overflow_gid}])
def test_ids_that_mean_unknown_are_no_identity(other: Peer, change: dict[str, int]) -> None:
    claimed = dataclasses.replace(peer.credentials(other.sock), **change)
    assert slug_of(lambda: Identifier(HERE).identify(other.sock, claimed)) == "CALLER_UNIDENTIFIED"


@pytest.mark.parametrize("capabilities", [HERE, OLD_KERNEL], ids=["this kernel", "old kernel"])
def test_a_caller_dead_on_arrival_is_gone_not_weaker(other: Peer, capabilities: IdentityCapabilities) -> None:
    before = open_descriptors()
    other.kill()
    assert slug_of(lambda: other.identify(capabilities)) == "CALLER_GONE"
    assert open_descriptors() <= before


def test_a_zombie_is_gone(other: Peer) -> None:
    other.process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, other.process.pid, os.WEXITED | os.WNOWAIT)
    assert slug_of(other.identify) == "CALLER_GONE"


@needs_pidfd
def test_two_connections_of_one_process_are_told_from_those_of_two(tmp_path: Path, other: Peer) -> None:
    (tmp_path / "second").mkdir()
    with connected(tmp_path / "second") as second:
        found = [other.identify(), other.identify(), second.identify()]
        assert found[0].is_same_process(found[1])
        assert not found[0].is_same_process(found[2])
        other.kill()
        assert not found[0].is_same_process(found[1])
        for each in found:
            each.close()


@needs_pidfd
def test_without_unique_inodes_processes_are_compared_by_pid(other: Peer) -> None:
    capabilities = dataclasses.replace(HERE, unique_pidfd_inode=False)
    first, second = other.identify(capabilities), other.identify(capabilities)
    assert first.pidfd_inode is None
    assert first.is_same_process(second)
    second.close()
    assert not first.is_same_process(second)
    first.close()


def test_without_pidfds_nothing_is_the_same_process(other: Peer) -> None:
    first, second = other.identify(OLD_KERNEL), other.identify(OLD_KERNEL)
    assert not first.is_same_process(second)
    first.close()
    second.close()


# -- still the same


@pytest.mark.parametrize("capabilities", [HERE, OLD_KERNEL], ids=["this kernel", "old kernel"])
def test_a_dead_caller_fails_the_check(other: Peer, capabilities: IdentityCapabilities) -> None:
    found = other.identify(capabilities)
    other.kill()
    assert not found.alive()
    assert slug_of(found.still_the_same) == "CALLER_GONE"
    found.close()


@pytest.mark.parametrize(
    "capabilities",
    [HERE, dataclasses.replace(HERE, pidfd_info=False), OLD_KERNEL],
    ids=["all", "no info", "old kernel"],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_a_caller_that_changes_its_user_fails_the_check(tmp_path: Path, capabilities: IdentityCapabilities) -> None:
    program = CONNECT + "; import os; os.setresuid(-1, 4321, -1); sys.stdout.close(); import time; time.sleep(1000)"
    with connected(tmp_path, (sys.executable, "-c", program)) as other:
        found = other.identify(capabilities)
        found.still_the_same()
        assert other.process.stdin is not None
        other.process.stdin.close()
        while peer.status_ids(other.process.pid) == found.facts.ids:
            pass
        assert slug_of(found.still_the_same) == "CALLER_CHANGED"
        found.close()


@needs_pidfd
def test_a_caller_that_runs_another_program_fails_the_check(tmp_path: Path) -> None:
    program = (
        "import os, socket, sys; s = socket.socket(1); s.connect(sys.argv[1]); s.set_inheritable(True);"
        "sys.stdin.read(); os.execv('/bin/sleep', ['sleep', '1000'])"
    )
    with connected(tmp_path, (sys.executable, "-c", program)) as other:
        found = other.identify()
        assert other.process.stdin is not None
        other.process.stdin.close()
        while peer.executable(other.process.pid) in {None, peer.executable(os.getpid())}:
            pass
        assert slug_of(found.still_the_same) == "CALLER_CHANGED"
        found.close()


@pytest.mark.parametrize("capabilities", [HERE, OLD_KERNEL], ids=["this kernel", "old kernel"])
def test_a_closed_identity_is_gone_for_ever(other: Peer, capabilities: IdentityCapabilities) -> None:
    found = other.identify(capabilities)
    found.close()
    found.close()
    assert found.pidfd is None
    assert not found.alive()
    assert slug_of(found.still_the_same) == "CALLER_GONE"


@needs_pidfd
def test_closing_while_others_ask_never_touches_a_recycled_descriptor(other: Peer) -> None:
    """The descriptors' numbers are taken at once by a dead process's pidfd: who polled one would see a death."""
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        corpse = os.pidfd_open(dead.pid)
        os.waitid(os.P_PIDFD, corpse, os.WEXITED | os.WNOWAIT)
        seen: set[str] = set()

        def ask(found: Identified, ready: threading.Barrier) -> None:
            ready.wait()
            for _ in range(200):
                try:
                    found.still_the_same()
                except Denied as refusal:
                    seen.add(refusal.slug)

        for _ in range(20):
            found, ready = other.identify(), threading.Barrier(2)
            asking = threading.Thread(target=ask, args=(found, ready))
            asking.start()
            ready.wait()
            found.close()
            copies = [os.dup(corpse) for _ in range(4)]
            asking.join()
            for copy in copies:
                os.close(copy)
        os.close(corpse)
        assert seen == {"CALLER_GONE"}


# -- the program


def test_the_digest_is_that_of_the_program_file(other: Peer) -> None:
    found = other.identify()
    expected = hashlib.sha256(Path(f"/proc/{other.process.pid}/exe").read_bytes()).hexdigest()
    digests = ExeDigests()
    if found.caller.identity_strength == "pidfd":
        assert asyncio.run(digests.digest(found)) == expected
        assert found.remembered_digest is not None
        assert asyncio.run(digests.digest(found)) == expected
    found.close()
    assert slug_of(lambda: asyncio.run(digests.digest(found))) == "CALLER_GONE"


def test_without_a_pidfd_there_is_no_digest(other: Peer) -> None:
    found = other.identify(OLD_KERNEL)
    assert slug_of(lambda: asyncio.run(ExeDigests().digest(found))) == "EXE_UNREADABLE"
    found.close()


def test_a_program_above_the_limit_has_no_digest(other: Peer) -> None:
    found = other.identify()
    assert slug_of(lambda: asyncio.run(ExeDigests(size_limit=1000).digest(found))) == "EXE_TOO_LARGE"
    found.close()


def test_a_digest_that_takes_too_long_is_given_up(other: Peer) -> None:
    found = other.identify()
    assert slug_of(lambda: asyncio.run(ExeDigests(time_limit=0.0).digest(found))) == "EXE_DIGEST_TIMEOUT"
    found.close()


@needs_pidfd
def test_one_uid_gets_one_digest_at_a_time(tmp_path: Path, other: Peer) -> None:
    (tmp_path / "large").mkdir()
    large = tmp_path / "large" / "sleep"
    shutil.copy("/bin/sleep", large)
    with large.open("r+b") as file:
        file.truncate(256 * 1024 * 1024)

    async def both(first: Identified, second: Identified) -> list[object]:
        digests = ExeDigests()
        asked = await asyncio.gather(digests.digest(first), digests.digest(second), return_exceptions=True)
        return [*asked, await digests.digest(second)]

    program = (
        "import os, socket, sys; s = socket.socket(1); s.set_inheritable(True); s.connect(sys.argv[2]);"
        "os.execv(sys.argv[1], ['sleep', '1000'])"
    )
    with connected(tmp_path / "large", (sys.executable, "-c", program, str(large))) as slow:
        while not large.samefile(f"/proc/{slow.process.pid}/exe"):
            pass
        found = slow.identify(), other.identify()
        first, refused, later = asyncio.run(both(*found))
        assert isinstance(refused, AgentError)
        assert refused.slug == "EXE_DIGEST_BUSY"
        assert first == hashlib.sha256(large.read_bytes()).hexdigest()
        assert later == hashlib.sha256(Path(sys.executable).resolve().read_bytes()).hexdigest()
        for each in found:
            each.close()
