"""The audit log: one line of strict JSON per decision, each bound to the one before by its hash.

``hash = SHA-256("cgpu/audit/1" || 00 || line without its newline)``; a record holds its predecessor's hash, the first
one 32 zero bytes. Sequence number and hash of the newest record (the head) are in every manifest, so whoever keeps a
bundle can later tell whether the records up to it were altered, dropped or replaced.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.strictjson import Fields

MAX_RECORD: Final = 8192
_MAX_TIME: Final = 253_402_300_799
"""The end of the year 9999: readers' calendars go no further."""
GENESIS: Final = bytes(32)
"""What the first record names as its predecessor."""


@dataclass(frozen=True, slots=True)
class AuditHead:
    """The newest record: its sequence number (-1 when there is none) and hash."""

    sequence: int
    digest: bytes


EMPTY: Final = AuditHead(-1, GENESIS)


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One decision.

    Attributes:
        sequence: from 0, without gaps, over all boots.
        previous: hash of the record before.
        time: seconds by the VM's clock: untrusted.
        boot_id: the kernel's boot id.
        event: what kind of record, e.g. ``call``, ``agent-start``.
        data: what happened; its keys depend on ``event``.
    """

    sequence: int
    previous: bytes
    time: int
    boot_id: str
    event: str
    data: Mapping[str, Any]

    def line(self) -> bytes:
        """The record's line, newline included."""
        body = {
            "boot_id": self.boot_id,
            "data": dict(self.data),
            "event": self.event,
            "previous": self.previous.hex(),
            "sequence": self.sequence,
            "time": self.time,
        }
        return strictjson.dumps(body) + b"\n"


def digest_of(line: bytes) -> bytes:
    """Hash of a record from its line, with or without the newline."""
    return hashlib.sha256(b"cgpu/audit/1\0" + line.removesuffix(b"\n")).digest()


def parse_record(line: bytes) -> AuditRecord:
    """Parse one line. Raises ``HostileInput``."""
    fields = Fields(strictjson.loads(line, "audit record", MAX_RECORD), "audit record")
    data = fields.raw("data")
    if not isinstance(data, dict):
        raise fields.fail("data is not an object")
    record = AuditRecord(
        fields.integer("sequence", 0, 1 << 53),
        fields.hex("previous", 32, 32),
        fields.integer("time", 0, _MAX_TIME),
        fields.text("boot_id", 36),
        fields.text("event", 64),
        data,
    )
    fields.end()
    return record


def follow(lines: bytes, start: AuditHead) -> tuple[list[AuditRecord], AuditHead]:
    """Check a chain.

    Args:
        lines: whole lines of an audit file.
        start: the head before the first of them; ``EMPTY`` for a log from its beginning.

    Returns:
        The records and the new head.

    Raises:
        HostileInput: ``AUDIT_TORN`` (no newline at the end), ``AUDIT_BROKEN`` (a record does not follow the last),
            and what ``parse_record`` raises.
    """
    if lines and not lines.endswith(b"\n"):
        raise HostileInput("AUDIT_TORN", "the audit log ends inside a record")
    records: list[AuditRecord] = []
    head = start
    for line in lines.split(b"\n")[:-1]:
        record = parse_record(line)
        if record.sequence != head.sequence + 1 or record.previous != head.digest:
            raise HostileInput("AUDIT_BROKEN", f"record {record.sequence} does not follow record {head.sequence}")
        records.append(record)
        head = AuditHead(record.sequence, digest_of(line))
    return records, head
