"""The one table from CUDA result codes to our slugs.

Source: ``CUresult`` of CUDA 13. What is not here is ``GPU_ERROR``: a code that a kernel's fault has, for no kernel is
ever run, or one that a later CUDA adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cgpu_agent.errors import DeviceFault, Unavailable

OUT_OF_MEMORY: Final = 2
NOT_READY: Final = 600
UNKNOWN: Final = 999

_UNSUPPORTED: Final = "GPU_UNSUPPORTED"

MEANINGS: Final[Mapping[int, tuple[str, str]]] = {
    1: ("GPU_ERROR", "the GPU driver refused the request"),
    OUT_OF_MEMORY: ("GPU_ERROR", "the GPU, or its driver, is out of memory"),
    3: ("GPU_DRIVER", "the GPU driver was not initialised"),
    4: ("GPU_DRIVER", "the GPU driver is shutting down"),
    34: ("GPU_DRIVER", "the installed CUDA library is a stub without a driver"),
    36: (_UNSUPPORTED, "the GPU driver is too old for this"),
    46: ("GPU_ERROR", "the GPU is in use, or out of order"),
    100: ("GPU_LOST", "the GPU driver sees no GPU"),
    101: ("GPU_LOST", "the GPU driver knows no such GPU"),
    214: ("GPU_ERROR", "the GPU's memory has an error that cannot be corrected"),
    220: ("GPU_ERROR", "the link between GPUs has an error that cannot be corrected"),
    226: ("GPU_ERROR", "the GPU contained an error of its own"),
    304: ("GPU_DRIVER", "the operating system keeps this process from the GPU driver"),
    800: ("GPU_ERROR", "the GPU driver does not permit this"),
    801: (_UNSUPPORTED, "the GPU has no such thing"),
    802: ("GPU_ERROR", "the GPUs do not accept work yet"),
    803: ("GPU_DRIVER", "the GPU driver and its library differ in version: restart the agent, or the VM"),
    804: (_UNSUPPORTED, "the CUDA library does not support this GPU"),
    916: ("GPU_ERROR", "the keys of the link to the GPU could not be changed"),
    UNKNOWN: ("GPU_ERROR", "something unknown went wrong in the GPU driver"),
}

_RETRY: Final[Mapping[int, float]] = {46: 1.0, 802: 1.0}
"""Codes that pass by themselves, and seconds until then."""


class CudaFault(DeviceFault):
    """A call that the driver refused. Made like any other fault, for whoever hands on a copy of it."""

    code: int | None = None
    """``CUresult``."""


def failed(code: int, call: str) -> CudaFault | Unavailable:
    """Build the error of a result other than 0."""
    slug, usual = MEANINGS.get(code, ("GPU_ERROR", "the GPU driver refused, with a code that is not expected here"))
    words = f"{usual} ({call}: {code})"
    if slug == _UNSUPPORTED:
        return unsupported(words)
    fault = CudaFault(slug, words, retry_after=_RETRY.get(code))
    fault.code = code
    return fault


def unsupported(words: str) -> Unavailable:
    """Build the error of what this machine cannot do."""
    return Unavailable(_UNSUPPORTED, words)
