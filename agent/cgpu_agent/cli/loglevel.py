"""``cgpuctl log-level``: how much goes to the agent's journal, now."""

from __future__ import annotations

import argparse

from cgpu_agent.cli import output
from cgpu_agent.client import Admin


def run(arguments: argparse.Namespace) -> int:
    admin = Admin(arguments.socket)
    try:
        if arguments.level is not None:
            admin.set_log_level(arguments.level)
        found = admin.get_log_level()
    finally:
        admin.close()
    told = "" if found.level == found.configured else f" (configured: {found.configured})"
    output.say(output.printable(f"{found.level}{told}"))
    return output.EXIT_PASS
