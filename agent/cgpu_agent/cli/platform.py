"""``cgpuctl platform verify``: say offline who vouches for a vTPM."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509

from cgpu_agent.cli import output
from cgpu_agent.cli.inputs import parse_time, read_file
from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.verifier.certificate import load_certificates
from cgpu_agent.verifier.keys import load_attestation_key
from cgpu_agent.verifier.platform import PlatformEndorsement, endorse_platform
from cgpu_agent.verifier.platformcase import PlatformEvidence, PlatformParty
from cgpu_agent.verifier.platformfloor import parse_floors

_SMALL = 1 << 16


def run(arguments: argparse.Namespace) -> int:
    if arguments.report is None and arguments.ak_certificate is None:
        raise Misuse("BAD_ARGUMENT", "give --report, or --ak-certificate where there is no hardware report")
    snp_floor, tdx_floor = parse_floors(arguments.floor)
    party = PlatformParty(at=parse_time(arguments.at), snp_floor=snp_floor, tdx_floor=tdx_floor)
    try:
        ak = None if arguments.ak is None else load_attestation_key(read_file(arguments.ak, _SMALL)).key
        evidence = PlatformEvidence(
            report=_read(arguments.report),
            claims=_read(arguments.claims),
            td_quote=_read(arguments.td_quote),
            certificates=_certificates(arguments.vcek),
            ak_certificate=_read(arguments.ak_certificate),
            ca_certificates=_certificates(arguments.ca),
        )
    except HostileInput as error:
        if arguments.json:
            reason = {"detail": error.message, "slug": error.slug, "step": None}
            output.emit_json({"endorsed_by": "none", "reason": reason, "result": "refused", "steps": []})
        output.complain(error)
        return output.EXIT_REFUSED
    answer = endorse_platform(evidence, party, ak=ak)
    if arguments.json:
        result = "refused" if answer.endorsed_by == "none" else "pass"
        output.emit_json({**answer.to_json(), "result": result})
    else:
        show(answer)
    return output.EXIT_REFUSED if answer.endorsed_by == "none" else output.EXIT_PASS


def _read(path: Path | None) -> bytes | None:
    return None if path is None else read_file(path, _SMALL)


def _certificates(paths: Sequence[Path]) -> list[x509.Certificate]:
    return [each for path in paths for each in load_certificates(read_file(path, _SMALL))]


def show(answer: PlatformEndorsement) -> None:
    """The verdict for people."""
    output.steps(answer.steps)
    output.say()
    if answer.endorsed_by == "none":
        refusal = answer.refusal
        detail = answer.reason if refusal is None else refusal.detail
        slug = "" if refusal is None else f" [{refusal.slug}]"
        output.say(f"{output.coloured('REFUSED', 'fail')}: {answer.trusted}: {output.printable(detail)}{slug}")
        return
    output.say(f"{output.coloured('PASS', 'ok')}: endorsed by {answer.endorsed_by}")
    facts = answer.facts
    rows = [("trust", answer.trusted)]
    if facts.code is not None:
        rows.append(("code", facts.code))
    if facts.secure_boot is not None:
        rows.append(("secure boot", "on" if facts.secure_boot else "off"))
    if facts.vm_unique_id is not None:
        rows.append(("VM", facts.vm_unique_id))
    output.pairs(rows)
    output.say("  not proven:")
    for step in answer.warnings:
        output.say(f"    - {output.printable(step.detail)}")
