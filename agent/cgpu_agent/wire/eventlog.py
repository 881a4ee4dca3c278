"""Boot event logs: bytes from firmware <-> a list of events, for TPM logs of both formats and for TDX's CCEL.

Source: TCG "PC Client Platform Firmware Profile" (PFP), section 10 (TCG_PCR_EVENT, TCG_EfiSpecIDEvent,
TCG_PCR_EVENT2); UEFI 2.10, chapter 38 (CCEL and its registers). All integers are little-endian.

Only a digest is ever extended: the event type and, where the digest is not that of the data, the data too are words
of whoever wrote the log. Hence ``Event.claimed_type``: a hint, never a fact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.reader import Reader
from cgpu_agent.wire.tpm import HASH_NAMES, HASH_SIZES, PCR_COUNT

Kind = Literal["tpm", "ccel"]
Format = Literal["legacy-sha1", "crypto-agile"]

MAX_LOG_SIZE: Final = 4 << 20
MAX_EVENTS: Final = 65536
_MAX_ALGORITHMS: Final = 16
_MAX_DIGEST_SIZE: Final = 128

EV_NO_ACTION: Final = 0x00000003

_SPEC_ID_03: Final = b"Spec ID Event03\0"
_HEADER_SIZE: Final = 32
"""Bytes of a TCG_PCR_EVENT before its data: PCR, type, SHA-1 digest, size."""
CCEL_BANK: Final = "sha384"
_CCEL_REGISTERS: Final = range(1, 5)


@dataclass(frozen=True, slots=True)
class Event:
    """One record.

    Attributes:
        index: position in the log, from 0; the Spec ID record counts.
        pcr: PCR index, or in a CCEL the MrIndex (1-4 = RTMR0-3).
        claimed_type: event type. Outside the digest: whoever hands over the log may choose it.
        digests: (bank, digest) in the order of the log; at least one.
        data: event data as logged. Proven only as far as a digest covers it (see ``verifier.eventproof``).
    """

    index: int
    pcr: int
    claimed_type: int
    digests: tuple[tuple[str, bytes], ...]
    data: bytes

    @property
    def measured(self) -> bool:
        """Whether this record was extended. An EV_NO_ACTION never is; a lie about that shows in the replay."""
        return self.claimed_type != EV_NO_ACTION

    def digest(self, bank: str) -> bytes | None:
        """The digest of one bank, or ``None`` when the record has none for it."""
        for name, value in self.digests:
            if name == bank:
                return value
        return None


@dataclass(frozen=True, slots=True)
class SpecId:
    """TCG_EfiSpecIDEvent . Never measured: it says how to read, not what happened.

    ``algorithms`` holds (bank, digest size in bytes); ``version`` is (major, minor, errata).
    """

    platform_class: int
    version: tuple[int, int, int]
    uintn_size: int
    algorithms: tuple[tuple[str, int], ...]
    vendor_info: bytes


@dataclass(frozen=True, slots=True)
class EventLog:
    """A parsed log.

    Attributes:
        kind: ``tpm`` or ``ccel``; decides what ``Event.pcr`` means.
        format: layout of the records.
        banks: banks that every measured event has a digest for, in the order announced. Only these can be replayed.
        events: all records, the Spec ID record included.
        padding: bytes of fill after the last record (CCEL only).
        spec: the Spec ID record of a crypto-agile log.
    """

    kind: Kind
    format: Format
    banks: tuple[str, ...]
    events: tuple[Event, ...]
    padding: int
    spec: SpecId | None


def bank_name(algorithm: int) -> str:
    """hashlib name of a TPM_ALG_ID, or ``alg-0xNNNN`` for one this package cannot compute."""
    return HASH_NAMES.get(algorithm, f"alg-0x{algorithm:04x}")


def parse(data: bytes, kind: Kind | None = None) -> EventLog:
    """Parse a whole log.

    Args:
        data: the log as the kernel or the ACPI table gives it, at most 4 MiB.
        kind: what the log is, where the caller knows. With ``None`` it is a CCEL exactly when its Spec ID record
            names register 1: PFP demands PCR 0 of a TPM log, while TDX firmware writes MrIndex 1. A wrong guess
            cannot pass for the other kind later: registers and banks differ, so the replay matches no quote.

    A CCEL area may be filled up after its last record, to its end, with all 0xff or all 0x00 bytes; a TPM log
    may not.

    Raises:
        HostileInput: ``EMPTY_LOG`` (no bytes: a state of a VM whose log was not handed over), ``TOO_LARGE``,
            ``TRUNCATED``, ``TRAILING_BYTES``, ``BAD_HEADER``, ``BAD_REGISTER``, ``UNKNOWN_ALGORITHM`` (a digest the
            header does not announce), ``DUPLICATE_DIGEST``, ``NO_DIGEST``.
    """
    if not data:
        raise HostileInput("EMPTY_LOG", "the event log is empty: the firmware's log was not handed over")
    if len(data) > MAX_LOG_SIZE:
        raise HostileInput("TOO_LARGE", f"event log has {len(data)} bytes, at most {MAX_LOG_SIZE} are allowed")
    reader = Reader(data, "event log", "little")
    first = _legacy_event(reader, 0)
    if first.data[: len(_SPEC_ID_03)] == _SPEC_ID_03:
        return _crypto_agile(data, reader, first, kind)
    if kind == "ccel":
        raise reader.fail("BAD_HEADER", "a CCEL begins with a Spec ID Event03 record, this log does not")
    return _legacy(reader, first)


def _legacy_event(reader: Reader, index: int) -> Event:
    pcr, claimed_type = reader.u32("PCR index"), reader.u32("event type")
    digest = reader.take(HASH_SIZES["sha1"], "SHA-1 digest")
    size = reader.u32("event size")
    return Event(index, pcr, claimed_type, (("sha1", digest),), reader.take(size, "event data"))


def _legacy(reader: Reader, first: Event) -> EventLog:
    events = [first]
    while reader.remaining:
        _count(reader, events)
        events.append(_legacy_event(reader, len(events)))
    for event in events:
        _check_register(reader, event, "tpm")
    return EventLog("tpm", "legacy-sha1", ("sha1",), tuple(events), 0, None)


def _crypto_agile(data: bytes, reader: Reader, first: Event, asked: Kind | None) -> EventLog:
    spec = _spec_id(first)
    kind: Kind = asked or ("ccel" if first.pcr == _CCEL_REGISTERS[0] else "tpm")
    if first.pcr > (1 if kind == "ccel" else 0):
        raise reader.fail("BAD_HEADER", f"a Spec ID record in register {first.pcr} of a {kind} log")
    if kind == "ccel" and [name for name, _ in spec.algorithms] != [CCEL_BANK]:
        raise reader.fail("BAD_HEADER", "a CCEL has SHA-384 digests and no others")
    sizes = dict(spec.algorithms)
    events, padding = [first], 0
    while reader.remaining:
        if _at_padding(data, reader.offset, kind):
            padding = _padding(reader, kind)
            break
        _count(reader, events)
        event = _agile_event(reader, len(events), sizes)
        _check_register(reader, event, kind)
        events.append(event)
    measured = [{name for name, _ in event.digests} for event in events if event.measured]
    banks = tuple(name for name in sizes if all(name in names for names in measured))
    return EventLog(kind, "crypto-agile", banks, tuple(events), padding, spec)


def _spec_id(event: Event) -> SpecId:
    reader = Reader(event.data, "Spec ID event", "little")
    reader.take(len(_SPEC_ID_03), "signature")
    if event.measured or any(event.digests[0][1]):
        raise reader.fail("BAD_HEADER", "its record is not an EV_NO_ACTION with a zero digest")
    platform = reader.u32("platformClass")
    minor, major, errata = (reader.u8(f"specVersion{part}") for part in ("Minor", "Major", "Errata"))
    uintn = reader.u8("uintnSize")
    # PFP: class 0 = client, 1 = server; uintnSize 1 = 32 bits, 2 = 64 bits.
    if (major, minor) != (2, 0) or uintn not in (1, 2) or platform > 1:
        raise reader.fail("BAD_HEADER", f"version {major}.{minor}, class {platform}, uintn size {uintn}")
    count = reader.u32("numberOfAlgorithms")
    if not 1 <= count <= _MAX_ALGORITHMS:
        raise reader.fail("BAD_HEADER", f"{count} digest algorithms, 1 to {_MAX_ALGORITHMS} are allowed")
    algorithms: dict[str, int] = {}
    for _ in range(count):
        name, size = bank_name(reader.u16("algorithmId")), reader.u16("digestSize")
        if name in algorithms or not 1 <= size <= _MAX_DIGEST_SIZE or HASH_SIZES.get(name, size) != size:
            raise reader.fail("BAD_HEADER", f"algorithm {name} with {size} bytes, or announced twice")
        algorithms[name] = size
    vendor = reader.take(reader.u8("vendorInfoSize"), "vendorInfo")
    reader.end()
    return SpecId(platform, (major, minor, errata), uintn, tuple(algorithms.items()), vendor)


def _agile_event(reader: Reader, index: int, sizes: dict[str, int]) -> Event:
    pcr, claimed_type = reader.u32("PCR index"), reader.u32("event type")
    count = reader.u32("digest count")
    if not 1 <= count <= len(sizes):
        raise reader.fail("NO_DIGEST", f"event {index} has {count} digests, 1 to {len(sizes)} are announced")
    digests: dict[str, bytes] = {}
    for _ in range(count):
        name = bank_name(reader.u16("digest algorithm"))
        if name not in sizes:
            raise reader.fail("UNKNOWN_ALGORITHM", f"event {index} has a digest of {name}, never announced")
        if name in digests:
            raise reader.fail("DUPLICATE_DIGEST", f"event {index} has two digests of {name}")
        digests[name] = reader.take(sizes[name], "digest")
    size = reader.u32("event size")
    return Event(index, pcr, claimed_type, tuple(digests.items()), reader.take(size, "event data"))


def _count(reader: Reader, events: list[Event]) -> None:
    if len(events) >= MAX_EVENTS:
        raise reader.fail("TOO_LARGE", f"more than {MAX_EVENTS} events")


def _check_register(reader: Reader, event: Event, kind: Kind) -> None:
    registers = _CCEL_REGISTERS if kind == "ccel" else range(PCR_COUNT)
    if event.measured and event.pcr not in registers:
        raise reader.fail("BAD_REGISTER", f"event {event.index} is in register {event.pcr} of a {kind} log")


def _at_padding(data: bytes, offset: int, kind: Kind) -> bool:
    # No record begins with register and type all ones, and a CCEL has no register 0.
    start = data[offset : offset + 8]
    return start == b"\xff" * len(start) or (kind == "ccel" and not any(start))


def _padding(reader: Reader, kind: Kind) -> int:
    rest = reader.rest()
    if kind != "ccel" or rest.count(rest[0]) != len(rest):
        raise reader.fail("TRAILING_BYTES", f"{len(rest)} bytes after the last event are not a record")
    return len(rest)
