"""A small gRPC server behind a real front door, and clients in processes of their own to call it.

Clients run ``frontdoor_client.py``, because a caller's identity is its process. Run as a program, this file serves on
its own: for tests that need limits of a whole process, and for comparing with a server that has no door.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from cgpu_agent.errors import AgentError
from cgpu_agent.rpc.addresses import bind_listener
from cgpu_agent.rpc.admission import DoorLimits
from cgpu_agent.rpc.connection import Connection
from cgpu_agent.rpc.environment import self_check_environment
from cgpu_agent.rpc.frontdoor import FrontDoor
from cgpu_agent.rpc.identify import Identified, Identifier

if TYPE_CHECKING:
    from typing_extensions import Self

CLIENT = Path(__file__).with_name("frontdoor_client.py")
SERVICE = "kit.Kit"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become other users")


class Kit:
    """The server, its door, and what they saw. Use as ``async with Kit() as kit``."""

    def __init__(
        self, limits: DoorLimits | None = None, *, door: bool = True, serve: bool = True, opened: bool = True
    ) -> None:
        # Not a pytest directory: other uids must reach the public socket, and paths must be short.
        self.root = Path(tempfile.mkdtemp(prefix="door-", dir="/tmp"))
        self.root.chmod(0o755)
        (self.root / "inner").mkdir(mode=0o700)
        self.public = str(self.root / "agent.sock")
        self.inner = str(self.root / "inner" / "grpc.sock")
        self.opened: list[Identified] = []
        self.closed: list[Identified] = []
        self.cancelled = 0
        self.door: FrontDoor | None = None
        self._serve = serve
        self._start_door = opened
        self._server: Any = None
        if door:
            self.door = FrontDoor(
                [bind_listener(self.public, 0o666)],
                self.inner,
                Identifier(self_check_environment()),
                limits=limits,
                on_open=self.opened.append,
                on_close=self.closed.append,
            )

    async def __aenter__(self) -> Self:
        if self._serve:
            await self.serve()
        if self.door is not None and self._start_door:
            self.door.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.door is not None:
            self.door.close()
        if self._server is not None:
            await self._server.stop(0)
        shutil.rmtree(self.root)

    async def serve(self) -> None:
        """Start the inner server."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        handlers: dict[str, Any] = {
            "Echo": unary(self._echo),
            "Who": unary(self._who),
            "Digest": unary(self._digest),
            "Stats": unary(self._stats),
            "Hold": stream(self._hold),
            "Flood": stream(self._flood),
        }
        server = self._server = grpc.aio.server()
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        server.add_insecure_port(f"unix:{self.inner if self.door else self.public}")
        await server.start()

    @property
    def front(self) -> FrontDoor:
        assert self.door is not None
        return self.door

    async def _connection(self, context: Any) -> Connection:
        connection = self.front.lookup(context.peer())
        if connection is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "NO_IDENTITY")
            raise AssertionError
        refusal = connection.refusal
        if refusal is not None:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, refusal.slug)
        return connection

    async def _echo(self, request: bytes, _context: Any) -> bytes:
        return request

    async def _who(self, _request: bytes, context: Any) -> bytes:
        connection = await self._connection(context)
        check = "ok"
        try:
            connection.check()
        except AgentError as error:
            check = error.slug
        assert connection.caller is not None
        return json.dumps({**connection.caller.claims(), "alive": connection.alive(), "check": check}).encode()

    async def _digest(self, _request: bytes, context: Any) -> bytes:
        connection = await self._connection(context)
        try:
            return json.dumps(await connection.exe_digest()).encode()
        except AgentError as error:
            return json.dumps(error.slug).encode()

    async def _stats(self, _request: bytes, _context: Any) -> bytes:
        return json.dumps(asdict(self.front.stats())).encode()

    async def _hold(self, _request: bytes, _context: Any) -> AsyncIterator[bytes]:
        try:
            yield b"holding"
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def _flood(self, request: bytes, _context: Any) -> AsyncIterator[bytes]:
        block = bytes(1024 * 1024)
        for _ in range(int(request)):
            yield block

    def client(self, verb: str, **options: Any) -> Client:
        """Start a client process; see ``frontdoor_client.py`` for verbs and options."""
        wrap = options.pop("wrap", ())
        options = {"public": self.public, "inner": self.inner, **options}
        return Client([*wrap, sys.executable, str(CLIENT), verb, json.dumps(options)])

    async def ask(self, verb: str, **options: Any) -> Any:
        """Run a client for its one answer."""
        async with self.client(verb, **options) as client:
            return await client.says()


class Client:
    """Another process, usually a client. It says JSON lines and goes on when told to."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @property
    def pid(self) -> int:
        return self.process.pid

    async def says(self) -> Any:
        assert self.process.stdout is not None
        line = await asyncio.to_thread(self.process.stdout.readline)
        assert line, "the client died without a word"
        return json.loads(line)

    def go_on(self) -> None:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.process.kill()
        with self.process:
            await asyncio.to_thread(self.process.wait)


def with_kit(
    scenario: Callable[[Kit], Awaitable[None]],
    limits: DoorLimits | None = None,
    *,
    serve: bool = True,
    opened: bool = True,
) -> None:
    """Run a scenario; without ``serve`` or ``opened`` it starts the inner server or the door itself."""

    async def run() -> None:
        async with Kit(limits, serve=serve, opened=opened) as kit:
            await scenario(kit)

    asyncio.run(run())


def connect(path: str) -> socket.socket:
    """A bare connection of this very process."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    sock.setblocking(False)
    return sock


async def call(address: str, method: str, request: bytes = b"") -> Any:
    """One unary call from this very process."""
    async with grpc.aio.insecure_channel(f"unix:{address}") as channel:
        return json.loads(await channel.unary_unary(f"/{SERVICE}/{method}")(request, timeout=30))


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that must happen; the limit only turns a hang into a failure."""
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it did not happen within 30 s")


def descriptors() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - iterdir would build paths to count them


def entries(folder: str | Path) -> list[str]:
    """Names in a directory."""
    return sorted(path.name for path in Path(folder).iterdir())


async def main(options: dict[str, Any]) -> None:
    """Serve until stdin closes. Options: ``door`` (bool), ``nofile`` (int)."""
    async with Kit(door=options.get("door", True)) as kit:
        if "nofile" in options:
            resource.setrlimit(resource.RLIMIT_NOFILE, (options["nofile"],) * 2)
        print(json.dumps(kit.public), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
