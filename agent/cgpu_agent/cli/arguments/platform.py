"""What ``cgpuctl platform`` takes."""

from __future__ import annotations

from pathlib import Path

from cgpu_agent.cli.arguments.common import SEVERAL, Commands, add_json, add_socket, group
from cgpu_agent.cli.arguments.judging import add_floor


def add(commands: Commands) -> None:
    verbs = group(commands, "platform", help="who vouches for a vTPM", description="Who vouches for a vTPM.")
    parser = verbs.add_parser(
        "verify",
        help="judge the platform below a vTPM offline",
        description="Say who vouches for the vTPM of an Azure VM: AMD or Intel under a known paravisor, the cloud, "
        "or nobody. Needs no network. Exit status: 0 somebody does, 1 nobody or refused.",
    )
    report = "HCL report, bare SNP report or bare TD quote"
    parser.add_argument("--hcl", "--report", type=Path, metavar="FILE", help=report)
    parser.add_argument("--claims", type=Path, metavar="FILE", help="runtime claims beside a bare report")
    parser.add_argument("--td-quote", type=Path, metavar="FILE", help="TD quote over the report's TDREPORT")
    parser.add_argument("--vcek", help="VCEK or VLEK, also with its CA and AMD's root (PEM or DER)", **SEVERAL)
    parser.add_argument("--chain", help="CA certificates above VCEK or AK certificate, roots among them", **SEVERAL)
    parser.add_argument("--ak", type=Path, metavar="FILE", help="the platform AK in question, as for quote verify")
    parser.add_argument("--ak-cert", type=Path, metavar="FILE", help="its certificate (PEM or DER)")
    parser.add_argument("--quote", type=Path, metavar="FILE", help="a quote by that AK: TPMS_ATTEST")
    parser.add_argument("--signature", type=Path, metavar="FILE", help="its signature: TPMT_SIGNATURE or raw RSA")
    parser.add_argument("--pcrs", type=Path, metavar="FILE", help='the PCR values it covers: JSON {"index": "hex"}')
    parser.add_argument("--nonce", metavar="HEX", help="its expected extraData")
    add_floor(parser)
    parser.add_argument("--at", metavar="RFC3339", help="judge certificates at this time (default: now)")
    add_json(parser)
    parser.set_defaults(module="platform")
    _platform_token(verbs)
    _this_platform(verbs)


def _platform_token(verbs: Commands) -> None:
    parser = verbs.add_parser(
        "token",
        help="judge a token of Microsoft's attestation service",
        description="Judge a token of Azure Attestation (MAA) offline, by the key set of the service that you trust. "
        "Exit status: 0 somebody vouches for the vTPM, by that service's word; 1 nobody or refused.",
    )
    parser.add_argument("--token", type=Path, required=True, metavar="FILE", help="the token; - for standard input")
    parser.add_argument(
        "--jwks", type=Path, required=True, metavar="FILE", help="the service's key set, of URL/certs"
    )
    parser.add_argument(
        "--issuer", action="append", required=True, metavar="URL", help="a service that you trust, as a whole URL"
    )
    parser.add_argument("--nonce", metavar="HEX", help="the nonce of the client payload")
    parser.add_argument("--at", metavar="RFC3339", help="judge at this time (default: now)")
    add_json(parser)
    parser.set_defaults(module="maa")


def _this_platform(verbs: Commands) -> None:
    show = verbs.add_parser(
        "show",
        help="what this VM says of its platform",
        description="Show what the platform below this VM's vTPM says of itself, by the agent. Not evidence: have it "
        "judged by cgpuctl platform verify.",
    )
    show.add_argument("--out", type=Path, metavar="DIR", help="write the files that platform verify takes")
    add_socket(show)
    add_json(show)
    show.set_defaults(module="thisplatform")
    fetch = verbs.add_parser(
        "fetch",
        help="get AMD's certificates, or a TD quote, for the agent",
        description="Get what the agent, which has no network, needs of Azure's metadata service: AMD's certificates "
        "of this processor, or a TD quote over its report. Run it in the VM, as root.",
    )
    fetch.add_argument(
        "--store",
        type=Path,
        default=Path("/etc/cgpu-agent/platform"),
        metavar="DIR",
        help="where the agent looks (platform.collateral; default: /etc/cgpu-agent/platform)",
    )
    fetch.add_argument(
        "--metadata-service",
        default="http://169.254.169.254",
        metavar="URL",
        help="the service (default: http://169.254.169.254)",
    )
    add_socket(fetch)
    fetch.set_defaults(module="thisplatform")
