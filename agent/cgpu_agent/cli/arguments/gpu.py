"""What ``cgpuctl gpu`` takes."""

from __future__ import annotations

from pathlib import Path

from cgpu_agent.cli.arguments.common import SEVERAL, Commands, add_json, add_socket, group
from cgpu_agent.cli.arguments.judging import add_gpu_demands

_ARCHITECTURES = ("hopper", "blackwell", "ls10", "ampere")


def add(commands: Commands) -> None:
    verbs = group(commands, "gpu", help="the GPUs, and their attestation", description="Attestation of GPUs.")
    _gpu_sessions(verbs)
    parser = verbs.add_parser(
        "verify",
        help="judge GPU and NVSwitch reports offline",
        description="Judge the attestation reports of NVIDIA GPUs and NVSwitches. Needs no GPU and no network. "
        "Exit status: 0 pass, 1 refused or unverifiable.",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="one report, hex or raw bytes")
    parser.add_argument("--chain", type=Path, metavar="FILE", help="its five certificates (PEM, leaf first)")
    parser.add_argument("--evidence", help="NVIDIA's JSON list of devices, all of one machine", **SEVERAL)
    parser.add_argument("--nonce", metavar="HEX", help="the 32 bytes that you sent")
    parser.add_argument("--arch", choices=_ARCHITECTURES, help="what every device must be")
    parser.add_argument("--at", metavar="RFC3339", help="judge at this time (default: now)")
    add_gpu_demands(parser, SEVERAL)
    form = parser.add_mutually_exclusive_group()
    add_json(form)
    form.add_argument("--eat", action="store_true", help="print claims as in NVIDIA's tokens, unsigned")
    parser.set_defaults(module="gpu")


def _gpu_sessions(verbs: Commands) -> None:
    told = {
        "list": ("list the GPUs of this VM", "Say whether the GPUs are trusted, and why not. Not evidence."),
        "attest": ("have the GPUs attested now", "Attest all GPUs now, or join the attestation that is running."),
        "watch": ("tell every change of the GPUs", "Print the GPUs now and after each change, until interrupted."),
    }
    for verb, (short, long) in told.items():
        status = "" if verb == "watch" else " Exit status: 0 all trusted and ready, 1 otherwise."
        parser = verbs.add_parser(verb, help=short, description=long + status)
        add_socket(parser)
        add_json(parser)
        parser.set_defaults(module="gpusession")
