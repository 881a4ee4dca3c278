"""Who may read metrics, and what becomes of everybody who asks for anything else, slowly, or not at all."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cgpu_agent.rpc.addresses import bind_listener
from cgpu_agent.rpc.environment import self_check_environment
from cgpu_agent.rpc.identify import Identifier
from cgpu_agent.rpc.metricsdoor import MAX_REQUEST, MetricsDoor, judge
from cgpu_agent.rpc.peer import SO_PASSRIGHTS

GOOD = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: text/plain;version=0.0.4, */*;q=0.1\r\n\r\n"
TEXT = "# HELP a \N{GREEK SMALL LETTER ALPHA}\n# TYPE a gauge\na 1\n"
READ = """
import os, socket, sys
path, uid, *groups = sys.argv[1], *map(int, sys.argv[2:])
os.setgroups(groups[1:]); os.setgid(groups[0]); os.setuid(uid)
s = socket.socket(socket.AF_UNIX)
s.connect(path)
try:
    s.sendall(b"GET /metrics HTTP/1.0\\r\\n\\r\\n")
except BrokenPipeError:
    pass  # refused before it asked
print(s.recv(12).decode())
"""
GROUP, STRANGER = 4321, 1234

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become other users")


class Door:
    """A door on an event loop of its own."""

    def __init__(self, path: Path, render: Callable[[], str], patience: float) -> None:
        self.path = path
        self._render, self._patience = render, patience
        self._begun, self._end = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._live()))

    async def _live(self) -> None:
        listener = bind_listener(str(self.path), 0o660)
        os.chown(self.path, -1, GROUP if os.geteuid() == 0 else -1)
        door = MetricsDoor(listener, Identifier(self_check_environment()), self._render, patience=self._patience)
        door.start()
        self._begun.set()
        await asyncio.to_thread(self._end.wait)
        await asyncio.to_thread(door.close)
        await asyncio.to_thread(door.close)

    @contextmanager
    def open(self) -> Iterator[Door]:
        self.thread.start()
        assert self._begun.wait(60)
        try:
            yield self
        finally:
            self._end.set()
            self.thread.join()

    @contextmanager
    def connected(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(60)
            sock.connect(str(self.path))
            yield sock

    def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body."""
        with self.connected() as sock:
            sock.sendall(request)
            return answer(sock)

    def read_as(self, uid: int, gid: int, *groups: int) -> str:
        command = [sys.executable, "-c", READ, str(self.path), *map(str, (uid, gid, *groups))]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return asked.stdout.strip() or asked.stderr.strip().splitlines()[-1]


def refuses_descriptors(sock: socket.socket) -> bool:
    """Whether this kernel has SO_PASSRIGHTS, which is 1 for a socket that nobody changed."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS) == 1
    except OSError:
        return False


def answer(sock: socket.socket) -> tuple[int, bytes]:
    data = b""
    while part := sock.recv(65536):
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    assert f"\r\nContent-Length: {len(body)}\r\n".encode() in head + b"\r\n"
    return int(head.split()[1]), body


@pytest.fixture
def door() -> Iterator[Door]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # where others may enter
        Path(folder).chmod(0o755)
        with Door(Path(folder) / "m.sock", lambda: TEXT, 2.0).open() as opened:
            yield opened


def test_whoever_may_reads_the_text_again_and_again(door: Door) -> None:
    for request in (GOOD, b"GET /metrics HTTP/1.0\r\n\r\n", GOOD):
        assert door.ask(request) == (200, TEXT.encode())


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (GOOD, 200),
        (GOOD + b"x", 400),
        (GOOD + GOOD, 400),
        (GOOD[:-2], 400),
        (b"", 400),
        (b"\r\n\r\n", 400),
        (b"GET /metrics HTTP/2.0\r\n\r\n", 400),
        (b"GET /metrics\r\n\r\n", 400),
        (b"get /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET  /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\nHost: x\n\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n folded: x\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nA: \x00\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nA: \xff\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics?x=1 HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics/ HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", 405),
        (b"GET /metrics HTTP/1.1\r\nA: " + b"x" * MAX_REQUEST + b"\r\n\r\n", 431),
    ],
)
def test_a_request_is_judged_by_its_whole_head(request_: bytes, status: int) -> None:
    assert judge(request_).value == status


@pytest.mark.parametrize("request_", [b"POST /metrics HTTP/1.1\r\n\r\n", GOOD + b"more", b"x" * (MAX_REQUEST + 1)])
def test_what_is_refused_gets_no_numbers_and_the_next_is_served(door: Door, request_: bytes) -> None:
    status, body = door.ask(request_)
    assert status >= 400
    assert body == b""
    assert door.ask(GOOD)[0] == 200


def test_a_request_that_trickles_in_is_cut_and_the_next_is_served(tmp_path: Path) -> None:
    with Door(tmp_path / "m.sock", lambda: TEXT, 2.0).open() as door, door.connected() as slow:
        stop = threading.Event()

        def trickle() -> None:
            for byte in GOOD * 100:
                try:
                    slow.send(bytes([byte]))
                except OSError:
                    return
                if stop.wait(0.05):
                    return

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            assert door.ask(GOOD) == (200, TEXT.encode())
            assert slow.recv(12) == b"HTTP/1.1 408"
        finally:
            stop.set()
            thread.join()


def test_a_reader_that_takes_nothing_is_cut_and_the_next_is_served(tmp_path: Path) -> None:
    texts = itertools.chain(["x" * (8 << 20)], itertools.repeat(TEXT))
    with Door(tmp_path / "m.sock", lambda: next(texts), 2.0).open() as door, door.connected() as lazy:
        lazy.sendall(GOOD)
        assert door.ask(GOOD) == (200, TEXT.encode())


def test_what_cannot_be_told_is_unavailable_and_says_nothing(tmp_path: Path) -> None:
    def fail() -> str:
        raise ValueError("secret")

    with Door(tmp_path / "m.sock", fail, 2.0).open() as door:
        assert door.ask(GOOD) == (503, b"")


def test_descriptors_cannot_be_sent_to_the_door(door: Door) -> None:
    with door.connected() as sock:
        if not refuses_descriptors(sock):
            pytest.skip("this kernel cannot refuse descriptors (Linux 6.16)")
        with pytest.raises(PermissionError):
            socket.send_fds(sock, [GOOD], [sock.fileno()])


@needs_root
def test_root_and_the_group_of_the_file_may_read_and_nobody_else(door: Door) -> None:
    assert door.read_as(0, 0) == "HTTP/1.1 200"
    assert door.read_as(STRANGER, GROUP) == "HTTP/1.1 200"
    assert door.read_as(STRANGER, STRANGER, 5, GROUP) == "HTTP/1.1 200"
    assert "PermissionError" in door.read_as(STRANGER, STRANGER, 5)
    door.path.chmod(0o666)  # the file mode is not the only lock
    assert door.read_as(STRANGER, STRANGER, 5) == "HTTP/1.1 403"
