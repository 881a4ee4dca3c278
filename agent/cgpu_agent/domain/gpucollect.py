"""What one batch of evidence takes from the GPUs: every device's report, and what the agent makes of the devices."""

from __future__ import annotations

from dataclasses import dataclass

from cgpu_agent.backends.base import GpuEvidence, GpuInfo
from cgpu_agent.errors import HostileInput, Unavailable
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.gpuinventory import GpuInventory, GpuRecord, GpuWords, parse_inventory
from cgpu_agent.wire.strictjson import Fields


@dataclass(frozen=True, slots=True)
class GpuCollection:
    """All devices at one moment.

    Attributes:
        backend, expected: as ``GpuView.backend`` and ``GpuRules.count``.
        ready, epoch: the agent's gate was open, and its trust epoch.
        trusted: uuids of the devices that it trusted.
        devices, answers: by PCI address, one answer a device.
    """

    backend: str
    expected: int
    ready: bool
    epoch: int
    trusted: frozenset[str]
    devices: tuple[GpuInfo, ...]
    answers: tuple[GpuEvidence, ...]

    def words(self) -> tuple[GpuWords, ...]:
        """As a bundle has them."""
        return tuple(GpuWords(answer.report, answer.chain) for answer in self.answers)

    def inventory(self) -> GpuInventory:
        """As a manifest has it. Raises ``Unavailable`` (``GPU_WORDS``): no reader would take in what it says."""
        records = zip(self.devices, self.words(), strict=True)
        made = GpuInventory(
            backend=self.backend,
            expected=self.expected,
            kernel=len(self.devices),
            ready=self.ready,
            epoch=self.epoch,
            devices=tuple(_record(info, words, trusted=info.uuid in self.trusted) for info, words in records),
        )
        try:
            parse_inventory(Fields(strictjson.loads(strictjson.dumps(made.to_json()), "GPUs", 1 << 16), "GPUs"))
        except HostileInput as error:
            raise Unavailable(
                "GPU_WORDS", f"the driver says of a GPU what evidence cannot hold: {error.message}"
            ) from error
        return made


def _record(info: GpuInfo, words: GpuWords, *, trusted: bool) -> GpuRecord:
    return GpuRecord(
        uuid=info.uuid,
        bdf=info.bdf,
        architecture=info.architecture,
        driver=info.driver,
        vbios=info.vbios,
        cc=info.cc,
        cc_environment=info.cc_environment,
        dev_tools=info.dev_tools,
        multi_gpu=info.multi_gpu,
        key_rotation_threshold=info.key_rotation_threshold,
        trusted=trusted,
        words=words.digest(),
    )
