"""Serves the agent alone: one request, a listed destination at a checked address, a tunnel, a line of log."""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from cgpu_agent.egress.addresses import may_answer
from cgpu_agent.egress.config import Config
from cgpu_agent.egress.net import Resolver, dial
from cgpu_agent.egress.tunnel import Tally, Tunnel
from cgpu_agent.errors import AgentError, Denied, HostileInput, Unavailable
from cgpu_agent.wire.egress import (
    CONNECTED,
    HEAD_END,
    MAX_HEAD,
    Address,
    Destination,
    encode_answer,
    parse_request,
)

HEAD_SECONDS: Final = 10.0
MAX_ADDRESSES: Final = 16
_UCRED: Final = struct.Struct("=iII")
_PAUSE: Final = 1.0
"""Seconds to wait where this process has no descriptor for another connection."""


class Proxy:
    """One proxy over its life, one event loop's.

    Args:
        config: what is allowed; another may be put in its place, for connections from then on.
        uid: the agent's user.
        resolve: the addresses of a name, none where there are none.
        dial: a non-blocking connection to an address and port; raises ``OSError``.
        patience: seconds in which a request must be there.
    """

    def __init__(
        self,
        config: Config,
        uid: int,
        *,
        resolve: Callable[[str], Awaitable[list[Address]]] | None = None,
        dial: Callable[[Address, int], Awaitable[socket.socket]] = dial,
        patience: float = HEAD_SECONDS,
    ) -> None:
        self.config = config
        self._uid: Final = uid
        self._resolve: Final = resolve or Resolver()
        self._dial: Final = dial
        self._patience: Final = patience
        self._open: Final[set[asyncio.Task[None]]] = set()

    async def serve(self, listener: socket.socket) -> None:
        """Accept until cancelled; then every connection is cut."""
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    sock, _ = await loop.sock_accept(listener)
                except OSError:
                    await asyncio.sleep(_PAUSE)
                    continue
                self._admit(sock)
        finally:
            for task in self._open:
                task.cancel()
            await asyncio.gather(*self._open, return_exceptions=True)

    def _admit(self, sock: socket.socket) -> None:
        if len(self._open) >= self.config.limits.connections:
            _answer(sock, "BUSY")
            sock.close()
            _log(4, "BUSY", {})
            return
        task = asyncio.ensure_future(self._serve(sock))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _serve(self, sock: socket.socket) -> None:
        config, began, tally = self.config, time.monotonic(), Tally()
        told: dict[str, object] = {}
        reason = "STOPPED"
        opened = False
        try:
            outer = await self._reach(sock, config, told)
            with outer:
                if not _answer(sock, CONNECTED):
                    raise ConnectionResetError
                opened = True
                await Tunnel(sock, outer, config.limits, tally).run()
            reason = "ENDED"
        except AgentError as error:
            reason = error.slug
            if not opened:
                _answer(sock, reason)
        except OSError:
            reason = "LOST"
        finally:
            sock.close()
            told |= {"sent": tally.sent, "received": tally.received, "seconds": f"{time.monotonic() - began:.3f}"}
            _log(6 if opened else 4, reason, told)

    async def _reach(self, sock: socket.socket, config: Config, told: dict[str, object]) -> socket.socket:
        """Read the request and connect; ``told`` gets what the log shall say of it.

        Raises:
            AgentError: with a reason of ``wire.egress.STATUS``.
            OSError: the agent is gone.
        """
        _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid != self._uid:
            told["uid"] = uid
            raise Denied("NOT_THE_AGENT", "this proxy serves the agent's user alone")
        try:
            destination = await asyncio.wait_for(_request(sock), self._patience)
        except asyncio.TimeoutError:
            raise HostileInput("REQUEST_TOO_SLOW", "the request did not come in time") from None
        told |= {"host": destination.host, "port": destination.port}
        if destination not in config.allow:
            raise Denied("NOT_ALLOWED", "the destination is not listed")
        try:
            seconds = config.limits.connect_seconds
            return await asyncio.wait_for(self._connect(destination, config, told), seconds)
        except asyncio.TimeoutError:
            raise Unavailable("CONNECT_TIMEOUT", "the destination did not answer in time") from None

    async def _connect(self, destination: Destination, config: Config, told: dict[str, object]) -> socket.socket:
        addresses = await self._addresses(destination, private=config.allow[destination], told=told)
        share = config.limits.connect_seconds / len(addresses)
        for address in addresses:
            told["address"] = address
            with suppress(OSError, asyncio.TimeoutError):
                return await asyncio.wait_for(self._dial(address, destination.port), share)
        raise Unavailable("UNREACHABLE", "no address of the destination can be reached")

    async def _addresses(self, destination: Destination, *, private: bool, told: dict[str, object]) -> list[Address]:
        """Addresses to connect to: those that were checked, not the name, which may have others by then."""
        if destination.address is not None:
            return [destination.address]
        found = list(dict.fromkeys(await self._resolve(destination.host)))
        if not found:
            raise Unavailable("NO_ADDRESS", "the name has no address")
        for address in found:
            if not may_answer(address, private=private):
                # One of them is enough: who gave this answer is not believed about the others.
                told["address"] = address
                raise Denied("ADDRESS_NOT_ALLOWED", "the name has an address that no such name may have")
        return found[:MAX_ADDRESSES]


async def _request(sock: socket.socket) -> Destination:
    loop = asyncio.get_running_loop()
    head = b""
    while HEAD_END not in head:
        part = await loop.sock_recv(sock, MAX_HEAD - len(head))
        if not part:  # Its end, or no room for more.
            raise HostileInput("BAD_REQUEST", "no request within its bounds")
        head += part
    return parse_request(head)


def _answer(sock: socket.socket, reason: str) -> bool:
    """It fits in a new socket's buffer, or its reader is gone."""
    sock.setblocking(False)
    with suppress(OSError):
        return sock.send(encode_answer(reason)) > 0
    return False


def _log(priority: int, reason: str, told: dict[str, object]) -> None:
    """One line, as the agent's own are. All values are of parsed kinds, so none has anything to quote."""
    words = " ".join(f"{key}={value}" for key, value in {"reason": reason, **told}.items())
    sys.stderr.write(f"<{priority}>connection {words}\n")
