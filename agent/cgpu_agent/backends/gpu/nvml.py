"""NVIDIA GPUs through their driver: the only file that imports pynvml, and it believes no length the driver gives.

Calls are those of NVML 13's confidential-computing section. The driver sits beside a hostile host, and its library
is not ours either: sizes are checked against the structures, text is ASCII or refused, numbers have a known meaning.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import pynvml

from cgpu_agent.backends.base import GpuArchitecture, GpuEvidence, GpuInfo, MultiGpuMode
from cgpu_agent.backends.gpu import nvmlfaults
from cgpu_agent.backends.gpu.nvmlfaults import NvmlFault, bad_answer, failed, timed_out
from cgpu_agent.backends.gpu.sysfs import pci_address
from cgpu_agent.errors import DeviceFault, HostileInput, Misuse, Unavailable
from cgpu_agent.wire.der import pem_blocks
from cgpu_agent.wire.spdm import NONCE_SIZE

MAX_GPUS: Final = 64
_PATIENCE: Final = 2.0
"""Seconds to wait for calls in flight before the library is closed, or is not."""

_UUID = re.compile(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TEXT = re.compile(r"[ -~]{1,95}")
_ARCHITECTURES: Final[Mapping[int | None, GpuArchitecture]] = {7: "ampere", 9: "hopper", 10: "blackwell"}
_ENVIRONMENTS: Final[Mapping[int, str]] = {0: "unavailable", 1: "sim", 2: "prod"}
_MULTI_GPU: Final[Mapping[int | None, MultiGpuMode]] = {0: "none", 1: "protected-pcie", 2: "nvle"}
_FLAGS: Final[Mapping[int, bool]] = {0: False, 1: True}
_KIB: Final = 1024


@dataclass(frozen=True, slots=True)
class _System:
    """What the driver says of all GPUs at once."""

    driver: str
    cc: bool | None
    environment: str | None
    dev_tools: bool | None
    multi_gpu: MultiGpuMode
    key_rotation_threshold: int | None


class Nvml:
    """The library, opened when it is first needed. Any thread may call; a hung call holds only its own thread.

    Methods raise ``DeviceFault`` and ``Unavailable`` as ``backends.base.Gpus`` says, and are valid inside ``use``.
    """

    def __init__(self) -> None:
        self._turn: Final = threading.Condition()
        self._users = 0
        self._is_open = False
        self._stale = False

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Open the library if need be, and keep it open meanwhile. A driver that fails is opened anew by the next."""
        with self._turn:
            self._renew()
            self._users += 1
        try:
            yield
        except DeviceFault as fault:
            self._stale = self._stale or fault.slug == "GPU_DRIVER"
            raise
        finally:
            with self._turn:
                self._users -= 1
                self._turn.notify_all()

    @property
    def stale(self) -> bool:
        """Whether the next ``use`` is to open the library anew; who uses it for long must let go."""
        return self._stale

    def drop(self) -> None:
        """Have the next ``use`` open the library anew: it lists its devices only then."""
        self._stale = True  # Without the lock: whoever holds it may be waiting for the driver.

    def close(self) -> None:
        """Close the library, unless a call in it hangs."""
        with self._turn:
            if self._turn.wait_for(lambda: not self._users, _PATIENCE):
                self._shut_down()

    def gpus(self, deadline: float) -> tuple[GpuInfo, ...]:
        """All GPUs, or none: whatever one of them refuses fails the whole list."""
        count = _ask("nvmlDeviceGetCount")
        if count > MAX_GPUS:
            raise bad_answer("nvmlDeviceGetCount")
        system = _system()
        found = tuple(_gpu(_ask("nvmlDeviceGetHandleByIndex", i), system, deadline) for i in range(count))
        if len({gpu.uuid for gpu in found}) != count or len({gpu.bdf for gpu in found}) != count:
            raise bad_answer("nvmlDeviceGetUUID")
        return found

    def evidence(self, uuid: str, nonce: bytes) -> GpuEvidence:
        """Report over ``nonce``, and the attestation certificate chain.

        Raises ``Misuse``: ``BAD_NONCE``, ``BAD_GPU_UUID``; ``Unavailable`` (``GPU_UNSUPPORTED``) where confidential
        computing is off: then the driver fails for reasons that it cannot tell.
        """
        if len(nonce) != NONCE_SIZE:
            raise Misuse("BAD_NONCE", f"a GPU signs {NONCE_SIZE} bytes of nonce, not {len(nonce)}")
        if not _UUID.fullmatch(uuid):
            raise Misuse("BAD_GPU_UUID", "not the UUID of a GPU (GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx)")
        device = _ask("nvmlDeviceGetHandleByUUID", uuid)
        if _ask("nvmlDeviceGetUUID", device) != uuid:
            raise bad_answer("nvmlDeviceGetHandleByUUID")
        if _confidential() is False:
            raise Unavailable("GPU_UNSUPPORTED", "confidential computing is not on: the GPU signs nothing")
        call = "nvmlDeviceGetConfComputeGpuAttestationReport"
        answer = _ask(call, device, nonce)
        report = _sized(answer.attestationReport, answer.attestationReportSize, call)
        return GpuEvidence(report, _chain(device))

    def ready(self) -> bool | None:
        """Whether the GPUs accept work; ``None`` where that is no matter of a state: the driver has none, or
        confidential computing is off. Then they accept work, and the driver says that they do not."""
        if _confidential() is False:
            return None
        call = "nvmlSystemGetConfComputeGpusReadyState"
        state = _optional(call)
        return None if state is None else _known(_FLAGS, state, call)

    def set_ready(self, ready: bool) -> None:
        """Needs root (CAP_SYS_ADMIN)."""
        try:
            _ask(nvmlfaults.SET_READY, int(ready))
        except NvmlFault as fault:
            raise nvmlfaults.ready_not_put(fault.code) from None

    @contextlib.contextmanager
    def watch_xids(self) -> Iterator[XidWatch]:
        """Have the driver report XID errors of every GPU that can. Holds ``use`` meanwhile."""
        with self.use():
            watch = XidWatch(self)
            try:
                watch.register()
                yield watch
            finally:
                watch.close()

    def _renew(self) -> None:
        """Open, and before it close if stale: once nobody is in a call, for NVML does not say what becomes of them.

        While one hangs the library stays as it is, because the ready state must work as long as it can.
        """
        self._turn.wait_for(lambda: not (self._stale and self._users), _PATIENCE)
        if self._stale and not self._users:
            self._shut_down()
        if self._is_open:
            return
        try:
            _ask("nvmlInit")
        except Unavailable as error:
            raise DeviceFault("GPU_DRIVER", "the GPU driver is too old for this agent") from error
        self._is_open = True

    def _shut_down(self) -> None:
        was_open, self._is_open, self._stale = self._is_open, False, False
        if was_open:
            with contextlib.suppress(DeviceFault, Unavailable):  # It was gone already.
                _ask("nvmlShutdown")


class XidWatch:
    """An event set of the driver's: XID errors since its making."""

    def __init__(self, nvml: Nvml) -> None:
        self._nvml: Final = nvml
        self._set: Final = _ask("nvmlEventSetCreate")
        self._bdf_of: Final[dict[int | None, str]] = {}

    @property
    def stale(self) -> bool:
        """Whether this watch is to be given up, and a new one opened."""
        return self._nvml.stale

    def register(self) -> None:
        """Add every GPU that reports XIDs."""
        count = _ask("nvmlDeviceGetCount")
        if count > MAX_GPUS:
            raise bad_answer("nvmlDeviceGetCount")
        wanted = pynvml.nvmlEventTypeXidCriticalError
        for index in range(count):
            device = _ask("nvmlDeviceGetHandleByIndex", index)
            if (_optional("nvmlDeviceGetSupportedEventTypes", device) or 0) & wanted:
                _ask("nvmlDeviceRegisterEvents", device, wanted, self._set)
                self._bdf_of[_pointer(device)] = _bdf(device)

    def wait(self, milliseconds: int) -> tuple[str | None, int] | None:
        """The next XID as (PCI address, number), or ``None`` when there was none in time."""
        try:
            event = _ask("nvmlEventSetWait", self._set, milliseconds)
        except NvmlFault as fault:
            if fault.code == nvmlfaults.TIMEOUT:
                return None
            raise
        if event.eventType != pynvml.nvmlEventTypeXidCriticalError:
            return None
        return self._bdf_of.get(_pointer(event.device)), event.eventData

    def close(self) -> None:
        with contextlib.suppress(DeviceFault, Unavailable):  # The driver that held it is gone.
            _ask("nvmlEventSetFree", self._set)


def _ask(call: str, *arguments: Any) -> Any:
    """Call pynvml. Its own exceptions stay here: their text comes from the driver's library."""
    function = getattr(pynvml, call, None)
    code: int = nvmlfaults.FUNCTION_NOT_FOUND
    if function is not None:
        try:
            return function(*arguments)
        except pynvml.NVMLError as error:
            code = error.value
        except UnicodeDecodeError:
            raise bad_answer(call) from None
    raise failed(code, call)


def _optional(call: str, *arguments: Any) -> Any | None:
    """As ``_ask``; ``None`` where the device or driver has no such thing."""
    try:
        return _ask(call, *arguments)
    except Unavailable:
        return None


def _system() -> _System:
    driver = _text("nvmlSystemGetDriverVersion")
    threshold = _optional("nvmlSystemGetConfComputeKeyRotationThresholdInfo")
    advantage = None if threshold is None else threshold.attackerAdvantage
    modes, call = _modes()
    if modes is None:
        return _System(driver, None, None, None, "unknown", advantage)
    return _System(
        driver=driver,
        cc=_known(_FLAGS, modes.ccFeature, call),
        environment=_known(_ENVIRONMENTS, modes.environment, call),
        dev_tools=_known(_FLAGS, modes.devToolsMode, call),
        multi_gpu=_MULTI_GPU.get(getattr(modes, "multiGpuMode", None), "unknown"),
        key_rotation_threshold=advantage,
    )


def _confidential() -> bool | None:
    """Whether confidential computing is on; ``None`` from a driver of before it."""
    modes, call = _modes()
    return None if modes is None else _known(_FLAGS, modes.ccFeature, call)


def _modes() -> tuple[Any | None, str]:
    """What says in which mode the GPUs are, or ``None``; and the call that told."""
    try:
        return _settings()
    except Unavailable:
        call = "nvmlSystemGetConfComputeState"
        return _optional(call), call


def _settings() -> tuple[Any, str]:
    """c_nvmlSystemConfComputeSettings_v1_t; drivers from 550 on have it, and it alone names the multi-GPU mode."""
    call = "nvmlSystemGetConfComputeSettings"
    settings = pynvml.c_nvmlSystemConfComputeSettings_v1_t()
    code = _ask(call, ctypes.byref(settings))  # The binding hands the code on unchecked.
    if code != 0:
        raise failed(code, call)
    return settings, call


def _gpu(device: Any, system: _System, deadline: float) -> GpuInfo:
    if time.monotonic() >= deadline:
        raise timed_out()
    memory = _optional("nvmlDeviceGetConfComputeMemSizeInfo", device)
    return GpuInfo(
        uuid=_text("nvmlDeviceGetUUID", device, pattern=_UUID),
        bdf=_bdf(device),
        model=_text("nvmlDeviceGetName", device),
        architecture=_ARCHITECTURES.get(_optional("nvmlDeviceGetArchitecture", device), "other"),
        driver=system.driver,
        vbios=_text("nvmlDeviceGetVbiosVersion", device),
        cc=system.cc,
        cc_environment=system.environment,
        dev_tools=system.dev_tools,
        multi_gpu=system.multi_gpu,
        protected_memory=None if memory is None else memory.protectedMemSizeKib * _KIB,
        key_rotation_threshold=system.key_rotation_threshold,
    )


def _bdf(device: Any) -> str:
    """From the numbers: NVML's text has eight digits of domain. It names functions by number 0 only."""
    info = _ask("nvmlDeviceGetPciInfo", device)
    if info.bus > 0xFF or info.device > 0x1F:
        raise bad_answer("nvmlDeviceGetPciInfo")
    return pci_address(info.domain, info.bus, info.device)


def _chain(device: Any) -> bytes:
    call = "nvmlDeviceGetConfComputeGpuCertificate"
    answer = _ask(call, device)
    chain = _sized(answer.attestationCertChain, answer.attestationCertChainSize, call).rstrip(b"\0")
    try:
        labels = {label for label, _ in pem_blocks(chain)}
    except HostileInput:
        raise bad_answer(call) from None
    if labels != {"CERTIFICATE"}:
        raise bad_answer(call)
    return chain


def _sized(buffer: Any, size: int, call: str) -> bytes:
    if not 1 <= size <= len(buffer):
        raise bad_answer(call)
    return bytes(buffer)[:size]


def _text(call: str, *arguments: Any, pattern: re.Pattern[str] = _TEXT) -> str:
    answer = _ask(call, *arguments)
    if not isinstance(answer, str) or not pattern.fullmatch(answer):
        raise bad_answer(call)
    return answer


def _known(meanings: Mapping[int, Any], value: int, call: str) -> Any:
    if value not in meanings:
        raise bad_answer(call)
    return meanings[value]


def _pointer(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value
