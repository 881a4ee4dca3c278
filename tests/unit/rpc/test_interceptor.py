"""The gate: nobody gets past it unnamed, and nothing gets out of it that was not meant to."""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import structlog

from cgpu_agent.api.v1 import errors_pb2
from cgpu_agent.daemon.logging import configure
from cgpu_agent.daemon.servers import MAX_STREAMS, Guarded, guarded
from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.policy import Decision
from cgpu_agent.domain.quota import InFlight
from cgpu_agent.errors import Exhausted, HostileInput, Misuse
from cgpu_agent.rpc import interceptor
from cgpu_agent.rpc.addresses import bind_listener
from cgpu_agent.rpc.admission import DoorLimits
from cgpu_agent.rpc.environment import self_check_environment
from cgpu_agent.rpc.identify import Identifier
from cgpu_agent.rpc.interceptor import current_caller
from frontdoor_kit import until

if TYPE_CHECKING:
    from typing_extensions import Self

SERVICE = "kit.Gate"
SECRET = "secret: 0xdeadbeef"


class Site:
    """A server with a real door and gate around handlers that go wrong in every way."""

    def __init__(self, in_flight: InFlight | None = None, *, wants_executable: bool = False) -> None:
        self.wants_executable = wants_executable
        self.root = Path(tempfile.mkdtemp(prefix="gate-", dir="/tmp"))
        self.in_flight = in_flight or InFlight(64, 64)
        self.allowed = True
        self.ran = 0
        self.running = 0
        self.go_on = asyncio.Event()
        self.waiting = asyncio.Event()
        self.server: Guarded = guarded(
            "test",
            bind_listener(str(self.root / "sock"), 0o600),
            self.root / "inner",
            Identifier(self_check_environment()),
            self._authorize,
            self.in_flight,
            DoorLimits(),
            self._add,
            wants_executable=lambda: self.wants_executable,
        )
        self.programs: set[str | None] = set()
        self.channel = grpc.aio.insecure_channel(f"unix:{self.root}/sock")

    async def __aenter__(self) -> Self:
        await self.server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await self.server.stop(0)
        shutil.rmtree(self.root)

    def _authorize(self, caller: Caller, method: str) -> Decision:
        assert caller.pid == os.getpid()
        self.programs.add(caller.exe_at_identify)
        return Decision(self.allowed, ("test-rule",), "forbidden by policy test-rule")

    def _add(self, server: grpc.aio.Server) -> tuple[str, ...]:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        handlers = {
            "Who": unary(self._who),
            "Fail": unary(self._fail),
            "Refuse": unary(self._refuse),
            "Abort": unary(self._abort),
            "Wait": unary(self._wait),
            "Change": unary(self._change),
            "Collect": grpc.stream_unary_rpc_method_handler(self._collect),
            "Yield": stream(self._yield),
            "Write": stream(self._write),
            "Echo": grpc.stream_stream_rpc_method_handler(self._echo),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        return (SERVICE,)

    async def _who(self, _request: bytes, _context: Any) -> bytes:
        self.ran += 1
        return str(current_caller().pid).encode()

    async def _fail(self, _request: bytes, _context: Any) -> bytes:
        raise ValueError(SECRET)

    async def _refuse(self, request: bytes, _context: Any) -> bytes:
        if request == b"hostile":
            raise HostileInput("BAD_JSON", "safe words") from ValueError(SECRET)
        raise Misuse("BAD_NONCE", "safe words") from ValueError(SECRET)

    async def _abort(self, _request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.NOT_FOUND, "the handler's words")
        raise AssertionError

    async def _wait(self, _request: bytes, _context: Any) -> bytes:
        self.waiting.set()
        self.running += 1
        await self.go_on.wait()
        return b"went on"

    async def _change(self, _request: bytes, _context: Any) -> bytes:
        os.setegid(12345)
        return b"for the process that asked"

    async def _collect(self, requests: AsyncIterator[bytes], _context: Any) -> bytes:
        return b"+".join([request async for request in requests])

    async def _yield(self, request: bytes, _context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        if request == b"fail":
            raise ValueError(SECRET)
        if request == b"refuse":
            raise Exhausted("MEASURE_LIMIT", "safe words")
        if request == b"wait":
            self.waiting.set()
            await self.go_on.wait()
        yield b"last"

    async def _write(self, request: bytes, context: Any) -> None:
        await context.write(b"first")
        if request == b"fail":
            raise ValueError(SECRET)
        await context.write(b"last")

    async def _echo(self, requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    async def call(self, method: str, request: bytes = b"", timeout: float | None = 30) -> bytes:
        answer: bytes = await self.channel.unary_unary(f"/{SERVICE}/{method}")(request, timeout=timeout)
        return answer

    async def stream(self, method: str, request: bytes = b"") -> list[bytes]:
        return [part async for part in self.channel.unary_stream(f"/{SERVICE}/{method}")(request, timeout=30)]

    def count(self, method: str) -> dict[str, int]:
        """How calls of a method ended, by code."""
        return {code: n for (name, code), n in self.server.gate.calls.items() if name == f"/{SERVICE}/{method}"}


@pytest.fixture
def journal() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handlers, level = logging.root.handlers[:], logging.root.level
    configure("debug", stream)
    yield stream
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()


class Failure:
    """How a call failed, as its client sees it."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code()
        self.details = error.details() or ""
        self.everything = f"{error.details()} {error.debug_error_string()} {error.trailing_metadata()}"
        self.slug = ""
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-status-details-bin":
                status = errors_pb2.Status.FromString(value)
                self.slug = errors_pb2.ErrorInfo.FromString(status.details[0].value).reason


async def failure(call: Any) -> Failure:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return Failure(caught.value)


def test_handler_knows_its_caller() -> None:
    async def scenario() -> None:
        async with Site() as site:
            assert await site.call("Who") == str(os.getpid()).encode()
            assert site.count("Who") == {"OK": 1}

    asyncio.run(scenario())


@pytest.mark.parametrize("wanted", [False, True])
def test_programs_are_hashed_only_where_the_policy_speaks_of_them(wanted: bool) -> None:
    own = hashlib.sha256(Path("/proc/self/exe").read_bytes()).hexdigest()

    async def scenario() -> None:
        async with Site(wants_executable=wanted) as site:
            await site.call("Who")
            await site.call("Who")
            assert site.programs == {own if wanted else None}

    asyncio.run(scenario())


def test_a_running_stream_is_judged_with_its_program_once_the_policy_speaks_of_programs() -> None:
    own = hashlib.sha256(Path("/proc/self/exe").read_bytes()).hexdigest()

    async def scenario() -> None:
        async with Site() as site:
            call = site.channel.unary_stream(f"/{SERVICE}/Yield")(b"wait", timeout=30)
            assert await call.read() == b"first"
            await site.waiting.wait()
            site.programs.clear()
            site.wants_executable = True
            site.go_on.set()
            assert await call.read() == b"last"
            assert site.programs == {own}

    asyncio.run(scenario())


def test_one_connection_has_so_many_calls_at_a_time_and_no_more() -> None:
    async def scenario() -> None:
        async with Site(InFlight(4096, 4096)) as site:

            async def ask() -> bytes:
                while True:
                    try:
                        return await site.call("Wait")
                    except grpc.aio.AioRpcError as error:
                        # The server refuses a stream that comes before it has put away the last one.
                        if error.code() is not grpc.StatusCode.UNAVAILABLE:
                            raise

            calls = [asyncio.ensure_future(ask()) for _ in range(MAX_STREAMS + 20)]
            await until(lambda: site.running >= MAX_STREAMS)
            await asyncio.sleep(0.3)
            assert site.running == MAX_STREAMS
            site.go_on.set()
            assert set(await asyncio.gather(*calls)) == {b"went on"}

    asyncio.run(scenario())


def test_every_shape_of_call_passes() -> None:
    async def scenario() -> None:
        async with Site() as site:
            assert await site.stream("Yield") == [b"first", b"last"]
            assert await site.stream("Write") == [b"first", b"last"]
            assert await site.channel.stream_unary(f"/{SERVICE}/Collect")(iter([b"a", b"b"]), timeout=30) == b"a+b"
            echo = site.channel.stream_stream(f"/{SERVICE}/Echo")(iter([b"a", b"b"]), timeout=30)
            assert [part async for part in echo] == [b"a", b"b"]
            for method in ("Yield", "Write", "Collect", "Echo"):
                assert site.count(method) == {"OK": 1}

    asyncio.run(scenario())


def test_a_stream_ends_when_the_policy_no_longer_allows_it() -> None:
    async def scenario() -> None:
        async with Site() as site:
            call = site.channel.unary_stream(f"/{SERVICE}/Yield")(b"wait", timeout=30)
            assert await call.read() == b"first"
            await site.waiting.wait()
            site.allowed = False
            site.go_on.set()
            found = await failure(call.read())
            assert (found.code, found.slug) == (grpc.StatusCode.PERMISSION_DENIED, "NOT_ALLOWED")

    asyncio.run(scenario())


@pytest.mark.parametrize("method", ["Who", "Yield", "Write", "Collect", "Echo"])
def test_denied_call_never_reaches_its_handler(method: str, journal: io.StringIO) -> None:
    async def scenario() -> None:
        async with Site() as site:
            site.allowed = False
            make = {
                "Collect": site.channel.stream_unary,
                "Echo": site.channel.stream_stream,
                "Who": site.channel.unary_unary,
            }.get(method, site.channel.unary_stream)
            asked = iter([b"x"]) if method in ("Collect", "Echo") else b"x"
            call = make(f"/{SERVICE}/{method}")(asked, timeout=30)
            found = await failure(_drain(call) if method in ("Yield", "Write", "Echo") else call)
            assert (found.code, found.slug) == (grpc.StatusCode.PERMISSION_DENIED, "NOT_ALLOWED")
            assert "test-rule" in found.details
            assert site.ran == 0
            assert site.count(method) == {"PERMISSION_DENIED": 1}
            assert f"uid={os.getuid()} pid={os.getpid()}" in journal.getvalue()

    asyncio.run(scenario())


async def _drain(call: Any) -> list[bytes]:
    return [part async for part in call]


def test_text_of_an_unknown_exception_reaches_neither_client_nor_log(journal: io.StringIO) -> None:
    async def scenario() -> None:
        async with Site() as site:
            found = [
                await failure(site.call("Fail")),
                await failure(site.stream("Yield", b"fail")),
                await failure(site.stream("Write", b"fail")),
                await failure(site.call("Refuse")),
                await failure(site.call("Refuse", b"hostile")),
            ]
            assert [each.slug for each in found] == ["INTERNAL"] * 3 + ["BAD_NONCE", "BAD_JSON"]
            assert [each.code for each in found[:3]] == [grpc.StatusCode.INTERNAL] * 3
            for each in found:
                assert SECRET not in each.everything
            for each in found[:3]:
                incident = each.details.split()[3]
                assert f"incident={incident}" in journal.getvalue()
            assert SECRET not in journal.getvalue()
            assert "error=ValueError" in journal.getvalue()
            assert "cause=ValueError" in journal.getvalue()
            assert all(line.startswith(("<3>", "<4>")) for line in journal.getvalue().splitlines())

    asyncio.run(scenario())


def test_error_of_ours_ends_a_stream_with_its_reason() -> None:
    async def scenario() -> None:
        async with Site() as site:
            found = await failure(site.stream("Yield", b"refuse"))
            assert (found.code, found.slug) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MEASURE_LIMIT")
            assert site.count("Yield") == {"RESOURCE_EXHAUSTED": 1}

    asyncio.run(scenario())


def test_status_that_a_handler_chose_is_left_alone() -> None:
    async def scenario() -> None:
        async with Site() as site:
            found = await failure(site.call("Abort"))
            assert (found.code, found.details) == (grpc.StatusCode.NOT_FOUND, "the handler's words")

    asyncio.run(scenario())


def test_unknown_methods_are_unimplemented_and_not_remembered() -> None:
    async def scenario() -> None:
        async with Site() as site:
            for number in range(50):
                assert (await failure(site.call(f"Made{number}"))).code is grpc.StatusCode.UNIMPLEMENTED
            assert not any("Made" in method for method in site.server.gate._wrapped)
            assert not any("Made" in method for method, _ in site.server.gate.calls)

    asyncio.run(scenario())


def test_running_calls_of_one_uid_are_bounded() -> None:
    async def scenario() -> None:
        async with Site(InFlight(2, 10)) as site:
            running = [asyncio.ensure_future(site.call("Wait")) for _ in range(2)]
            await until(lambda: site.in_flight.running == 2)
            found = await failure(site.call("Who"))
            assert (found.code, found.slug) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS")
            site.go_on.set()
            assert await asyncio.gather(*running) == [b"went on"] * 2
            assert await site.call("Who")
            assert site.in_flight.running == 0

    asyncio.run(scenario())


def test_stream_holds_its_slot_until_it_ends() -> None:
    async def scenario() -> None:
        async with Site(InFlight(1, 10)) as site:
            stream = asyncio.ensure_future(site.stream("Yield", b"wait"))
            await site.waiting.wait()
            assert (await failure(site.call("Who"))).slug == "TOO_MANY_CALLS"
            site.go_on.set()
            assert await stream == [b"first", b"last"]
            assert await site.call("Who")

    asyncio.run(scenario())


@pytest.mark.parametrize("method", ["Wait", "Yield"])
def test_caller_that_hangs_up_frees_its_slot(method: str) -> None:
    async def scenario() -> None:
        async with Site() as site:
            make = site.channel.unary_unary if method == "Wait" else site.channel.unary_stream
            call = make(f"/{SERVICE}/{method}")(b"wait")
            await asyncio.gather(site.waiting.wait(), call.initial_metadata() if method == "Yield" else _nothing())
            assert site.in_flight.running == 1
            call.cancel()
            await until(lambda: site.in_flight.running == 0)
            assert site.count(method) == {"CANCELLED": 1}

    async def _nothing() -> None:
        return None

    asyncio.run(scenario())


@pytest.mark.parametrize("method", ["Wait", "Yield"])
def test_call_that_the_agents_stop_ends_is_told_to_try_again(method: str) -> None:
    async def scenario() -> None:
        async with Site() as site:
            asked = asyncio.ensure_future(
                site.call("Wait", b"wait") if method == "Wait" else site.stream("Yield", b"wait")
            )
            await site.waiting.wait()
            site.server.gate.end()
            told = await failure(asked)
            assert (told.slug, told.code) == ("AGENT_STOPPING", grpc.StatusCode.UNAVAILABLE)
            await until(lambda: site.in_flight.running == 0)
            await until(lambda: site.count(method) == {"UNAVAILABLE": 1})
            assert site.server.gate._running == set()

    asyncio.run(scenario())


def test_call_without_a_deadline_is_given_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptor, "MAX_SECONDS", 0.05)

    async def scenario() -> None:
        async with Site() as site:
            for timeout in (None, 3600.0):
                found = await failure(site.call("Wait", timeout=timeout))
                assert (found.code, found.slug) == (grpc.StatusCode.UNAVAILABLE, "CALL_TIMEOUT")
            assert site.in_flight.running == 0

    asyncio.run(scenario())


def test_who_goes_round_the_door_is_nobody() -> None:
    async def scenario() -> None:
        async with Site() as site, grpc.aio.insecure_channel(f"unix:{site.root}/inner/s") as inside:
            found = await failure(inside.unary_unary(f"/{SERVICE}/Who")(b"", timeout=30))
            assert (found.code, found.slug) == (grpc.StatusCode.PERMISSION_DENIED, "CALLER_UNKNOWN")
            assert site.ran == 0

    asyncio.run(scenario())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change the group")
def test_answer_goes_to_the_process_that_asked_or_to_nobody() -> None:
    group = os.getegid()

    async def scenario() -> None:
        async with Site() as site:
            try:
                found = await failure(site.call("Change"))
            finally:
                os.setegid(group)
            assert (found.code, found.slug) == (grpc.StatusCode.PERMISSION_DENIED, "CALLER_CHANGED")

    asyncio.run(scenario())


def test_refused_callers_cannot_flood_the_journal(journal: io.StringIO) -> None:
    async def scenario() -> None:
        async with Site() as site:
            site.allowed = False
            await asyncio.gather(*(failure(site.call("Who")) for _ in range(60)))
            assert site.count("Who") == {"PERMISSION_DENIED": 60}

    asyncio.run(scenario())
    assert 1 <= len(journal.getvalue().splitlines()) <= 20
