"""What ``cgpuctl ak`` takes."""

from __future__ import annotations

from pathlib import Path

from cgpu_agent.cli.arguments.common import Commands, add_socket, group


def add(commands: Commands) -> None:
    verbs = group(commands, "ak", help="have the platform AK certified", description="This VM's platform AK.")
    parser = verbs.add_parser(
        "enrol",
        help="get an AK certificate from a verifier service",
        description="Show a verifier service that the platform AK is in one TPM with an EK that it trusts, and get a "
        "short-lived certificate. The agent must permit you boot.activate_credential.",
    )
    parser.add_argument("--url", required=True, metavar="URL", help="the service: https, or http to this machine")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where to write it (DER)")
    parser.add_argument("--ek", choices=("rsa", "ecc"), help="which EK (default: the first with a certificate)")
    parser.add_argument(
        "--ek-certificate", type=Path, metavar="FILE", help="its certificate (default: the one in the TPM's NV)"
    )
    parser.add_argument(
        "--ek-intermediate",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="CA certificate above it (PEM or DER)",
    )
    add_socket(parser)
    parser.set_defaults(module="ak")
