"""``Gpus`` over NVIDIA's driver: a thread for devices, one for the ready state, two that watch.

The ready state has a thread of its own because dropping it must not wait behind a report of a slow or hung GPU.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, Literal

from cgpu_agent.backends.base import GpuEvent, GpuEvidence, GpuInfo
from cgpu_agent.backends.gpu.cudamemory import CudaMemory
from cgpu_agent.backends.gpu.hub import Hub
from cgpu_agent.backends.gpu.nvml import Nvml
from cgpu_agent.backends.gpu.nvmlfaults import DRIVER_NOT_LOADED, UNINITIALIZED, NvmlFault, ready_not_put, timed_out
from cgpu_agent.backends.gpu.readylease import ReadyLease
from cgpu_agent.backends.gpu.sysfs import SYSFS, loaded_driver, nvidia_functions
from cgpu_agent.backends.gpu.watch import Watch
from cgpu_agent.backends.worker import Faults, Job, Worker
from cgpu_agent.errors import DeviceFault, Unavailable

_UNSURE: Final = frozenset({"GPU_TIMEOUT", "GPU_LOST", "GPU_DRIVER"})
"""After these a change may have been made all the same."""


class NvmlGpus:
    """``Gpus`` of this VM; see ``backends.base``. Starts without a driver too: calls then raise ``GPU_DRIVER``.

    Args:
        sysfs: where sysfs is mounted.
        poll: seconds between two looks for devices and driver that came or went.
        retry: seconds between two attempts at a driver that reports no errors; each may load a kernel module.
        queue_limit: calls that may wait for a thread.
        helper: socket of the root helper that sets the ready state; ``None`` = set it here, which takes root.
    """

    kind: Literal["nvml", "software", "none"] = "nvml"

    def __init__(
        self,
        *,
        sysfs: Path = SYSFS,
        poll: float = 2.0,
        retry: float = 10.0,
        queue_limit: int = 64,
        helper: Path | None = None,
    ) -> None:
        self._sysfs: Final = sysfs
        self._nvml: Final = Nvml()
        self._hub: Final = Hub()
        self._lease: Final = None if helper is None else ReadyLease(helper, self._lost)
        self._devices: Final = self._worker("gpu-devices", queue_limit)
        self._state: Final = self._worker("gpu-ready", queue_limit)
        self._watch: Final = Watch(self._hub, sysfs, self._nvml.watch_xids, self._nvml.drop, poll=poll, retry=retry)

    async def pci(self, *, timeout: float) -> tuple[str, ...]:
        try:
            return tuple(await asyncio.wait_for(asyncio.to_thread(nvidia_functions, self._sysfs), timeout))
        except asyncio.TimeoutError:
            raise timed_out() from None

    async def list(self, *, timeout: float) -> tuple[GpuInfo, ...]:
        found: tuple[GpuInfo, ...] = await self._devices.run(self._nvml.gpus, timeout=timeout)
        return found

    async def evidence(self, uuid: str, nonce: bytes, *, timeout: float) -> GpuEvidence:
        found: GpuEvidence = await self._devices.run(lambda _: self._nvml.evidence(uuid, nonce), timeout=timeout)
        return found

    async def ready(self, *, timeout: float) -> bool | None:
        state: bool | None = await self._state.run(lambda _: self._nvml.ready(), timeout=timeout)
        return state

    async def set_ready(self, ready: bool, *, timeout: float) -> None:
        if self._lease is None:
            await self._state.run(lambda _: self._nvml.set_ready(ready), timeout=timeout, idempotent=False)
        elif loaded_driver(self._sysfs) is None:
            raise ready_not_put(DRIVER_NOT_LOADED)  # Asking would start a helper on every machine without a GPU.
        else:
            await self._lease.put(ready, timeout=timeout)

    async def establish_transfers(self, uuid: str, *, timeout: float) -> CudaMemory:
        """As ``TransferGpus``, by CUDA; ``GPU_UNSUPPORTED`` without the extra ``cuda``. Outlives ``close``."""
        if self._devices.closed:
            raise _closed()
        return await CudaMemory.establish(uuid, timeout=timeout)

    def events(self) -> AsyncIterator[GpuEvent]:
        return self._hub.follow()

    def heartbeat_age(self, now: float) -> float:
        return max(part.heartbeat_age(now) for part in (self._devices, self._state, self._watch))

    def close(self) -> None:
        if self._lease is not None:
            self._lease.end()
        for part in (self._watch, self._devices, self._state, self._hub):
            part.close()

    def _lost(self) -> None:
        self._hub.publish(GpuEvent("ready-lost", None, "the connection to the helper ended"))

    def _worker(self, name: str, queue_limit: int) -> Worker:
        return Worker(name, self._perform, self._nvml.close, _FAULTS, queue_limit=queue_limit)

    def _perform(self, job: Job) -> None:
        try:
            job.settle(self._attempt(job), None)
        except BaseException as error:  # noqa: BLE001 - the thread outlives whatever goes wrong in a job
            job.settle(None, error)

    def _attempt(self, job: Job) -> Any:
        """Run the job, once more if the driver had forgotten us before it began."""
        try:
            return self._once(job)
        except DeviceFault as fault:
            if not _forgotten(fault):
                raise
        return self._once(job)

    def _once(self, job: Job) -> Any:
        with self._nvml.use():
            if time.monotonic() >= job.deadline:
                raise timed_out()  # Opening took all its time; nobody waits for what it would change.
            try:
                return job.work(job.deadline)
            except DeviceFault as fault:
                raise job.failed(fault) if fault.slug in _UNSURE and not _forgotten(fault) else fault  # noqa: B904


def _forgotten(fault: DeviceFault) -> bool:
    """Whether the driver refused because it was closed under us: then it did nothing."""
    return isinstance(fault, NvmlFault) and fault.code == UNINITIALIZED


def _closed() -> DeviceFault:
    return DeviceFault("GPU_CLOSED", "the GPUs are no longer in use")


def _queue_full() -> Unavailable:
    return Unavailable("GPU_QUEUE_FULL", "too many calls wait for the GPUs", retry_after=1.0)


_FAULTS: Final = Faults(timed_out, _closed, _queue_full)
