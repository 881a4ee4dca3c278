"""What ``cgpuctl collateral`` takes."""

from __future__ import annotations

from pathlib import Path

from cgpu_agent.cli.arguments.common import ONE_EACH, Commands, add_json, group

DEFAULT_COLLATERAL = "/etc/cgpu-agent/collateral"
"""As ``gpu.collateral`` in the agent's configuration."""


def add(commands: Commands) -> None:
    verbs = group(
        commands,
        "collateral",
        help="an offline store of reference values and revocation data",
        description="A directory of reference values (RIM), CRLs and OCSP responses, as the agent and "
        "cgpuctl gpu verify --collateral read it.",
    )
    fetch = verbs.add_parser(
        "fetch",
        help="get what GPUs need from NVIDIA's services",
        description="Get the reference values that devices name, or those named here, and the OCSP status of all "
        "certificates involved. Only what verifies is kept. Exit status: 0 all there, 1 otherwise.",
    )
    fetch.add_argument("--report", type=Path, metavar="FILE", help="one device's report, hex or raw bytes")
    fetch.add_argument("--chain", type=Path, metavar="FILE", help="its five certificates (PEM, leaf first)")
    fetch.add_argument("--evidence", help="NVIDIA's JSON list of devices", **ONE_EACH)
    fetch.add_argument("--rim-id", action="append", default=[], metavar="ID", help="a RIM, by NVIDIA's name for it")
    fetch.add_argument(
        "--rim-url",
        default="https://rim.attestation.nvidia.com",
        metavar="URL",
        help="the RIM service (default: NVIDIA's)",
    )
    fetch.add_argument(
        "--ocsp-url",
        default="https://ocsp.ndis.nvidia.com",
        metavar="URL",
        help="the OCSP responder (default: NVIDIA's)",
    )
    fetch.add_argument("--device-root", type=Path, metavar="FILE", help="trust this root instead of NVIDIA's")
    bring = verbs.add_parser(
        "import",
        help="put files into the store",
        description="Put RIMs (XML, or the RIM service's JSON), CRLs and OCSP responses into the store. A RIM must "
        "verify, and be no older issue than one that is there. Exit status: 0 all there, 1 otherwise.",
    )
    bring.add_argument("file", type=Path, nargs="+", metavar="FILE", help="a file; its content says what it is")
    shown = verbs.add_parser(
        "list",
        help="say what is in the store",
        description="Say what is in the store, until when it is good, and which files the agent would refuse. "
        "Exit status: 0 no file is broken or refused, 1 otherwise.",
    )
    for parser in (fetch, bring, shown):
        parser.add_argument(
            "--store",
            type=Path,
            default=Path(DEFAULT_COLLATERAL),
            metavar="DIR",
            help=f"the store (default: {DEFAULT_COLLATERAL})",
        )
        parser.add_argument("--rim-root", type=Path, metavar="FILE", help="trust this root for RIMs, not NVIDIA's")
        parser.add_argument("--at", metavar="RFC3339", help="judge at this time (default: now)")
        add_json(parser)
        parser.set_defaults(module="collateral")
