"""What ``cgpuctl evidence`` takes."""

from __future__ import annotations

from pathlib import Path

from cgpu_agent.cli.arguments.common import DEFAULT_AUDIENCE, Commands, add_socket, group


def add(commands: Commands) -> None:
    verbs = group(commands, "evidence", help="get evidence from the agent", description="Evidence of this VM.")
    parser = verbs.add_parser(
        "get",
        help="get a bundle",
        description="Get an evidence bundle that names you, nonce and audience. Judge it with cgpuctl verify.",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to write it (default: stdout)")
    parser.add_argument("--nonce", metavar="HEX", help="the relying party's nonce (default: a random one, printed)")
    parser.add_argument(
        "--audience",
        default=DEFAULT_AUDIENCE,
        metavar="NAME",
        help=f"the relying party it is for (default: {DEFAULT_AUDIENCE})",
    )
    parser.add_argument("--gpus", action="store_true", help="the GPUs too, not the boot alone")
    binding = parser.add_mutually_exclusive_group()
    binding.add_argument("--user-data", metavar="HEX", help="up to 64 bytes to bind")
    binding.add_argument("--public-key", type=Path, metavar="FILE", help="key to bind (DER SubjectPublicKeyInfo)")
    add_socket(parser)
    parser.set_defaults(module="evidence")
