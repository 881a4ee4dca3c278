"""Our errors as gRPC statuses with google.rpc details; nothing but slug and message ever leaves the daemon."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message

from cgpu_agent.api.v1 import errors_pb2
from cgpu_agent.errors import AgentError, Denied, DeviceFault, Exhausted, Misuse, Unavailable

DOMAIN = "cgpu.agent"


def code_of(error: AgentError) -> grpc.StatusCode:
    """The gRPC code of an error. ``UNAVAILABLE`` invites a retry, so it is only used where one makes sense."""
    if isinstance(error, Misuse):
        return grpc.StatusCode.INVALID_ARGUMENT
    if isinstance(error, Denied):
        return grpc.StatusCode.PERMISSION_DENIED
    if isinstance(error, Exhausted):
        return grpc.StatusCode.RESOURCE_EXHAUSTED
    if isinstance(error, (Unavailable, DeviceFault)):
        return grpc.StatusCode.FAILED_PRECONDITION if error.retry_after is None else grpc.StatusCode.UNAVAILABLE
    return grpc.StatusCode.INTERNAL


def _packed(name: str, message: Message) -> AnyMessage:
    return AnyMessage(type_url=f"type.googleapis.com/google.rpc.{name}", value=message.SerializeToString())


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: AgentError) -> NoReturn:
    """End the call with this error."""
    code = code_of(error)
    number: int = code.value[0]
    status = errors_pb2.Status(code=number, message=error.message)
    status.details.append(_packed("ErrorInfo", errors_pb2.ErrorInfo(reason=error.slug, domain=DOMAIN)))
    if error.retry_after is not None:
        retry = errors_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(math.ceil(error.retry_after * 1000))  # whoever waits so long is not early
        status.details.append(_packed("RetryInfo", retry))
    await context.abort(code, error.message, (("grpc-status-details-bin", status.SerializeToString()),))
    raise AssertionError("abort returned")  # pragma: no cover - grpc raises
