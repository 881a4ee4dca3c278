"""What ``cgpuctl metrics`` takes."""

from __future__ import annotations

from pathlib import Path

from cgpu_agent.cli.arguments.common import Commands, add_admin_socket


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "metrics",
        help="the agent's numbers, for Prometheus",
        description="Print the agent's numbers in Prometheus' text format, for root and the agent's user.",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to write it (default: stdout)")
    add_admin_socket(parser)
    parser.set_defaults(module="metrics")
