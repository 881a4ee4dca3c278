"""What ``cgpuctl log-level`` takes."""

from __future__ import annotations

from cgpu_agent.cli.arguments.common import Commands, add_admin_socket

_LEVELS = ("debug", "info", "warning", "error")


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "log-level",
        help="how much the agent writes to the journal",
        description="Show how much the agent writes to the journal, or set it until the next reload or start.",
    )
    parser.add_argument("level", nargs="?", choices=_LEVELS, metavar="LEVEL", help=", ".join(_LEVELS))
    add_admin_socket(parser)
    parser.set_defaults(module="loglevel")
