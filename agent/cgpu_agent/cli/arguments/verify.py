"""What ``cgpuctl verify`` takes."""

from __future__ import annotations

from pathlib import Path

from cgpu_agent.cli.arguments.common import Commands, add_json
from cgpu_agent.cli.arguments.judging import add_relying_party


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "verify",
        help="judge an evidence bundle offline",
        description="Judge an evidence bundle. Needs no agent, no TPM and no network. Exit status: 0 accepted, "
        "1 refused; with --policy or --appraise, 0 only where the policy affirms or accepts it too.",
    )
    add_relying_party(parser)
    group = parser.add_argument_group("appraisal")
    group.add_argument(
        "--policy", type=Path, metavar="FILE", help="your appraisal policy (Cedar), which then decides"
    )
    group.add_argument("--appraise", action="store_true", help="let the default appraisal policy decide")
    group.add_argument("--reference", type=Path, metavar="FILE", help="expected values (cgpuctl reference make)")
    group.add_argument("--explain", action="store_true", help="for each part: the rule, and what would change it")
    group = parser.add_argument_group("output")
    add_json(group)
    group.add_argument("--html", type=Path, metavar="FILE", help="write the verdict as a page")
    group.add_argument("--jwt", type=Path, metavar="FILE", help="write the verdict as a signed EAR (JWT)")
    group.add_argument("--jwt-key", type=Path, metavar="FILE", help="your key to sign it (PEM)")
    group.add_argument("--jwt-audience", metavar="NAME", help="who may rely on it (default: your own name)")
    parser.set_defaults(module="verify")
