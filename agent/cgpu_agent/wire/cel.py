"""Logs of what was measured after the firmware's: systemd's and the agent's own, both JSON text sequences.

Framing: RFC 7464 (RS, JSON, LF per record). Records follow the JSON encoding of the TCG "Canonical Event Log Format".
A digest in a log is a claim: what counts is that it, extended in order, leads to the quoted PCR. For the agent's own
records the digest is recomputed from the content too: a record cannot say one thing and have measured another.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.strictjson import Fields, b64

MAX_LOG = 4 << 20
MAX_RECORDS = 16384
MAX_CONTENT = 4096

Author = Literal["agent", "caller"]

_TAGS: dict[str, bytes] = {"agent": b"cgpu/cel/agent/1", "caller": b"cgpu/cel/caller/1"}
_CONTENT_TYPES: dict[str, Author] = {"cgpu-agent": "agent", "cgpu-caller": "caller"}


@dataclass(frozen=True, slots=True)
class Record:
    """One record of the agent log.

    Attributes:
        sequence: position from 0, without gaps.
        pcr: index of the agent register.
        author: ``agent`` for the agent's own words, ``caller`` for a MeasureEvent.
        content: the exact bytes that were hashed: one strict JSON object.
    """

    sequence: int
    pcr: int
    author: Author
    content: bytes

    @property
    def digest(self) -> bytes:
        """SHA-256(tag || 00 || content): the tag keeps a caller's bytes from ever hashing to an agent's record."""
        return hashlib.sha256(_TAGS[self.author] + b"\0" + self.content).digest()

    def encode(self) -> bytes:
        """The framed record."""
        body = {
            "content": b64(self.content),
            "content_type": f"cgpu-{self.author}",
            "digests": [{"digest": self.digest.hex(), "hashAlg": "sha256"}],
            "pcr": self.pcr,
            "recnum": self.sequence,
        }
        return b"\x1e" + strictjson.dumps(body) + b"\n"


@dataclass(frozen=True, slots=True)
class SystemdRecord:
    """One PCR record of systemd's tpm2-measure.log: what was extended, and the text it claims to be."""

    pcr: int
    digests: dict[str, bytes]
    event_type: str
    text: str


def _sequence(data: bytes, what: str) -> list[bytes]:
    if len(data) > MAX_LOG:
        raise HostileInput("TOO_LARGE", f"{what}: {len(data)} bytes, at most {MAX_LOG} are allowed")
    if not data:
        return []
    if data[:1] != b"\x1e" or data[-1:] != b"\n":
        raise HostileInput("BAD_FRAMING", f"{what}: not a whole JSON text sequence (RFC 7464)")
    parts = data[1:].split(b"\x1e")
    if len(parts) > MAX_RECORDS:
        raise HostileInput("TOO_LARGE", f"{what}: {len(parts)} records, at most {MAX_RECORDS} are allowed")
    for number, part in enumerate(parts):
        if part[-1:] != b"\n":
            raise HostileInput("BAD_FRAMING", f"{what}: record {number} is cut short")
    return parts


def _digests(value: Any, fields: Fields) -> dict[str, bytes]:
    if not isinstance(value, list) or not 1 <= len(value) <= 8:
        raise fields.fail("digests is not a list of 1 to 8")
    found: dict[str, bytes] = {}
    for item in value:
        entry = Fields(item, "digest")
        name = entry.text("hashAlg", 16)
        if name in found:
            raise fields.fail(f"two digests for {name!r}")
        found[name] = entry.hex("digest", 20, 64)
        entry.end()
    return found


def parse_agent_log(data: bytes) -> tuple[Record, ...]:
    """Parse the agent's log; sequence numbers count from 0, every digest is recomputed from its content.

    Raises:
        HostileInput: ``BAD_FRAMING``, ``BAD_FIELD``, ``BAD_JSON``, ``DUPLICATE_KEY``, ``UNKNOWN_KEY``, ``TOO_LARGE``,
            ``DIGEST_MISMATCH``.
    """
    records: list[Record] = []
    for number, part in enumerate(_sequence(data, "agent log")):
        what = f"agent log record {number}"
        fields = Fields(strictjson.loads(part, what, 4 * MAX_CONTENT), what)
        author = _CONTENT_TYPES[fields.choice("content_type", frozenset(_CONTENT_TYPES))]
        fields_pcr = fields.integer("pcr", 0, 23)
        record = Record(
            fields.integer("recnum", 0, MAX_RECORDS), fields_pcr, author, fields.base64("content", MAX_CONTENT)
        )
        digests = _digests(fields.raw("digests"), fields)
        fields.end()
        if record.sequence != number:
            raise HostileInput("BAD_FIELD", f"{what}: sequence number {record.sequence}")
        if digests != {"sha256": record.digest}:
            raise HostileInput("DIGEST_MISMATCH", f"{what}: the digest is not that of its content")
        Fields(strictjson.loads(record.content, f"{what} content", MAX_CONTENT), f"{what} content")
        records.append(record)
    return tuple(records)


def parse_systemd_log(data: bytes) -> tuple[SystemdRecord, ...]:
    """Parse systemd's tpm2-measure.log (systemd >= 255). Records of NV indices are left out: no PCR holds them.

    Content is systemd's to shape, so unknown keys in it are no error; nothing is concluded from it.

    Raises:
        HostileInput: ``BAD_FRAMING``, ``BAD_FIELD``, ``BAD_JSON``, ``DUPLICATE_KEY``, ``TOO_LARGE``.
    """
    records: list[SystemdRecord] = []
    for number, part in enumerate(_sequence(data, "systemd log")):
        what = f"systemd log record {number}"
        fields = Fields(strictjson.loads(part, what, 4 * MAX_CONTENT), what)
        digests = _digests(fields.raw("digests"), fields)
        if "pcr" not in fields.keys():  # noqa: SIM118 - a method of ours, not a dict's
            continue
        pcr = fields.integer("pcr", 0, 23)
        content = fields.raw("content") if "content" in fields.keys() else {}  # noqa: SIM118
        if not isinstance(content, dict):
            raise fields.fail("content is not an object")
        text, event_type = content.get("string", ""), content.get("eventType", "")
        if not isinstance(text, str) or not isinstance(event_type, str):
            raise fields.fail("content.string or content.eventType is not text")
        records.append(SystemdRecord(pcr, digests, event_type, text))
    return tuple(records)
