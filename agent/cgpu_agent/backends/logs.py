"""Reads the measurement logs where firmware, kernel and systemd leave them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cgpu_agent.errors import Unavailable

MAX_LOG = 4 << 20
_LOCK_SECONDS = 2.0


def _read(descriptor: int) -> bytes:
    """Read to the end; securityfs states a size of 0, so ``stat`` is no guide."""
    parts: list[bytes] = []
    total = 0
    while part := os.read(descriptor, 1 << 16):
        parts.append(part)
        total += len(part)
        if total > MAX_LOG:
            raise Unavailable("LOG_TOO_LARGE", f"a measurement log is larger than {MAX_LOG} bytes")
    return b"".join(parts)


class SystemLogs:
    """Logs at fixed paths.

    Args:
        boot: places to look for the firmware log, the first readable one counts. Under systemd this is the credential
            ``eventlog`` (the kernel's own file is for root), whose content is ``none`` where there is no log.
        systemd: path of tpm2-measure.log.
        systemd_descriptor: the same, already open: the file is for root alone, so the unit has systemd open it
            (``OpenFile=``).
    """

    def __init__(self, boot: Sequence[Path], systemd: Path, systemd_descriptor: int | None = None) -> None:
        self._boot_paths = tuple(boot)
        self._systemd_path = systemd
        self._systemd_descriptor = systemd_descriptor
        self._boot: bytes | None = None

    def boot(self) -> bytes | None:
        if self._boot is None:
            self._boot = self._find_boot()
        return self._boot

    def _find_boot(self) -> bytes | None:
        for path in self._boot_paths:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                data = _read(descriptor)
            except OSError:
                continue
            finally:
                os.close(descriptor)
            if data not in (b"", b"none"):
                return data
        return None

    @contextlib.contextmanager
    def systemd(self) -> Iterator[bytes | None]:
        descriptor = self._systemd_descriptor
        if descriptor is None:
            try:
                descriptor = os.open(self._systemd_path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                yield None
                return
        try:
            _lock_shared(descriptor)
            os.lseek(descriptor, 0, os.SEEK_SET)
            yield _read(descriptor)
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            if descriptor != self._systemd_descriptor:
                os.close(descriptor)


def _lock_shared(descriptor: int) -> None:
    """Take systemd's own lock (systemd-pcrphase.service(8)) without ever blocking the TPM's thread for long."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Unavailable("LOG_LOCKED", "systemd's measurement log is locked", retry_after=1.0) from None
            time.sleep(0.01)
        else:
            return
