"""What ``cgpuctl status`` takes."""

from __future__ import annotations

from cgpu_agent.cli.arguments.common import Commands, add_admin_socket, add_json


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "status",
        help="what the agent is doing",
        description="What the agent is doing, for root and the agent's user. Exit status: 0 serving, 1 otherwise.",
    )
    add_admin_socket(parser)
    add_json(parser)
    parser.set_defaults(module="status")
