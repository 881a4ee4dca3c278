"""Keeps the audit log: what was decided, about whom, by which rule; chained, so that its history cannot be rewritten.

Actions that let a caller speak as this VM are recorded, durably, before they happen. Refusals are counted per caller
and minute instead, so that nobody can fill the disk by being refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cgpu_agent.backends.base import Clock
from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.store import Store, sync_folder
from cgpu_agent.errors import HostileInput, Unavailable
from cgpu_agent.wire.audit import EMPTY, MAX_RECORD, AuditHead, AuditRecord, digest_of, follow, parse_record

_NAME = "audit.jsonl"
MAX_FILE = 16 << 20
DENIAL_SECONDS = 60.0
_MAX_DENIALS = 1024


class AuditLog:
    """The log in one directory: ``audit.jsonl``, and the full files before it as ``audit.<first record>.jsonl``.

    Args:
        folder: of mode 0700; lives over boots.
        boot_id: the kernel's boot id.
        clock: for the (untrusted) time of records.

    Raises:
        Unavailable: ``STATE_DIRECTORY``; ``AUDIT_BROKEN`` when the files do not hold one chain: an operator must
            look, and move them away.
    """

    def __init__(self, folder: Path, boot_id: str, clock: Clock) -> None:
        self._path = folder / _NAME
        self._folder = folder
        self._boot_id = boot_id
        self._clock = clock
        Store(folder)  # refuses a directory that others may enter
        # One thread writes, in the order of the calls: a caller who is gone leaves its write running, and the next
        # record must not be chained beside it.
        self._writer = ThreadPoolExecutor(1, "audit")
        self._writing_since: float | None = None
        self._denials: Counter[tuple[int, str, str]] = Counter()
        self._denials_since = clock.monotonic()
        try:
            self.head = self._recover()
        except (HostileInput, OSError) as error:
            raise Unavailable(
                "AUDIT_BROKEN", "the audit log is damaged; move it away and keep it as evidence"
            ) from error
        self._torn: int | None = None
        self.quoted: AuditHead = EMPTY
        """The head that the newest manifest holds."""

    def _recover(self) -> AuditHead:
        """Check the current file against itself and the one before; drop a record that a crash cut short."""
        data = self._path.read_bytes() if self._path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            with self._path.open("rb+") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())
        if not whole:
            return self._kept_head()
        start = self._kept_head()
        if start == EMPTY:  # no earlier files, or they were archived
            first = parse_record(whole.split(b"\n", 1)[0])
            start = AuditHead(first.sequence - 1, first.previous)
        _, head = follow(whole, start)
        return head

    def _kept_head(self) -> AuditHead:
        kept = sorted(self._folder.glob("audit.[0-9]*.jsonl"))
        if not kept:
            return EMPTY
        last = kept[-1].read_bytes().rstrip(b"\n").rpartition(b"\n")[2]
        return AuditHead(parse_record(last).sequence, digest_of(last))

    async def record(self, event: str, data: Mapping[str, Any]) -> int:
        """Write one record, wait until it is on disk, and return its sequence number.

        Raises:
            Unavailable: ``AUDIT_UNAVAILABLE``: what needs its record must then not happen.
        """
        return await self._record([(event, dict(data))])

    async def _record(self, entries: list[tuple[str, dict[str, Any]]]) -> int:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._writer, self._append, entries)
        except OSError as error:
            raise Unavailable("AUDIT_UNAVAILABLE", "the audit log cannot be written", retry_after=5.0) from error

    def heartbeat_age(self, _now: float) -> float:
        """Seconds that the writer has been at one write; 0 while it is at none."""
        since = self._writing_since
        return 0.0 if since is None else self._clock.monotonic() - since

    def _append(self, entries: list[tuple[str, dict[str, Any]]]) -> int:
        self._writing_since = self._clock.monotonic()
        try:
            return self._write(entries)
        finally:
            self._writing_since = None

    def _write(self, entries: list[tuple[str, dict[str, Any]]]) -> int:
        lines, head, now = b"", self.head, int(self._clock.time())
        for event, data in entries:
            line = AuditRecord(head.sequence + 1, head.digest, now, self._boot_id, event, data).line()
            if len(line) > MAX_RECORD:  # or nobody could read the log any more, this agent's next start included
                raise Unavailable("AUDIT_UNAVAILABLE", "the record of this call is longer than the audit log takes")
            lines += line
            head = AuditHead(head.sequence + 1, digest_of(line))
        self._mend()
        self._rotate()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._path, flags, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            try:
                if os.write(descriptor, lines) != len(lines):
                    raise OSError("short write")
                os.fsync(descriptor)
                if size == 0:
                    sync_folder(self._folder)  # or a power cut takes a new file, name and all
            except OSError:
                self._torn = size  # all of it or nothing: now, or before the next
                with contextlib.suppress(OSError):
                    self._mend()
                raise
        finally:
            os.close(descriptor)
        self.head = head
        return head.sequence

    def _mend(self) -> None:
        """Cut off what a failed write left behind; where that fails, too, nothing is written until it can be done."""
        if self._torn is not None:
            os.truncate(self._path, self._torn)
            self._torn = None

    def _rotate(self) -> None:
        if not self._path.exists() or self._path.stat().st_size < MAX_FILE:
            return
        with self._path.open("rb") as file:
            first = parse_record(file.readline(MAX_RECORD))
        self._path.rename(self._folder / f"audit.{first.sequence:016d}.jsonl")

    def denied(self, caller: Caller | None, method: str, reason: str) -> None:
        """Count a refusal; ``flush_denials`` writes the counts."""
        self._count((-1 if caller is None else caller.uid, method, reason), 1)

    def _count(self, key: tuple[int, str, str], count: int) -> None:
        if key not in self._denials and len(self._denials) >= _MAX_DENIALS:
            key = (-1, "", "OTHER")
        self._denials[key] += count

    async def flush_denials(self, *, now: bool = False) -> bool:
        """Write what was refused in the last minute, a record per caller, method and reason; false if nothing was."""
        moment = self._clock.monotonic()
        if not self._denials or (not now and moment - self._denials_since < DENIAL_SECONDS):
            return False
        self._denials_since = moment
        counted, self._denials = self._denials, Counter()
        try:
            await self._record(
                [
                    ("denied", {"count": count, "method": method, "reason": reason, "uid": uid})
                    for (uid, method, reason), count in counted.items()
                ]
            )
        except Unavailable:
            for key, count in counted.items():
                self._count(key, count)
            raise
        return True
