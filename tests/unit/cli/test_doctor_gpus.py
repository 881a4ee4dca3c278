"""What ``cgpuctl doctor`` says of GPUs, by the driver's own word."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from cgpu_agent.backends.gpu import nvmlgpus
from cgpu_agent.cli import doctor
from fixtures.nvml import FakeDriver, fake_driver


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    with fake_driver(tmp_path) as driver:
        here = partial(nvmlgpus.NvmlGpus, sysfs=driver.sysfs, poll=0.01)
        monkeypatch.setattr(nvmlgpus, "NvmlGpus", here)
        yield driver


def levels() -> list[tuple[str, str]]:
    return [(finding.check, finding.level) for finding in doctor._gpus()]


@pytest.mark.parametrize(
    ("settings", "level"), [("2 1 0 0", "ok"), ("2 1 1 0", "fail"), ("2 0 0 0", "warn"), ("0 0 0 0", "warn")]
)
def test_mode_of_a_gpu(driver: FakeDriver, settings: str, level: str) -> None:
    driver.say("settings", settings)
    assert levels() == [("GPUs", level), ("GPU ready state", "ok")]


@pytest.mark.parametrize(("state", "words"), [("0", "no work"), ("1", "accept work")])
def test_ready_state(driver: FakeDriver, state: str, words: str) -> None:
    driver.say("ready", state)
    assert words in doctor._gpus()[-1].finding


def test_a_driver_that_lists_none_of_the_kernels_gpus_fails(driver: FakeDriver) -> None:
    driver.say("count", "0")
    (finding,) = doctor._gpus()
    assert finding.level == "fail"
    assert "0000:01:00.0" in finding.finding


def test_a_driver_that_does_not_fit_its_library_fails(driver: FakeDriver) -> None:
    driver.fail("nvmlInitWithFlags", 18)
    (finding,) = doctor._gpus()
    assert finding.level == "fail"
    assert "differ in version" in finding.finding
