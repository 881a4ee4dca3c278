"""What every command takes that judges evidence: what is demanded of it, and what is brought along."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cgpu_agent.cli.arguments.common import DEFAULT_AUDIENCE, ONE_EACH


def add_relying_party(parser: argparse.ArgumentParser) -> None:
    """Who judges, and what it demands."""
    parser.add_argument("bundle", type=Path, metavar="FILE", help="the bundle; - for standard input")
    parser.add_argument("--nonce", required=True, metavar="HEX", help="the nonce you sent")
    parser.add_argument(
        "--audience",
        default=DEFAULT_AUDIENCE,
        metavar="NAME",
        help=f"your name, as the evidence must hold it (default: {DEFAULT_AUDIENCE})",
    )
    parser.add_argument("--at", metavar="RFC3339", help="judge certificates at this time (default: now)")
    parser.add_argument("--ak-root", help="trusted root for AK certificates (PEM or DER)", **ONE_EACH)
    parser.add_argument(
        "--simulated-ak-root",
        help="root of a simulator's AK certificates; the verdict says so",
        **ONE_EACH,
    )
    parser.add_argument("--ak-intermediate", help="CA certificates below it (PEM or DER)", **ONE_EACH)
    parser.add_argument(
        "--ak-name", action="append", default=[], metavar="HEX", help="Name of a platform AK that you enrolled"
    )
    parser.add_argument(
        "--register", type=int, default=13, metavar="PCR", help="agent register of your VMs, 0-15 (default: 13)"
    )
    parser.add_argument("--user-data", metavar="HEX", help="user data the evidence must bind")
    parser.add_argument("--public-key", type=Path, metavar="FILE", help="key the evidence must bind (DER SPKI)")
    parser.add_argument(
        "--allow-unendorsed", action="store_true", help="accept an AK nobody vouches for; the verdict says so"
    )
    parser.add_argument(
        "--allow-no-boot-log", action="store_true", help="accept a missing firmware log; the verdict says so"
    )
    add_floor(parser)
    add_gpu_demands(parser.add_argument_group("GPUs"), ONE_EACH)


def add_floor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--floor",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="lowest security version of the processor's firmware to accept",
    )


def add_gpu_demands(parser: argparse._ActionsContainer, files: Mapping[str, Any]) -> None:
    """What a judge demands of GPUs, and brings along."""
    parser.add_argument("--gpus", type=int, metavar="COUNT", help="how many GPUs there must be")
    parser.add_argument("--collateral", type=Path, metavar="DIR", help="use this store (cgpuctl collateral)")
    parser.add_argument("--rim", help="NVIDIA's reference values: signed XML", **files)
    parser.add_argument("--crl", help="certificate revocation list (DER or PEM)", **files)
    parser.add_argument("--ocsp", help="OCSP response (DER)", **files)
    parser.add_argument("--max-age", type=int, metavar="DAYS", help="oldest acceptable CRL or OCSP response")
    parser.add_argument("--device-root", type=Path, metavar="FILE", help="trust this root instead of NVIDIA's")
    parser.add_argument("--rim-root", type=Path, metavar="FILE", help="the same for reference values")
    parser.add_argument("--min-driver", metavar="VERSION", help="lowest driver to accept")
    parser.add_argument("--min-vbios", metavar="VERSION", help="lowest GPU firmware to accept")
    parser.add_argument("--min-switch-bios", metavar="VERSION", help="lowest NVSwitch firmware to accept")
    parser.add_argument("--require-revocation", action="store_true", help="refuse an unknown revocation status")
    parser.add_argument("--require-fwid", action="store_true", help="refuse firmware that does not report its FWID")
    parser.add_argument("--allow-no-rim", action="store_true", help="accept unmeasured devices; the verdict says so")
    parser.add_argument(
        "--allow-rim-hold", action="store_true", help="accept a RIM signer whose certificate is on hold"
    )
