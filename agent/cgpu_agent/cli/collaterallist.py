"""``cgpuctl collateral list``: what a store holds, until when it is good, and which files would be refused."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from cgpu_agent.cli import output
from cgpu_agent.cli.collateralstore import subject_of
from cgpu_agent.cli.gpudemands import roots_of
from cgpu_agent.cli.inputs import parse_time
from cgpu_agent.errors import AgentError, HostileInput
from cgpu_agent.verifier.collateral import signed_at
from cgpu_agent.verifier.collateralfolder import KINDS, collateral_paths, read_bounded
from cgpu_agent.verifier.gpuchain import NVIDIA_RIM_ROOTS, PinnedRoots
from cgpu_agent.verifier.keys import certificate_from_der
from cgpu_agent.verifier.revocation import CLOCK_SKEW, load_crl, load_ocsp
from cgpu_agent.verifier.rim import verify_rim
from cgpu_agent.wire.rim import parse_rim

State = Literal["good", "stale", "superseded", "refused", "broken"]

_COLOURS: dict[State, str] = {
    "good": "ok",
    "stale": "warn",
    "superseded": "warn",
    "refused": "fail",
    "broken": "fail",
}
_OUT_OF_TIME = ("CERTIFICATE_EXPIRED", "CERTIFICATE_NOT_YET_VALID")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a store.

    Attributes:
        kind: by its suffix.
        about: chip, edition and version; an issuer; serial numbers with what is said of them.
        since: when it was signed, or its thisUpdate.
        until: when it stops counting; ``None`` where it does not say.
        state: ``stale`` = not within these times; ``superseded`` = there is a newer issue, which counts alone;
            ``refused`` = it does not verify; ``broken`` = nobody can read it, so the agent refuses the whole store.
        reason: why it is refused or broken: slug and sentence.
    """

    file: str
    kind: str
    state: State
    about: tuple[str, ...] = ()
    since: datetime | None = None
    until: datetime | None = None
    reason: tuple[str, str] | None = None

    def to_json(self) -> dict[str, object]:
        """As the command's JSON has it."""
        return {
            "about": list(self.about),
            "file": self.file,
            "kind": self.kind,
            "reason": None if self.reason is None else dict(zip(("slug", "detail"), self.reason, strict=True)),
            "since": None if self.since is None else self.since.isoformat(),
            "state": self.state,
            "until": None if self.until is None else self.until.isoformat(),
        }


def show(arguments: argparse.Namespace) -> int:
    """Carry the command out."""
    at, roots = parse_time(arguments.at), roots_of(arguments.rim_root, NVIDIA_RIM_ROOTS)
    entries = _superseded([_entry(path, roots, at) for path in collateral_paths(arguments.store)])
    good = all(entry.state not in ("refused", "broken") for entry in entries)
    if arguments.json:
        output.emit_json(
            {"at": at.isoformat(), "files": [entry.to_json() for entry in entries], "store": str(arguments.store)}
        )
    else:
        for entry in entries:
            _tell(entry)
        output.say(f"{output.printable(str(arguments.store))}: {len(entries)} files")
    return output.EXIT_PASS if good else output.EXIT_REFUSED


def _entry(path: Path, roots: PinnedRoots, at: datetime) -> Entry:
    kind = KINDS[path.suffix].removesuffix("s")
    try:
        data = read_bounded(path)
        if kind == "rim":
            return _rim(path.name, data, roots, at)
        return _crl(path.name, data, at) if kind == "crl" else _ocsp(path.name, data, at)
    except AgentError as error:
        return Entry(path.name, kind, "broken", reason=(error.slug, error.message))


def _rim(name: str, data: bytes, roots: PinnedRoots, at: datetime) -> Entry:
    document = parse_rim(data)
    until = min(certificate_from_der(each).not_valid_after_utc for each in document.certificates)
    found = Entry(name, "rim", "good", subject_of(document.claimed), signed_at(document), until)
    refusal = verify_rim(document, roots=roots, at=at).refusal
    if refusal is None:
        return found
    slug = refusal.slug or "INTERNAL"
    return replace(found, state="stale" if slug in _OUT_OF_TIME else "refused", reason=(slug, refusal.detail))


def _superseded(entries: Iterable[Entry]) -> list[Entry]:
    entries = list(entries)

    def newer(entry: Entry) -> bool:
        return any(
            other.kind == "rim" and other.about == entry.about and entry.since < other.since
            for other in entries
            if entry.since is not None and other.since is not None
        )

    return [
        replace(entry, state="superseded") if entry.kind == "rim" and newer(entry) else entry for entry in entries
    ]


def _crl(name: str, data: bytes, at: datetime) -> Entry:
    crl = load_crl(data)
    try:
        about = crl.issuer.rfc4514_string(), f"{len(crl)} revoked"
        since, until = crl.last_update_utc, crl.next_update_utc
    except (ValueError, TypeError) as error:
        raise HostileInput("BAD_CRL", "a certificate revocation list with unreadable content") from error
    return Entry(name, "crl", _freshness(since, until, at), about, since, until)


def _ocsp(name: str, data: bytes, at: datetime) -> Entry:
    response = load_ocsp(data)
    try:
        singles = list(response.responses)
        about = tuple(f"{each.serial_number:x} {each.certificate_status.name.lower()}" for each in singles)
        since = max((each.this_update_utc for each in singles), default=response.produced_at_utc)
        ends = [each.next_update_utc for each in singles if each.next_update_utc is not None]
    except (ValueError, TypeError) as error:
        raise HostileInput("BAD_OCSP", "an OCSP response with unreadable content") from error
    until = min(ends) if ends and len(ends) == len(singles) else None
    entry = Entry(name, "ocsp", _freshness(since, until, at), about, since, until)
    if all(each.not_valid_after_utc >= at for each in response.certificates):
        return entry
    reason = ("CERTIFICATE_EXPIRED", "its signer's certificate has ended: whatever it is about is refused")
    return replace(entry, state="refused", reason=reason)


def _freshness(since: datetime, until: datetime | None, at: datetime) -> State:
    """As the verifier takes it: what does not say until when it holds is never fresh."""
    return "good" if until is not None and since - CLOCK_SKEW <= at <= until else "stale"


def _tell(entry: Entry) -> None:
    output.say(f"{output.coloured(entry.state, _COLOURS[entry.state])}  {output.printable(entry.file)}")
    rows = [("about", ", ".join(entry.about))] if entry.about else []
    times = [("since", entry.since), ("until", entry.until)]
    rows += [(label, moment.isoformat()) for label, moment in times if moment is not None]
    if entry.reason is not None:
        rows.append(("reason", f"{entry.reason[1]} [{entry.reason[0]}]"))
    output.pairs(rows)
