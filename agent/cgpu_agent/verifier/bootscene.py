"""The shape of a boot story, and the scene it is told from: every measured event, its proof, whether it was told.

A stage takes the events it understands off the scene; what remains at the end is told as "not understood". So no
event can be left out of the story by being odd.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.eventproof import Proof, prove
from cgpu_agent.verifier.secureboot import SecureBoot, register_of
from cgpu_agent.wire.eventlog import Event, EventLog, Kind
from cgpu_agent.wire.text import printable, utf8_field, utf16_field
from cgpu_agent.wire.uefi import Variable, parse_variable

Value = str | int | bool | None


@dataclass(frozen=True, slots=True)
class Statement:
    """One sentence of the story.

    Attributes:
        text: plain words, safe to print.
        events: indices of the events it rests on.
        digested: whether the words come from bytes under a digest (or from digests themselves). Otherwise they are
            described by firmware or a loader, not proven.
        data: the same facts for programs.
    """

    text: str
    events: tuple[int, ...]
    digested: bool
    data: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stage:
    """A chapter: ``name`` is a stable slug, ``title`` for people, ``note`` says what its sentences cannot prove."""

    name: str
    title: str
    note: str
    statements: tuple[Statement, ...]


@dataclass(frozen=True, slots=True)
class BootStory:
    """The whole story.

    Attributes:
        kind, bank: what log it is and whose digests it rests on.
        secure_boot: see ``secureboot``.
        stages: in the order of a boot.
        proven: events whose data are under their digest to the last byte. Data of any other event may have been
            chosen by whoever handed over the log.
    """

    kind: Kind
    bank: str
    secure_boot: SecureBoot
    stages: tuple[Stage, ...]
    proven: frozenset[int]


@dataclass(frozen=True, slots=True)
class Seen:
    """A measured event and what its digest proves of it."""

    event: Event
    proof: Proof | None
    digest: bytes

    @property
    def index(self) -> int:
        return self.event.index

    @property
    def whole(self) -> bool:
        """Whether all data are under the digest."""
        return self.proof is not None and self.proof.form in ("data", "name")

    def text(self) -> str | None:
        """The labelled text a GRUB-like loader measured, decoded, or ``None``."""
        if self.proof is None or self.proof.form != "labelled-text":
            return None
        try:
            return utf8_field(self.proof.proven, "text")
        except HostileInput:
            return None

    def label(self) -> str:
        """What stands before a labelled text; not under the digest."""
        end = self.event.data.find(b" ")
        return printable(self.event.data[: max(end, 0)].decode("ascii", "replace").rstrip(":"), 32)

    def variable(self) -> Variable | None:
        """The UEFI variable in the data, proven or not."""
        try:
            return parse_variable(self.event.data)
        except HostileInput:
            return None


class Scene:
    """Measured events that wait to be told."""

    def __init__(self, log: EventLog, bank: str) -> None:
        self.kind: Kind = log.kind
        self.bank = bank
        self.events: tuple[Seen, ...] = tuple(
            Seen(event, prove(event, bank), digest)
            for event in log.events
            if event.measured and (digest := event.digest(bank)) is not None
        )
        self._told: set[int] = set()

    def waiting(self, *pcrs: int) -> list[Seen]:
        """Events not told yet in the registers of these PCRs, in log order; all of them without arguments."""
        registers = {register_of(self.kind, pcr) for pcr in pcrs}
        return [
            seen for seen in self.events if seen.index not in self._told and (not pcrs or seen.event.pcr in registers)
        ]

    def tell(self, events: Iterable[int]) -> tuple[int, ...]:
        """Mark events as told; returns them sorted."""
        told = tuple(sorted(events))
        self._told.update(told)
        return told

    def register(self, event: Event) -> str:
        """Name of an event's register: ``PCR 7``, or ``RTMR0`` in a TDX guest."""
        return f"PCR {event.pcr}" if self.kind == "tpm" else f"RTMR{event.pcr - 1}"


def readable(data: bytes) -> str | None:
    """Data as one line of text, where they are text in UTF-8 or UTF-16; else ``None``."""
    for decode in (utf8_field, utf16_field):
        try:
            text = decode(data, "data")
        except HostileInput:
            continue
        if text and text.isprintable():
            return printable(text, 256)
    return None
