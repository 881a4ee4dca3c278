"""Secure Boot as the digests tell it: state, key databases and the authorities that were used.

A host that hands over a log may choose every event type and all data that no digest covers, may add records that
are never extended, and after boot anyone may extend PCR 7 further. So: a state is concluded only from proven bytes,
in the right register, before the one separator; whatever could hide a second answer makes it ``unknown``. The result
holds only for a log whose replay equals the quoted register; that check belongs to the caller.

Source: TCG PC Client Platform Firmware Profile (use of PCR 7, EV_SEPARATOR); UEFI 2.10, chapters 32 (SecureBoot, PK,
KEK, db, dbx) and 38 (registers of a TDX guest).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.bootkeys import Certificate, read_certificate
from cgpu_agent.verifier.eventproof import Proof, prove
from cgpu_agent.wire.eventlog import Event, EventLog, Kind
from cgpu_agent.wire.text import printable
from cgpu_agent.wire.tpm import HASH_SIZES
from cgpu_agent.wire.uefi import (
    GLOBAL_VARIABLE,
    IMAGE_SECURITY,
    SHIM_LOCK,
    Variable,
    parse_signature_lists,
    parse_variable,
)

State = Literal["enabled", "disabled", "unknown"]

SEPARATORS: Final = (b"\0\0\0\0", b"\xff\xff\xff\xff")
_SECURE_BOOT_VALUES: Final = (b"\1", b"\0", b"")
_DEBUG_MODE: Final = b"UEFI Debug Mode"
_HARMLESS_ACTIONS: Final = (b"DMA Protection Disabled",)
_DATABASES: Final = {
    (GLOBAL_VARIABLE, "PK"): "pk",
    (GLOBAL_VARIABLE, "KEK"): "kek",
    (IMAGE_SECURITY, "db"): "db",
    (IMAGE_SECURITY, "dbx"): "dbx",
}
_SHIM_SLACK: Final = 6


@dataclass(frozen=True, slots=True)
class KeyDatabase:
    """PK, KEK, db or dbx: certificates in full, hashes counted. ``others`` counts signature types not understood."""

    event: int
    certificates: tuple[Certificate, ...]
    hashes: int
    others: int


@dataclass(frozen=True, slots=True)
class Authority:
    """What allowed an image to start: a certificate of a database, or a rule such as SbatLevel.

    ``certificate`` is set where the value holds one, ``text`` where it is plain text. ``before_separator`` marks
    drivers that firmware itself loaded; after it, any software that reaches the TPM could have added one. ``proven``
    is false where the digest does not cover the data.
    """

    event: int
    variable: str
    certificate: Certificate | None
    text: str | None
    before_separator: bool
    proven: bool


@dataclass(frozen=True, slots=True)
class SecureBoot:
    """The verdict on one register, with everything it rests on.

    Attributes:
        state: ``unknown`` whenever the digests allow more than one reading.
        reason: one sentence that says why.
        event: index of the SecureBoot variable's event, or ``None``.
        separator: index of the separator's event, or ``None``.
        pk, kek, db, dbx: proven databases; ``None`` when absent or doubtful.
        authorities: in log order.
        warnings: further sentences a person should read.
    """

    state: State
    reason: str
    event: int | None
    separator: int | None
    pk: KeyDatabase | None
    kek: KeyDatabase | None
    db: KeyDatabase | None
    dbx: KeyDatabase | None
    authorities: tuple[Authority, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Seen:
    event: Event
    proof: Proof | None
    variable: Variable | None


def register_of(kind: Kind, pcr: int) -> int | None:
    """Where events of a PCR stand in a log: the PCR itself, or the MrIndex of a CCEL (UEFI 2.10, chapter 38).

    ``None`` for PCR 0 of a TDX guest: what a TPM would hold there is in MRTD, which no event extends.
    """
    if kind == "tpm":
        return pcr
    if pcr in (1, 7):
        return 1
    if 2 <= pcr <= 6:
        return 2
    return 3 if pcr >= 8 else None


def secure_boot_payload(value: bytes) -> bytes:
    """UEFI_VARIABLE_DATA of the SecureBoot variable with this value: what a firmware digests."""
    name = "SecureBoot".encode("utf-16-le")
    sizes = (len(name) // 2).to_bytes(8, "little") + len(value).to_bytes(8, "little")
    return GLOBAL_VARIABLE.bytes_le + sizes + name + value


def secure_boot(log: EventLog, bank: str) -> SecureBoot:
    """Conclude the Secure Boot state from one bank of a log.

    Raises:
        HostileInput: ``MISSING_BANK`` when the log has not got ``bank`` for every measured event.
    """
    if bank not in log.banks or bank not in HASH_SIZES:
        raise HostileInput("MISSING_BANK", f"the event log has no usable digests of bank {bank}")
    register = register_of(log.kind, 7)
    seen = [_see(event, bank) for event in log.events if event.measured and event.pcr == register]
    before, after, separator, reason = _split(seen, bank)
    if reason is None:
        reason = _doubt(before, after, bank, shared=log.kind == "ccel")
    answer = next((s for s in before if _is_secure_boot(s, bank)), None)
    databases, doubled = _databases(before)
    state, reason = _state(reason or doubled, answer)
    authorities = _authorities(before, before_separator=True) + _authorities(after, before_separator=False)
    return SecureBoot(
        state,
        reason,
        None if answer is None else answer.event.index,
        None if separator is None else separator.index,
        databases.get("pk"),
        databases.get("kek"),
        databases.get("db"),
        databases.get("dbx"),
        authorities,
        _warnings(state, before, authorities, bank),
    )


def _state(doubt: str | None, answer: _Seen | None) -> tuple[State, str]:
    if doubt is not None:
        return "unknown", doubt
    if answer is None or answer.variable is None:
        return "unknown", "no SecureBoot variable was measured before the separator"
    value = answer.variable.data
    if answer.variable.slack or value not in _SECURE_BOOT_VALUES:
        return "unknown", f"the SecureBoot variable holds neither 0 nor 1 (event {answer.event.index})"
    if value == b"\1":
        return "enabled", "the SecureBoot variable is 1, measured once, before the one separator"
    if value == b"\0":
        return "disabled", "the SecureBoot variable is 0"
    return "disabled", "the firmware has no SecureBoot variable (measured as empty)"


def _see(event: Event, bank: str) -> _Seen:
    proof = prove(event, bank)
    variable = None
    if proof is not None and proof.form in ("data", "data-but-last-byte"):
        try:
            variable = parse_variable(proof.proven, slack=_SHIM_SLACK)
        except HostileInput:
            variable = None
    return _Seen(event, proof, variable)


def _digest_in(event: Event, bank: str, payloads: Sequence[bytes]) -> bool:
    return event.digest(bank) in [hashlib.new(bank, payload).digest() for payload in payloads]


def _is_secure_boot(seen: _Seen, bank: str) -> bool:
    # By digest as well as by content: data that were altered cannot hide which variable was measured.
    if _digest_in(seen.event, bank, [secure_boot_payload(value) for value in _SECURE_BOOT_VALUES]):
        return True
    return seen.variable is not None and (seen.variable.guid, seen.variable.name) == (GLOBAL_VARIABLE, "SecureBoot")


def _split(seen: list[_Seen], bank: str) -> tuple[list[_Seen], list[_Seen], Event | None, str | None]:
    """Events before and after the separator, the separator, and why there is not exactly one."""
    at = [i for i, s in enumerate(seen) if _digest_in(s.event, bank, SEPARATORS)]
    if not seen:
        return [], [], None, "the log has no events in the Secure Boot register"
    if not at:
        return seen, [], None, "no separator closes the firmware's part of the Secure Boot register"
    first, separators = at[0], set(at)
    after = [s for i, s in enumerate(seen) if i > first and i not in separators]
    reason = None
    if len(at) > 1:
        places = ", ".join(str(seen[i].event.index) for i in at[:8])
        reason = f"duplicate separator in the Secure Boot register (events {places})"
    return seen[:first], after, seen[first].event, reason


def _doubt(before: list[_Seen], after: list[_Seen], bank: str, *, shared: bool) -> str | None:
    """Why the events around the separator allow no conclusion; ``None`` when they do.

    ``shared``: the register of a TDX guest also holds PCR 1's events, which describe rather than prove.
    """
    for seen in after:
        if _is_secure_boot(seen, bank):
            return f"a SecureBoot variable was measured after the separator (event {seen.event.index})"
    answers = [s for s in before if _is_secure_boot(s, bank)]
    if not answers:
        return "no SecureBoot variable was measured before the separator"
    if len(answers) > 1:
        return f"the SecureBoot variable was measured {len(answers)} times"
    if answers[0].variable is None:
        return f"the data of event {answers[0].event.index} are not what its digest covers"
    for seen in before:
        if _digest_in(seen.event, bank, [_DEBUG_MODE]):
            return f"the firmware was in debug mode (event {seen.event.index})"
        if shared or seen.variable is not None:
            continue
        if seen.proof is None:
            return f"event {seen.event.index} before the separator is not proven by its digest"
        if seen.proof.proven not in _HARMLESS_ACTIONS:
            return f"event {seen.event.index} before the separator is of a kind this verifier does not know"
    return None


def _databases(before: list[_Seen]) -> tuple[dict[str, KeyDatabase], str | None]:
    found: dict[str, KeyDatabase] = {}
    doubled: str | None = None
    for seen in before:
        if seen.variable is None:
            continue
        slot = _DATABASES.get((seen.variable.guid, seen.variable.name))
        if slot is None:
            continue
        try:
            database = _database(seen.event.index, seen.variable.data)
        except HostileInput:
            continue  # a single signature, not lists: an authority that firmware used
        if slot in found:
            doubled = doubled or f"the variable {seen.variable.name} was measured twice (event {seen.event.index})"
        found[slot] = database
    return found, doubled


def _database(event: int, data: bytes) -> KeyDatabase:
    certificates: list[Certificate] = []
    hashes = others = 0
    for signature in parse_signature_lists(data):
        if signature.kind == "x509":
            certificates.append(read_certificate(signature.data))
        elif "sha" in signature.kind:
            hashes += 1
        else:
            others += 1
    return KeyDatabase(event, tuple(certificates), hashes, others)


def _authorities(events: list[_Seen], *, before_separator: bool) -> tuple[Authority, ...]:
    found: list[Authority] = []
    for seen in events:
        variable, proven = seen.variable, True
        if variable is None:
            variable, proven = _described(seen), False
        if variable is None or variable.guid not in (IMAGE_SECURITY, SHIM_LOCK):
            continue
        if before_separator and _is_database(variable):
            continue
        certificate, text = _authority_value(variable.data)
        name = printable(variable.name, 64)
        found.append(Authority(seen.event.index, name, certificate, text, before_separator, proven))
    return tuple(found)


def _is_database(variable: Variable) -> bool:
    try:
        parse_signature_lists(variable.data)
    except HostileInput:
        return False
    return variable.guid == IMAGE_SECURITY


def _described(seen: _Seen) -> Variable | None:
    try:
        return parse_variable(seen.event.data, slack=_SHIM_SLACK)
    except HostileInput:
        return None


def _authority_value(data: bytes) -> tuple[Certificate | None, str | None]:
    # EFI_SIGNATURE_DATA puts a 16-byte owner GUID before the certificate; old versions of shim leave it out.
    for der in (data[16:], data):
        certificate = read_certificate(der)
        if certificate.subject is not None:
            return certificate, None
    if len(data) <= 8:
        return None, f"0x{data.hex()}"
    try:
        return None, printable(data.decode("ascii").rstrip("\0\n"), 512)
    except UnicodeDecodeError:
        return None, None


def _warnings(state: State, before: list[_Seen], authorities: tuple[Authority, ...], bank: str) -> tuple[str, ...]:
    found: list[str] = []
    if bank == "sha1":
        found.append("the conclusion rests on SHA-1 digests, for which collisions can be made")
    if any(_digest_in(s.event, bank, _HARMLESS_ACTIONS) for s in before):
        found.append("the firmware says that protection against DMA was off")
    if state == "enabled" and not any(a.proven and not a.before_separator for a in authorities):
        found.append(
            "Secure Boot was on, but no use of an authority is proven: nothing shows that an image was checked"
        )
    return tuple(found)
