"""Finds the agent's socket and turns what goes wrong there into errors that say what to do."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from cgpu_agent.api.v1 import (
    admin_pb2_grpc,
    errors_pb2,
    evidence_pb2_grpc,
    gpus_pb2_grpc,
    keys_pb2_grpc,
    measured_boot_pb2_grpc,
    sealed_keys_pb2_grpc,
    transfer_buffers_pb2_grpc,
)
from cgpu_agent.errors import AgentError, Denied, DeviceFault, Exhausted, Misuse, Unavailable

DEFAULT_SOCKET = "/run/cgpu-agent/agent.sock"
DEFAULT_ADMIN_SOCKET = "/run/cgpu-agent/admin.sock"
ENVIRONMENT = "CGPU_AGENT_SOCKET"
ADMIN_ENVIRONMENT = "CGPU_AGENT_ADMIN_SOCKET"
LEASE_ENVIRONMENT = "CGPU_AGENT_LEASE_SOCKET"

_WHO_MAY = "its mode and group say who may; the admin socket is for root"

# A bundle with all its logs; the daemon's own cap on what it sends.
CHANNEL_OPTIONS = (("grpc.max_receive_message_length", 32 << 20), ("grpc.default_authority", "localhost"))

STUBS: dict[str, Any] = {
    "MeasuredBoot": measured_boot_pb2_grpc.MeasuredBootStub,
    "Evidence": evidence_pb2_grpc.EvidenceStub,
    "Gpus": gpus_pb2_grpc.GpusStub,
    "Keys": keys_pb2_grpc.KeysStub,
    "Admin": admin_pb2_grpc.AdminStub,
    "SealedKeys": sealed_keys_pb2_grpc.SealedKeysStub,
    "TransferBuffers": transfer_buffers_pb2_grpc.TransferBuffersStub,
}

_KINDS: dict[grpc.StatusCode, type[AgentError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: Misuse,
    grpc.StatusCode.PERMISSION_DENIED: Denied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Exhausted,
    grpc.StatusCode.INTERNAL: DeviceFault,
}


def find_socket(given: str | None, *, admin: bool = False) -> str:
    """The socket's path: what was given, else the environment, else the well-known place."""
    if given:
        return given
    name, default = (ADMIN_ENVIRONMENT, DEFAULT_ADMIN_SOCKET) if admin else (ENVIRONMENT, DEFAULT_SOCKET)
    return os.environ.get(name) or default


def unreachable(path: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> Unavailable:
    """Say why nobody answers at ``path``, by trying it."""
    try:
        info = Path(path).stat()
    except PermissionError:
        return Unavailable("SOCKET_DENIED", f"no permission to reach {path}: {_WHO_MAY}")
    except OSError:
        return Unavailable(
            "NO_SOCKET",
            f"there is no {path}: start the agent (systemctl start cgpu-agent.socket cgpu-agent-admin.socket "
            f"cgpu-agent-lease.socket), or say where its socket is ({ENVIRONMENT}, {ADMIN_ENVIRONMENT}, "
            f"{LEASE_ENVIRONMENT})",
        )
    if not stat.S_ISSOCK(info.st_mode):
        return Unavailable("NO_SOCKET", f"{path} is not a socket: name the agent's")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except PermissionError:
            return Unavailable("SOCKET_DENIED", f"no permission to connect to {path}: {_WHO_MAY}")
        except OSError:
            return Unavailable("NO_AGENT", f"nobody listens at {path}: systemctl status cgpu-agent", retry_after=1.0)
    why = "it starts anew, or has as many callers as it takes"
    return Unavailable("CONNECTION_LOST", f"the agent closed the connection: {why}; try again", retry_after=0.5)


def translate(error: Any, path: str) -> AgentError:
    """A call's ``grpc.RpcError`` as one of ours; slug and retry time are from the agent's google.rpc details."""
    code: grpc.StatusCode = error.code()
    message: str = error.details() or code.name
    slug, retry = _details(error)
    if slug is None:
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):  # nobody here cancelled it
            return unreachable(path)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Unavailable("DEADLINE", "the agent did not answer in time", retry_after=1.0)
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return Misuse("UNIMPLEMENTED", "this agent does not know the method: it is older than this client")
        slug = code.name
    return _KINDS.get(code, Unavailable)(slug, message, retry_after=retry)


def _details(error: Any) -> tuple[str | None, float | None]:
    slug: str | None = None
    retry: float | None = None
    trailers = error.trailing_metadata() or ()
    for key, value in trailers:
        if key != "grpc-status-details-bin" or not isinstance(value, bytes):
            continue
        try:
            for detail in errors_pb2.Status.FromString(value).details:
                if detail.type_url.endswith("/google.rpc.ErrorInfo"):
                    slug = errors_pb2.ErrorInfo.FromString(detail.value).reason
                elif detail.type_url.endswith("/google.rpc.RetryInfo"):
                    delay = errors_pb2.RetryInfo.FromString(detail.value).retry_delay
                    retry = delay.seconds + delay.nanos / 1e9
        except DecodeError:
            return None, None
    return slug, retry
