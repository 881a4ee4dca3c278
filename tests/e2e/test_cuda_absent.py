"""A process of its own without the extra, without a driver, with an old one: what it says of transfers to GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures.cuda import SONAME, library_folder
from fixtures.nvml import uuid_of

ASK = """
import asyncio, sys
from cgpu_agent.backends.gpu.nvmlgpus import NvmlGpus
from cgpu_agent.errors import AgentError
if sys.argv[2] == "without the extra":
    sys.modules["cuda"] = None

async def main():
    gpus = NvmlGpus()
    try:
        await gpus.establish_transfers(sys.argv[1], timeout=60)
    except AgentError as error:
        print(type(error).__name__, error)
    gpus.close()

asyncio.run(main())
"""


def ask(libraries: Path | None, case: str = "", gpu: int = 0) -> str:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    if libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(libraries)
    command = [sys.executable, "-c", ASK, uuid_of(gpu), case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


def has_driver() -> bool:
    probe = f"import ctypes; ctypes.CDLL('{SONAME}')"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0


def test_without_the_extra() -> None:
    told = ask(None, "without the extra")
    assert told == "Unavailable the agent was installed without the extra 'cuda' [GPU_UNSUPPORTED]"


@pytest.mark.skipif(has_driver(), reason="this machine has NVIDIA's CUDA library")
def test_without_a_driver() -> None:
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed (the extra 'cuda')")
    assert ask(None) == "Unavailable the GPU driver's CUDA library is not installed [GPU_UNSUPPORTED]"


def test_with_a_driver_before_cuda_12_5() -> None:
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed (the extra 'cuda')")
    told = ask(library_folder("-DOLD_DRIVER"))
    assert told == "Unavailable the GPU driver's CUDA library is too old (cuCtxCreate) [GPU_UNSUPPORTED]"


def test_with_a_driver_that_sees_no_such_gpu() -> None:
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed (the extra 'cuda')")
    assert ask(library_folder(), gpu=5).endswith("[GPU_LOST]")
