"""The state of a simulated machine: its GPUs, how they are told to be, and what the driver says of them."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Final

from cgpu_agent.backends.base import GpuInfo
from cgpu_agent.backends.gpu.software import commands
from cgpu_agent.backends.gpu.software.commands import Inventory
from cgpu_agent.backends.gpu.software.frames import MAX_GPUS
from cgpu_agent.backends.gpu.software.make import DRIVER, MODEL, VBIOS, Device, Maker, blocks
from cgpu_agent.backends.gpu.software.responder import Responder
from cgpu_agent.backends.gpu.software.rims import collateral
from cgpu_agent.backends.gpu.software.transferdevice import Door, TransferSession
from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.wire.spdm import NONCE_SIZE, Measurement
from cgpu_agent.wire.strictjson import Fields, b64

_ALWAYS_HEARD: Final = frozenset({"misbehave", "behave"})
_MEMORY: Final = 1 << 30
_FIRST_VALUE: Final = 52  # of a report: request, headers, and the first block's own header
_FIRST_VALUE_1_2: Final = 15


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :]


@dataclass(slots=True)
class _Gpu:
    number: int
    life: int = 0
    bad: set[str] = field(default_factory=set)


class Board:
    """All GPUs of a simulated machine and their driver.

    Args:
        maker: who made the GPUs.
        count: how many, 1 to ``MAX_GPUS``.

    Raises:
        Misuse: ``GPU_COUNT``.
    """

    def __init__(self, maker: Maker, count: int) -> None:
        if not 1 <= count <= MAX_GPUS:
            raise Misuse("GPU_COUNT", f"a software machine has 1 to {MAX_GPUS} GPUs")
        self.maker: Final = maker
        self._gpus: Final = {number: _Gpu(number) for number in range(1, count + 1)}
        self._devices: Final[dict[tuple[int, int], Device]] = {}
        self._instance: Final = os.urandom(8).hex()
        self._generation = 0
        self._ready = False
        self._hangs = False
        self.door: Final = Door()
        self._responders: Final = weakref.WeakKeyDictionary[Responder, int]()

    # --- what the transport asks ---

    def present(self, endpoint: int) -> bool:
        """Whether a GPU is at this endpoint."""
        return endpoint in self._gpus and "vanish" not in self._gpus[endpoint].bad

    def hangs(self, endpoint: int) -> bool:
        """Whether this GPU swallows what it is sent. The driver does when every GPU was told to."""
        return "hang" in self._gpus[endpoint].bad

    def responder(self, endpoint: int) -> Responder:
        """The SPDM side of a GPU, for one connection and its present identity."""
        gpu = self._gpus[endpoint]

        def command(payload: bytes) -> bytes:
            return self._gpu_command(gpu, payload)

        made = Responder(
            self._shown(gpu),
            lambda: self._blocks(gpu),
            command,
            lambda message: _flip(message, _FIRST_VALUE_1_2) if "edited-measurement" in gpu.bad else message,
            lambda number, exporter: TransferSession(number, exporter, self.door, command),
        )
        self._responders[made] = endpoint
        return made

    def stale(self, responder: Responder, endpoint: int) -> bool:
        """Whether a responder speaks for hardware that is no longer what this endpoint shows."""
        return responder.device is not self._shown(self._gpus[endpoint])

    # --- how GPUs are told to be ---

    def misbehave(self, name: str, endpoint: int | None) -> None:
        """Make one GPU bad, or all. Raises ``HostileInput`` (``UNKNOWN_MISBEHAVIOUR``, ``NO_SUCH_GPU``)."""
        commands.one_of(name)
        if endpoint is not None and endpoint not in self._gpus:
            raise HostileInput("NO_SUCH_GPU", "there is no GPU of this number")
        before = self._infos()
        self._hangs = self._hangs or (name == "hang" and endpoint is None)
        for gpu in [self._gpus[endpoint]] if endpoint is not None else list(self._gpus.values()):
            if name == "other-device":
                gpu.life += 1
            else:
                gpu.bad.add(name)
        self._generation += self._infos() != before
        self._hang_up()

    def behave(self) -> None:
        """End every misbehaviour. Hardware that was replaced stays replaced."""
        before = self._infos()
        self._hangs = False
        for gpu in self._gpus.values():
            gpu.bad.clear()
        self._generation += self._infos() != before
        self._hang_up()

    def _hang_up(self) -> None:
        """End what goes on with hardware that is not there any more; nobody may send it another frame for a while."""
        for responder, endpoint in list(self._responders.items()):
            if not self.present(endpoint) or self.stale(responder, endpoint):
                responder.close()

    # --- what the driver answers ---

    def command(self, payload: bytes) -> bytes | None:
        """Answer a request to the driver; ``None``: it hangs. Raises ``HostileInput`` for a bad one."""
        name, arguments = commands.parse_request(payload)
        if self._hangs and name not in _ALWAYS_HEARD:
            return None
        known: dict[str, Callable[[Fields], dict[str, object]]] = {
            "inventory": lambda _: self.inventory().to_json(),
            "ready": lambda _: {"ready": self._ready},
            "set-ready": self._set_ready,
            "collateral": self._collateral,
            "misbehave": self._misbehave,
            "behave": self._behave,
        }
        if name not in known:
            return commands.encode_fault("unsupported")
        result = known[name](arguments)
        arguments.end()
        return commands.encode_result(result)

    def inventory(self) -> Inventory:
        """What the driver sees now."""
        infos = self._infos()
        return Inventory(self._instance, self._generation, tuple(info.bdf for info in infos.values()), infos)

    def files(self) -> dict[str, Callable[[], bytes]]:
        """What a relying party needs, as ``rims.collateral`` has it, spoiled as far as GPUs are told to be bad."""
        bad = set[str]().union(*(gpu.bad for gpu in self._gpus.values()))
        revoked = [self._own(gpu).signers[1].certificate for gpu in self._gpus.values() if "revoked" in gpu.bad]
        return dict(collateral(self.maker, _now(), stale="stale-rim" in bad, revoked=revoked))

    def _set_ready(self, arguments: Fields) -> dict[str, object]:
        self._ready = arguments.boolean("ready")
        return {}

    def _collateral(self, arguments: Fields) -> dict[str, object]:
        files = self.files()
        if arguments.absent("name"):
            return {"names": sorted(files)}
        name = arguments.choice("name", frozenset(files))
        return {"content": b64(files[name]())}

    def _misbehave(self, arguments: Fields) -> dict[str, object]:
        endpoint = None if arguments.absent("gpu") else arguments.integer("gpu", 1, MAX_GPUS)
        self.misbehave(arguments.text("name", 32), endpoint)
        return {}

    def _behave(self, _arguments: Fields) -> dict[str, object]:
        self.behave()
        return {}

    def _infos(self) -> dict[int, GpuInfo]:
        return {number: self._info(gpu) for number, gpu in self._gpus.items() if self.present(number)}

    # --- what a GPU answers ---

    def _gpu_command(self, gpu: _Gpu, payload: bytes) -> bytes:
        name, arguments = commands.parse_request(payload)
        if name != "report":
            return commands.encode_fault("unsupported")
        nonce = arguments.hex("nonce", NONCE_SIZE, NONCE_SIZE)
        arguments.end()
        if "wrong-nonce" in gpu.bad:
            nonce = _flip(nonce, 0)
        report = self._signing(gpu).report(nonce, self._blocks(gpu))
        if "edited-measurement" in gpu.bad:
            report = _flip(report, _FIRST_VALUE)
        return commands.encode_result({"report": b64(report)})

    def _blocks(self, gpu: _Gpu) -> list[Measurement]:
        found = blocks()
        if "other-firmware" in gpu.bad:
            found = [Measurement(each.index, each.value_type, _flip(each.value, 0)) for each in found]
        return found

    def _info(self, gpu: _Gpu) -> GpuInfo:
        return GpuInfo(
            uuid=self._own(gpu).uuid,
            bdf=f"0000:{gpu.number:02x}:00.0",
            model=MODEL,
            architecture="hopper",
            driver=DRIVER,
            vbios=VBIOS,
            cc="cc-off" not in gpu.bad,
            cc_environment="unavailable" if "cc-off" in gpu.bad else "sim",
            dev_tools="dev-tools" in gpu.bad,
            multi_gpu="none",
            protected_memory=_MEMORY,
            key_rotation_threshold=None,
        )

    # --- identities ---

    def _own(self, gpu: _Gpu) -> Device:
        """The hardware in this place."""
        return self._device(gpu.number, gpu.life)

    def _signing(self, gpu: _Gpu) -> Device:
        """The hardware that signs in its name."""
        return self._own(self._gpus[1]) if "duplicate" in gpu.bad else self._own(gpu)

    def _shown(self, gpu: _Gpu) -> Device:
        """Whose certificates are shown, and, in SPDM, whose key signs."""
        return self._device(gpu.number, -1) if "other-chain" in gpu.bad else self._signing(gpu)

    def _device(self, number: int, life: int) -> Device:
        if (number, life) not in self._devices:
            made = self.maker.stranger().device(number) if life < 0 else self.maker.device(number, life)
            self._devices[number, life] = made
        return self._devices[number, life]
