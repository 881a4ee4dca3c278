"""GPUs in an evidence bundle: what the manifest says of them, and the words of each device that travel beside it.

What the manifest says is the driver's word, handed on by the agent: no signature of NVIDIA's covers a mode or the
ready state. Reports and chains are under the manifest's digests, and speak for themselves.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any, Final

from cgpu_agent.wire.gpuevidence import MAX_CHAIN
from cgpu_agent.wire.spdm import MAX_REPORT
from cgpu_agent.wire.strictjson import Fields, b64

MAX_DEVICES: Final = 64
BACKENDS: Final = frozenset({"nvml", "software"})
ARCHITECTURES: Final = frozenset({"ampere", "hopper", "blackwell", "other"})
ENVIRONMENTS: Final = frozenset({"prod", "sim", "unavailable"})
MULTI_GPU_MODES: Final = frozenset({"none", "protected-pcie", "nvle", "unknown"})

_MAX_EPOCH: Final = 1 << 53
_UUID = re.compile(r"[A-Za-z0-9-]{1,96}")
_BDF = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_VERSION = re.compile(r"[0-9A-Za-z.]{0,32}")


@dataclass(frozen=True, slots=True)
class GpuWords:
    """A device's own words.

    Attributes:
        report: SPDM GET_MEASUREMENTS request and MEASUREMENTS response.
        chain: PEM certificates, leaf first.
    """

    report: bytes
    chain: bytes

    def digest(self) -> bytes:
        """SHA-256("cgpu/gpu-words/1" || 00 || u32be(len(report)) || report || chain)."""
        framed = len(self.report).to_bytes(4, "big") + self.report + self.chain
        return hashlib.sha256(b"cgpu/gpu-words/1\0" + framed).digest()

    def to_json(self) -> dict[str, str]:
        """As a bundle has it."""
        return {"chain": b64(self.chain), "report": b64(self.report)}


def parse_words(fields: Fields) -> GpuWords:
    """Raises ``HostileInput``."""
    words = GpuWords(fields.base64("report", MAX_REPORT), fields.base64("chain", MAX_CHAIN))
    fields.end()
    return words


@dataclass(frozen=True, slots=True)
class GpuRecord:
    """What the agent reports of one device; ``None`` = the driver has no such thing.

    Attributes:
        uuid, bdf: the driver's name of it, and its PCI address.
        architecture, driver, vbios: what the driver says it is.
        cc, cc_environment, dev_tools, multi_gpu: modes, as in ``backends.base.GpuInfo``.
        key_rotation_threshold: attacker-advantage exponent at which the driver rotates its link keys.
        trusted: whether the agent's own verdict on it was good at that moment.
        words: ``GpuWords.digest`` of what travels in the bundle.
    """

    uuid: str
    bdf: str
    architecture: str
    driver: str
    vbios: str
    cc: bool | None
    cc_environment: str | None
    dev_tools: bool | None
    multi_gpu: str
    key_rotation_threshold: int | None
    trusted: bool
    words: bytes

    def to_json(self) -> dict[str, Any]:
        """As a manifest has it."""
        return {
            "architecture": self.architecture,
            "bdf": self.bdf,
            "cc": self.cc,
            "cc_environment": self.cc_environment,
            "dev_tools": self.dev_tools,
            "driver": self.driver,
            "key_rotation_threshold": self.key_rotation_threshold,
            "multi_gpu": self.multi_gpu,
            "trusted": self.trusted,
            "uuid": self.uuid,
            "vbios": self.vbios,
            "words": self.words.hex(),
        }


def _record(value: Any) -> GpuRecord:
    fields = Fields(value, "manifest.gpus.devices")
    record = GpuRecord(
        uuid=_matching(fields, "uuid", _UUID),
        bdf=_matching(fields, "bdf", _BDF),
        architecture=fields.choice("architecture", ARCHITECTURES),
        driver=_matching(fields, "driver", _VERSION),
        vbios=_matching(fields, "vbios", _VERSION),
        cc=None if fields.absent("cc") else fields.boolean("cc"),
        cc_environment=None if fields.absent("cc_environment") else fields.choice("cc_environment", ENVIRONMENTS),
        dev_tools=None if fields.absent("dev_tools") else fields.boolean("dev_tools"),
        multi_gpu=fields.choice("multi_gpu", MULTI_GPU_MODES),
        key_rotation_threshold=(
            None if fields.absent("key_rotation_threshold") else fields.integer("key_rotation_threshold", 0, 255)
        ),
        trusted=fields.boolean("trusted"),
        words=fields.hex("words", 32, 32),
    )
    fields.end()
    return record


def _matching(fields: Fields, name: str, pattern: re.Pattern[str]) -> str:
    text = fields.text(name, 128)
    if not pattern.fullmatch(text):
        raise fields.fail(f"{name} is malformed")
    return text


@dataclass(frozen=True, slots=True)
class GpuInventory:
    """All devices of a machine, as the agent saw them; nothing changed between the first look and the quote.

    Attributes:
        backend: ``nvml`` or ``software``.
        expected: how many GPUs the agent was told there are; 0 = it was not told.
        kernel: how many devices the kernel sees.
        ready: the system-wide ready state that the agent keeps.
        epoch: the agent's trust epoch.
        devices: what the driver sees, one record each, by PCI address.
    """

    backend: str
    expected: int
    kernel: int
    ready: bool
    epoch: int
    devices: tuple[GpuRecord, ...]

    def to_json(self) -> dict[str, Any]:
        """As a manifest has it."""
        return {
            "backend": self.backend,
            "devices": [device.to_json() for device in self.devices],
            "epoch": self.epoch,
            "expected": self.expected,
            "kernel": self.kernel,
            "ready": self.ready,
        }


def parse_inventory(fields: Fields) -> GpuInventory:
    """Raises ``HostileInput``."""
    inventory = GpuInventory(
        backend=fields.choice("backend", BACKENDS),
        expected=fields.integer("expected", 0, MAX_DEVICES),
        kernel=fields.integer("kernel", 0, MAX_DEVICES),
        ready=fields.boolean("ready"),
        epoch=fields.integer("epoch", 0, _MAX_EPOCH),
        devices=tuple(_record(item) for item in fields.items("devices", MAX_DEVICES)),
    )
    fields.end()
    return inventory
