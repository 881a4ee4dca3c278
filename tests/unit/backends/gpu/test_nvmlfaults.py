"""Every code of NVML has a meaning, and the driver's own words stay out of it."""

from __future__ import annotations

import pynvml
import pytest

from cgpu_agent.backends.gpu.nvmlfaults import MEANINGS, NvmlFault, failed
from cgpu_agent.errors import DeviceFault, Unavailable

CODES = {name: value for name, value in vars(pynvml).items() if name.startswith("NVML_ERROR_")}
UNSUPPORTED = {
    "NVML_ERROR_NOT_SUPPORTED",
    "NVML_ERROR_FUNCTION_NOT_FOUND",
    "NVML_ERROR_VGPU_ECC_NOT_SUPPORTED",
    "NVML_ERROR_FREQ_NOT_SUPPORTED",
    "NVML_ERROR_ARGUMENT_VERSION_MISMATCH",
    "NVML_ERROR_DEPRECATED",
    "NVML_ERROR_RESET_TYPE_NOT_SUPPORTED",
}
SLUGS = {
    "NVML_ERROR_UNINITIALIZED": "GPU_DRIVER",
    "NVML_ERROR_DRIVER_NOT_LOADED": "GPU_DRIVER",
    "NVML_ERROR_LIBRARY_NOT_FOUND": "GPU_DRIVER",
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": "GPU_DRIVER",
    "NVML_ERROR_OPERATING_SYSTEM": "GPU_DRIVER",
    "NVML_ERROR_TIMEOUT": "GPU_TIMEOUT",
    "NVML_ERROR_GPU_IS_LOST": "GPU_LOST",
    "NVML_ERROR_RESET_REQUIRED": "GPU_LOST",
    "NVML_ERROR_NOT_FOUND": "GPU_LOST",
    "NVML_ERROR_UNKNOWN": "GPU_ERROR",
    "NVML_ERROR_NO_PERMISSION": "GPU_ERROR",
}


def test_every_code_of_the_binding_has_a_meaning() -> None:
    assert set(CODES.values()) == set(MEANINGS)


@pytest.mark.parametrize("name", CODES)
def test_what_a_device_lacks_is_an_answer_and_all_else_a_fault(name: str) -> None:
    error = failed(CODES[name], "nvmlInit")
    if name in UNSUPPORTED:
        assert isinstance(error, Unavailable)
        assert error.slug == "GPU_UNSUPPORTED"
    else:
        assert isinstance(error, DeviceFault)
        assert error.slug in {"GPU_DRIVER", "GPU_LOST", "GPU_TIMEOUT", "GPU_ERROR"}
        assert error.slug == SLUGS.get(name, error.slug)
    assert f"(nvmlInit: {CODES[name]})" in error.message


@pytest.mark.parametrize("code", [31, 998, 2**31 - 1, -1])
def test_a_code_of_a_later_nvml_is_an_error_without_retry(code: int) -> None:
    error = failed(code, "nvmlInit")
    assert isinstance(error, NvmlFault)
    assert (error.slug, error.retry_after, error.code) == ("GPU_ERROR", None, code)
