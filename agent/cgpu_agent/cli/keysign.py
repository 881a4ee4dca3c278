"""``cgpuctl key policy-sign``: the owner of sealed keys approves a boot, where neither the VM nor a TPM is."""

from __future__ import annotations

import argparse

from cgpu_agent.cli import output
from cgpu_agent.cli.appraise import read_reference
from cgpu_agent.cli.files import write_whole
from cgpu_agent.cli.inputs import read_file
from cgpu_agent.verifier.approval import pcrs_to_approve, sign_approval

_MAX_KEY = 65536


def run(arguments: argparse.Namespace) -> int:
    reference = read_reference(arguments.reference)
    approval = sign_approval(
        read_file(arguments.key, _MAX_KEY),
        fleet=arguments.fleet,
        groups=arguments.group,
        pcrs=pcrs_to_approve(reference, arguments.pcr, uncovered_root=arguments.i_know),
        epoch=arguments.epoch,
    )
    write_whole(arguments.output, approval.encode())
    pcrs = ", ".join(map(str, sorted(approval.pcrs)))
    groups = ", ".join(sorted(approval.signatures))
    output.say(
        f"{arguments.output}: approves PCR {pcrs} up to epoch {approval.epoch}, for {groups} of {approval.fleet}"
    )
    return output.EXIT_PASS
