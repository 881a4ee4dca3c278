"""Which log explains which PCR: the firmware's, then systemd's, then the agent's, each going on from the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cgpu_agent.verifier.replay import PcrResult, compare
from cgpu_agent.verifier.replay import replay as replay_firmware
from cgpu_agent.wire.cel import Record, SystemdRecord
from cgpu_agent.wire.eventlog import EventLog
from cgpu_agent.wire.tpm import extend

_BANK = "sha256"


@dataclass(frozen=True, slots=True)
class RegisterStory:
    """How each quoted PCR compares with all logs together."""

    results: Mapping[int, PcrResult]

    def wrong(self) -> list[PcrResult]:
        """PCRs that contradict a log; ``unexplained`` ones do not, they are reported."""
        return [result for result in self.results.values() if result.status in ("mismatch", "uncompared")]


def explain_registers(
    pcrs: Mapping[int, bytes],
    boot_log: EventLog | None,
    systemd: Sequence[SystemdRecord],
    records: Sequence[Record],
) -> RegisterStory:
    """Replay all logs and compare with the quoted values.

    Args:
        pcrs: quoted SHA-256 values.
        boot_log: the firmware's log, or ``None``: then only PCRs that later logs extend are explained.
        systemd: records of tpm2-measure.log, in order.
        records: the agent's records, in order.

    Raises:
        HostileInput: from the replay of the firmware log.
    """
    if boot_log is None:
        results: dict[int, PcrResult] = {
            index: PcrResult(index, "unexplained", b"", value, "there is no firmware log")
            for index, value in pcrs.items()
        }
        start = {index: bytes(32) for index in pcrs}
    else:
        replayed = replay_firmware(boot_log, _BANK)
        results = compare(replayed, pcrs)
        start = {index: replayed.pcrs.get(index, replayed.initial(index)) for index in pcrs}
    later = _extended(start, systemd, records)
    for index, (value, authors) in later.items():
        if index not in results or results[index].status == "mismatch":
            continue
        if value == pcrs.get(index):
            note = f"equal after the records of {' and '.join(authors)}"
            results[index] = replace(results[index], status="explained", expected=value, note=note, exception=None)
        else:
            note = f"not what the records of {' and '.join(authors)} lead to"
            results[index] = replace(results[index], status="unexplained", expected=value, note=note)
    return RegisterStory(results)


def _extended(
    start: Mapping[int, bytes], systemd: Sequence[SystemdRecord], records: Sequence[Record]
) -> dict[int, tuple[bytes, list[str]]]:
    """Value and authors of every PCR that a later log extends."""
    found: dict[int, tuple[bytes, list[str]]] = {}
    steps = [(r.pcr, r.digests.get(_BANK), "systemd") for r in systemd]
    steps += [(r.pcr, r.digest, "the agent") for r in records]
    for pcr, digest, author in steps:
        if pcr not in start:
            continue
        value, authors = found.get(pcr, (start[pcr], []))
        if author not in authors:
            authors = [*authors, author]
        # A record without a digest in this bank leaves the bank's PCR unexplained, whatever else is there.
        found[pcr] = (b"" if digest is None or not value else extend(_BANK, value, digest), authors)
    return found
