"""The two things asked of the network: the addresses of a name, and a connection to one address."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from contextlib import suppress
from typing import Final

from cgpu_agent.errors import Unavailable
from cgpu_agent.wire.egress import Address

MAX_LOOKUPS: Final = 16


class Resolver:
    """getaddrinfo(3), which cannot be ended: each call has a thread that does not keep the program from ending."""

    def __init__(self) -> None:
        self._running = 0

    async def __call__(self, host: str) -> list[Address]:
        """All addresses of a name, none where there are none. Raises ``Unavailable`` (``BUSY``)."""
        if self._running >= MAX_LOOKUPS:
            raise Unavailable("BUSY", "too many names are being looked up")
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[Address]] = loop.create_future()
        self._running += 1
        threading.Thread(target=self._look_up, args=(loop, found, host), daemon=True).start()
        return await found

    def _look_up(self, loop: asyncio.AbstractEventLoop, found: asyncio.Future[list[Address]], host: str) -> None:
        addresses: list[Address] = []
        with suppress(OSError, ValueError):
            told = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            addresses = [ipaddress.ip_address(each[4][0]) for each in told]
        with suppress(RuntimeError):  # The program has ended meanwhile.
            loop.call_soon_threadsafe(self._tell, found, addresses)

    def _tell(self, found: asyncio.Future[list[Address]], addresses: list[Address]) -> None:
        self._running -= 1
        if not found.done():
            found.set_result(addresses)


async def dial(address: Address, port: int) -> socket.socket:
    """A connection to this very address. Raises ``OSError``."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(sock, (str(address), port))
    except BaseException:
        sock.close()
        raise
    return sock
