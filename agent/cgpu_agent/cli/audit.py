"""``cgpuctl audit``: read the audit log, and check that it only ever grew since a bundle was made."""

from __future__ import annotations

import argparse
from datetime import datetime, timezone

from cgpu_agent.cli import output
from cgpu_agent.cli.inputs import read_file
from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.wire.audit import EMPTY, AuditHead, AuditRecord, digest_of, follow, parse_record
from cgpu_agent.wire.bundle import MAX_BUNDLE, parse_bundle
from cgpu_agent.wire.manifest import parse_manifest

_MAX_LOG = 256 << 20


def run(arguments: argparse.Namespace) -> int:
    try:
        records, head = _read(arguments)
        if arguments.verb == "verify":
            for path in arguments.since:
                _require_anchor(records, read_file(path, MAX_BUNDLE + 1), str(path))
    except HostileInput as error:
        if arguments.json:
            output.emit_json({"result": "refused", "reason": {"slug": error.slug, "detail": error.message}})
        output.complain(error)
        return output.EXIT_REFUSED
    if arguments.json:
        output.emit_json(
            {
                "result": "pass",
                "head": {"sequence": head.sequence, "digest": head.digest.hex()},
                "records": [as_json(record) for _, record in records],
            }
        )
    elif arguments.verb == "show":
        for _, record in records:
            output.say(output.printable(as_line(record)))
    else:
        since = f", grown only since {len(arguments.since)} bundles" if arguments.since else ""
        first = records[0][1].sequence if records else 0
        part = f" from record {first} on" if first else ""
        output.say(f"{output.coloured('whole', 'ok')}: {len(records)} records{part}{since}; head {head.digest.hex()}")
    return output.EXIT_PASS


def _read(arguments: argparse.Namespace) -> tuple[list[tuple[AuditHead, AuditRecord]], AuditHead]:
    """All records with the head each one made. Files are given oldest first; the first may begin anywhere."""
    data = b"".join(read_file(path, _MAX_LOG) for path in arguments.log)
    if not data:
        return [], EMPTY
    first = parse_record(data.split(b"\n", 1)[0])
    start = AuditHead(first.sequence - 1, first.previous)
    records, head = follow(data, start)
    lines = data.split(b"\n")[: len(records)]
    return [
        (AuditHead(record.sequence, digest_of(line)), record) for line, record in zip(lines, records, strict=True)
    ], head


def _require_anchor(records: list[tuple[AuditHead, AuditRecord]], data: bytes, name: str) -> None:
    """The head that a bundle's manifest holds must be in the log. The bundle itself is not judged here.

    Raises:
        HostileInput: ``AUDIT_FORKED`` (another record stands in its place), ``AUDIT_SHORT`` (the log ends before it).
        Misuse: ``NO_ANCHOR`` when the bundle holds no head.
    """
    anchor = parse_manifest(parse_bundle(data).manifest).audit
    if anchor is None:
        raise Misuse("NO_ANCHOR", f"{name}: this bundle was made without an audit log")
    for wanted in (anchor.head, anchor.quoted):
        if wanted == EMPTY:
            continue
        found = next((head for head, _ in records if head.sequence == wanted.sequence), None)
        if found is None:
            raise HostileInput("AUDIT_SHORT", f"{name}: record {wanted.sequence} is not in the log")
        if found != wanted:
            raise HostileInput("AUDIT_FORKED", f"{name}: record {wanted.sequence} is another than was quoted")


def as_json(record: AuditRecord) -> dict[str, object]:
    """A record for programs."""
    return {
        "boot_id": record.boot_id,
        "data": dict(record.data),
        "event": record.event,
        "sequence": record.sequence,
        "time": record.time,
    }


def as_line(record: AuditRecord) -> str:
    """A record for people; it may hold what a terminal must not be sent."""
    when = datetime.fromtimestamp(record.time, timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")
    data = dict(record.data)
    caller = data.pop("caller", None)
    if isinstance(caller, dict):
        data |= {"uid": caller.get("uid"), "unit": caller.get("unit")}
    told = " ".join(f"{key}={value}" for key, value in sorted(data.items()))
    return f"{record.sequence:>6}  {when}  {record.event:<12}  {told}"
