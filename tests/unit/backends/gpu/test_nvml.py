"""The real pynvml over a library with NVML's ABI: what it says is reported, and what it must not say is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from cgpu_agent.backends.base import GpuEvidence, GpuInfo, Gpus
from cgpu_agent.backends.gpu.nvmlfaults import MEANINGS
from cgpu_agent.backends.gpu.nvmlgpus import NvmlGpus
from cgpu_agent.errors import AgentError, DeviceFault, Misuse, Unavailable
from cgpu_agent.verifier.gpu import verify_device
from cgpu_agent.verifier.gpucase import DeviceEvidence
from fixtures.gpu import DRIVER, NONCE, VBIOS
from fixtures.gpujudge import GPU, PARTY
from fixtures.nvml import GIB, MODEL, FakeDriver, fake_driver, uuid_of

T = TypeVar("T")
REPORT = "nvmlDeviceGetConfComputeGpuAttestationReport"
CERTIFICATE = "nvmlDeviceGetConfComputeGpuCertificate"
SETTINGS = "nvmlSystemGetConfComputeSettings"
STATE = "nvmlSystemGetConfComputeState"
READY = "nvmlSystemGetConfComputeGpusReadyState"
SET_READY = "nvmlSystemSetConfComputeGpusReadyState"
SECOND_NONCE = bytes(range(32))


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[FakeDriver]:
    with fake_driver(tmp_path) as driver:
        driver.hold(0, GPU, NONCE)
        yield driver


@pytest.fixture
def gpus(driver: FakeDriver) -> Iterator[NvmlGpus]:
    gpus = NvmlGpus(sysfs=driver.sysfs, poll=0.01)
    yield gpus
    driver.release()
    gpus.close()


def listed(gpus: Gpus) -> tuple[GpuInfo, ...]:
    return asyncio.run(gpus.list(timeout=30))


def asked(gpus: Gpus, nonce: bytes = NONCE, number: int = 0) -> GpuEvidence:
    return asyncio.run(gpus.evidence(uuid_of(number), nonce, timeout=30))


def refused(call: Callable[[], object], kind: type[AgentError] = DeviceFault) -> AgentError:
    with pytest.raises(kind) as caught:
        call()
    return caught.value


def test_a_gpu_is_told_as_driver_and_device_tell_it(gpus: NvmlGpus) -> None:
    assert listed(gpus) == (
        GpuInfo(
            uuid=uuid_of(0),
            bdf="0000:01:00.0",
            model=MODEL,
            architecture="hopper",
            driver=DRIVER,
            vbios=VBIOS,
            cc=True,
            cc_environment="prod",
            dev_tools=False,
            multi_gpu="none",
            protected_memory=80 * GIB,
            key_rotation_threshold=60,
        ),
    )


@pytest.mark.parametrize(
    ("number", "name"), [(7, "ampere"), (9, "hopper"), (10, "blackwell"), (8, "other"), (2**32 - 1, "other")]
)
def test_architectures(driver: FakeDriver, gpus: NvmlGpus, number: int, name: str) -> None:
    driver.say("gpu0/arch", str(number))
    assert listed(gpus)[0].architecture == name


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("2 1 0 0", (True, "prod", False, "none")),
        ("2 1 1 1", (True, "prod", True, "protected-pcie")),
        ("1 1 0 2", (True, "sim", False, "nvle")),
        ("0 0 0 9", (False, "unavailable", False, "unknown")),
    ],
)
def test_modes(driver: FakeDriver, gpus: NvmlGpus, settings: str, told: tuple[object, ...]) -> None:
    driver.say("settings", settings)
    gpu = listed(gpus)[0]
    assert (gpu.cc, gpu.cc_environment, gpu.dev_tools, gpu.multi_gpu) == told


@pytest.mark.parametrize("code", [3, 13, 25])
def test_a_driver_without_settings_is_asked_for_its_state(driver: FakeDriver, gpus: NvmlGpus, code: int) -> None:
    driver.fail(SETTINGS, code)
    driver.say("state", "2 1 1")
    gpu = listed(gpus)[0]
    assert (gpu.cc, gpu.cc_environment, gpu.dev_tools, gpu.multi_gpu) == (True, "prod", True, "unknown")


def test_what_a_device_lacks_is_none(driver: FakeDriver, gpus: NvmlGpus) -> None:
    for name in ("settings", "state", "threshold", "gpu0/memory", "gpu0/arch"):
        driver.forget(name)
    gpu = listed(gpus)[0]
    assert (gpu.cc, gpu.cc_environment, gpu.dev_tools, gpu.multi_gpu) == (None, None, None, "unknown")
    assert (gpu.protected_memory, gpu.key_rotation_threshold, gpu.architecture) == (None, None, "other")


def test_settings_that_fail_are_not_replaced_by_the_state(driver: FakeDriver, gpus: NvmlGpus) -> None:
    driver.fail(SETTINGS, 999)
    assert refused(lambda: listed(gpus)).slug == "GPU_ERROR"
    assert STATE not in driver.calls()


def test_a_machine_without_gpus_has_none(driver: FakeDriver, gpus: NvmlGpus) -> None:
    driver.say("count", "0")
    assert listed(gpus) == ()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("count", "65"),
        ("count", str(2**32 - 1)),
        ("settings", "3 1 0 0"),
        ("settings", "2 2 0 0"),
        ("settings", "2 1 255 0"),
        ("driver", b"\xff\xfe"),
        ("driver", b""),
        ("driver", b"550\n54"),
        ("gpu0/uuid", b"\xc3\x28"),
        ("gpu0/uuid", b"GPU-" + b"a" * 92),
        ("gpu0/uuid", b"MIG-00000000-0000-4000-8000-000000000000"),
        ("gpu0/name", b"N" * 96),
        ("gpu0/name", b"\x1b[2J"),
        ("gpu0/vbios", b"\0"),
        ("gpu0/pci", "0 256 0"),
        ("gpu0/pci", "0 1 32"),
    ],
)
def test_refuses_an_answer_that_nvml_cannot_give(
    driver: FakeDriver, gpus: NvmlGpus, name: str, content: str | bytes
) -> None:
    driver.say(name, content)
    assert refused(lambda: listed(gpus)).slug == "GPU_ERROR"


@pytest.mark.parametrize("name", ["uuid", "pci"])
def test_refuses_two_gpus_that_are_one(driver: FakeDriver, gpus: NvmlGpus, name: str) -> None:
    driver.plug(1)
    assert len(listed(gpus)) == 2
    driver.say(f"gpu1/{name}", (driver.folder / "gpu0" / name).read_bytes())
    assert refused(lambda: listed(gpus)).slug == "GPU_ERROR"


def test_a_wide_pci_domain_keeps_its_digits(driver: FakeDriver, gpus: NvmlGpus) -> None:
    driver.say("gpu0/pci", f"{0x10001} 0x3b 0x1f")
    assert listed(gpus)[0].bdf == "10001:3b:1f.0"


def test_a_lost_gpu_fails_the_whole_list(driver: FakeDriver, gpus: NvmlGpus) -> None:
    driver.plug(1)
    driver.fail("nvmlDeviceGetVbiosVersion", 15)
    assert refused(lambda: listed(gpus)).slug == "GPU_LOST"


def test_evidence_is_fresh_and_passes_the_verifier(driver: FakeDriver, gpus: NvmlGpus) -> None:
    driver.hold(0, GPU, SECOND_NONCE)
    evidence = asked(gpus)
    assert verify_device(DeviceEvidence(evidence.report, evidence.chain), PARTY).accepted
    other = asked(gpus, SECOND_NONCE)
    assert not verify_device(DeviceEvidence(other.report, other.chain), PARTY).accepted


def test_evidence_is_of_the_gpu_that_was_named(driver: FakeDriver, gpus: NvmlGpus) -> None:
    driver.plug(1)
    held = driver.hold(1, GPU, SECOND_NONCE)
    assert asked(gpus, SECOND_NONCE, number=1) == held
    driver.say("gpu1/uuid", uuid_of(7))
    assert refused(lambda: asked(gpus, SECOND_NONCE, number=1)).slug == "GPU_LOST"


def test_refuses_the_handle_of_another_gpu(driver: FakeDriver, gpus: NvmlGpus) -> None:
    driver.plug(1)
    driver.hold(1, GPU, NONCE)
    driver.say("misdirect", "1")
    assert refused(lambda: asked(gpus)).slug == "GPU_ERROR"


@pytest.mark.parametrize("size", [0, 8193, 2**31, 2**32 - 1])
def test_refuses_a_report_of_an_impossible_length(driver: FakeDriver, gpus: NvmlGpus, size: int) -> None:
    driver.say("gpu0/report.size", str(size))
    assert refused(lambda: asked(gpus)).slug == "GPU_ERROR"


@pytest.mark.parametrize("size", [0, 5121, 2**31, 2**32 - 1])
def test_refuses_a_chain_of_an_impossible_length(driver: FakeDriver, gpus: NvmlGpus, size: int) -> None:
    driver.say("gpu0/chain.size", str(size))
    assert refused(lambda: asked(gpus)).slug == "GPU_ERROR"


@pytest.mark.parametrize(
    "chain",
    [
        b"\0" * 4096,
        b"\xff" * 5120,
        GPU.chain[:-10],
        GPU.chain + b"x",
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
    ],
)
def test_refuses_a_chain_that_is_not_certificates(driver: FakeDriver, gpus: NvmlGpus, chain: bytes) -> None:
    driver.say("gpu0/chain", chain)
    assert refused(lambda: asked(gpus)).slug == "GPU_ERROR"


def test_zeros_that_fill_the_chains_buffer_are_no_part_of_it(driver: FakeDriver, gpus: NvmlGpus) -> None:
    driver.say("gpu0/chain", GPU.chain + bytes(16))
    assert asked(gpus).chain == GPU.chain


@pytest.mark.parametrize("nonce", [b"", bytes(31), bytes(33), bytes(64)])
def test_refuses_a_nonce_that_no_gpu_signs(gpus: NvmlGpus, nonce: bytes) -> None:
    assert refused(lambda: asked(gpus, nonce), Misuse).slug == "BAD_NONCE"


@pytest.mark.parametrize(
    "uuid", ["", "0", uuid_of(0xABC).upper(), uuid_of(0) + "\n", uuid_of(0) + "\0", "MIG-0", "GPU-é"]
)
def test_refuses_what_names_no_gpu(driver: FakeDriver, gpus: NvmlGpus, uuid: str) -> None:
    refusal = refused(lambda: asyncio.run(gpus.evidence(uuid, NONCE, timeout=30)), Misuse)
    assert refusal.slug == "BAD_GPU_UUID"
    assert "nvmlDeviceGetHandleByUUID" not in driver.calls()


@pytest.mark.parametrize("code", [*MEANINGS, 31, 12345])
@pytest.mark.parametrize("call", [REPORT, CERTIFICATE])
def test_every_code_fails_evidence_with_its_reason(driver: FakeDriver, gpus: NvmlGpus, call: str, code: int) -> None:
    driver.fail(call, code)
    error = refused(lambda: asked(gpus), AgentError)
    slug, words = MEANINGS.get(code, ("GPU_ERROR", ""))
    assert error.slug == slug
    assert words in error.message
    assert isinstance(error, Unavailable if slug == "GPU_UNSUPPORTED" else DeviceFault)


def test_words_of_the_drivers_library_reach_nobody(driver: FakeDriver, gpus: NvmlGpus) -> None:
    driver.fail(REPORT, 12345)
    error = refused(lambda: asked(gpus))
    assert "words of the driver's library" not in str(error)
    assert error.__cause__ is None


def test_ready_state_is_read_and_set(driver: FakeDriver, gpus: NvmlGpus) -> None:
    async def scenario() -> None:
        assert await gpus.ready(timeout=30) is False
        await gpus.set_ready(True, timeout=30)
        assert await gpus.ready(timeout=30) is True
        await gpus.set_ready(False, timeout=30)
        assert await gpus.ready(timeout=30) is False

    asyncio.run(scenario())


def test_without_a_ready_state_there_is_none_and_it_cannot_be_set(driver: FakeDriver, gpus: NvmlGpus) -> None:
    driver.fail(READY, 3)
    driver.fail(SET_READY, 13)
    assert asyncio.run(gpus.ready(timeout=30)) is None
    assert refused(lambda: asyncio.run(gpus.set_ready(False, timeout=30)), Unavailable).slug == "GPU_UNSUPPORTED"


def test_without_confidential_computing_there_is_neither_evidence_nor_a_ready_state(
    driver: FakeDriver, gpus: NvmlGpus
) -> None:
    """As a real driver has it: it says "not ready" of GPUs that work, and cannot tell why there is no report."""
    driver.say("settings", "0 0 0 0")
    driver.fail(REPORT, 999)
    assert asyncio.run(gpus.ready(timeout=30)) is None
    fault = refused(lambda: asyncio.run(gpus.evidence(uuid_of(0), NONCE, timeout=30)), Unavailable)
    assert (fault.slug, "is not on" in fault.message) == ("GPU_UNSUPPORTED", True)


def test_refuses_a_ready_state_without_meaning(driver: FakeDriver, gpus: NvmlGpus) -> None:
    driver.say("ready", "2")
    assert refused(lambda: asyncio.run(gpus.ready(timeout=30))).slug == "GPU_ERROR"


@pytest.mark.parametrize(
    ("code", "slug", "words", "unknown"),
    [
        (2, "GPU_ERROR", "only by a reset", False),
        (4, "GPU_ERROR", "root only", False),
        (10, "GPU_TIMEOUT", "in time", True),
        (15, "GPU_LOST", "fell off", True),
        (18, "GPU_DRIVER", "version", True),
    ],
)
def test_a_ready_state_that_was_not_set_says_why_and_whether_it_may_be(
    driver: FakeDriver, gpus: NvmlGpus, code: int, slug: str, words: str, *, unknown: bool
) -> None:
    driver.fail(SET_READY, code)
    fault = refused(lambda: asyncio.run(gpus.set_ready(True, timeout=30)))
    assert isinstance(fault, DeviceFault)
    assert (fault.slug, fault.outcome_unknown) == (slug, unknown)
    assert words in fault.message


def test_kernel_tells_of_devices_that_the_driver_hides(driver: FakeDriver, gpus: NvmlGpus) -> None:
    driver.plug_function("0000:05:00.0", kind="0x068000")
    driver.say("count", "0")
    assert asyncio.run(gpus.pci(timeout=30)) == ("0000:01:00.0", "0000:05:00.0")


def test_it_is_a_gpus_backend(gpus: NvmlGpus) -> None:
    backend: Gpus = gpus
    assert backend.kind == "nvml"
