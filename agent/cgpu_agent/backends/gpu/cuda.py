"""A GPU's memory through NVIDIA's driver: the only file that imports cuda.bindings, and only when it is first needed.

Calls are those of the driver API. Addresses and ranges are never a caller's: whoever uses this has checked them.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import Any, Final

from cgpu_agent.backends.gpu.cudafaults import NOT_READY, OUT_OF_MEMORY, UNKNOWN, CudaFault, failed, unsupported
from cgpu_agent.errors import DeviceFault, Exhausted

_MAX_GPUS: Final = 64
_SCHED_BLOCKING_SYNC: Final = 4
_STREAM_NON_BLOCKING: Final = 1
_EVENT_DISABLE_TIMING: Final = 2


class Context:
    """A CUDA context of its own on one GPU: what is allocated in it is nobody else's.

    Any thread may call, inside ``current``; a call that hangs holds its own thread only. After the first fault that
    is no lack of memory nothing more is asked of it: CUDA's errors stay with a context, and nobody can say any more
    what is still being copied. It is good for ``destroy`` then.

    Args:
        gpu: ``GPU-...``, as the driver names it. Devices are never told apart by their numbers, which may change.

    Raises ``DeviceFault`` as ``backends.base.Gpus``; ``Unavailable`` (``GPU_UNSUPPORTED``).
    """

    def __init__(self, gpu: str) -> None:
        self._fault: DeviceFault | None = None
        _ask("cuInit", 0)
        self._context: Final = _ask("cuCtxCreate", None, _SCHED_BLOCKING_SYNC, _device(gpu))
        _ask("cuCtxPopCurrent")

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Have this thread's calls mean this context."""
        self._do("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            with contextlib.suppress(CudaFault):  # of a context that is lost, and the call that noticed says so
                _ask("cuCtxPopCurrent")

    @property
    def fault(self) -> DeviceFault | None:
        """Why it is lost, if it is."""
        return self._fault and DeviceFault(self._fault.slug, self._fault.message)

    def condemn(self, fault: DeviceFault) -> None:
        """Ask nothing more of it."""
        # Afresh: with its traceback a fault would keep the buffers of the call that met it.
        self._fault = self._fault or DeviceFault(fault.slug, fault.message)

    def allocate(self, size: int) -> int:
        """An address in device memory, of anything. Raises ``Exhausted`` (``DEVICE_MEMORY``)."""
        try:
            return int(self._do("cuMemAlloc", size))
        except CudaFault as fault:
            if fault.code == OUT_OF_MEMORY:
                raise Exhausted("DEVICE_MEMORY", "the GPU has no room for this allocation") from fault
            raise

    def zero(self, address: int, size: int) -> None:
        """Overwrite device memory with zeros, and wait until it is."""
        self._do("cuMemsetD8", address, 0, size)
        self._do("cuStreamSynchronize", 0)

    def free(self, address: int) -> None:
        """Give device memory back. Nothing may be using it."""
        self._do("cuMemFree", address)

    def pin(self, size: int) -> int:
        """An address in host memory that copies can be made from and to while this process goes on.

        On a GPU in confidential-computing mode the driver manages that memory, which is private to the VM like any
        other, and puts what it has encrypted elsewhere.
        """
        return int(self._do("cuMemHostAlloc", size, 0))

    def unpin(self, address: int) -> None:
        """Give host memory back. Nothing may be using it."""
        self._do("cuMemFreeHost", address)

    def stream(self) -> Any:
        """Make a line in which copies are made one after the other."""
        return self._do("cuStreamCreate", _STREAM_NON_BLOCKING)

    def idle(self, stream: Any) -> bool:
        """Whether all copies of a stream were made."""
        return self._finished("cuStreamQuery", stream)

    def close_stream(self, stream: Any) -> None:
        self._do("cuStreamDestroy", stream)

    def event(self) -> Any:
        """Make a mark for a place in a stream."""
        return self._do("cuEventCreate", _EVENT_DISABLE_TIMING)

    def mark(self, event: Any, stream: Any) -> None:
        """Put a mark behind the copies that are in a stream now."""
        self._do("cuEventRecord", event, stream)

    def reached(self, event: Any) -> bool:
        """Whether all copies before a mark were made."""
        return self._finished("cuEventQuery", event)

    def close_event(self, event: Any) -> None:
        self._do("cuEventDestroy", event)

    def to_device(self, device: int, pinned: int, size: int, stream: Any) -> None:
        """Queue a copy from pinned memory."""
        self._do("cuMemcpyHtoDAsync", device, pinned, size, stream)

    def to_host(self, pinned: int, device: int, size: int, stream: Any) -> None:
        """Queue a copy into pinned memory."""
        self._do("cuMemcpyDtoHAsync", pinned, device, size, stream)

    def within_device(self, to: int, device: int, size: int, stream: Any) -> None:
        """Queue a copy from device memory to device memory."""
        self._do("cuMemcpyDtoDAsync", to, device, size, stream)

    def destroy(self) -> None:
        """End it, with everything in it, whatever became of it. Only once."""
        _ask("cuCtxDestroy", self._context)

    def _finished(self, call: str, handle: Any) -> bool:
        try:
            self._do(call, handle)
        except CudaFault as fault:
            if fault.code == NOT_READY:
                return False
            raise
        return True

    def _do(self, call: str, *arguments: Any) -> Any:
        if (fault := self.fault) is not None:
            raise fault
        try:
            return _ask(call, *arguments)
        except CudaFault as error:
            if error.code not in {OUT_OF_MEMORY, NOT_READY}:
                self.condemn(error)
            raise


def _ask(call: str, *arguments: Any) -> Any:
    """Call the binding. Its own exceptions stay here: their text comes from libraries that are not ours."""
    try:
        from cuda.bindings import driver  # noqa: PLC0415 - an extra, and 30 MB that only transfers to NVIDIA's GPUs need
    except ImportError:
        raise unsupported("the agent was installed without the extra 'cuda'") from None
    try:
        result, *answer = getattr(driver, call)(*arguments)
        code = int(result)
    except RuntimeError:
        lacks = "CUDA library is not installed" if call == "cuInit" else f"CUDA library is too old ({call})"
        raise unsupported(f"the GPU driver's {lacks}") from None
    except ValueError:  # the binding has no name for this result
        code = UNKNOWN
    if code != 0:
        raise failed(code, call)
    return answer[0] if answer else None


def _device(gpu: str) -> Any:
    """The device of a UUID."""
    count = _ask("cuDeviceGetCount")
    if not 0 <= count <= _MAX_GPUS:
        raise _bad_answer("cuDeviceGetCount")
    devices = [_ask("cuDeviceGet", number) for number in range(count)]
    found = [each for each in devices if f"GPU-{uuid.UUID(bytes=_ask('cuDeviceGetUuid', each).bytes)}" == gpu]
    if len(found) > 1:
        raise _bad_answer("cuDeviceGetUuid")
    if not found:
        raise DeviceFault("GPU_LOST", "CUDA sees no such GPU; one that came after the first transfer takes a restart")
    return found[0]


def _bad_answer(call: str) -> DeviceFault:
    return DeviceFault("GPU_ERROR", f"the GPU driver's answer could not be used ({call})")
