"""What ``cgpuctl boot`` takes."""

from __future__ import annotations

from pathlib import Path

from cgpu_agent.cli.arguments.common import Commands, add_json, add_socket, group


def add(commands: Commands) -> None:
    verbs = group(commands, "boot", help="what booted here", description="What booted here.")
    parser = verbs.add_parser(
        "show",
        help="tell the boot as a story",
        description="Tell the boot: firmware, keys, loader, kernel, command line, and which PCRs the logs explain. "
        "Live values are not signed: for evidence use cgpuctl evidence get and cgpuctl verify.",
    )
    parser.add_argument("--bundle", type=Path, metavar="FILE", help="a bundle's boot instead (told, not judged)")
    add_socket(parser)
    add_json(parser)
    parser.set_defaults(module="boot")
