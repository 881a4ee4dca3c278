"""A process of its own with the real pynvml: without a driver, with an old one, and with recorded evidence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pynvml
import pytest

from fixtures.gpu import NONCE
from fixtures.gpujudge import GPU
from fixtures.nvml import SONAME, FakeDriver, library_folder, uuid_of

ASK = """
import asyncio, json, sys
from pathlib import Path
from cgpu_agent.backends.gpu.nvmlgpus import NvmlGpus
from cgpu_agent.errors import AgentError

async def main(sysfs, uuid, nonce):
    gpus = NvmlGpus(sysfs=Path(sysfs), poll=0.05)
    calls = {
        "pci": gpus.pci(timeout=30),
        "list": gpus.list(timeout=30),
        "evidence": gpus.evidence(uuid, bytes.fromhex(nonce), timeout=30),
        "ready": gpus.ready(timeout=30),
        "set_ready": gpus.set_ready(False, timeout=30),
    }
    told = {}
    for name, call in calls.items():
        try:
            told[name] = repr(await call)
        except AgentError as error:
            told[name] = [type(error).__name__, error.slug, error.message]
    gpus.close()
    return told

print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
"""


def ask(driver: FakeDriver, libraries: Path | None, nonce: bytes = NONCE) -> dict[str, Any]:
    environment = {"PATH": os.environ["PATH"], "FAKE_NVML": str(driver.folder)}
    if libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(libraries)
    done = subprocess.run(
        [sys.executable, "-c", ASK, driver.sysfs, uuid_of(0), nonce.hex()],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stderr == ""
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


@pytest.fixture
def driver(tmp_path: Path) -> FakeDriver:
    return FakeDriver.loaded(tmp_path)


def has_driver() -> bool:
    probe = f"import ctypes; ctypes.CDLL('{SONAME}')"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0


@pytest.mark.skipif(has_driver(), reason="this machine has NVIDIA's driver library")
def test_without_the_drivers_library_it_starts_and_says_so(driver: FakeDriver) -> None:
    answers = ask(driver, None)
    assert answers.pop("pci") == "('0000:01:00.0',)"
    for name, answer in answers.items():
        assert answer == ["NvmlFault", "GPU_DRIVER", "the GPU driver's library is not installed (nvmlInit: 12)"], name


def test_with_the_library_but_no_driver_it_says_so(driver: FakeDriver) -> None:
    driver.forget("boot")
    answers = ask(driver, library_folder())
    assert answers["list"] == ["NvmlFault", "GPU_DRIVER", "the GPU driver is not loaded (nvmlInit: 9)"]


def test_a_driver_of_before_confidential_computing_has_no_such_thing(driver: FakeDriver) -> None:
    answers = ask(driver, library_folder("-DOLD_DRIVER"))
    assert "cc=None, cc_environment=None, dev_tools=None, multi_gpu='unknown'" in answers["list"]
    assert "protected_memory=None, key_rotation_threshold=None" in answers["list"]
    assert answers["ready"] == "None"
    for name in ("evidence", "set_ready"):
        assert answers[name][:2] == ["Unavailable", "GPU_UNSUPPORTED"]


def test_a_driver_of_now_answers_everything(driver: FakeDriver) -> None:
    held = driver.hold(0, GPU, NONCE)
    answers = ask(driver, library_folder())
    assert answers["evidence"] == repr(held)
    assert "cc=True, cc_environment='prod'" in answers["list"]
    assert (answers["ready"], answers["set_ready"]) == ("False", "None")


@pytest.mark.parametrize("name", ["hopper/sdk-sample", "hopper/trustee-coco1", "blackwell/sdk-blackwell"])
def test_recorded_evidence_fits_and_comes_through_unchanged(driver: FakeDriver, shared_data: Path, name: str) -> None:
    report = bytes.fromhex((shared_data / "nvidia" / f"{name}-report.hex").read_text())
    chain = (shared_data / "nvidia" / f"{name}-chain.pem").read_bytes()
    driver.say("gpu0/report", report)
    driver.say("gpu0/chain", chain)
    answers = ask(driver, library_folder(), report[4:36])
    assert answers["evidence"] == f"GpuEvidence(report={report!r}, chain={chain!r})"


def test_the_fake_has_the_bindings_structures() -> None:
    """Sizes of NVML 13, as in the fake library's C: were they others, both would have to follow."""
    sizes = {name: pynvml.sizeof(getattr(pynvml, name)) for name in SIZES}
    assert sizes == SIZES


SIZES = {
    "nvmlPciInfo_t": 68,
    "c_nvmlConfComputeSystemState_t": 12,
    "c_nvmlSystemConfComputeSettings_v1_t": 20,
    "c_nvmlConfComputeMemSizeInfo_t": 16,
    "c_nvmlConfComputeGpuCertificate_t": 9224,
    "c_nvmlConfComputeGpuAttestationReport_t": 12332,
    "c_nvmlConfComputeGetKeyRotationThresholdInfo_t": 16,
    "c_nvmlEventData_t": 32,
}
