"""The agent starts anew, in order or after a crash: no lease is lost, none is another's, nothing half is whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from cgpu_agent.backends import memory
from cgpu_agent.client import AgentError, calls
from cgpu_agent.client.calls import Copy
from cgpu_agent.client.connect import translate
from cgpu_agent.client.lease import LeasedMemory
from cgpu_agent.errors import Denied, Unavailable
from fixtures.daemon import PATIENCE
from fixtures.gpudaemon import gpu_daemon
from fixtures.policies import permit
from fixtures.restarting import CUT, NAME, PLAIN, SECRET, STORE_SIZE, Restarting, restarting_daemon
from fixtures.restarts import run
from fixtures.sealed import seal
from fixtures.stuckfs import can_mount, stuck

pytestmark = pytest.mark.swtpm

# Takes a lease of one page, says so, and does what it is told: "exec", to be another program, or else to end.
_HOLDER = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(sys.argv[1])
sock.send(b"cgpu/lease/1\\0\\0" + (4096).to_bytes(8, "big"))
data, fds, _, _ = socket.recv_fds(sock, 512, 1)
sock.set_inheritable(True)
print(data.hex(), flush=True)
if sys.stdin.readline() == "exec\\n":
    os.execv("/bin/sleep", ["sleep", "600"])
"""


@pytest.fixture
def machine() -> Iterator[Restarting]:
    with restarting_daemon() as found:
        yield found


@contextlib.contextmanager
def holder(machine: Restarting) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", _HOLDER, machine.daemon.lease_socket]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield process
    finally:
        process.kill()
        with process:
            process.wait()


def tell(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin is not None
    print(word, file=process.stdin, flush=True)


def said(machine: Restarting, what: str) -> bool:
    return any(what in line for line in machine.daemon.journal)


def is_socket(fd: int) -> bool:
    return stat.S_ISSOCK(os.fstat(fd).st_mode)


@contextlib.contextmanager
def kept_copy(machine: Restarting) -> Iterator[int]:
    """A descriptor of the one memory that systemd keeps."""
    assert machine.holds(2)
    (found,) = [fd for _, fd in machine.daemon.manager.store if not is_socket(fd)]
    fd = os.dup(found)
    try:
        yield fd
    finally:
        os.close(fd)


def test_a_restart_and_a_crash_lose_no_lease_and_its_end_leaves_nothing(machine: Restarting) -> None:
    machine.start()
    with machine.object.open("rb") as source:
        lease = machine.lease(source)
        lease.open()
        for again in (machine.restart, machine.crash, machine.restart):
            again()
            assert bytes(lease) == PLAIN
            assert lease.alive()
            assert len(machine.kept) == 2
        assert said(machine, "leases of the last run go on kept=1 resumed=1")
        with kept_copy(machine) as memory_fd:
            lease.memory.close()
            assert machine.holds(0)
            assert os.fstat(memory_fd).st_blocks == 0
        machine.restart()
        lease = machine.lease(source)
        assert machine.holds(2)
        lease.memory.close()
        assert machine.holds(0)


def test_a_lease_of_the_last_run_has_its_memory_but_no_object_and_says_to_take_another(machine: Restarting) -> None:
    machine.start()
    with machine.object.open("rb") as source:
        lease = machine.lease(source)
        machine.crash()
        with pytest.raises(Unavailable) as caught:
            lease.open()
        assert (caught.value.slug, caught.value.retry_after) == ("SOURCE_LOST", 0.1)
        lease.memory.close()
        another = machine.lease(source)
        another.open()
        assert bytes(another) == PLAIN


@pytest.mark.parametrize("limit", ["leases_per_uid = 1", "lease_mib_per_uid = 1"])
def test_leases_of_the_last_run_count(machine: Restarting, limit: str) -> None:
    machine.daemon.tables["limits"] += "\nleases_per_uid = 2"
    machine.configure()
    machine.start()
    with machine.object.open("rb") as source:
        held = [machine.lease(source, 700 << 10) for _ in range(2)]
        machine.crash()
        with pytest.raises(AgentError) as caught:
            machine.lease(source)
        assert caught.value.slug == "LEASE_LIMIT"
        assert all(lease.alive() for lease in held)
        machine.daemon.kill()
        machine.daemon.tables["limits"] = limit
        machine.configure()
        machine.start()
        assert machine.holds(2)
        assert sorted(lease.alive() for lease in held) == [False, True]
        assert said(machine, "LEASE_LIMIT")


def test_memory_that_was_being_filled_is_wiped(machine: Restarting) -> None:
    plain = PLAIN * 800
    machine.object.write_bytes(seal(plain, NAME, segment_size=CUT))
    machine.start()
    with machine.object.open("rb") as source, machine.daemon.client() as agent:
        lease = machine.lease(source, len(plain))
        stream = agent._stubs["Keys"].OpenSealed(lease.call.request, timeout=PATIENCE)
        assert not next(stream).whole
        machine.daemon.kill()
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert translate(caught.value, machine.daemon.socket).retry_after is not None
        assert lease.memory.view[: 1 << 20] == plain[: 1 << 20]
        machine.start()
        assert bytes(lease) == bytes(len(plain))
        assert lease.alive()


def test_who_dies_while_the_agent_is_away_leaves_nothing(machine: Restarting) -> None:
    machine.start()
    with holder(machine) as process, kept_copy(machine) as memory_fd:
        os.pwrite(memory_fd, b"plaintext", 0)
        machine.daemon.kill()
        machine.daemon.manager.release(lambda _name: False)
        process.kill()
        process.wait()
        machine.start()
        assert machine.holds(0)
        assert os.fstat(memory_fd).st_blocks == 0


def test_who_is_another_program_meanwhile_has_no_lease(machine: Restarting) -> None:
    machine.start()
    with holder(machine) as process:
        machine.daemon.kill()
        tell(process, "exec")
        while "sleep" not in Path(f"/proc/{process.pid}/comm").read_text():
            pass
        machine.start()
        assert machine.holds(0)
        assert said(machine, "CALLER_CHANGED")


def test_memory_that_a_workload_writes_to_goes_on_without_its_channel() -> None:
    copied, size = os.urandom(1 << 20), 2 << 20
    with gpu_daemon() as world, contextlib.ExitStack() as stack:
        daemon = world.daemon
        daemon.manager.store_size = STORE_SIZE
        world.start(permit("gpu.transfer", f"principal.uid == {os.geteuid()}"))
        agent = stack.enter_context(daemon.client())
        lease = LeasedMemory(daemon.lease_socket, size, None, PATIENCE)
        lost = agent._run(calls.open_channel(agent.list_gpus().gpus[0].uuid))
        for crash in (True, False):
            lease.view[:] = copied + bytes(size - len(copied))
            if crash:
                daemon.kill()
            else:
                assert daemon.stop(restarting=True) == 0
            daemon.start()
            world.ready()
            assert lease.view[: len(copied)] == copied
            with pytest.raises(Denied) as refused:
                agent._run(calls.allocate(lost, 1))
            assert refused.value.slug == "NO_CHANNEL"
            with agent.channel() as channel:
                handle = channel.allocate(len(copied))
                for to_device, offset in ((True, 0), (False, len(copied))):
                    ticket = channel.submit([Copy(to_device, lease.id, offset, handle, 0, len(copied))])
                    channel.synchronize(ticket)
            assert lease.view[len(copied) :] == copied
        (memory_fd,) = [os.dup(fd) for _, fd in daemon.manager.store if not is_socket(fd)]
        stack.callback(os.close, memory_fd)
        lease.close()
        assert daemon.manager.wait(lambda: not daemon.manager.store)
        assert os.fstat(memory_fd).st_blocks == 0


def test_one_holders_lease_is_not_given_to_another(machine: Restarting) -> None:
    """Whoever mixed up the descriptors that are kept: the kernel says who is at the other end."""
    machine.start()
    with holder(machine), machine.object.open("rb") as source:
        lease = machine.lease(source)
        lease.open()
        assert machine.holds(4)
        machine.daemon.kill()
        (one, a), (_, b), (other, c), (_, d) = machine.daemon.manager.store
        first, second = (a, b) if is_socket(a) else (b, a), (c, d) if is_socket(c) else (d, c)
        machine.daemon.manager.store[:] = [(one, second[0]), (one, first[1]), (other, first[0]), (other, second[1])]
        machine.start()
        assert machine.holds(0)
        assert lease.ended()
        assert bytes(lease) == bytes(len(PLAIN))


def _memfd(size: int = CUT, seals: int = memory.SEALS, mode: int = os.O_RDWR) -> int:
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    again = os.open(f"/proc/self/fd/{fd}", mode)
    os.close(fd)
    return again


def _connection() -> int:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _LIVING.append(other)
    return one.detach()


_LIVING: list[socket.socket] = []
_NAME = f"lease-{'00' * 16}-{'11' * 16}"
STRANGE: dict[str, tuple[str, Callable[[], list[int]]]] = {
    "another name": ("tpm", lambda: [_memfd()]),
    "no name": ("stored", lambda: [_connection()]),
    "half a name": ("lease-00", lambda: [_connection(), _memfd()]),
    "a longer name": (_NAME + "0", lambda: [_connection(), _memfd()]),
    "capitals": (_NAME.replace("11", "AA"), lambda: [_connection(), _memfd()]),
    "no memory": (_NAME, lambda: [_connection()]),
    "no connection": (_NAME, lambda: [_memfd()]),
    "two connections": (_NAME, lambda: [_connection(), _connection()]),
    "two memories": (_NAME, lambda: [_connection(), _memfd(), _memfd()]),
    "memory that can be cut": (_NAME, lambda: [_connection(), _memfd(seals=0)]),
    "memory to read": (_NAME, lambda: [_connection(), _memfd(mode=os.O_RDONLY)]),
    "no bytes": (_NAME, lambda: [_connection(), _memfd(0)]),
    "a pipe": (_NAME, lambda: [_connection(), os.pipe()[0]]),
    "one more": (_NAME, lambda: [_connection(), _memfd(), os.pipe()[0]]),
    "a stream": (_NAME, lambda: [socket.socketpair()[0].detach(), _memfd()]),
    "a network socket": (_NAME, lambda: [socket.socket().detach(), _memfd()]),
    "nobody's connection": (_NAME, lambda: [_connection(), _memfd()]),
}


def test_what_the_agent_did_not_give_away_is_closed_and_said(machine: Restarting) -> None:
    store = machine.daemon.manager.store
    for number, (name, make) in enumerate(STRANGE.values()):
        store += [(name.replace("lease-0000", f"lease-{number:04x}"), fd) for fd in make()]
    machine.start()
    assert machine.holds(0)
    closed = [line for line in machine.daemon.journal if "closed what systemd had kept" in line]
    assert len(closed) == len(STRANGE) - 1
    assert said(machine, "a lease of the last run does not go on reason=CALLER_CHANGED")
    with machine.object.open("rb") as source:
        machine.lease(source).open()
    for path in Path(f"/proc/{machine.daemon.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            assert not str(path.readlink()).startswith("/memfd:x")


def test_restarts_under_load_lose_no_lease_and_fail_nobody_for_good() -> None:
    """A few rounds of ``make restarts``."""
    campaign = run(rounds=4, seed=1)
    assert campaign.callers.counts["released"] > 4
    assert campaign.callers.counts["opened"] > 4


def test_the_status_line_counts_callers_and_keys(machine: Restarting) -> None:
    machine.start()
    with machine.daemon.client() as agent:
        for _ in range(2):
            assert agent.get_key("near", plain=True).secret == SECRET
        with pytest.raises(Denied):
            agent.get_key("far", plain=True)
        assert machine.daemon.shows("; 1 callers; 2 keys released; 1 denied")


def test_a_stop_ends_leases(machine: Restarting) -> None:
    machine.start()
    with machine.object.open("rb") as source:
        lease = machine.lease(source)
        assert machine.daemon.stop() == 0
        assert lease.ended()
        machine.start()
        with pytest.raises(Denied) as caught:
            lease.open()
        assert caught.value.slug == "NO_LEASE"


@pytest.mark.skipif(not can_mount(), reason="needs root and FUSE")
def test_an_opening_that_a_stop_ends_is_told_to_try_again(machine: Restarting, tmp_path: Path) -> None:
    def stop() -> None:
        while '"how":"open"' not in (machine.daemon.folder / "state" / "audit.jsonl").read_text():
            time.sleep(0.01)
        assert machine.daemon.stop() == 0

    machine.start()
    content = seal(PLAIN[: 4 * CUT], NAME, segment_size=CUT)
    with stuck(tmp_path / "fs", "read", content) as path, path.open("rb") as source:
        lease = machine.lease(source)
        stopping = threading.Thread(target=stop)
        stopping.start()
        with pytest.raises(Unavailable) as caught:
            lease.open()
        assert (caught.value.slug, caught.value.retry_after) == ("AGENT_STOPPING", 1.0)
        assert bytes(lease) == bytes(len(PLAIN))
    stopping.join()  # the kernel lets no process end that waits for FUSE
