"""An NVIDIA GPU as its own driver's tool describes it; without one these tests are skipped: "make test-gpu"."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from cgpu_agent.backends.gpu.cudachannel import CudaChannel
from fixtures.cuda import Owner

_FIELDS = ("uuid", "pci.bus_id", "name", "vbios_version", "driver_version")


@dataclass(frozen=True)
class Card:
    """What nvidia-smi says of a GPU."""

    uuid: str
    bdf: str
    model: str
    vbios: str
    driver: str

    @property
    def memory_used(self) -> int:
        """MiB that are taken, the driver's own included."""
        return int(_nvidia_smi("memory.used", self.uuid))


@pytest.fixture(scope="session")
def card() -> Card:
    """The first GPU."""
    if shutil.which("nvidia-smi") is None:
        pytest.skip("there is no NVIDIA driver (nvidia-smi)")
    try:
        first = _nvidia_smi(",".join(_FIELDS)).splitlines()[0]
    except (subprocess.CalledProcessError, IndexError):
        pytest.skip("nvidia-smi sees no GPU")
    uuid, bus, *others = (each.strip() for each in first.split(","))
    return Card(uuid, bus.lower().removeprefix("0000"), *others)


@pytest.fixture
def owner(card: Card) -> Iterator[Owner]:
    owner = Owner.on(card.uuid)
    yield owner
    owner.end()


@pytest.fixture
def channel(owner: Owner) -> CudaChannel:
    return owner.channel()


def _nvidia_smi(fields: str, gpu: str | None = None) -> str:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    if gpu is not None:
        command.append(f"--id={gpu}")
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
