"""The agent's side of ``cgpu-ready``: an open connection holds the ready state, and its end is noticed at once."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cgpu_agent.backends.gpu.nvmlfaults import ready_not_put, timed_out
from cgpu_agent.errors import DeviceFault, HostileInput
from cgpu_agent.wire.ready import CLEAR, MAX_MESSAGE, SET, parse_answer


class ReadyLease:
    """Sets and clears the ready state through the helper. One event loop's.

    Args:
        path: the helper's socket.
        lost: called when the helper ends a lease that was not given up here.
    """

    def __init__(self, path: Path, lost: Callable[[], None]) -> None:
        self._path: Final = path
        self._lost: Final = lost
        self._turn: Final = asyncio.Lock()
        self._held: tuple[socket.socket, asyncio.AbstractEventLoop] | None = None

    async def put(self, ready: bool, *, timeout: float) -> None:
        """Set or clear. When setting fails, or nobody waits for it any more, the helper clears.

        Raises as ``Gpus.set_ready``.
        """
        try:
            await asyncio.wait_for(self._put(ready), timeout)
        except asyncio.TimeoutError:
            raise timed_out() from None

    def end(self) -> None:
        """Give up the lease, if there is one: the helper clears. Idempotent."""
        if self._held is not None:
            (sock, loop), self._held = self._held, None
            loop.remove_reader(sock)
            sock.close()

    async def _put(self, ready: bool) -> None:
        async with self._turn:
            self.end()
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as sock:
                code = await self._ask(sock, SET if ready else CLEAR)
                if code is None:
                    raise DeviceFault(
                        "GPU_ERROR",
                        "the helper for the GPUs' ready state refused: it serves cgpu-agent.service alone",
                    )
                if code != 0:
                    raise ready_not_put(code)
                if ready:
                    self._hold(socket.socket(fileno=sock.detach()))

    async def _ask(self, sock: socket.socket, word: bytes) -> int | None:
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(sock, str(self._path))
            await loop.sock_sendall(sock, word)
            return parse_answer(await loop.sock_recv(sock, MAX_MESSAGE))
        except (OSError, HostileInput) as error:
            raise DeviceFault("GPU_ERROR", "the helper for the GPUs' ready state does not answer") from error

    def _hold(self, sock: socket.socket) -> None:
        self._held = (sock, asyncio.get_running_loop())
        self._held[1].add_reader(sock, self._ended)

    def _ended(self) -> None:
        self.end()
        self._lost()
