"""``cgpuctl platform verify``: say offline who vouches for a vTPM."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509

from cgpu_agent.cli import output
from cgpu_agent.cli.inputs import parse_hex, parse_time, read_file
from cgpu_agent.cli.quote import parse_pcrs
from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.verifier.certificate import load_certificates
from cgpu_agent.verifier.keys import AttestationKey, load_attestation_key
from cgpu_agent.verifier.platform import PlatformEndorsement, endorse_platform
from cgpu_agent.verifier.platformcase import PlatformEvidence, PlatformParty
from cgpu_agent.verifier.platformfloor import parse_floors
from cgpu_agent.verifier.quote import QuoteResult, verify_quote

_SMALL = 1 << 16


def run(arguments: argparse.Namespace) -> int:
    if arguments.hcl is None and arguments.ak_cert is None:
        raise Misuse("BAD_ARGUMENT", "give --hcl, or --ak-cert where there is no hardware report")
    if (arguments.quote is None) != (arguments.signature is None):
        raise Misuse("BAD_ARGUMENT", "--quote and --signature go together")
    if arguments.quote is None and (arguments.pcrs is not None or arguments.nonce is not None):
        raise Misuse("BAD_ARGUMENT", "--pcrs and --nonce are about a quote: give --quote and --signature")
    snp_floor, tdx_floor = parse_floors(arguments.floor)
    party = PlatformParty(at=parse_time(arguments.at), snp_floor=snp_floor, tdx_floor=tdx_floor)
    nonce = None if arguments.nonce is None else parse_hex(arguments.nonce, "--nonce")
    pcrs = None if arguments.pcrs is None else parse_pcrs(read_file(arguments.pcrs, _SMALL), "sha256")
    try:
        ak = None if arguments.ak is None else load_attestation_key(read_file(arguments.ak, _SMALL)).key
        certificates = _certificates((*arguments.vcek, *arguments.chain))
        evidence = PlatformEvidence(
            report=_read(arguments.hcl),
            claims=_read(arguments.claims),
            td_quote=_read(arguments.td_quote),
            certificates=certificates,
            ak_certificate=_read(arguments.ak_cert),
            ca_certificates=certificates,
        )
    except HostileInput as error:
        if arguments.json:
            reason = {"detail": error.message, "slug": error.slug, "step": None}
            output.emit_json({"endorsed_by": "none", "reason": reason, "result": "refused", "steps": []})
        output.complain(error)
        return output.EXIT_REFUSED
    answer = endorse_platform(evidence, party, ak=ak)
    quote = None
    if arguments.quote is not None and answer.ak is not None:
        pair = read_file(arguments.quote, _SMALL), read_file(arguments.signature, _SMALL)
        endorsed = AttestationKey(answer.ak, None)
        quote = verify_quote(*pair, endorsed, nonce=nonce, pcrs=pcrs, expected_pcrs=None)
        if quote.accepted and pcrs is not None:
            answer = endorse_platform(evidence, party, ak=ak, pcrs=pcrs)  # the values count, once they are quoted
    passed = answer.endorsed_by != "none" and (quote is None or quote.accepted)
    if arguments.json:
        told = None if quote is None else quote.to_json()
        output.emit_json({**answer.to_json(), "quote": told, "result": "pass" if passed else "refused"})
    else:
        show(answer, quote)
    return output.EXIT_PASS if passed else output.EXIT_REFUSED


def _read(path: Path | None) -> bytes | None:
    return None if path is None else read_file(path, _SMALL)


def _certificates(paths: Sequence[Path]) -> list[x509.Certificate]:
    return [each for path in paths for each in load_certificates(read_file(path, _SMALL))]


def show(answer: PlatformEndorsement, quote: QuoteResult | None = None) -> None:
    """The verdict for people."""
    output.steps(answer.steps)
    if quote is not None:
        output.say("its quote")
        output.steps(quote.steps)
    output.say()
    if answer.endorsed_by == "none":
        refusal = answer.refusal
        detail = answer.reason if refusal is None else refusal.detail
        slug = "" if refusal is None else f" [{refusal.slug}]"
        output.say(f"{output.coloured('REFUSED', 'fail')}: {answer.trusted}: {output.printable(detail)}{slug}")
        return
    if quote is not None and quote.refusal is not None:
        refusal = quote.refusal
        output.say(
            f"{output.coloured('REFUSED', 'fail')}: {answer.endorsed_by} endorses the AK, but the quote: "
            f"{output.printable(refusal.detail)} [{refusal.slug}]"
        )
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
