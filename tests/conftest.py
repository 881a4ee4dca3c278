"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from cgpu_agent.backends.tpm.software import Swtpm
from fixtures.daemon import Daemon, booted_daemon
from fixtures.machine import Machine, replay_boot
from fixtures.swtpm import running_swtpm

# How long an example takes says how busy the machine is, and nothing about what is tested.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def vectors() -> Path:
    """Folder of the committed test vectors."""
    return ROOT / "tests" / "vectors"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of third-party recordings that live beside the project and are never committed."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("third-party recordings (../shared/data) are not on this machine")
    return folder


@pytest.fixture
def swtpm() -> Iterator[Swtpm]:
    """An emulated TPM of the test's own: just made, and running."""
    with running_swtpm() as tpm:
        yield tpm


@pytest.fixture
def machine(swtpm: Swtpm, tmp_path: Path) -> Machine:
    """A VM in whose TPM the recorded firmware booted, without an agent yet."""
    replay_boot(swtpm)
    return Machine(swtpm, tmp_path)


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A real cgpu-agent process on a TPM in which the recorded firmware booted; ready."""
    with booted_daemon() as agent:
        agent.start()
        yield agent
