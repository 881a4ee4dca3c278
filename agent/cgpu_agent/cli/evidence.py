"""``cgpuctl evidence get``: ask the agent for a bundle, as any workload would."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tempfile
from pathlib import Path

from cgpu_agent.cli import output
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
        )
    if arguments.output is None:
        sys.stdout.buffer.write(bundle)
        return output.EXIT_PASS
    write_whole(arguments.output, bundle)
    output.say(f"{arguments.output}: {len(bundle)} bytes, nonce {nonce.hex()}, audience {arguments.audience}")
    return output.EXIT_PASS


def write_whole(path: Path, data: bytes) -> None:
    """Write a file as a whole or not at all. Raises ``Misuse`` (``CANNOT_WRITE``)."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(data)
                file.flush()
                temporary.chmod(0o666 & ~_umask())
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise Misuse("CANNOT_WRITE", f"{path}: {error.strerror}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
