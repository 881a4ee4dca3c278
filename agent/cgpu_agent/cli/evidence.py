"""``cgpuctl evidence get``: ask the agent for a bundle, as any workload would."""

from __future__ import annotations

import argparse
import secrets
import sys

from cgpu_agent.cli import output
from cgpu_agent.cli.files import write_whole
from cgpu_agent.cli.inputs import parse_hex, read_file
from cgpu_agent.client import Agent
from cgpu_agent.errors import Misuse


def run(arguments: argparse.Namespace) -> int:
    nonce = secrets.token_bytes(32) if arguments.nonce is None else parse_hex(arguments.nonce, "--nonce")
    if arguments.output is None and sys.stdout.isatty():
        raise Misuse("NO_OUTPUT", "a bundle is not for a terminal: give -o FILE, or redirect")
    with Agent(arguments.socket) as agent:
        bundle = agent.get_evidence(
            nonce,
            arguments.audience,
            user_data=None if arguments.user_data is None else parse_hex(arguments.user_data, "--user-data"),
            public_key=None if arguments.public_key is None else read_file(arguments.public_key, 8192),
            gpus=arguments.gpus,
        )
    if arguments.output is None:
        sys.stdout.buffer.write(bundle)
        return output.EXIT_PASS
    write_whole(arguments.output, bundle)
    output.say(f"{arguments.output}: {len(bundle)} bytes, nonce {nonce.hex()}, audience {arguments.audience}")
    return output.EXIT_PASS
