"""The GPU sessions as a state machine without I/O or clock: when the gate to the GPUs may be open, and why it is not.

    discovered -> attesting -> trusted -> stale -> attesting ...
                           \\-> rejected            lost, from anywhere

The gate is one for all GPUs. It may be open only while every GPU is trusted and the inventory is the one that was
judged. Any doubt closes it at once and spoils the attestation that is running: what was judged before the doubt says
nothing of what came after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from cgpu_agent.backends.base import GpuInfo

Phase = Literal["discovered", "attesting", "trusted", "stale", "rejected", "lost"]
Gate = Literal["closed", "opening", "open"]
Outcome = Literal["opening", "kept", "spoilt"]

MAX_LOST: Final = 64
"""Devices remembered after they vanished: a host can plug and unplug without end."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a device, or all of them, may not be used: a stable slug and a sentence that anybody may read."""

    slug: str
    message: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """A device that passed.

    Attributes:
        identity: its UEID, from its certificates.
        at: host's time of the judgement, seconds since the epoch; untrusted.
        until: end of the trust, on the monotonic clock.
        simulated: a root other than NVIDIA's vouches for it.
        chain: SHA-256 of the certificates (PEM, leaf first) that were accepted.
    """

    identity: str
    at: float
    until: float
    simulated: bool
    chain: bytes = b""


@dataclass(frozen=True, slots=True)
class Session:
    """One device. ``verdict`` is there exactly while it is trusted; ``reason`` says why it is not."""

    info: GpuInfo
    phase: Phase
    reason: Reason | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attestation of all devices; good for nothing once a doubt came in between."""

    devices: tuple[GpuInfo, ...]
    doubts: int


STARTED: Final = Reason("GPU_NOT_ATTESTED", "the GPUs were not attested since the agent started")
_AMISS: Final = Reason("GPU_JUDGEMENT", "the judgement does not name exactly the devices that were asked")
_DUPLICATE: Final = Reason("DUPLICATE_DEVICE", "two GPUs have one identity")
CHANGED: Final = Reason("GPU_INVENTORY_CHANGED", "the GPUs are not those that were attested")
IDENTITY: Final = Reason("GPU_IDENTITY_CHANGED", "another device answers under a GPU's name")
EXPIRED: Final = Reason("GPU_VERDICT_EXPIRED", "the verdict on the GPUs has expired")


def likeness(info: GpuInfo) -> tuple[object, ...]:
    """What must not change while a device is trusted."""
    mode = (info.cc, info.cc_environment, info.dev_tools, info.multi_gpu)
    return (info.uuid, info.bdf, info.architecture, info.driver, info.vbios, *mode)


def same(one: Sequence[GpuInfo], other: Sequence[GpuInfo]) -> bool:
    """Whether two inventories are the same devices in the same state, in any order."""
    return sorted(map(repr, map(likeness, one))) == sorted(map(repr, map(likeness, other)))


class GpuState:
    """The machine. Whoever drives it closes the devices' ready state whenever ``gate`` is ``closed``.

    Attributes:
        gate: whether the devices' ready state may be set.
        why: why the gate is not open.
        on_doubt: told of every drop at once, before the ready state is cleared: what rests on the GPUs ends first.
        epoch: grows with every drop and every change of driver or identity; what was decided in one epoch is void in
            the next.
    """

    def __init__(self) -> None:
        self.on_doubt: Callable[[Reason], None] = lambda _: None
        self.gate: Gate = "closed"
        self.why: Reason = STARTED
        self.epoch = 0
        self._doubts = 0
        self._sessions: dict[str, Session] = {}
        self._inventory: tuple[GpuInfo, ...] = ()

    @property
    def sessions(self) -> tuple[Session, ...]:
        """All devices, lost ones too, by PCI address."""
        return tuple(sorted(self._sessions.values(), key=lambda each: (each.info.bdf, each.info.uuid)))

    @property
    def inventory(self) -> tuple[GpuInfo, ...]:
        """The devices of the newest attempt."""
        return self._inventory

    def current(self, attempt: Attempt) -> bool:
        """Whether nothing cast doubt since the attempt began."""
        return attempt.doubts == self._doubts

    def doubt(self, reason: Reason, *, lost: str | None = None) -> None:
        """Trust no device any more; ``lost`` is the PCI address or uuid of one that is gone."""
        self._doubts += 1
        self.epoch += 1
        self.gate = "closed"
        self.why = reason
        for uuid, session in self._sessions.items():
            if lost is not None and lost in (session.info.bdf, uuid):
                self._sessions[uuid] = Session(session.info, "lost", reason)
            elif session.phase in ("discovered", "attesting", "trusted"):
                self._sessions[uuid] = Session(session.info, "stale", reason)
        self.on_doubt(reason)

    def see(self, devices: Sequence[GpuInfo]) -> bool:
        """Compare with what is there now; false, and doubt, if it is not what was there before."""
        if same(devices, self._inventory):
            return True
        self.doubt(CHANGED if self._inventory else STARTED)
        self._take(devices)
        return False

    def expire(self, now: float) -> bool:
        """End what has reached its time; true if anything did."""
        if not any(each.verdict is not None and each.verdict.until <= now for each in self._sessions.values()):
            return False
        self.doubt(EXPIRED)
        return True

    def begin(self, devices: Sequence[GpuInfo]) -> Attempt:
        """Begin to attest these devices, all that there are. While the gate is open, they stay trusted meanwhile."""
        self.see(devices)
        if self.gate == "closed":
            for info in self._inventory:
                self._sessions[info.uuid] = Session(info, "attesting")
        return Attempt(self._inventory, self._doubts)

    def _take(self, devices: Sequence[GpuInfo]) -> None:
        known = {info.uuid for info in devices}
        for uuid, session in self._sessions.items():
            if uuid not in known and session.phase != "lost":
                self._sessions[uuid] = Session(session.info, "lost", Reason("GPU_LOST", "the GPU is gone"))
        for info in devices:
            self._sessions.pop(info.uuid, None)
            self._sessions[info.uuid] = Session(info, "discovered")
        lost = [uuid for uuid, session in self._sessions.items() if session.phase == "lost"]
        for uuid in lost[: max(0, len(lost) - MAX_LOST)]:
            del self._sessions[uuid]
        self._inventory = tuple(devices)

    def refuse(self, attempt: Attempt, whole: Reason, devices: Mapping[str, Reason]) -> None:
        """The attempt failed: ``whole`` for all, ``devices`` by uuid for those at fault."""
        if not self.current(attempt):
            return  # what it found is older than the doubt, which closed the gate already
        self.doubt(whole)
        for uuid, reason in devices.items():
            if uuid in self._sessions:
                self._sessions[uuid] = Session(self._sessions[uuid].info, "rejected", reason)

    def accept(self, attempt: Attempt, verdicts: Mapping[str, Verdict]) -> Outcome:
        """Every device passed, by uuid.

        Returns:
            ``opening``: the gate may be opened, then ``confirm``; ``kept``: it was open and stays so; ``spoilt``: it
            is closed, and the devices must be attested again.
        """
        if not self.current(attempt):
            return "spoilt"
        if not verdicts or verdicts.keys() != {info.uuid for info in attempt.devices}:
            self.refuse(attempt, _AMISS, {})
            return "spoilt"
        if len({verdict.identity for verdict in verdicts.values()}) != len(verdicts):
            self.refuse(attempt, _DUPLICATE, dict.fromkeys(verdicts, _DUPLICATE))
            return "spoilt"
        before = {uuid: each.verdict.identity for uuid, each in self._sessions.items() if each.verdict is not None}
        if any(before.get(uuid, verdict.identity) != verdict.identity for uuid, verdict in verdicts.items()):
            self.refuse(attempt, IDENTITY, {})
            return "spoilt"
        for info in attempt.devices:
            self._sessions[info.uuid] = Session(info, "trusted", None, verdicts[info.uuid])
        if self.gate == "open":
            return "kept"
        self.gate = "opening"
        return "opening"

    def confirm(self, attempt: Attempt, devices: Sequence[GpuInfo]) -> bool:
        """The ready state is set, and these are the devices seen since: may it stay so?"""
        if not self.current(attempt) or self.gate == "closed":
            return False
        if not self.see(devices):
            return False
        self.gate = "open"
        return True
