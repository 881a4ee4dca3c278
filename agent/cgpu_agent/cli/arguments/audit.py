"""What ``cgpuctl audit`` takes."""

from __future__ import annotations

from pathlib import Path

from cgpu_agent.cli.arguments.common import Commands, add_json, group


def add(commands: Commands) -> None:
    verbs = group(commands, "audit", help="read and check the audit log", description="The agent's audit log.")
    log = {"type": Path, "nargs": "+", "metavar": "FILE", "help": "files of the log, oldest first"}
    show = verbs.add_parser("show", help="print the records", description="Print the audit log, a line a record.")
    show.add_argument("log", **log)  # type: ignore[arg-type]
    add_json(show)
    show.set_defaults(module="audit")
    verify = verbs.add_parser(
        "verify",
        help="check that the log is whole",
        description="Check that the audit log is one unbroken chain and, with --since, that it holds what bundles "
        "said of it: then nothing before them was altered or dropped.",
    )
    verify.add_argument("log", **log)  # type: ignore[arg-type]
    verify.add_argument(
        "--since", type=Path, action="append", default=[], metavar="BUNDLE", help="a bundle you kept (verified)"
    )
    add_json(verify)
    verify.set_defaults(module="audit")
    follow = verbs.add_parser(
        "follow",
        help="print records as they come",
        description="Print the last records of the audit log and then each one as it comes, checked against the one "
        "before, until interrupted or until one does not follow.",
    )
    follow.add_argument(
        "log",
        type=Path,
        nargs="?",
        default=Path("/var/lib/cgpu-agent/audit.jsonl"),
        metavar="FILE",
        help="the file that grows (default: %(default)s)",
    )
    add_json(follow)
    follow.set_defaults(module="auditfollow")
