"""The one table from NVML return codes to our slugs.

Source: ``nvmlReturn_t`` of NVML 13. That a driver or device lacks something is an answer, hence ``Unavailable`` and
no fault; a driver older than the function is the same answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cgpu_agent.errors import DeviceFault, Unavailable

UNINITIALIZED: Final = 1
INVALID_ARGUMENT: Final = 2
NOT_SUPPORTED: Final = 3
DRIVER_NOT_LOADED: Final = 9
TIMEOUT: Final = 10
FUNCTION_NOT_FOUND: Final = 13
UNKNOWN: Final = 999

SET_READY: Final = "nvmlSystemSetConfComputeGpusReadyState"

_UNSUPPORTED: Final = "GPU_UNSUPPORTED"

MEANINGS: Final[Mapping[int, tuple[str, str]]] = {
    UNINITIALIZED: ("GPU_DRIVER", "the GPU driver no longer knows this process"),
    INVALID_ARGUMENT: ("GPU_ERROR", "the GPU driver refused the request"),
    NOT_SUPPORTED: (_UNSUPPORTED, "the GPU has no such thing"),
    4: ("GPU_ERROR", "the GPU driver allows this to root only"),
    5: ("GPU_ERROR", "the GPU driver is in use already"),
    6: ("GPU_LOST", "the GPU driver knows no such GPU"),
    7: ("GPU_ERROR", "the GPU driver's answer needs more room than its interface has"),
    8: ("GPU_ERROR", "the GPU lacks external power"),
    DRIVER_NOT_LOADED: ("GPU_DRIVER", "the GPU driver is not loaded"),
    TIMEOUT: ("GPU_TIMEOUT", "the GPU did not answer its driver in time"),
    11: ("GPU_DRIVER", "the GPU driver gets no interrupts"),
    12: ("GPU_DRIVER", "the GPU driver's library is not installed"),
    FUNCTION_NOT_FOUND: (_UNSUPPORTED, "the GPU driver is too old for this"),
    14: ("GPU_ERROR", "the GPU's configuration memory is corrupt"),
    15: ("GPU_LOST", "the GPU fell off its bus"),
    16: ("GPU_LOST", "the GPU does nothing more until it is reset"),
    17: ("GPU_DRIVER", "the operating system keeps this process from the GPU driver"),
    18: ("GPU_DRIVER", "the GPU driver and its library differ in version: restart the agent, or the VM"),
    19: ("GPU_ERROR", "the GPU is in use"),
    20: ("GPU_ERROR", "the GPU driver is out of memory"),
    21: ("GPU_ERROR", "the GPU driver has no data"),
    22: (_UNSUPPORTED, "the virtual GPU has no such thing"),
    23: ("GPU_ERROR", "the GPU driver is out of resources"),
    24: (_UNSUPPORTED, "the GPU has no such frequency"),
    25: (_UNSUPPORTED, "the GPU driver knows no such version of this structure"),
    26: (_UNSUPPORTED, "the GPU driver no longer has this"),
    27: ("GPU_ERROR", "the GPU is not ready yet"),
    28: ("GPU_LOST", "the GPU driver found no such GPU"),
    29: ("GPU_ERROR", "the GPU is in a state that forbids this"),
    30: (_UNSUPPORTED, "the GPU cannot be reset in this way"),
    UNKNOWN: ("GPU_ERROR", "something unknown went wrong in the GPU driver"),
}
"""Every code but 0: slug and words. What a later NVML adds is ``GPU_ERROR``."""

_RETRY: Final[Mapping[int, float]] = {TIMEOUT: 1.0, 19: 1.0, 20: 1.0, 23: 1.0, 27: 1.0}
"""Codes that pass by themselves, and seconds until then."""


class NvmlFault(DeviceFault):
    """A call that the driver, or the library above it, refused.

    Args:
        code: ``nvmlReturn_t``.
        call: the NVML function.
        words: where the call gives the code another meaning than the table.
    """

    def __init__(self, code: int, call: str, *, words: str | None = None) -> None:
        slug, usual = _meaning(code)
        super().__init__(slug, f"{words or usual} ({call}: {code})", retry_after=_RETRY.get(code))
        self.code = code


def failed(code: int, call: str) -> NvmlFault | Unavailable:
    """Build the error of a return code other than 0."""
    slug, words = _meaning(code)
    if slug == _UNSUPPORTED:
        return Unavailable(_UNSUPPORTED, f"{words} ({call}: {code})")
    return NvmlFault(code, call)


def ready_not_put(code: int) -> NvmlFault | Unavailable:
    """Build the error of a ready state that could not be set or cleared; ``code`` as in ``failed``."""
    if code == INVALID_ARGUMENT:
        # NVIDIA's own tool reads this answer so; there is no other that says it.
        words = "the GPUs are in a state that they leave only by a reset: restart the VM"
        return NvmlFault(code, SET_READY, words=words)
    return failed(code, SET_READY)


def bad_answer(call: str) -> DeviceFault:
    """Build the error of an answer that breaks NVML's own limits."""
    return DeviceFault("GPU_ERROR", f"the GPU driver's answer could not be used ({call})")


def timed_out() -> DeviceFault:
    """Build the error of every expired deadline."""
    return DeviceFault("GPU_TIMEOUT", "the GPU driver did not answer in time", retry_after=1.0)


def _meaning(code: int) -> tuple[str, str]:
    return MEANINGS.get(code, ("GPU_ERROR", "the GPU driver refused, with a code that is not known here"))
