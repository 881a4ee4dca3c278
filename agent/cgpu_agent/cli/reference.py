"""``cgpuctl reference make``: write down what a good bundle showed, to expect it from then on."""

from __future__ import annotations

import argparse

from cgpu_agent.cli import output
from cgpu_agent.cli.files import write_whole
from cgpu_agent.cli.inputs import read_file
from cgpu_agent.cli.verify import party_of
from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.evidence import verify_evidence
from cgpu_agent.verifier.reference import DEFAULT_PCRS, make_reference, parse_reference
from cgpu_agent.wire.bundle import MAX_BUNDLE


def run(arguments: argparse.Namespace) -> int:
    result = verify_evidence(read_file(arguments.bundle, MAX_BUNDLE + 1), party_of(arguments))
    refusal = result.refusal
    if refusal is not None:
        output.complain(HostileInput(refusal.slug or "REFUSED", f"refused at {refusal.id}: {refusal.detail}"))
        return output.EXIT_REFUSED
    made = make_reference(
        result,
        pcrs=(*DEFAULT_PCRS, *arguments.pcr),
        command_lines=arguments.command_line,
        any_instance=arguments.any_instance,
    )
    if arguments.output is None:
        output.say(made.decode().rstrip())
        return output.EXIT_PASS
    write_whole(arguments.output, made)
    reference = parse_reference(made)
    pinned = ", ".join([f"PCR {index}" for index in sorted(reference.pcrs)] + sorted(reference.pins))
    output.say(f"{arguments.output}: expects {pinned}")
    return output.EXIT_PASS
