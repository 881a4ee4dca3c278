"""The asyncio client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Literal, TypeVar

import grpc

from cgpu_agent.api.v1 import gpus_pb2, keys_pb2
from cgpu_agent.client import calls
from cgpu_agent.client.channels import AsyncChannel
from cgpu_agent.client.connect import CHANNEL_OPTIONS, STUBS, find_socket, translate
from cgpu_agent.client.lease import LeasedMemory, find_lease_socket, plain_size, require_whole
from cgpu_agent.client.transfer import ChannelPlans
from cgpu_agent.errors import AgentError
from cgpu_agent.wire.sealed import SEGMENT_SIZES

if TYPE_CHECKING:
    from typing_extensions import Self

R = TypeVar("R")


class AsyncAgent:
    """A connection to the agent of this VM, for one event loop.

    Methods, arguments and errors are those of ``Agent``.

    Args:
        socket: path of the agent's socket; by default ``CGPU_AGENT_SOCKET``, else /run/cgpu-agent/agent.sock.
        timeout: seconds each call may take.
    """

    def __init__(self, socket: str | None = None, *, timeout: float = 60.0) -> None:
        self.socket = find_socket(socket)
        self._timeout = timeout
        self._channel = grpc.aio.insecure_channel(f"unix:{self.socket}", options=CHANNEL_OPTIONS)
        self._stubs = {name: stub(self._channel) for name, stub in STUBS.items()}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection. Idempotent."""
        await self._channel.close()

    async def _run(self, call: calls.Call[R]) -> R:
        try:
            answer = await getattr(self._stubs[call.service], call.method)(call.request, timeout=self._timeout)
        except grpc.RpcError as error:
            raise translate(error, self.socket) from None
        return call.convert(answer)

    async def get_evidence(
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
        return await self._run(calls.get_evidence(nonce, audience, user_data, public_key, gpus=gpus))

    async def get_identity(self) -> calls.Identity:
        """The VM's TPM keys and certificates."""
        return await self._run(calls.get_identity())

    async def get_platform(self) -> calls.Platform:
        """What the platform below the vTPM says of itself."""
        return await self._run(calls.get_platform())

    async def get_quote(self, nonce: bytes, pcrs: Sequence[int] = ()) -> calls.Quote:
        """A quote whose extraData names you and ``nonce`` (8-64 bytes); PCRs 0-15 unless given."""
        return await self._run(calls.get_quote(nonce, pcrs))

    async def get_raw_quote(self, nonce: bytes, pcrs: Sequence[int] = ()) -> calls.Quote:
        """A quote over ``nonce`` (1-48 bytes) verbatim. Denied unless the operator granted ``boot.raw_quote``."""
        return await self._run(calls.get_raw_quote(nonce, pcrs))

    async def read_pcrs(self, pcrs: Sequence[int] = ()) -> dict[int, bytes]:
        """Current SHA-256 PCR values; not evidence."""
        return await self._run(calls.read_pcrs(pcrs))

    async def get_event_log(self, kind: calls.LogKind = "boot") -> bytes:
        """A measurement log."""
        return await self._run(calls.get_event_log(kind))

    async def measure_event(self, content: bytes) -> calls.Measured:
        """Measure an event (1-1024 bytes) under your name. Denied unless the operator granted ``boot.measure``."""
        return await self._run(calls.measure_event(content))

    async def activate_credential(self, ek: Literal["rsa", "ecc"], credential_blob: bytes, secret: bytes) -> bytes:
        """Open a credential made for this VM's EK and platform AK. Denied unless granted."""
        return await self._run(calls.activate_credential(ek, credential_blob, secret))

    async def list_keys(self) -> list[keys_pb2.KeyInfo]:
        """The keys that you may have now, and in which way."""
        return await self._run(calls.list_keys())

    async def get_key(self, name: str, *, plain: bool = False) -> calls.Key:
        """A key, if the operator's policy lets you have it.

        It comes wrapped to a key pair made for this call (``pip install 'cgpu-agent[keys]'``), or as it is with
        ``plain``, which policy permits apart. Denied unless granted.
        """
        receiver = None if plain else calls.new_receiver()
        delivery = await self._run(calls.get_key(name, None if receiver is None else receiver.recipient))
        return calls.opened(delivery, receiver)

    @contextlib.asynccontextmanager
    async def open_sealed(
        self,
        name: str,
        file: BinaryIO,
        *,
        object_id: str,
        version: int,
        segment_size: int = SEGMENT_SIZES["1MiB"],
    ) -> AsyncIterator[memoryview]:
        """A sealed object, opened by the agent into memory that it shares with you: you never have the key.

            async with agent.open_sealed("models/llama", file, object_id="models/llama", version=3) as plain:
                use(plain)  # a read-only memoryview

        It is the whole object, verified. With the block it ends, and the agent wipes it. Denied unless granted.

        Args:
            name: the agent's id of the key, which must be the object's key id.
            file: the sealed object: a regular file, opened for reading only.
            object_id, version: what you expect it to be; any other does not open.
            segment_size: every how many bytes it is cut: 1 MiB or 4 KiB.
        """
        size = plain_size(file, segment_size)
        path = find_lease_socket(self.socket)
        memory = await asyncio.to_thread(LeasedMemory, path, size, file, self._timeout)
        with contextlib.closing(memory):
            call = calls.open_sealed(name, memory.id, object_id, version, segment_size)
            stream = getattr(self._stubs[call.service], call.method)(call.request, timeout=self._timeout)
            try:
                whole = [call.convert(answer) async for answer in stream]  # to its end: only then is it the object
            except grpc.RpcError as error:
                raise translate(error, self.socket) from None
            require_whole(whole[-1:] == [True])
            yield memory.view

    @contextlib.asynccontextmanager
    async def channel(self, gpu: int | str = 0) -> AsyncIterator[AsyncChannel]:
        """A channel to a GPU's memory. What you allocate through it ends with the block. Denied unless granted.

            async with agent.channel() as channel:
                handle = await channel.put(array)

        Args:
            gpu: which, by its uuid or its place in ``list_gpus``.
        """
        uuid = gpu if isinstance(gpu, str) else calls.uuid_of(await self.list_gpus(), gpu)
        path = find_lease_socket(self.socket)
        name = await self._run(calls.open_channel(uuid))
        plans = ChannelPlans(
            name, lambda size, source: LeasedMemory(path, size, source, self._timeout), self._timeout
        )
        try:
            yield AsyncChannel(plans, self._run, self._stream)
        finally:
            plans.close()
            with contextlib.suppress(AgentError):  # it ends with this process at the latest
                await self._run(calls.close_channel(name))

    async def list_gpus(self) -> gpus_pb2.GpuSet:
        """The GPUs, and what the agent makes of them; not evidence."""
        return await self._run(calls.list_gpus())

    async def get_gpu_report(self, uuid: str, nonce: bytes) -> calls.GpuReport:
        """A GPU's report whose nonce names you and ``nonce`` (8-64 bytes)."""
        return await self._run(calls.get_gpu_report(uuid, nonce))

    async def get_raw_gpu_report(self, uuid: str, nonce: bytes) -> calls.GpuReport:
        """A GPU's report over ``nonce`` (32 bytes) verbatim. Denied unless ``gpu.raw_report`` was granted."""
        return await self._run(calls.get_raw_gpu_report(uuid, nonce))

    async def attest_gpus(self) -> gpus_pb2.GpuSet:
        """Attest all GPUs now; returns what came of it. Denied unless the operator granted ``gpu.attest``."""
        return await self._run(calls.attest_gpus())

    async def watch_gpus(self) -> AsyncGenerator[gpus_pb2.GpuSet, None]:
        """The GPUs now and after each change, without end; close the iterator to stop."""
        async with contextlib.aclosing(self._stream(calls.watch_gpus())) as updates:
            async for update in updates:
                yield update

    async def _stream(self, call: calls.Call[R]) -> AsyncGenerator[R, None]:
        stream = getattr(self._stubs[call.service], call.method)(call.request)
        try:
            async for answer in stream:
                yield call.convert(answer)
        except grpc.RpcError as error:
            raise translate(error, self.socket) from None
        finally:
            stream.cancel()
