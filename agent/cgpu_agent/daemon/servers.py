"""The public and the admin gRPC server, each behind a front door of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from cgpu_agent.api.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    evidence_pb2,
    evidence_pb2_grpc,
    gpus_pb2,
    gpus_pb2_grpc,
    keys_pb2,
    keys_pb2_grpc,
    measured_boot_pb2,
    measured_boot_pb2_grpc,
    sealed_keys_pb2,
    sealed_keys_pb2_grpc,
    transfer_buffers_pb2,
    transfer_buffers_pb2_grpc,
)
from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.core import Core
from cgpu_agent.domain.leases import Leases
from cgpu_agent.domain.policy import Decision
from cgpu_agent.domain.quota import InFlight
from cgpu_agent.errors import Unavailable
from cgpu_agent.rpc.addresses import Listener
from cgpu_agent.rpc.admin import AdminService, Operated
from cgpu_agent.rpc.admission import DoorLimits
from cgpu_agent.rpc.auditor import LEASE
from cgpu_agent.rpc.evidence import EvidenceService
from cgpu_agent.rpc.exe_digest import ExeDigests
from cgpu_agent.rpc.frontdoor import FrontDoor
from cgpu_agent.rpc.gpus import GpusService
from cgpu_agent.rpc.identify import Identified, Identifier
from cgpu_agent.rpc.interceptor import Gate, Recorder, current_caller
from cgpu_agent.rpc.keptleases import Store
from cgpu_agent.rpc.keys import KeysService
from cgpu_agent.rpc.leasedoor import LeaseDoor, LeaseKinds
from cgpu_agent.rpc.measured_boot import MeasuredBootService
from cgpu_agent.rpc.sealed_keys import SealedKeysService
from cgpu_agent.rpc.transfer_buffers import TransferBuffersService

MAX_REQUEST = 64 << 10
MAX_RESPONSE = 32 << 20
MAX_STREAMS = 128
"""Calls at a time on one connection; a client with more of them waits."""

_LAST_WORD_SECONDS = 2.0

SELF_CHECK = "/cgpu.agent.internal.SelfCheck/Pid"
"""Answers the caller's pid, to the daemon itself only: how it proves at start that identities reach handlers."""


@dataclass(slots=True)
class Guarded:
    """One server, its gate and its door."""

    name: str
    server: grpc.aio.Server
    gate: Gate
    door: FrontDoor
    public_path: str
    health: Any

    async def start(self) -> None:
        """Serve; first prove that the door identifies.

        Raises:
            Unavailable: ``FRONTDOOR_SELF_CHECK``.
        """
        await self.server.start()
        self.door.start()
        await self.door.verify_self(self._probe)

    async def _probe(self) -> int:
        async with grpc.aio.insecure_channel(
            f"unix:{self.public_path}", options=(("grpc.use_local_subchannel_pool", 1),)
        ) as channel:
            call: Any = channel.unary_unary(SELF_CHECK)
            return int(await call(b"", timeout=5))

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self.health.set("", status)

    async def stop(self, grace: float) -> None:
        """Take no new callers; let running calls end within ``grace`` seconds; end the rest with a word, then cut."""
        self.door.stop_accepting()
        await self.health.enter_graceful_shutdown()
        stopping = asyncio.ensure_future(self.server.stop(grace + _LAST_WORD_SECONDS))
        await asyncio.wait([stopping], timeout=grace)
        self.gate.end()
        await stopping
        self.door.close()


class _SelfCheck(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if handler_call_details.method != SELF_CHECK:
            return None

        async def answer(_request: bytes, _context: Any) -> bytes:
            return str(current_caller().pid).encode()

        return grpc.unary_unary_rpc_method_handler(answer)


class _OneQueue:
    """A server to which services are added, so that it takes calls in the order in which they come.

    grpc has a queue of its own for each method that is registered, and the front door would not know how far it is.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, _service: str, _handlers: object) -> None:
        """Nothing: generated code adds the same handlers as generic ones, too."""


def with_self_check(authorize: Callable[[Caller, str], Decision]) -> Callable[[Caller, str], Decision]:
    """Let this very process, and nobody else, run the self check."""

    def decide(caller: Caller, method: str) -> Decision:
        if method == SELF_CHECK:
            return Decision(caller.pid == os.getpid(), (), "for the agent alone")
        return authorize(caller, method)

    return decide


def guarded(
    name: str,
    listener: Listener,
    private_dir: Path,
    identifier: Identifier,
    authorize: Callable[[Caller, str], Decision],
    in_flight: InFlight,
    limits: DoorLimits,
    add_services: Callable[[grpc.aio.Server], tuple[str, ...]],
    recorder: Recorder | None = None,
    wants_executable: Callable[[], bool] = lambda: False,
) -> Guarded:
    """Build a server on a private socket and a door in front of it; nothing is started.

    Args:
        private_dir: directory of mode 0700 for this server alone.
        add_services: registers the services and returns their full names, for reflection.
    """
    private_dir.mkdir(mode=0o700, exist_ok=True)
    for stale in private_dir.iterdir():
        stale.unlink()
    inner = str(private_dir / "s")
    door = FrontDoor([listener], inner, identifier, limits=limits)
    gate = Gate(door.lookup, with_self_check(authorize), in_flight, recorder, wants_executable)
    server = grpc.aio.server(
        interceptors=(gate,),
        options=(
            ("grpc.max_receive_message_length", MAX_REQUEST),
            ("grpc.max_send_message_length", MAX_RESPONSE),
            # A stream without its message is held by grpc, where neither the gate nor its limits see it.
            ("grpc.max_concurrent_streams", MAX_STREAMS),
        ),
    )
    queue: Any = _OneQueue(server)
    services = add_services(queue)
    checker = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checker, queue)
    server.add_generic_rpc_handlers((_SelfCheck(),))
    reflector = reflection.aio.ReflectionServicer((*services, health.SERVICE_NAME, reflection.SERVICE_NAME))
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflector, queue)
    server.add_insecure_port(f"unix:{inner}")
    public = listener.sock.getsockname()
    return Guarded(name, server, gate, door, public, checker)


def lease_door(
    core: Core,
    leases: Leases,
    listener: Listener,
    identifier: Identifier,
    limits: DoorLimits,
    wants_executable: Callable[[], bool],
    may_transfer: Callable[[Caller], bool],
    store: Store | None,
    recorder: Recorder,
) -> LeaseDoor:
    """The door where memory is leased: to callers who may have an object opened or may transfer, and to no other."""
    digests = ExeDigests()

    async def permit(who: Identified) -> LeaseKinds:
        caller = who.caller
        if wants_executable():
            with contextlib.suppress(Unavailable):
                caller = replace(caller, exe_at_identify=await digests.digest(who))
        release, gpus = core.release, [] if core.channels is None else core.channels.gpus
        objects = release is not None and (release.may_open(caller) or release.may_load(caller, gpus))
        return LeaseKinds(objects, transfers=core.channels is not None and may_transfer(caller))

    def denied(caller: Caller | None, reason: str) -> None:
        recorder.denied(caller, LEASE, reason)

    return LeaseDoor(listener, identifier, leases, permit, limits, store=store, denied=denied)


def add_public(core: Core) -> Callable[[grpc.aio.Server], tuple[str, ...]]:
    """Services of the public socket."""

    def add(server: grpc.aio.Server) -> tuple[str, ...]:
        measured_boot_pb2_grpc.add_MeasuredBootServicer_to_server(MeasuredBootService(core), server)
        evidence_pb2_grpc.add_EvidenceServicer_to_server(EvidenceService(core), server)
        gpus_pb2_grpc.add_GpusServicer_to_server(GpusService(core), server)
        keys_pb2_grpc.add_KeysServicer_to_server(KeysService(core), server)
        transfer_buffers_pb2_grpc.add_TransferBuffersServicer_to_server(TransferBuffersService(core), server)
        return (
            measured_boot_pb2.DESCRIPTOR.services_by_name["MeasuredBoot"].full_name,
            evidence_pb2.DESCRIPTOR.services_by_name["Evidence"].full_name,
            gpus_pb2.DESCRIPTOR.services_by_name["Gpus"].full_name,
            keys_pb2.DESCRIPTOR.services_by_name["Keys"].full_name,
            transfer_buffers_pb2.DESCRIPTOR.services_by_name["TransferBuffers"].full_name,
        )

    return add


def add_admin(core: Core, daemon: Operated) -> Callable[[grpc.aio.Server], tuple[str, ...]]:
    """Services of the admin socket."""

    def add(server: grpc.aio.Server) -> tuple[str, ...]:
        admin_pb2_grpc.add_AdminServicer_to_server(AdminService(daemon), server)
        sealed_keys_pb2_grpc.add_SealedKeysServicer_to_server(SealedKeysService(core), server)
        return (
            admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name,
            sealed_keys_pb2.DESCRIPTOR.services_by_name["SealedKeys"].full_name,
        )

    return add
