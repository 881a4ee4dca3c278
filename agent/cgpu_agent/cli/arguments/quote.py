"""What ``cgpuctl quote`` takes."""

from __future__ import annotations

from pathlib import Path

from cgpu_agent.cli.arguments.common import Commands, add_json, group

_BANKS = ("sha1", "sha256", "sha384", "sha512")


def add(commands: Commands) -> None:
    verbs = group(commands, "quote", help="judge bare TPM quotes", description="Judge bare TPM quotes.")
    parser = verbs.add_parser(
        "verify",
        help="judge a quote offline",
        description="Judge a TPM2_Quote by its AK. What is not given is not compared, and the verdict says so. "
        "Whether the AK is a real TPM's is not judged here (see cgpuctl verify).",
    )
    parser.add_argument("--attest", type=Path, required=True, metavar="FILE", help="TPMS_ATTEST")
    parser.add_argument("--signature", type=Path, required=True, metavar="FILE", help="TPMT_SIGNATURE or raw RSA")
    parser.add_argument(
        "--ak", type=Path, required=True, metavar="FILE", help="PEM, DER, certificate, TPMT_PUBLIC or TPM2B_PUBLIC"
    )
    parser.add_argument("--pcrs", type=Path, metavar="FILE", help='PCR values as JSON {"index": "hex"}')
    parser.add_argument("--nonce", metavar="HEX", help="expected extraData")
    parser.add_argument("--bank", choices=_BANKS, default="sha256", help="PCR bank (default: sha256)")
    parser.add_argument("--allow-sha1-bank", action="store_true", help="accept PCR values of the SHA-1 bank")
    add_json(parser)
    parser.set_defaults(module="quote")
