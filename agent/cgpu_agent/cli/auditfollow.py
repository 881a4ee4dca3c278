"""``cgpuctl audit follow``: the audit log as it grows, each record checked against the one before, over files."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from cgpu_agent.cli import output
from cgpu_agent.cli.audit import as_json, as_line
from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.wire.audit import MAX_RECORD, AuditHead, AuditRecord, follow, parse_record

_SHOWN_AT_FIRST: Final = 10
_POLL_SECONDS: Final = 0.25
_CHUNK: Final = 16 * MAX_RECORD


def run(arguments: argparse.Namespace) -> int:
    log = GrowingLog(arguments.log)
    try:
        for record in deque(log.grown(), _SHOWN_AT_FIRST):
            _tell(record, json=arguments.json)
        while True:
            sys.stdout.flush()
            time.sleep(_POLL_SECONDS)
            for record in log.grown():
                _tell(record, json=arguments.json)
    except HostileInput as error:
        if arguments.json:
            output.emit_json(
                {"result": "refused", "reason": {"slug": error.slug, "detail": error.message}}, indent=None
            )
        output.complain(error)
        return output.EXIT_REFUSED
    finally:
        log.close()


def _tell(record: AuditRecord, *, json: bool) -> None:
    if json:
        output.emit_json(as_json(record), indent=None)
    else:
        output.say(output.printable(as_line(record)))


class GrowingLog:
    """A log that an agent writes; holds no more of it than one chunk.

    Args:
        path: the file that grows. Full ones stand beside it as ``audit.<first record>.jsonl``.

    Raises:
        Misuse: ``NO_FILE``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._head: AuditHead | None = None
        file = _open(path)
        if file is None:
            raise Misuse("NO_FILE", f"{path}: there is no such file")
        self._file = file
        self._offset = 0

    def grown(self) -> Iterator[AuditRecord]:
        """The records that came since the last time.

        Raises:
            HostileInput: as ``follow`` and ``parse_record``; ``AUDIT_BROKEN`` also where records that were read are
                gone, ``AUDIT_TORN`` where a file that grows no more ends inside a record.
        """
        yield from self._whole()
        while (after := self._next()) is not None:
            try:
                # It was renamed before its successor was found: what it holds by now is all that it will ever hold.
                yield from self._whole()
                if self._size() != self._offset:
                    raise HostileInput("AUDIT_TORN", "a full file of the audit log ends inside a record")
            finally:
                self._file.close()
                self._file, self._offset = after, 0
            yield from self._whole()

    def close(self) -> None:
        self._file.close()

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _whole(self) -> Iterator[AuditRecord]:
        """What whole records there are from here to the end of this file."""
        while True:
            if self._size() < self._offset:
                raise HostileInput("AUDIT_BROKEN", "records that were in the audit log are gone")
            # Always from the last whole record on: an agent that starts cuts off what a crash left of the next one.
            data = os.pread(self._file.fileno(), _CHUNK, self._offset)
            lines = data[: data.rfind(b"\n") + 1]
            if len(data) - len(lines) > MAX_RECORD:
                raise HostileInput("AUDIT_TORN", "the audit log holds what is longer than a record")
            if not lines:
                return
            if self._head is None:  # the files before may be gone: a log may begin anywhere
                first = parse_record(lines.split(b"\n", 1)[0])
                self._head = AuditHead(first.sequence - 1, first.previous)
            records, self._head = follow(lines, self._head)
            self._offset += len(lines)
            yield from records

    def _next(self) -> BinaryIO | None:
        """The file after this one; ``None`` while this one is the newest."""
        newest = _open(self._path)
        if newest is None:
            if os.fstat(self._file.fileno()).st_nlink == 0:
                raise HostileInput("AUDIT_BROKEN", "the audit log was removed")
            return None
        if self._is(newest):
            newest.close()
            return None
        # Others may have been filled meanwhile. Asked after opening the newest, so that none is skipped.
        number = 0 if self._head is None else self._head.sequence + 1
        kept = _open(self._path.with_name(f"audit.{number:016d}.jsonl"))
        if kept is None or self._is(kept):
            return newest
        newest.close()
        return kept

    def _is(self, file: BinaryIO) -> bool:
        return os.path.sameopenfile(file.fileno(), self._file.fileno())


def _open(path: Path) -> BinaryIO | None:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Misuse("NO_FILE", f"{path}: {error.strerror}") from error
