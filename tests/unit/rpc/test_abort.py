"""Our errors travel as google.rpc statuses, and come out at the client as what they were."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from cgpu_agent.api.v1 import errors_pb2
from cgpu_agent.client.connect import translate
from cgpu_agent.errors import AgentError, Denied, DeviceFault, Exhausted, HostileInput, Misuse, Unavailable
from cgpu_agent.rpc.abort import DOMAIN, abort, code_of

Code = grpc.StatusCode

TABLE: list[tuple[AgentError, grpc.StatusCode, type[AgentError]]] = [
    (Misuse("BAD_NONCE", "m"), Code.INVALID_ARGUMENT, Misuse),
    (Denied("NOT_ALLOWED", "m"), Code.PERMISSION_DENIED, Denied),
    (Exhausted("TOO_MANY_CALLS", "m", retry_after=0.1), Code.RESOURCE_EXHAUSTED, Exhausted),
    (Exhausted("MEASURE_LIMIT", "m"), Code.RESOURCE_EXHAUSTED, Exhausted),
    (Unavailable("TPM_RESET_DETECTED", "m"), Code.FAILED_PRECONDITION, Unavailable),
    (Unavailable("NOT_READY", "m", retry_after=2.0), Code.UNAVAILABLE, Unavailable),
    (DeviceFault("TPM_TIMEOUT", "m"), Code.FAILED_PRECONDITION, Unavailable),
    (DeviceFault("TPM_BUSY", "m", retry_after=1.0), Code.UNAVAILABLE, Unavailable),
    (HostileInput("BAD_JSON", "m"), Code.INTERNAL, DeviceFault),
    (AgentError("INTERNAL", "m"), Code.INTERNAL, DeviceFault),
]


async def served(error: AgentError) -> grpc.aio.AioRpcError:
    """Make a call that fails with ``error``, over a real connection."""

    async def handler(_request: bytes, context: Any) -> bytes:
        await abort(context, error)

    server = grpc.aio.server()
    handlers = {"Fail": grpc.unary_unary_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("kit.Abort", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/kit.Abort/Fail")(b"", timeout=30)
            return caught.value
    finally:
        await server.stop(0)


@pytest.mark.parametrize(("error", "code", "kind"), TABLE, ids=lambda value: getattr(value, "slug", None))
def test_error_arrives_as_what_it_was(error: AgentError, code: grpc.StatusCode, kind: type[AgentError]) -> None:
    failed = asyncio.run(served(error))
    assert failed.code() is code is code_of(error)
    found = translate(failed, "/nonexistent")
    assert type(found) is kind
    assert (found.slug, found.message, found.retry_after) == (error.slug, error.message, error.retry_after)


def test_details_are_google_rpcs() -> None:
    failed = asyncio.run(served(Unavailable("NOT_READY", "words", retry_after=1.5)))
    trailers = dict(failed.trailing_metadata() or ())
    status = errors_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert (status.code, status.message) == (Code.UNAVAILABLE.value[0], "words")
    info, retry = status.details
    assert info.type_url == "type.googleapis.com/google.rpc.ErrorInfo"
    assert errors_pb2.ErrorInfo.FromString(info.value) == errors_pb2.ErrorInfo(reason="NOT_READY", domain=DOMAIN)
    assert retry.type_url == "type.googleapis.com/google.rpc.RetryInfo"
    assert errors_pb2.RetryInfo.FromString(retry.value).retry_delay.ToMilliseconds() == 1500


def test_nobody_is_told_to_come_back_too_early() -> None:
    assert (
        translate(asyncio.run(served(Unavailable("NOT_READY", "words", retry_after=0.0123))), "").retry_after == 0.013
    )


def test_only_unavailable_invites_to_retry() -> None:
    for error, code, _ in TABLE:
        if code is Code.UNAVAILABLE:
            assert error.retry_after is not None
        if code is Code.FAILED_PRECONDITION:
            assert error.retry_after is None


def test_cause_and_other_exception_text_stay_inside() -> None:
    error = DeviceFault("TPM_IO", "safe words")
    error.__cause__ = OSError("/root/secret")
    failed = asyncio.run(served(error))
    assert "secret" not in f"{failed.details()} {failed.debug_error_string()} {failed.trailing_metadata()}"
