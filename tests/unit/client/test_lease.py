"""The SDK's side of a lease: it takes what it asked for, and nothing else, from whoever answers."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cgpu_agent.client.lease import LeasedMemory, find_lease_socket, require_whole
from cgpu_agent.errors import AgentError, Exhausted, HostileInput, Unavailable
from cgpu_agent.wire.lease import LeaseRequest, encode_grant, encode_refusal

ID = bytes(range(16))


def descriptors() -> int:
    """How many are open, once the garbage of other tests is gone."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def memory(size: int) -> int:
    fd = os.memfd_create("test")
    os.ftruncate(fd, size)
    os.pwrite(fd, b"text", 0)
    return fd


@contextlib.contextmanager
def agent(folder: Path, answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Something that listens where the agent should, and answers once."""
    path = str(folder / "lease.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            sock = listener.accept()[0]
            with sock:
                answer(sock)

        thread = threading.Thread(target=serve)
        thread.start()
        yield path
        thread.join()


def granting(size: int, *, fds: int = 1, data: bytes = encode_grant(ID)) -> Callable[[socket.socket], None]:
    def answer(sock: socket.socket) -> None:
        request, came, _, _ = socket.recv_fds(sock, 512, 4)
        assert LeaseRequest.parse(request).source
        assert len(came) == 1
        made = [memory(size) for _ in range(fds)]
        socket.send_fds(sock, [data], made)
        for fd in (*came, *made):
            os.close(fd)
        sock.recv(1)  # until it is closed

    return answer


def take(path: str, size: int) -> LeasedMemory:
    with Path(__file__).open("rb") as source:
        return LeasedMemory(path, size, source, 60)


def test_a_grant_is_mapped_read_only(tmp_path: Path) -> None:
    with agent(tmp_path, granting(4096)) as path:
        lease = take(path, 4096)
        assert lease.id == ID
        assert lease.view.readonly
        assert bytes(lease.view[:5]) == b"text\0"
        lease.close()
        lease.close()


def test_nothing_is_left_of_a_lease(tmp_path: Path) -> None:
    before = descriptors()
    with agent(tmp_path, granting(4096)) as path:
        take(path, 4096).close()
    assert descriptors() == before


@pytest.mark.parametrize(
    "answer",
    [granting(4095), granting(4096, fds=0), granting(4096, data=b"nonsense"), granting(4096, data=b"x" * 600)],
    ids=["too small", "no memory", "nonsense", "too long"],
)
def test_what_is_no_grant_is_refused_and_closed(tmp_path: Path, answer: Callable[[socket.socket], None]) -> None:
    before = descriptors()
    with agent(tmp_path, answer) as path, pytest.raises(HostileInput):
        take(path, 4096)
    assert descriptors() == before


def test_a_refusal_is_the_error_that_it_is_even_before_the_request_was_read(tmp_path: Path) -> None:
    def refuse(sock: socket.socket) -> None:
        sock.send(encode_refusal(Exhausted("LEASE_LIMIT", "too many", retry_after=1.0)))

    with agent(tmp_path, refuse) as path, pytest.raises(Exhausted) as raised:
        take(path, 1)
    assert (raised.value.slug, raised.value.retry_after) == ("LEASE_LIMIT", 1.0)


def test_an_agent_that_hangs_up_is_a_lost_connection(tmp_path: Path) -> None:
    def leave(sock: socket.socket) -> None:
        socket.recv_fds(sock, 512, 0)

    with agent(tmp_path, leave) as path, pytest.raises(AgentError) as raised:
        take(path, 1)
    assert raised.value.slug == "CONNECTION_LOST"


def test_without_a_socket_the_error_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as raised:
        take(str(tmp_path / "none"), 1)
    assert raised.value.slug == "NO_SOCKET"
    assert "CGPU_AGENT_LEASE_SOCKET" in raised.value.message


def test_the_socket_is_beside_the_agents_unless_the_environment_says_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CGPU_AGENT_LEASE_SOCKET", raising=False)
    assert find_lease_socket("/run/cgpu-agent/agent.sock") == "/run/cgpu-agent/lease.sock"
    monkeypatch.setenv("CGPU_AGENT_LEASE_SOCKET", "/else/where")
    assert find_lease_socket("/run/cgpu-agent/agent.sock") == "/else/where"


def test_a_stream_that_did_not_say_whole_is_no_object() -> None:
    require_whole(True)
    with pytest.raises(HostileInput):
        require_whole(False)
