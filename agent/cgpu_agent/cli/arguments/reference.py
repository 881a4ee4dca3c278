"""What ``cgpuctl reference`` takes."""

from __future__ import annotations

from pathlib import Path

from cgpu_agent.cli.arguments.common import Commands, group
from cgpu_agent.cli.arguments.judging import add_relying_party


def add(commands: Commands) -> None:
    verbs = group(commands, "reference", help="values to expect of a VM", description="Values to expect of a VM.")
    parser = verbs.add_parser(
        "make",
        help="make reference values from a good bundle",
        description="Verify a bundle of a VM that you know to be good, and write down what it showed, for "
        "cgpuctl verify --reference. Look at the file before you rely on it.",
    )
    add_relying_party(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to write it (default: stdout)")
    parser.add_argument(
        "--pcr",
        type=int,
        action="append",
        default=[],
        metavar="PCR",
        help="expect this PCR too, besides 0, 2, 3, 4 and 7",
    )
    parser.add_argument(
        "--command-line",
        action="append",
        default=[],
        metavar="TEXT",
        help="the kernel command line of a unified kernel image, whose log holds only its digest",
    )
    parser.add_argument("--any-instance", action="store_true", help="expect this image on any VM, not this VM")
    parser.set_defaults(module="reference")
