"""Replay of an event log, and an honest comparison with the register values of a quote.

Source: TPM 2.0 Library, Part 1, 17 (extend); TCG PC Client Platform Firmware Profile (start-up locality,
EV_NO_ACTION); systemd-pcrphase.service(8) for the words that user space adds to PCR 11. Nothing here judges what was
booted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.eventlog import EventLog, Kind
from cgpu_agent.wire.tpm import HASH_SIZES, PCR_COUNT, extend
from cgpu_agent.wire.uefi import parse_startup_locality

Status = Literal["explained", "untouched", "unexplained", "mismatch", "uncompared"]

PHASE_WORDS: Final = ("enter-initrd", "leave-initrd", "sysinit", "ready", "shutdown", "final")
"""What systemd extends into PCR 11, in this order; a system without a measured initrd starts at ``sysinit``."""
EXIT_BOOT_SERVICES: Final = (b"Exit Boot Services Invocation", b"Exit Boot Services Returned with Success")

_DRTM: Final = range(17, 23)
"""PCRs that read as all ones until a dynamic launch resets them."""
_FIRM: Final = frozenset((*range(10), 12, 14))
"""PCRs that only firmware and loaders extend, both through the log: a difference is a contradiction."""
_UNEXPLAINED_NOTES: Final = {
    10: "the kernel (IMA) extends this PCR after the firmware's log ends; its own list is needed",
    11: "user space extended this PCR, and the log holds no boot stub that would say what for",
    13: "user space may extend this PCR: the log of whoever did is needed",
    15: "user space may extend this PCR: the log of whoever did is needed",
    16: "any process may reset and extend this PCR",
    23: "any process may reset and extend this PCR",
}


@dataclass(frozen=True, slots=True)
class Replay:
    """What the log alone says the registers hold.

    Attributes:
        kind: ``tpm`` (keys are PCR indices) or ``ccel`` (keys are MrIndex 1-4 = RTMR0-3).
        bank: hash algorithm of the digests.
        pcrs: value of each register the log extends; others are absent.
        locality: start-up locality, which is PCR 0's first value.
        counts: measured events per register.
        exits_logged: whether PCR 5 holds either ExitBootServices event, by digest.
    """

    kind: Kind
    bank: str
    pcrs: Mapping[int, bytes]
    locality: int
    counts: Mapping[int, int]
    exits_logged: bool

    def initial(self, index: int) -> bytes:
        """Value of a register that nothing was ever extended into."""
        size = HASH_SIZES[self.bank]
        if self.kind == "tpm" and index == 0:
            return self.locality.to_bytes(size, "big")
        return (b"\xff" if self.kind == "tpm" and index in _DRTM else b"\0") * size


@dataclass(frozen=True, slots=True)
class PcrResult:
    """How one register compares.

    Attributes:
        index: PCR index or MrIndex.
        status: ``explained`` (the log accounts for the value, with ``note`` naming what was added), ``untouched`` (no
            event, initial value), ``unexplained`` (differs, in a register that others extend without this log),
            ``mismatch`` (differs where it must not), ``uncompared`` (events, but no value was given).
        expected: value after the replay.
        actual: value given; ``None`` with ``uncompared``.
        note: one sentence for a person, or empty.
        exception: name of the rule that was needed beyond a plain replay: ``systemd-phases`` or
            ``exit-boot-services-not-logged``; otherwise ``None``.
    """

    index: int
    status: Status
    expected: bytes
    actual: bytes | None
    note: str = ""
    exception: str | None = None


def replay(log: EventLog, bank: str) -> Replay:
    """Extend every measured event of one bank, in log order. EV_NO_ACTION records are never extended.

    Raises:
        HostileInput: ``MISSING_BANK`` (an event has no digest in ``bank``, or it was never announced),
            ``UNKNOWN_ALGORITHM`` (a bank this package cannot compute), ``BAD_LOCALITY`` (a start-up locality record
            that is late, doubled or outside PCR 0).
    """
    if bank not in log.banks:
        raise HostileInput("MISSING_BANK", f"the event log has no digest of bank {bank} for every event")
    if bank not in HASH_SIZES:
        raise HostileInput("UNKNOWN_ALGORITHM", f"bank {bank} of the event log cannot be computed here")
    state = Replay(log.kind, bank, {}, startup_locality(log), {}, exits_logged=False)
    exits = {hashlib.new(bank, text).digest() for text in EXIT_BOOT_SERVICES}
    pcrs: dict[int, bytes] = {}
    counts: dict[int, int] = {}
    exits_logged = False
    for event in log.events:
        digest = event.digest(bank)
        if not event.measured or digest is None:
            continue
        old = pcrs.get(event.pcr)
        if old is None:
            # A PCR of a dynamic launch can only be extended after that launch set it to zero.
            old = state.initial(event.pcr) if event.pcr not in _DRTM else bytes(HASH_SIZES[bank])
        pcrs[event.pcr] = extend(bank, old, digest)
        counts[event.pcr] = counts.get(event.pcr, 0) + 1
        exits_logged = exits_logged or (event.pcr == 5 and digest in exits)
    return Replay(
        log.kind,
        bank,
        dict(sorted(pcrs.items())),
        state.locality,
        dict(sorted(counts.items())),
        exits_logged=exits_logged,
    )


def startup_locality(log: EventLog) -> int:
    """Start-up locality of a TPM log: that of the one record before anything is measured into PCR 0, else 0.

    Raises:
        HostileInput: ``BAD_LOCALITY`` when such a record stands elsewhere or twice; it would be a decoy.
    """
    found: int | None = None
    started = False
    for event in log.events:
        if event.measured:
            started = started or event.pcr == 0
            continue
        value = parse_startup_locality(event.data)
        if value is None:
            continue
        if log.kind != "tpm" or event.pcr != 0 or started or found is not None:
            raise HostileInput("BAD_LOCALITY", f"event {event.index} states a start-up locality out of place")
        found = value
    return found or 0


def compare(replayed: Replay, actual: Mapping[int, bytes]) -> dict[int, PcrResult]:
    """Compare a replay with register values, register by register. Nothing is left out: keys are the union of both.

    Args:
        replayed: from ``replay``.
        actual: values of the same bank by PCR index, or by MrIndex (RTMR number + 1) for a CCEL.

    Raises:
        HostileInput: ``BAD_VALUE`` for an index or a value size that does not exist.
    """
    registers = range(PCR_COUNT) if replayed.kind == "tpm" else range(1, 5)
    for index, value in actual.items():
        if index not in registers or len(value) != HASH_SIZES[replayed.bank]:
            raise HostileInput("BAD_VALUE", f"{len(value)} bytes for register {index} of bank {replayed.bank}")
    return {
        index: _compare_one(replayed, index, actual.get(index))
        for index in sorted(replayed.pcrs.keys() | actual.keys())
    }


def _compare_one(replayed: Replay, index: int, actual: bytes | None) -> PcrResult:
    expected = replayed.pcrs.get(index)
    if expected is None:
        expected = replayed.initial(index)
        if actual == expected:
            return PcrResult(index, "untouched", expected, actual, "nothing was measured here")
    if actual is None:
        return PcrResult(index, "uncompared", expected, None, "the log has events here, but no value was given")
    if actual == expected:
        return PcrResult(index, "explained", expected, actual)
    if replayed.kind == "ccel":
        return _ccel_difference(index, expected, actual)
    return _tpm_difference(replayed, index, expected, actual)


def _ccel_difference(index: int, expected: bytes, actual: bytes) -> PcrResult:
    if index >= 3:
        note = f"user space may extend RTMR{index - 1}: the log of whoever did is needed"
        return PcrResult(index, "unexplained", expected, actual, note)
    return PcrResult(index, "mismatch", expected, actual, f"RTMR{index - 1} does not hold what the log says")


def _tpm_difference(replayed: Replay, index: int, expected: bytes, actual: bytes) -> PcrResult:
    logged = replayed.counts.get(index, 0)
    if index == 11 and logged:
        return _phases(replayed.bank, expected, actual)
    if index == 5 and logged and not replayed.exits_logged:
        value = expected
        for text in EXIT_BOOT_SERVICES:
            value = extend(replayed.bank, value, hashlib.new(replayed.bank, text).digest())
        if value == actual:
            note = "equal after the two ExitBootServices events, which some firmware measures without logging"
            return PcrResult(index, "explained", expected, actual, note, "exit-boot-services-not-logged")
    if index in _FIRM:
        return PcrResult(index, "mismatch", expected, actual, f"PCR {index} does not hold what the log says")
    note = _UNEXPLAINED_NOTES.get(index, "a dynamic launch or another process extended this PCR")
    return PcrResult(index, "unexplained", expected, actual, note)


def _phases(bank: str, expected: bytes, actual: bytes) -> PcrResult:
    for words in (PHASE_WORDS, PHASE_WORDS[2:]):
        value = expected
        for count, word in enumerate(words, 1):
            value = extend(bank, value, hashlib.new(bank, word.encode()).digest())
            if value == actual:
                note = f"equal after systemd's phase words {', '.join(words[:count])}"
                return PcrResult(11, "explained", expected, actual, note, "systemd-phases")
    note = "PCR 11 differs from the log by something other than systemd's phase words"
    return PcrResult(11, "mismatch", expected, actual, note)
