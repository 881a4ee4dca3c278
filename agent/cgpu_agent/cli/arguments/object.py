"""What ``cgpuctl object`` takes."""

from __future__ import annotations

import argparse
from pathlib import Path

from cgpu_agent.cli.arguments.common import Commands, add_json, group

_SEGMENT_SIZES = ("1MiB", "4KiB")


def add(commands: Commands) -> None:
    verbs = group(commands, "object", help="seal and open objects", description="Sealed objects, such as models.")
    told = {
        "seal": ("encrypt a file under a key and a name", "Seal a file: nobody reads, alters, cuts or swaps it."),
        "open": ("decrypt it, if it is the one named", "Open a sealed object, if it is whole and the one named."),
    }
    for verb, (short, long) in told.items():
        parser = verbs.add_parser(
            verb, help=short, description=f"{long} Needs no agent and no network. Exit status: 0 done, 1 refused."
        )
        parser.add_argument("--key-file", type=Path, required=True, metavar="FILE", help="32 random bytes, mode 0600")
        parser.add_argument("--key-id", required=True, metavar="ID", help="the key's name")
        parser.add_argument("--object-id", required=True, metavar="ID", help="the object's name")
        parser.add_argument(
            "--object-version", type=int, required=True, metavar="N", help="its version, from 1 up: one per content"
        )
        _segment_size(parser)
        parser.add_argument("source", type=Path, metavar="IN", help="what to read; - for standard input")
        parser.add_argument("target", type=Path, metavar="OUT", help="where to write; - for standard output")
        add_json(parser)
        parser.set_defaults(module="object")
    parser = verbs.add_parser(
        "inspect",
        help="say how an object is cut",
        description="Print an object's header and the sizes that follow from its own. Nothing is verified.",
    )
    parser.add_argument("source", type=Path, metavar="FILE", help="the sealed object")
    _segment_size(parser)
    add_json(parser)
    parser.set_defaults(module="object")


def _segment_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--segment-size",
        choices=_SEGMENT_SIZES,
        default=_SEGMENT_SIZES[0],
        help=f"how it is cut, which no object says of itself (default: {_SEGMENT_SIZES[0]})",
    )
