"""``cgpuctl platform token``: judge a token of Microsoft's attestation service offline."""

from __future__ import annotations

import argparse

from cgpu_agent.cli import output
from cgpu_agent.cli.inputs import parse_hex, parse_time, read_file
from cgpu_agent.errors import Misuse
from cgpu_agent.verifier.maa import MAX_JWKS, MAX_TOKEN, MaaParty, MaaResult, verify_maa_token


def run(arguments: argparse.Namespace) -> int:
    if not all(url.startswith("https://") for url in arguments.issuer):
        raise Misuse("BAD_ARGUMENT", "--issuer needs the service's whole URL, https://HOST")
    party = MaaParty(
        at=parse_time(arguments.at),
        issuers=arguments.issuer,
        jwks=read_file(arguments.jwks, MAX_JWKS),
        nonce=None if arguments.nonce is None else parse_hex(arguments.nonce, "--nonce"),
    )
    answer = verify_maa_token(read_file(arguments.token, MAX_TOKEN).strip(), party)
    endorsed = answer.endorsed_by != "none"
    if arguments.json:
        output.emit_json({**answer.to_json(), "result": "pass" if endorsed else "refused"})
    else:
        show(answer)
    return output.EXIT_PASS if endorsed else output.EXIT_REFUSED


def show(answer: MaaResult) -> None:
    """The verdict for people."""
    output.steps(answer.steps)
    output.say()
    if answer.endorsed_by == "none":
        refusal = answer.refusal
        detail = answer.reason if refusal is None else refusal.detail
        slug = "" if refusal is None else f" [{refusal.slug}]"
        output.say(f"{output.coloured('REFUSED', 'fail')}: {output.printable(detail)}{slug}")
        return
    output.say(f"{output.coloured('PASS', 'ok')}: endorsed by {answer.endorsed_by}, by the word of its issuer")
    rows = [(name.replace("_", " "), value) for name, value in sorted(answer.token.items())]
    facts = answer.facts
    if facts.secure_boot is not None:
        rows.append(("secure boot", "on" if facts.secure_boot else "off"))
    if facts.vm_unique_id is not None:
        rows.append(("VM", facts.vm_unique_id))
    if answer.ak is not None:
        rows.append(("AK (SHA-256)", answer.ak))
    output.pairs(rows)
