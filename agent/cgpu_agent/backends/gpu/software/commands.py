"""What NVML would answer, as vendor-defined messages: small strict JSON objects, understood by both sides.

A request is ``{"command": ..., ...}``; an answer is ``{"result": {...}}`` or ``{"fault": word}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, get_args

from cgpu_agent.backends.base import GpuArchitecture, GpuInfo, MultiGpuMode
from cgpu_agent.backends.gpu.software.frames import MAX_GPUS
from cgpu_agent.errors import HostileInput
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.strictjson import Fields

MAX_JSON: Final = 0xFFFF
FAULTS: Final = frozenset({"unsupported", "bad-request", "exhausted"})
MISBEHAVIOURS: Final = (
    "wrong-nonce",
    "edited-measurement",
    "other-firmware",
    "other-chain",
    "revoked",
    "stale-rim",
    "hang",
    "vanish",
    "other-device",
    "duplicate",
    "cc-off",
    "dev-tools",
)
"""Ways in which a software GPU can be told to be bad; ``behave`` ends them all.

``wrong-nonce``: answers another nonce. ``edited-measurement``: alters a measurement after signing.
``other-firmware``: measured something else, and signs it. ``other-chain``: shows certificates of a stranger.
``revoked``: its boot ROM is on its issuer's CRL. ``stale-rim``: reference values whose signer expired.
``hang``: never answers. ``vanish``: is gone, and sessions and channels with it. ``other-device``: likewise, but
another one sits in its place, and stays. ``duplicate``: answers as the first GPU. ``cc-off``, ``dev-tools``: what the
driver says of the mode, unsigned.
"""

_ARCHITECTURES: Final = frozenset(get_args(GpuArchitecture))
_MODES: Final = frozenset(get_args(MultiGpuMode))
_TEXT: Final = 128


@dataclass(frozen=True, slots=True)
class Inventory:
    """What the driver sees.

    Attributes:
        instance: 16 hex digits that change when the driver starts anew.
        generation: counts changes of ``gpus``, so that none between two looks goes unseen.
        pci: addresses on the bus, as the kernel would list them.
        gpus: endpoint -> GPU.
    """

    instance: str
    generation: int
    pci: tuple[str, ...]
    gpus: Mapping[int, GpuInfo]

    def to_json(self) -> dict[str, object]:
        return {
            "generation": self.generation,
            "gpus": [{"endpoint": endpoint, **_info_json(info)} for endpoint, info in self.gpus.items()],
            "instance": self.instance,
            "pci": list(self.pci),
        }

    @classmethod
    def parse(cls, fields: Fields) -> Inventory:
        """Raises ``HostileInput``: ``BAD_FIELD``, ``UNKNOWN_KEY``."""
        gpus: dict[int, GpuInfo] = {}
        for value in fields.items("gpus", MAX_GPUS):
            each = Fields(value, "inventory: GPU")
            endpoint = each.integer("endpoint", 1, MAX_GPUS)
            if endpoint in gpus:
                raise each.fail("its endpoint is another's too")
            gpus[endpoint] = _info(each)
        if len({info.uuid for info in gpus.values()}) != len(gpus):
            raise fields.fail("two GPUs have one UUID")
        pci = fields.items("pci", MAX_GPUS)
        if not all(isinstance(each, str) and len(each) <= _TEXT for each in pci):
            raise fields.fail("a PCI address is not text")
        found = cls(fields.hex("instance", 8, 8).hex(), fields.integer("generation", 0, 1 << 62), tuple(pci), gpus)
        fields.end()
        return found


def _info_json(info: GpuInfo) -> dict[str, object]:
    return {name: getattr(info, name) for name in GpuInfo.__slots__}


def _info(fields: Fields) -> GpuInfo:
    def flag(name: str) -> bool | None:
        return None if fields.absent(name) else fields.boolean(name)

    def number(name: str) -> int | None:
        return None if fields.absent(name) else fields.integer(name, 0, 1 << 62)

    info = GpuInfo(
        uuid=fields.text("uuid", _TEXT),
        bdf=fields.text("bdf", _TEXT),
        model=fields.text("model", _TEXT),
        architecture=fields.choice("architecture", _ARCHITECTURES),  # type: ignore[arg-type]
        driver=fields.text("driver", _TEXT),
        vbios=fields.text("vbios", _TEXT),
        cc=flag("cc"),
        cc_environment=None if fields.absent("cc_environment") else fields.text("cc_environment", _TEXT),
        dev_tools=flag("dev_tools"),
        multi_gpu=fields.choice("multi_gpu", _MODES),  # type: ignore[arg-type]
        protected_memory=number("protected_memory"),
        key_rotation_threshold=number("key_rotation_threshold"),
    )
    fields.end()
    return info


def encode_request(command: str, **arguments: object) -> bytes:
    """A request's payload."""
    return strictjson.dumps({"command": command, **arguments})


def parse_request(payload: bytes) -> tuple[str, Fields]:
    """The command, and its arguments to be read and ended. Raises ``HostileInput``."""
    fields = Fields(strictjson.loads(payload, "command", MAX_JSON), "command")
    return fields.text("command", 32), fields


def encode_result(result: Mapping[str, object]) -> bytes:
    """The answer to a request that was carried out."""
    return strictjson.dumps({"result": result})


def encode_fault(word: str) -> bytes:
    """The answer to one that was not: one of ``FAULTS``."""
    return strictjson.dumps({"fault": word})


def parse_answer(payload: bytes) -> Fields | str:
    """The fields of a result, to be read and ended, or the word of a fault. Raises ``HostileInput``."""
    answer: Any = strictjson.loads(payload, "answer", MAX_JSON)
    fields = Fields(answer, "answer")
    if fields.keys() == ["fault"]:
        return fields.choice("fault", FAULTS)
    result = fields.fields("result")
    fields.end()
    return result


def one_of(name: str) -> str:
    """A misbehaviour by name. Raises ``HostileInput`` (``UNKNOWN_MISBEHAVIOUR``)."""
    if name not in MISBEHAVIOURS:
        raise HostileInput(
            "UNKNOWN_MISBEHAVIOUR", f"there is no such misbehaviour; there are {', '.join(MISBEHAVIOURS)}"
        )
    return name
