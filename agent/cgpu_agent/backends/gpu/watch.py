"""Two threads that look for what makes a GPU's verdict stale: one at sysfs, one in the driver's event wait.

Apart, because a driver that hangs is itself news, and the kernel still tells what is plugged.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, Protocol

from cgpu_agent.backends.base import GpuEvent
from cgpu_agent.backends.gpu.hub import Hub
from cgpu_agent.backends.gpu.sysfs import LoadedDriver, loaded_driver, nvidia_functions
from cgpu_agent.errors import DeviceFault, Unavailable

_XID_SLICE: Final = 0.5
"""Seconds of one wait in the driver, at most."""
_XID_STUCK: Final = 30.0
"""Seconds after which that thread's silence is an outage; a driver may need most of it to start its GPUs."""
_CLOSE_GRACE: Final = 2.0


class Xids(Protocol):
    """XID errors, as the driver reports them."""

    @property
    def stale(self) -> bool:
        """Whether this watch is to be given up, and a new one opened."""

    def wait(self, milliseconds: int) -> tuple[str | None, int] | None:
        """The next (PCI address, number), or ``None`` when there was none in time."""


class Watch:
    """Publishes to a hub until it is closed; starts at once, so that no change after its making is missed.

    Args:
        hub: takes the events.
        sysfs: where sysfs is mounted.
        open_xids: has the driver report XIDs, on the thread that then waits for them.
        changed: called when the devices or the driver are others than before.
        poll: seconds between two looks at sysfs.
        retry: seconds between two attempts to have the driver report XIDs.
    """

    def __init__(
        self,
        hub: Hub,
        sysfs: Path,
        open_xids: Callable[[], AbstractContextManager[Xids]],
        changed: Callable[[], None],
        *,
        poll: float,
        retry: float,
    ) -> None:
        self._hub: Final = hub
        self._sysfs: Final = sysfs
        self._open_xids: Final = open_xids
        self._changed: Final = changed
        self._poll: Final = poll
        self._retry: Final = retry
        self._closing: Final = threading.Event()
        self._driver: LoadedDriver | None = loaded_driver(sysfs)
        self._functions: frozenset[tuple[str, int]] = frozenset()
        self._look_at_pci(first=True)
        self._beat = self._xid_beat = time.monotonic()
        self._threads: Final = [
            threading.Thread(target=self._watch_sysfs, name="gpu-sysfs", daemon=True),
            threading.Thread(target=self._watch_xids, name="gpu-xid", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def heartbeat_age(self, now: float) -> float:
        """Of the thread at sysfs. The other may hang in the driver, and that is an event, not an end."""
        return max(0.0, now - self._beat)

    def close(self) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join(_CLOSE_GRACE)

    def _watch_sysfs(self) -> None:
        while not self._closing.wait(self._poll):
            self._beat = time.monotonic()
            changed = self._look_at_driver()
            if self._look_at_pci() or changed:
                self._changed()
            if self._beat - self._xid_beat > _XID_STUCK:
                self._hub.lose("xid", "the GPU driver hangs, its errors are not seen")

    def _look_at_driver(self) -> bool:
        before, self._driver = self._driver, loaded_driver(self._sysfs)
        if self._driver == before:
            return False
        now = f"version {self._driver.version}" if self._driver else "not loaded"
        self._hub.publish(GpuEvent("driver-reloaded", None, f"the GPU driver is {now}"))
        return True

    def _look_at_pci(self, *, first: bool = False) -> bool:
        try:
            now = frozenset(nvidia_functions(self._sysfs).items())
        except DeviceFault as fault:
            self._hub.lose("pci", fault.message)
            return False
        self._hub.regain("pci")
        before, self._functions = self._functions, now
        if first:
            return False
        for bdf, _ in sorted(before - now):
            self._hub.publish(GpuEvent("vanished", bdf, "a device left the PCI bus"))
        for bdf, _ in sorted(now - before):
            self._hub.publish(GpuEvent("appeared", bdf, "a device joined the PCI bus"))
        return now != before

    def _watch_xids(self) -> None:
        while not self._closing.is_set():
            try:
                with self._open_xids() as xids:
                    self._follow(xids)
            except (DeviceFault, Unavailable) as error:
                self._xid_beat = time.monotonic()
                self._hub.lose("xid", error.message)
                self._closing.wait(self._retry)
            else:
                self._hub.lose("xid", "the GPU driver is opened anew, its errors are not seen meanwhile")

    def _follow(self, xids: Xids) -> None:
        while not xids.stale and not self._closing.is_set():
            self._xid_beat = time.monotonic()
            found = xids.wait(int(min(_XID_SLICE, self._poll) * 1000))
            self._hub.regain("xid")
            if found is not None:
                bdf, number = found
                self._hub.publish(GpuEvent("xid", bdf, f"XID {number}"))
