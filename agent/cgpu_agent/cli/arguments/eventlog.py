"""What ``cgpuctl eventlog`` takes."""

from __future__ import annotations

from pathlib import Path

from cgpu_agent.cli.arguments.common import Commands, add_json


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "eventlog",
        help="parse and replay a raw TCG event log",
        description="Parse a TCG event log (legacy, crypto-agile or CCEL), replay every bank and tell the boot. "
        "A log alone proves nothing: compare its PCRs with a quote's.",
    )
    parser.add_argument("log", type=Path, metavar="FILE", help="the raw log; - for standard input")
    parser.add_argument("--kind", choices=("tpm", "ccel"), help="whose log it is (default: recognised)")
    add_json(parser)
    parser.set_defaults(module="eventlog")
