"""Memory on lease from the agent: a connection of its own, a descriptor that came over it, and a mapping to read."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from typing import BinaryIO

from cgpu_agent.client.connect import LEASE_ENVIRONMENT, unreachable
from cgpu_agent.errors import AgentError, HostileInput, Unavailable
from cgpu_agent.wire.lease import MAX_MESSAGE, LeaseRequest, parse_answer
from cgpu_agent.wire.sealed import Layout


def find_lease_socket(agent: str) -> str:
    """The socket's path: what the environment says, else ``lease.sock`` beside the agent's."""
    return os.environ.get(LEASE_ENVIRONMENT) or os.path.join(os.path.dirname(agent), "lease.sock")  # noqa: PTH118, PTH120


def plain_size(file: BinaryIO, segment_size: int) -> int:
    """Bytes that a sealed object needs when it is opened, as its file's size has it.

    Raises ``Misuse`` (``BAD_SEGMENT_SIZE``), ``HostileInput`` (``TRUNCATED``, ``TOO_LARGE``).
    """
    return Layout.of_sealed(segment_size, os.fstat(file.fileno()).st_size).plain_size


class LeasedMemory:
    """A lease, until ``close``.

    Args:
        path: the agent's lease socket.
        size: bytes; at least one is leased.
        source: the sealed object, a regular file that was opened for reading only; ``None``: the memory is to be
            written to, too.
        timeout: seconds for getting it.

    Attributes:
        id: names the lease to the agent.
        view: the memory. It is all zeros when the lease has ended.

    Raises ``AgentError``: why there is none.
    """

    def __init__(self, path: str, size: int, source: BinaryIO | None, timeout: float) -> None:
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            request = LeaseRequest(max(1, size), source=source is not None, writable=source is None)
            self.id, memory = self._exchange(path, request, [] if source is None else [source.fileno()], timeout)
            try:
                if os.fstat(memory).st_size < size:  # a view past the end would be a fault, not an error
                    raise HostileInput("BAD_LEASE_MESSAGE", "the agent leased less memory than was asked for")
                access = mmap.PROT_READ | (mmap.PROT_WRITE if request.writable else 0)
                self._map = mmap.mmap(memory, max(1, size), mmap.MAP_SHARED, access)
            finally:
                os.close(memory)
        except BaseException:
            self._connection.close()
            raise
        self.view = memoryview(self._map)[:size]

    def close(self) -> None:
        """End the lease: the agent wipes the memory. Idempotent."""
        self._connection.close()
        with contextlib.suppress(BufferError):  # somebody still has a part of it; he sees zeros
            self.view.release()
            self._map.close()

    def _exchange(self, path: str, request: LeaseRequest, sources: list[int], timeout: float) -> tuple[bytes, int]:
        sock = self._connection
        sock.settimeout(timeout)
        try:
            sock.connect(path)
            with contextlib.suppress(BrokenPipeError):  # refused already; the answer says why
                socket.send_fds(sock, [request.encode()], sources)
            data, fds = _receive(sock)
        except TimeoutError:
            raise Unavailable("DEADLINE", "the agent did not answer in time", retry_after=1.0) from None
        except OSError:
            raise unreachable(path, socket.SOCK_SEQPACKET) from None
        sock.settimeout(None)
        try:
            if not data:
                raise Unavailable("CONNECTION_LOST", "the agent closed the connection; try again", retry_after=0.5)
            answer = parse_answer(data)
            if isinstance(answer, AgentError):
                raise answer
            if not fds:
                raise HostileInput("BAD_LEASE_MESSAGE", "the agent granted a lease without its memory")
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return answer, fds[0]


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    try:
        return socket.recv_fds(sock, MAX_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)[:2]
    except ConnectionResetError:  # told once, where the agent closed with our request unread; its answer comes after
        return socket.recv_fds(sock, MAX_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)[:2]


def require_whole(whole: bool) -> None:
    """Raises ``HostileInput`` where the stream ended well without having said that the object is whole."""
    if not whole:
        raise HostileInput("BAD_OBJECT_STREAM", "the agent ended before the object was whole")
