"""What ``cgpuctl policy`` takes."""

from __future__ import annotations

from pathlib import Path

from cgpu_agent.cli.arguments.common import Commands, add_json, group

_BROKERS = ("credential", "sealed", "openbao", "trustee", "azure")
_GPU_STATES = ("ready", "not-ready", "none", "not-asked")


def add(commands: Commands) -> None:
    verbs = group(commands, "policy", help="check and explain policies", description="Cedar policies.")
    parser = verbs.add_parser(
        "check",
        help="say what is wrong with a policy",
        description="Check a policy as its reader would, and the agent's for permits that name nobody in particular. "
        "Exit status: 0 nothing to say, 1 otherwise.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the policy; - for standard input")
    parser.add_argument("--kind", choices=("agent", "verifier"), default="agent", help="whose it is (default: agent)")
    add_json(parser)
    parser.set_defaults(module="policy")
    parser = verbs.add_parser(
        "explain",
        help="say who may do what",
        description="Say what a caller may do, and which policy decides it; by default for a few typical callers.",
    )
    parser.add_argument("--policy", type=Path, metavar="FILE", help="the agent's policy (default: the one built in)")
    parser.add_argument("--uid", type=int, metavar="N", help="the caller's uid (default: 1000)")
    parser.add_argument("--unit", metavar="NAME", help="its systemd unit (default: none)")
    parser.add_argument("--container", metavar="ID", help="its container (default: none)")
    parser.add_argument("--groups", type=int, nargs="+", metavar="N", help="its supplementary groups")
    parser.add_argument("--key", metavar="ID", help="say what it may do with this key, too")
    parser.add_argument("--broker", choices=_BROKERS, default="sealed", help="who keeps the key (default: sealed)")
    parser.add_argument("--key-group", default="", metavar="NAME", help="the key's group (default: none)")
    parser.add_argument(
        "--gpus",
        choices=_GPU_STATES,
        default="not-asked",
        help="what the agent makes of the GPUs (default: not-asked)",
    )
    add_json(parser)
    parser.set_defaults(module="policy")
