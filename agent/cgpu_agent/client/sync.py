"""The blocking client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Literal, TypeVar

import grpc

from cgpu_agent.api.v1 import admin_pb2, gpus_pb2, keys_pb2, sealed_keys_pb2
from cgpu_agent.client import calls
from cgpu_agent.client.channels import Channel
from cgpu_agent.client.connect import CHANNEL_OPTIONS, STUBS, find_socket, translate
from cgpu_agent.client.lease import LeasedMemory, find_lease_socket, plain_size, require_whole
from cgpu_agent.client.transfer import ChannelPlans
from cgpu_agent.errors import AgentError
from cgpu_agent.wire.sealed import SEGMENT_SIZES

if TYPE_CHECKING:
    from typing_extensions import Self

R = TypeVar("R")


class Agent:
    """A connection to the agent of this VM. Thread-safe; do not use it across a fork.

    Every method raises ``cgpu_agent.errors.AgentError``: ``Denied``, ``Misuse``, ``Exhausted``, ``Unavailable``
    (nobody there, not ready, or evidence is refused), ``DeviceFault``. ``slug`` says which, ``retry_after`` whether
    to try again.

    Args:
        socket: path of the agent's socket; by default ``CGPU_AGENT_SOCKET``, else /run/cgpu-agent/agent.sock.
        timeout: seconds each call may take.
    """

    def __init__(self, socket: str | None = None, *, timeout: float = 60.0) -> None:
        self.socket = find_socket(socket)
        self._timeout = timeout
        self._channel = grpc.insecure_channel(f"unix:{self.socket}", options=CHANNEL_OPTIONS)
        self._stubs = {name: stub(self._channel) for name, stub in STUBS.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._channel.close()

    def _run(self, call: calls.Call[R]) -> R:
        try:
            answer = getattr(self._stubs[call.service], call.method)(call.request, timeout=self._timeout)
        except grpc.RpcError as error:
            raise translate(error, self.socket) from None
        return call.convert(answer)

    def get_evidence(
        self,
        nonce: bytes,
        audience: str,
        *,
        user_data: bytes | None = None,
        public_key: bytes | None = None,
        gpus: bool = False,
    ) -> bytes:
        """A bundle to send to a relying party.

        Args:
            nonce: 8-64 bytes from the relying party.
            audience: the relying party's name, as it will check it.
            user_data: up to 64 bytes to bind; or
            public_key: your public key (DER SubjectPublicKeyInfo) to bind.
            gpus: the GPUs too, not the boot alone.
        """
        return self._run(calls.get_evidence(nonce, audience, user_data, public_key, gpus=gpus))

    def get_identity(self) -> calls.Identity:
        """The VM's TPM keys and certificates."""
        return self._run(calls.get_identity())

    def get_platform(self) -> calls.Platform:
        """What the platform below the vTPM says of itself."""
        return self._run(calls.get_platform())

    def get_quote(self, nonce: bytes, pcrs: Sequence[int] = ()) -> calls.Quote:
        """A quote whose extraData names you and ``nonce`` (8-64 bytes); PCRs 0-15 unless given."""
        return self._run(calls.get_quote(nonce, pcrs))

    def get_raw_quote(self, nonce: bytes, pcrs: Sequence[int] = ()) -> calls.Quote:
        """A quote over ``nonce`` (1-48 bytes) verbatim. Denied unless the operator granted ``boot.raw_quote``."""
        return self._run(calls.get_raw_quote(nonce, pcrs))

    def read_pcrs(self, pcrs: Sequence[int] = ()) -> dict[int, bytes]:
        """Current SHA-256 PCR values; not evidence."""
        return self._run(calls.read_pcrs(pcrs))

    def get_event_log(self, kind: calls.LogKind = "boot") -> bytes:
        """A measurement log."""
        return self._run(calls.get_event_log(kind))

    def measure_event(self, content: bytes) -> calls.Measured:
        """Measure an event (1-1024 bytes) under your name. Denied unless the operator granted ``boot.measure``."""
        return self._run(calls.measure_event(content))

    def activate_credential(self, ek: Literal["rsa", "ecc"], credential_blob: bytes, secret: bytes) -> bytes:
        """Open a credential made for this VM's EK and platform AK. Denied unless granted."""
        return self._run(calls.activate_credential(ek, credential_blob, secret))

    def list_keys(self) -> list[keys_pb2.KeyInfo]:
        """The keys that you may have now, and in which way."""
        return self._run(calls.list_keys())

    def get_key(self, name: str, *, plain: bool = False) -> calls.Key:
        """A key, if the operator's policy lets you have it.

        It comes wrapped to a key pair made for this call (``pip install 'cgpu-agent[keys]'``), or as it is with
        ``plain``, which policy permits apart. Denied unless granted.
        """
        receiver = None if plain else calls.new_receiver()
        delivery = self._run(calls.get_key(name, None if receiver is None else receiver.recipient))
        return calls.opened(delivery, receiver)

    @contextlib.contextmanager
    def open_sealed(
        self,
        name: str,
        file: BinaryIO,
        *,
        object_id: str,
        version: int,
        segment_size: int = SEGMENT_SIZES["1MiB"],
    ) -> Iterator[memoryview]:
        """A sealed object, opened by the agent into memory that it shares with you: you never have the key.

            with agent.open_sealed("models/llama", file, object_id="models/llama", version=3) as plain:
                use(plain)  # a read-only memoryview

        It is the whole object, verified. With the block it ends, and the agent wipes it. Denied unless granted.

        Args:
            name: the agent's id of the key, which must be the object's key id.
            file: the sealed object: a regular file, opened for reading only.
            object_id, version: what you expect it to be; any other does not open.
            segment_size: every how many bytes it is cut: 1 MiB or 4 KiB.
        """
        size = plain_size(file, segment_size)
        memory = LeasedMemory(find_lease_socket(self.socket), size, file, self._timeout)
        with contextlib.closing(memory):
            call = calls.open_sealed(name, memory.id, object_id, version, segment_size)
            stream = getattr(self._stubs[call.service], call.method)(call.request, timeout=self._timeout)
            try:
                whole = [call.convert(answer) for answer in stream]  # to its end: only then is it the object
            except grpc.RpcError as error:
                raise translate(error, self.socket) from None
            require_whole(whole[-1:] == [True])
            yield memory.view

    @contextlib.contextmanager
    def channel(self, gpu: int | str = 0) -> Iterator[Channel]:
        """A channel to a GPU's memory. What you allocate through it ends with the block. Denied unless granted.

            with agent.channel() as channel:
                handle = channel.put(array)

        Args:
            gpu: which, by its uuid or its place in ``list_gpus``.
        """
        uuid = gpu if isinstance(gpu, str) else calls.uuid_of(self.list_gpus(), gpu)
        path = find_lease_socket(self.socket)
        name = self._run(calls.open_channel(uuid))
        plans = ChannelPlans(
            name, lambda size, source: LeasedMemory(path, size, source, self._timeout), self._timeout
        )
        try:
            yield Channel(plans, self._run, self._stream)
        finally:
            plans.close()
            with contextlib.suppress(AgentError):  # it ends with this process at the latest
                self._run(calls.close_channel(name))

    def list_gpus(self) -> gpus_pb2.GpuSet:
        """The GPUs, and what the agent makes of them; not evidence."""
        return self._run(calls.list_gpus())

    def get_gpu_report(self, uuid: str, nonce: bytes) -> calls.GpuReport:
        """A GPU's report whose nonce names you and ``nonce`` (8-64 bytes)."""
        return self._run(calls.get_gpu_report(uuid, nonce))

    def get_raw_gpu_report(self, uuid: str, nonce: bytes) -> calls.GpuReport:
        """A GPU's report over ``nonce`` (32 bytes) verbatim. Denied unless ``gpu.raw_report`` was granted."""
        return self._run(calls.get_raw_gpu_report(uuid, nonce))

    def attest_gpus(self) -> gpus_pb2.GpuSet:
        """Attest all GPUs now; returns what came of it. Denied unless the operator granted ``gpu.attest``."""
        return self._run(calls.attest_gpus())

    def watch_gpus(self) -> Iterator[gpus_pb2.GpuSet]:
        """The GPUs now and after each change, without end; close the iterator to stop."""
        return self._stream(calls.watch_gpus())

    def _stream(self, call: calls.Call[R]) -> Iterator[R]:
        stream = getattr(self._stubs[call.service], call.method)(call.request)
        try:
            for answer in stream:
                yield call.convert(answer)
        except grpc.RpcError as error:
            raise translate(error, self.socket) from None
        finally:
            stream.cancel()


class Admin:
    """A connection to the agent's admin socket, for operators."""

    def __init__(self, socket: str | None = None, *, timeout: float = 10.0) -> None:
        self.socket = find_socket(socket, admin=True)
        self._timeout = timeout
        self._channel = grpc.insecure_channel(f"unix:{self.socket}", options=CHANNEL_OPTIONS)

    def get_status(self) -> admin_pb2.GetStatusResponse:
        """What the agent is doing. Raises ``AgentError``, as everything here."""
        return self._run(calls.get_status())

    def get_metrics(self) -> str:
        """The agent's numbers, in Prometheus' text format."""
        return self._run(calls.get_metrics())

    def get_log_level(self) -> admin_pb2.GetLogLevelResponse:
        """How much goes to the journal."""
        return self._run(calls.get_log_level())

    def set_log_level(self, level: str) -> None:
        """Have it be ``debug``, ``info``, ``warning`` or ``error`` until the next reload or start."""
        self._run(calls.set_log_level(level))

    def show_sealed_keys(self) -> sealed_keys_pb2.ShowSealedKeysResponse:
        """The store of keys sealed to this VM's TPM."""
        return self._run(calls.show_sealed_keys())

    def create_sealed_keys(
        self, authority: bytes, fleet: str, *, owner_auth: bytes = b"", replace_lost: bool = False
    ) -> None:
        """Make the store, without a key.

        Args:
            authority: DER SubjectPublicKeyInfo of the P-256 key that approves boots.
            fleet: the name of the VMs whose approvals count here.
            owner_auth: password of the TPM's owner hierarchy.
            replace_lost: give up keys whose file is gone.
        """
        self._run(calls.create_sealed_keys(authority, fleet, owner_auth, replace_lost=replace_lost))

    def adopt_sealed_keys(self, authority: bytes, *, owner_auth: bytes = b"") -> int:
        """Take the file on disk for the right one; its generation."""
        return self._run(calls.adopt_sealed_keys(authority, owner_auth))

    def add_sealed_key(self, key: str, group: str, secret: bytes = b"") -> sealed_keys_pb2.SealedKeyInfo:
        """Seal a new key: ``secret`` (1 to 128 bytes), or 32 random ones."""
        return self._run(calls.add_sealed_key(key, group, secret))

    def rotate_sealed_key(self, key: str, secret: bytes = b"") -> sealed_keys_pb2.SealedKeyInfo:
        """Seal the next generation of a key."""
        return self._run(calls.rotate_sealed_key(key, secret))

    def remove_sealed_key(self, key: str, generation: int = 0) -> None:
        """Remove one generation of a key; 0 = all."""
        self._run(calls.remove_sealed_key(key, generation))

    def raise_epoch(self, minimum: int) -> int:
        """End the approvals of epochs before ``minimum``; the counter's value."""
        return self._run(calls.raise_epoch(minimum))

    def _run(self, call: calls.Call[R]) -> R:
        try:
            answer = getattr(STUBS[call.service](self._channel), call.method)(call.request, timeout=self._timeout)
        except grpc.RpcError as error:
            raise translate(error, self.socket) from None
        return call.convert(answer)

    def close(self) -> None:
        self._channel.close()
