"""What every call passes: who is it, may they, is there room, are they still the same; then count and report."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import secrets
import time
import traceback
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Protocol

import grpc
import structlog

from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.leases import Process
from cgpu_agent.domain.policy import Decision
from cgpu_agent.domain.quota import InFlight
from cgpu_agent.errors import AgentError, Denied, DeviceFault, Unavailable
from cgpu_agent.rpc.abort import abort, code_of
from cgpu_agent.rpc.methods import BY_KEY
from cgpu_agent.wire.metrics import Histogram

MAX_SECONDS = 120.0
_LOG_LINES_PER_WINDOW = 20
_LOG_WINDOW_SECONDS = 10.0
_CALL_SECONDS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, MAX_SECONDS)

log = structlog.get_logger()

_caller: ContextVar[Caller] = ContextVar("caller")
_begin: ContextVar[Callable[[Decision], Awaitable[None]]] = ContextVar("begin")
_process: ContextVar[Process | None] = ContextVar("process")


def current_caller() -> Caller:
    """The caller of the RPC that is being served."""
    return _caller.get()


async def put_on_record(decision: Decision) -> None:
    """Put the RPC that is being served on record, where it is the handler that decides (``BY_KEY``).

    Raises as ``Recorder.begins``.
    """
    await _begin.get()(decision)


def current_process() -> Process:
    """The process that makes the RPC that is being served."""
    process = _process.get()
    if process is None:
        raise _unknown()
    return process


class Connection(Protocol):
    """What the front door knows of one connection."""

    @property
    def caller(self) -> Caller | None: ...
    @property
    def identified(self) -> Process | None: ...
    @property
    def refusal(self) -> Denied | None: ...
    def check(self) -> None:
        """Raises ``Denied`` when the connecting process is gone or is not what it was."""

    async def exe_digest(self) -> str:
        """SHA-256 hex of the program it runs; kept once made.

        Raises ``Exhausted`` while another is being hashed, ``Unavailable`` where it cannot be read.
        """


class Recorder(Protocol):
    """Keeps the record of what was decided."""

    def denied(self, caller: Caller | None, method: str, reason: str) -> None:
        """A call was refused."""

    async def begins(self, caller: Caller, method: str, decision: Decision) -> Callable[[str], None] | None:
        """A permitted call is about to be served; raises where that needs a record and none can be made.

        Returns what to tell the gRPC code to when the call ends, or ``None`` for calls of no such weight. It does not
        wait: between the gate's last look at the caller and the answer nothing may.
        """


class LogThrottle:
    """Bounds how many log lines hostile callers can cause; the counters still count every call."""

    def __init__(self) -> None:
        self._window = 0.0
        self._lines = 0

    def allow(self, now: float) -> bool:
        if now - self._window > _LOG_WINDOW_SECONDS:
            self._window, self._lines = now, 0
        self._lines += 1
        return self._lines <= _LOG_LINES_PER_WINDOW


class Gate(grpc.aio.ServerInterceptor):
    """The interceptor of one server.

    Args:
        lookup: from ``context.peer()`` to the connection, ``None`` for a peer that did not come through the door.
        authorize: decides by caller and full method name; must deny methods it does not know.
        in_flight: the callers' slots.
        recorder: the audit log's side; ``None`` = nothing is recorded.
        wants_executable: whether the policy in force speaks of the caller's program.
    """

    def __init__(
        self,
        lookup: Callable[[str], Connection | None],
        authorize: Callable[[Caller, str], Decision],
        in_flight: InFlight,
        recorder: Recorder | None = None,
        wants_executable: Callable[[], bool] = lambda: False,
    ) -> None:
        self._lookup = lookup
        self._authorize = authorize
        self._in_flight = in_flight
        self._recorder = recorder
        self._wants_executable = wants_executable
        self._wrapped: dict[str, Any] = {}
        self._throttle = LogThrottle()
        self._running: set[asyncio.Task[Any] | None] = set()
        self._ended = False
        self.calls: Counter[tuple[str, str]] = Counter()
        """Calls ended so far, by (method, gRPC code name)."""
        self.seconds: dict[str, Histogram] = {}
        """How long they took, by method."""
        self.refusals: Counter[str] = Counter()
        """Those that ended in an error, by its slug."""

    def end(self) -> None:
        """End the calls that run, and tell whoever made them to try again; the agent stops."""
        self._ended = True
        for task in filter(None, self._running):
            task.cancel()

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        method: str = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None  # grpc answers UNIMPLEMENTED; not kept, or made-up names would fill the memory
            wrapped = self._wrapped[method] = self._wrap(method, handler)
        return wrapped

    def _wrap(self, method: str, handler: Any) -> Any:
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if not handler.response_streaming:
            inner = handler.stream_unary if handler.request_streaming else handler.unary_unary

            async def unary(request: Any, context: Any) -> Any:
                async with self._passage(method, context):
                    return await self._bounded(context, inner(request, context))

            make = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            return make(unary, **codec)
        make_stream = (
            grpc.stream_stream_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_stream_rpc_method_handler
        )
        stream = handler.stream_stream if handler.request_streaming else handler.unary_stream
        guard = self._generating if inspect.isasyncgenfunction(stream) else self._writing
        return make_stream(guard(method, stream), **codec)

    def _generating(self, method: str, stream: Callable[..., AsyncGenerator[Any, None]]) -> Any:
        """Guard a handler that yields its responses."""

        async def guarded(request: Any, context: Any) -> AsyncIterator[Any]:
            async with (
                self._passage(method, context) as connection,
                contextlib.aclosing(stream(request, context)) as responses,
            ):
                async for response in responses:
                    connection.check()
                    # What was allowed when the stream began may be no more.
                    self._permitted(await self._for_policy(connection, current_caller()), method)
                    yield response

        return guarded

    def _writing(self, method: str, stream: Callable[..., Awaitable[None]]) -> Any:
        """Guard a handler that writes its responses to the context."""

        async def guarded(request: Any, context: Any) -> None:
            async with self._passage(method, context):
                await stream(request, context)

        return guarded

    @contextlib.asynccontextmanager
    async def _passage(self, method: str, context: Any) -> AsyncIterator[Connection]:
        """Around a handler: let nobody in who may not, hold a slot, and let no unknown error out."""
        caller: Caller | None = None
        begun = time.monotonic()
        code = grpc.StatusCode.CANCELLED
        task = asyncio.current_task()
        ended: Callable[[str], None] | None = None

        async def begin(decided: Decision) -> None:
            nonlocal ended
            if self._recorder is not None and caller is not None:
                ended = await self._recorder.begins(caller, method, decided)

        try:
            self._running.add(task)
            connection, caller = self._identified(context)
            caller = await self._for_policy(connection, caller)
            decision = self._permitted(caller, method)
            _caller.set(caller)
            _process.set(connection.identified)
            with self._in_flight.hold(caller.uid):
                _begin.set(begin)
                if method not in BY_KEY:  # or whoever is refused would fill the log
                    await begin(decision)
                yield connection
            # The answer may be a secret: it goes to the process that asked, or to nobody.
            connection.check()
            code = grpc.StatusCode.OK
        except AgentError as error:
            code = code_of(error)
            self.refusals[error.slug] += 1
            self._report(method, caller, error)
            await abort(context, error)
        except asyncio.CancelledError:
            if not self._ended:
                raise  # the caller hung up
            code = grpc.StatusCode.UNAVAILABLE
            self.refusals["AGENT_STOPPING"] += 1
            await abort(context, Unavailable("AGENT_STOPPING", "the agent is stopping", retry_after=1.0))
        except grpc.aio.AbortError:
            code = grpc.StatusCode.UNKNOWN  # the handler chose it, and grpc does not say
            raise
        except Exception as error:  # noqa: BLE001 - the text of an unknown exception must not reach the client
            code = grpc.StatusCode.INTERNAL
            await abort(context, self._unexpected(method, error))
        finally:
            self._running.discard(task)
            del task  # or it and its fault would keep each other, and so what the fault's traceback names
            self._count(method, code, begun)
            if ended is not None:
                ended(code.name)

    def _unexpected(self, method: str, error: Exception) -> AgentError:
        """What the caller is told of it; the rest is for the journal."""
        self.refusals["INTERNAL"] += 1
        incident = secrets.token_hex(4)
        frames = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-6:]]
        log.error("call failed", method=method, incident=incident, error=type(error).__name__, frames=frames)
        return AgentError("INTERNAL", f"internal error, incident {incident} in the agent's journal")

    def _count(self, method: str, code: grpc.StatusCode, begun: float) -> None:
        self.calls[method, code.name] += 1
        self.seconds.setdefault(method, Histogram(_CALL_SECONDS)).add(time.monotonic() - begun)

    async def _for_policy(self, connection: Connection, caller: Caller) -> Caller:
        """The caller with all that the policy of this moment asks about."""
        return await _with_executable(connection, caller) if self._wants_executable() else caller

    def _permitted(self, caller: Caller, method: str) -> Decision:
        decision = self._authorize(caller, method)
        if not decision.allowed:
            if decision.log_detail and self._throttle.allow(asyncio.get_running_loop().time()):
                log.error("the policy could not be evaluated", method=method, detail=decision.log_detail)
            raise Denied("NOT_ALLOWED", f"not allowed: {decision.reason}")
        return decision

    def _identified(self, context: Any) -> tuple[Connection, Caller]:
        connection = self._lookup(context.peer())
        if connection is None:
            raise _unknown()
        if connection.refusal is not None:
            raise connection.refusal
        if connection.caller is None:
            raise _unknown()
        return connection, connection.caller

    async def _bounded(self, context: Any, work: Awaitable[Any]) -> Any:
        remaining = context.time_remaining()
        if remaining is not None and remaining <= MAX_SECONDS:
            return await work  # grpc cancels the call at its deadline
        try:
            return await asyncio.wait_for(work, MAX_SECONDS)
        except asyncio.TimeoutError:
            raise DeviceFault("CALL_TIMEOUT", "the call took too long", retry_after=1.0) from None

    def _report(self, method: str, caller: Caller | None, error: AgentError) -> None:
        if self._recorder is not None and isinstance(error, Denied):
            self._recorder.denied(caller, method, error.slug)
        if not self._throttle.allow(asyncio.get_running_loop().time()):
            return
        fields: dict[str, object] = {"method": method, "reason": error.slug}
        if caller is not None:
            fields |= {"uid": caller.uid, "pid": caller.pid}
            if caller.unit is not None:
                fields["unit"] = caller.unit
        if error.__cause__ is not None:
            fields["cause"] = type(error.__cause__).__name__
        log.warning("call refused", **fields)


async def _with_executable(connection: Connection, caller: Caller) -> Caller:
    """The caller with its program's digest, where that can be had; rules that ask for it deny where it cannot."""
    try:
        return replace(caller, exe_at_identify=await connection.exe_digest())
    except Unavailable:
        return caller


def _unknown() -> Denied:
    return Denied("CALLER_UNKNOWN", "this connection did not come through the agent's public socket")
