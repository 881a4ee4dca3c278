"""Memory of GPUs and the ways to it: Protocols that the software GPU and NVIDIA's driver implement alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from cgpu_agent.errors import AgentError

Buffer = bytes | bytearray | memoryview

MAX_PACKED_COPY: Final = 64 << 10
"""Most bytes of one copy of ``DeviceChannel.write_many``."""


class DeviceChannel(Protocol):
    """A way to one ``DeviceMemory``. Methods but ``stop`` block; calls from several threads take turns.

    Any other fault than a device's refusal of a range (``DEVICE_RANGE``, ``NO_ALLOCATION``) kills it: the call that
    notices says why, later ones raise ``Unavailable`` ``TRANSFER_DEAD``. A copy that failed may have been made in
    part. Buffers are shared with a caller who may write to them meanwhile: each byte is read, or written, once. No
    reference to a buffer is kept after the call.

    All three copies raise:
        Misuse: ``BAD_COPY`` (nothing to copy), ``DEVICE_RANGE``, ``NO_ALLOCATION``.
        DeviceFault: ``TRANSFER_STALLED``, ``TRANSFER_PEER_GONE``, and those of ``Gpus``.
        HostileInput: what came was altered, repeated, out of order, or not what was asked for.
        Unavailable: ``TRANSFER_STOPPED``, ``TRANSFER_DEAD``.
    """

    @property
    def dead(self) -> AgentError | None:
        """Why it died, if it has."""

    @property
    def locked(self) -> bool:
        """Whether plaintext on its way stays off swap."""

    def write(self, handle: int, offset: int, source: Buffer) -> None:
        """Copy ``source`` to ``offset`` of an allocation. Returns when it is in device memory."""

    def write_many(self, copies: Sequence[tuple[int, int, Buffer]]) -> None:
        """Copies ``(handle, offset, source)`` of at most ``MAX_PACKED_COPY`` bytes each, in this order."""

    def read_into(self, handle: int, offset: int, out: bytearray | memoryview) -> None:
        """Fill ``out`` from ``offset`` of an allocation; nothing is written there that was not verified."""

    def stop(self) -> None:
        """Have whoever uses it give up soon, with ``TRANSFER_STOPPED``. Does not wait; ``close`` is still due."""

    def close(self) -> None:
        """End it, and wipe what it has staged. Waits for whoever uses it to give up. Idempotent."""


class DeviceMemory(Protocol):
    """Memory of one GPU for one owner, and channels to it. What one owner has is nobody else's handle.

    Every method raises as those of ``Gpus``.
    """

    @property
    def chain(self) -> bytes | None:
        """Certificates (PEM, leaf first) of the device that holds the other end's keys: whoever rests on it compares
        them with those of accepted evidence. ``None``: the driver keeps the keys, and knows which device it means."""

    async def allocate(self, size: int, *, timeout: float) -> int:
        """A handle, from 1 to 2^32 - 1, of ``size`` zero bytes; none is given out twice.

        Raises ``Exhausted`` (``DEVICE_MEMORY``).
        """

    async def free(self, handle: int, *, timeout: float) -> None:
        """Wipe an allocation and give it back. Raises ``Misuse`` (``NO_ALLOCATION``).

        A copy that is using it ends before, or as ``NO_ALLOCATION``: it never reaches what is there afterwards.
        """

    async def channel(self, *, timeout: float) -> DeviceChannel:
        """Open a channel. Raises ``Exhausted`` (``TRANSFER_CHANNELS``)."""

    async def end(self, *, timeout: float) -> None:
        """Wipe and give back everything. Its channels were closed before."""


class TransferGpus(Protocol):
    """GPUs whose memory can be had through the agent."""

    async def establish_transfers(self, uuid: str, *, timeout: float) -> DeviceMemory:
        """Memory of this GPU for a new owner. Raises as ``Gpus.evidence``; ``GPU_UNSUPPORTED``."""
