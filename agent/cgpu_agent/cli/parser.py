"""The whole command line of cgpuctl, a table of contents: what a command takes stands in ``cli.arguments``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from cgpu_agent import __version__
from cgpu_agent.cli.arguments import (
    ak,
    audit,
    boot,
    collateral,
    completion,
    doctor,
    eventlog,
    evidence,
    gpu,
    key,
    loglevel,
    metrics,
    platform,
    policy,
    quote,
    reference,
    status,
    transfer,
    verify,
)
from cgpu_agent.cli.arguments import object as object_
from cgpu_agent.cli.arguments.common import Commands

_COMMANDS: tuple[Callable[[Commands], None], ...] = (
    status.add,
    doctor.add,
    metrics.add,
    loglevel.add,
    boot.add,
    evidence.add,
    verify.add,
    reference.add,
    eventlog.add,
    quote.add,
    gpu.add,
    collateral.add,
    platform.add,
    ak.add,
    key.add,
    policy.add,
    audit.add,
    object_.add,
    transfer.add,
    completion.add,
)
"""In the order of the help and of cgpuctl(1)."""


def build_parser() -> argparse.ArgumentParser:
    """Every command sets ``module``: the module of ``cgpu_agent.cli`` whose ``run`` carries it out."""
    parser = argparse.ArgumentParser(
        prog="cgpuctl",
        description="Evidence of a confidential GPU VM: get it, read it, verify it.",
        epilog="Exit status: 0 pass, 1 refused (with the reason), 2 usage. See cgpuctl(1).",
    )
    parser.add_argument("--version", action="version", version=f"cgpuctl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in _COMMANDS:
        add(commands)
    return parser
