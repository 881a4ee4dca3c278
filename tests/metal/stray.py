"""Has a GPU write to where nothing is, as a broken program does: ``stray.py GPU-...``; 0: CUDA noticed."""

from __future__ import annotations

import sys
import uuid

from cuda.bindings import driver

# Eight bytes to address 8 of the GPU's: PTX, which the driver compiles for whatever GPU there is.
PTX = b"""
.version 7.0
.target sm_80
.address_size 64
.visible .entry stray()
{
    .reg .b64 %where;
    mov.u64 %where, 8;
    st.global.u64 [%where], %where;
    ret;
}
\0"""
ILLEGAL_ADDRESS = 700


def asked(answer: tuple[driver.CUresult, ...]) -> object:
    """What a call answered; only one that fails is looked at."""
    result, *rest = answer
    if int(result) != 0:
        sys.exit(f"CUDA refused: {int(result)}")
    return rest[0] if rest else None


def stray() -> int:
    """In the context of this thread. Returns how CUDA says it ended, and spoils the context."""
    module = asked(driver.cuModuleLoadData(PTX))
    kernel = asked(driver.cuModuleGetFunction(module, b"stray"))
    asked(driver.cuLaunchKernel(kernel, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0))
    return int(driver.cuCtxSynchronize()[0])


def main(gpu: str) -> int:
    asked(driver.cuInit(0))
    for number in range(int(asked(driver.cuDeviceGetCount()))):  # type: ignore[call-overload]
        device = asked(driver.cuDeviceGet(number))
        if f"GPU-{uuid.UUID(bytes=asked(driver.cuDeviceGetUuid(device)).bytes)}" == gpu:  # type: ignore[attr-defined]
            asked(driver.cuCtxCreate(None, 0, device))
            return 0 if stray() == ILLEGAL_ADDRESS else 1
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
