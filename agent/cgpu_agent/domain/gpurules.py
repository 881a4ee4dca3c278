"""What the agent demands of GPUs beside a good report: their modes, which no signature covers, and quiet errors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from cgpu_agent.backends.base import GpuEvent, GpuInfo
from cgpu_agent.domain.gpustate import Reason

_XID = re.compile(r"\d{1,4}")

APPLICATION_XIDS: Final = frozenset({13, 31, 43, 45})
"""Errors of an application's own making (NVIDIA's XID catalogue): any workload causes them at will, and they say
nothing of the device. Every other XID, and one that cannot be read, casts doubt on it."""


@dataclass(frozen=True, slots=True)
class GpuRules:
    """What holds for the sessions.

    Attributes:
        allow_simulated: trust devices that a root other than NVIDIA's vouches for.
        count: how many GPUs there must be; 0 = any number.
        reattest_seconds: a verdict ends after this time, and is renewed before.
        report_seconds: what one device may take for a report.
    """

    allow_simulated: bool = False
    count: int = 0
    reattest_seconds: float = 3600.0
    report_seconds: float = 30.0


def mode_fault(info: GpuInfo, rules: GpuRules) -> Reason | None:
    """Why this mode is not to be trusted with data; ``None`` = it is. What the driver cannot tell is not trusted."""
    environments = ("prod", "sim") if rules.allow_simulated else ("prod",)
    if info.cc is not True:
        return Reason("GPU_CC_OFF", "confidential computing is not on: data would cross the bus in clear")
    if info.cc_environment not in environments:
        return Reason("GPU_CC_NOT_PRODUCTION", "the confidential-computing environment is not a production one")
    if info.dev_tools is not False:
        return Reason("GPU_DEV_TOOLS", "developer tools are not off: they open a confidential GPU to its debugger")
    if info.multi_gpu not in ("none", "protected-pcie", "nvle"):
        return Reason("GPU_MODE_UNKNOWN", "the driver reports a multi-GPU mode that this agent does not know")
    return None


def doubt_of(event: GpuEvent) -> Reason | None:
    """What an event means for trust; ``None`` = nothing."""
    if event.kind == "xid":
        found = _XID.search(event.detail)
        number = int(found.group()) if found else None
        if number in APPLICATION_XIDS:
            return None
        return Reason("GPU_XID", f"the GPU reported an error (XID {'unknown' if number is None else number})")
    return {
        "appeared": Reason("GPU_APPEARED", "a GPU appeared"),
        "vanished": Reason("GPU_LOST", "a GPU vanished"),
        "driver-reloaded": Reason("GPU_DRIVER_RELOADED", "the GPU driver was loaded anew"),
        "watch-lost": Reason("GPU_WATCH_LOST", "what happened to the GPUs may have been missed"),
        "ready-lost": Reason("GPU_READY_CLEARED", "the helper that held the GPUs' ready state let it go"),
    }[event.kind]
