"""What ``cgpuctl transfer`` takes."""

from __future__ import annotations

import argparse
from pathlib import Path

from cgpu_agent.cli.arguments.common import Commands, add_json, add_segment_size, add_socket, group


def add(commands: Commands) -> None:
    verbs = group(
        commands,
        "transfer",
        help="bytes to a GPU's memory and back",
        description="Transfers to a GPU's memory, by the agent. Policy must permit you gpu.transfer.",
    )
    parser = verbs.add_parser(
        "bench",
        help="measure how fast they are",
        description="Measure transfers between this process and a GPU's memory: large ones, then ones of 4 KiB.",
    )
    parser.add_argument("--size", default="64MiB", metavar="SIZE", help="of the large ones (default: 64MiB)")
    parser.add_argument(
        "--direction",
        choices=("to", "from", "both"),
        default="both",
        help="to the GPU's memory, or from it (default: both)",
    )
    parser.add_argument(
        "--seconds", type=int, default=2, metavar="N", help="for each measurement, 1-600 (default: 2)"
    )
    _common(parser)
    parser = verbs.add_parser(
        "copy",
        help="copy a file to a GPU's memory and back, and compare",
        description="Copy a file to a GPU's memory and back, and compare; or, with --sealed, have a sealed object "
        "opened into it, from where it cannot be read back. Then that is wiped. Exit status: 0 done, 1 otherwise.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a regular file")
    parser.add_argument("--sealed", metavar="KEY", help="it is sealed under this key, as key list gives it")
    parser.add_argument("--object-id", metavar="ID", help="the sealed object's name")
    parser.add_argument("--object-version", type=int, metavar="N", help="its version")
    add_segment_size(parser)
    _common(parser)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpu", default="0", metavar="GPU", help="its uuid, or its place in gpu list, from 0 (default: 0)"
    )
    add_socket(parser)
    add_json(parser)
    parser.set_defaults(module="transfer")
