"""Where numbers are read: just enough HTTP on a Unix socket for whoever scrapes, one request at a time.

It has a thread of its own and nothing waits for it: descriptors that a reader sends along, and that nobody takes, can
take long to drop (see ``peer.refuse_descriptors``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import select
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeout
from http import HTTPStatus
from pathlib import Path
from typing import Final

from cgpu_agent.errors import Denied
from cgpu_agent.rpc import peer
from cgpu_agent.rpc.addresses import Listener
from cgpu_agent.rpc.identify import Identifier
from cgpu_agent.wire.metrics import CONTENT_TYPE

logger = logging.getLogger(__name__)

MAX_REQUEST: Final = 4096
EXCHANGE_SECONDS: Final = 2.0
"""For the request to come, for the numbers to be put together, and for the answer to be taken: each."""
_BACKOFF: Final = 0.1
_CLOSE_SECONDS: Final = 3.0
_LINE: Final = re.compile(rb"([A-Z]{1,16}) (/[!-~]*) HTTP/1\.[01]")
_HEADER: Final = re.compile(rb"([!#-'*+.^_`|~0-9A-Za-z-]+):[\t -~]*")
_BODY: Final = frozenset({b"content-length", b"transfer-encoding"})


class MetricsDoor:
    """One thread, which accepts a reader, answers it and hangs up.

    Args:
        listener: the door owns it from now on. Root, this user and the group of its file may read.
        render: the text; called on the event loop.
        patience: instead of ``EXCHANGE_SECONDS``.
    """

    def __init__(
        self,
        listener: Listener,
        identifier: Identifier,
        render: Callable[[], str],
        *,
        patience: float = EXCHANGE_SECONDS,
    ) -> None:
        peer.refuse_descriptors(listener.sock)
        self._listener: Final = listener
        self._identifier: Final = identifier
        self._render: Final = render
        self._patience: Final = patience
        self._group: Final = Path(listener.sock.getsockname()).stat().st_gid
        self._bell: Final = os.eventfd(0, os.EFD_CLOEXEC)
        self._stopping: Final = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to accept; on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="metrics-door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Accept nobody any more. Waits for a moment, so not on the event loop; idempotent."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        os.eventfd_write(self._bell, 1)
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)
        self._listener.close()
        os.close(self._bell)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._listener.sock.fileno(), select.POLLIN)
        poll.register(self._bell, select.POLLIN)
        while True:
            poll.poll()
            if self._stopping.is_set():
                return
            try:
                sock, _address = self._listener.sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError:
                self._stopping.wait(_BACKOFF)  # out of descriptors
                continue
            with sock, contextlib.suppress(OSError):
                peer.refuse_descriptors(sock)
                status, text = self._answer(sock)
                sock.settimeout(self._patience)
                sock.sendall(_response(status, text))

    def _answer(self, sock: socket.socket) -> tuple[HTTPStatus, str]:
        if not self._may_read(sock):
            return HTTPStatus.FORBIDDEN, "root and the socket's group may read this\n"
        head = self._receive(sock)
        if head is None:
            return HTTPStatus.REQUEST_TIMEOUT, ""
        status = judge(head)
        if status is not HTTPStatus.OK or self._loop is None:
            return status, ""
        asked = asyncio.run_coroutine_threadsafe(self._rendered(), self._loop)
        try:
            return status, asked.result(self._patience)
        except (TimeoutError, FutureTimeout):
            asked.cancel()
        except Exception:
            logger.exception("the metrics could not be put together")
        return HTTPStatus.SERVICE_UNAVAILABLE, ""

    async def _rendered(self) -> str:
        return self._render()

    def _may_read(self, sock: socket.socket) -> bool:
        """Beside the mode of the file, which anybody may change whose file it is."""
        credentials = peer.credentials(sock)
        try:
            self._identifier.require_identity(credentials)
        except Denied:
            return False
        groups = (credentials.gid, *(peer.groups(sock) or ()))
        return credentials.uid in (0, os.geteuid()) or self._group in groups

    def _receive(self, sock: socket.socket) -> bytes | None:
        """The head of a request, or as much as shows that it is none; ``None`` if it does not come in time."""
        until = time.monotonic() + self._patience
        data = b""
        while b"\r\n\r\n" not in data and len(data) <= MAX_REQUEST:
            sock.settimeout(max(0.001, until - time.monotonic()))
            try:
                part = sock.recv(MAX_REQUEST + 1 - len(data))
            except TimeoutError:
                return None
            if not part:
                break
            data += part
        return data


def judge(head: bytes) -> HTTPStatus:
    """What becomes of a request: its whole head (RFC 9112), and nothing behind it."""
    if len(head) > MAX_REQUEST:
        return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    line, *headers = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    found = _LINE.fullmatch(line)
    names = [_HEADER.fullmatch(each) for each in headers]
    if not head.endswith(b"\r\n\r\n") or found is None or not all(names):
        return HTTPStatus.BAD_REQUEST
    if any(name[1].lower() in _BODY for name in names if name is not None):
        return HTTPStatus.BAD_REQUEST
    if found[2] != b"/metrics":
        return HTTPStatus.NOT_FOUND
    return HTTPStatus.OK if found[1] == b"GET" else HTTPStatus.METHOD_NOT_ALLOWED


def _response(status: HTTPStatus, text: str) -> bytes:
    body = text.encode()
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {CONTENT_TYPE}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
