"""systemd's side of a service: readiness, status line, watchdog pings, the sockets it hands over and those it keeps.

Protocol: sd_notify(3), sd_listen_fds(3). A datagram and a few environment variables need no library.
"""

from __future__ import annotations

import os
import socket
import time
from array import array
from collections.abc import Sequence
from typing import Final

_MAX_PASSED: Final = 4096


class Notifier:
    """Sends state to the service manager; silent where there is none."""

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        period = os.environ.pop("WATCHDOG_USEC", "")
        pid = os.environ.pop("WATCHDOG_PID", "")
        mine = not pid or pid == str(os.getpid())
        self.watchdog_seconds: float | None = int(period) / 1e6 if mine and period.isdigit() and int(period) else None
        """Period within which systemd wants a ping, ``None`` where it wants none."""
        room = os.environ.pop("FDSTORE", "")
        self.store_size = int(room) if self._address and room.isdigit() else 0
        """How many descriptors systemd keeps over a restart (``FileDescriptorStoreMax=``)."""
        self._status = ""

    def _send(self, *lines: str, fds: Sequence[int] = ()) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            try:
                message = "\n".join(lines).encode("utf-8", "replace")
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
                sock.sendmsg([message], rights, 0, self._address)
            except OSError:
                return  # a manager that does not listen must not stop the service

    def status(self, line: str) -> None:
        """Set the line that ``systemctl status`` shows; sent only when it changed."""
        line = " ".join(line.split())
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def ready(self) -> None:
        self._send("READY=1")

    def reloading(self) -> None:
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def ping(self) -> None:
        self._send("WATCHDOG=1")

    def keep(self, name: str, fds: Sequence[int]) -> None:
        """Have systemd keep copies, to be passed to the next run; it lets go of a socket whose peer has left."""
        self._send("FDSTORE=1", f"FDNAME={name}", fds=fds)

    def forget(self, name: str) -> None:
        """Have systemd close all that it keeps by this name."""
        self._send("FDSTOREREMOVE=1", f"FDNAME={name}")


def passed_descriptors() -> list[tuple[str, int]]:
    """Descriptors from systemd with their names (``FileDescriptorName=``, ``OpenFile=``, ``Notifier.keep``), in its
    order; no child inherits or sees them."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "")
    os.environ.pop("LISTEN_PIDFDID", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    labels = names.split(":") if names else []
    found: list[tuple[str, int]] = []
    for offset in range(min(int(count), _MAX_PASSED)):
        os.set_inheritable(3 + offset, False)
        found.append((labels[offset] if offset < len(labels) else f"unknown-{offset}", 3 + offset))
    return found
