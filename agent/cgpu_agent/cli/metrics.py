"""``cgpuctl metrics``: the agent's numbers for Prometheus, from its admin socket."""

from __future__ import annotations

import argparse
import sys

from cgpu_agent.cli import output
from cgpu_agent.cli.files import write_whole
from cgpu_agent.client import Admin


def run(arguments: argparse.Namespace) -> int:
    admin = Admin(arguments.socket)
    try:
        text = admin.get_metrics()
    finally:
        admin.close()
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        write_whole(arguments.output, text.encode())
    return output.EXIT_PASS
