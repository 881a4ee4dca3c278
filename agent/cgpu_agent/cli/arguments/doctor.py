"""What ``cgpuctl doctor`` takes."""

from __future__ import annotations

from cgpu_agent.cli.arguments.common import Commands, add_json, add_socket


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what stands in the way on this machine",
        description="Check what an operator of a confidential GPU VM must know; each finding comes with its remedy. "
        "Best as root. Exit status: 0 nothing failed, 1 otherwise.",
    )
    add_socket(parser)
    add_json(parser)
    parser.set_defaults(module="doctor")
