"""What ``cgpuctl key`` takes."""

from __future__ import annotations

import argparse
from pathlib import Path

from cgpu_agent.cli.arguments.common import Commands, add_admin_socket, add_json, add_socket, group


def add(commands: Commands) -> None:
    verbs = group(commands, "key", help="the keys that you may have", description="Keys that the agent releases.")
    parser = verbs.add_parser(
        "list",
        help="say which keys you may have now",
        description="Say which keys you may have now, and in which way.",
    )
    add_socket(parser)
    add_json(parser)
    parser.set_defaults(module="key")
    parser = verbs.add_parser(
        "get",
        help="get a key",
        description="Get a key, if the operator's policy lets you have it: wrapped to a key pair made for this call, "
        "and opened here.",
    )
    parser.add_argument("key", metavar="KEY", help="its id, as key list gives it")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to write it (mode 0600)")
    parser.add_argument("--plain", action="store_true", help="in plain over the socket, which policy permits apart")
    add_socket(parser)
    parser.set_defaults(module="key")
    parser = verbs.add_parser(
        "policy-sign",
        help="approve a boot in which sealed keys may be opened",
        description="Approve the boot that a reference describes: the TPMs of the fleet open keys of these groups in "
        "it, without resealing. Needs your key, and neither a VM nor a TPM.",
    )
    for name, what in (("--key", "your P-256 key (PEM)"), ("--reference", "the boot (cgpuctl reference make)")):
        parser.add_argument(name, type=Path, required=True, metavar="FILE", help=what)
    parser.add_argument("--fleet", required=True, metavar="NAME", help="the VMs, as their keys were created for")
    parser.add_argument("--group", action="append", required=True, metavar="NAME", help="a group of keys; repeatable")
    parser.add_argument(
        "--epoch", type=int, required=True, metavar="N", help="good while the TPM's epoch counter is at most this"
    )
    parser.add_argument(
        "--pcr", type=int, action="append", metavar="PCR", help="approve this PCR (default: all of the reference)"
    )
    parser.add_argument(
        "--i-know",
        action="store_true",
        help="approve a boot that does not measure the root file system, all the same",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where to write it")
    parser.set_defaults(module="keysign")
    _sealed_keys(verbs)


def _sealed_keys(verbs: Commands) -> None:
    """The operator's verbs; what a key is called is the store's name of it, not the agent's id."""

    def verb(name: str, text: str, description: str, *, json: bool = False) -> argparse.ArgumentParser:
        parser = verbs.add_parser(name, help=text, description=f"{description} For the operator, as root.")
        add_admin_socket(parser)
        if json:
            add_json(parser)
        parser.set_defaults(module="keystore")
        return parser

    def key(parser: argparse.ArgumentParser, *, group: bool = False) -> None:
        parser.add_argument("key", metavar="KEY", help="its name in the store")
        if group:
            parser.add_argument("--group", required=True, metavar="NAME", help="by which boots are approved for it")

    owned = ("--authority", "public half of the owner's P-256 key (PEM)")
    password = ("--owner-auth", "file with the password of the TPM's owner hierarchy (default: it has none)")
    parser = verb(
        "init", "make the store of sealed keys", "Make what keys sealed to this VM's TPM need, and no key yet."
    )
    parser.add_argument(owned[0], type=Path, required=True, metavar="FILE", help=owned[1])
    parser.add_argument("--fleet", required=True, metavar="NAME", help="the VMs, as the owner's approvals name them")
    parser.add_argument(password[0], type=Path, metavar="FILE", help=password[1])
    parser.add_argument("--replace-lost", action="store_true", help="give up keys whose store is gone")
    parser = verb(
        "adopt",
        "take the store on disk for the right one",
        "Take the store on disk for the right one: you know that it is no old one, since nothing else tells.",
    )
    parser.add_argument(owned[0], type=Path, required=True, metavar="FILE", help=owned[1])
    parser.add_argument(password[0], type=Path, metavar="FILE", help=password[1])
    verb("show", "show the sealed keys", "Show the sealed keys, and whether the TPM would open them now.", json=True)
    key(verb("create", "seal a new random key", "Seal 32 random bytes.", json=True), group=True)
    parser = verb("import", "seal a key of yours", "Seal 1 to 128 bytes of yours; keep a copy elsewhere.", json=True)
    key(parser, group=True)
    parser.add_argument("--secret", type=Path, required=True, metavar="FILE", help="the key, mode 0600; - = stdin")
    parser = verb("rotate", "seal a key's next generation", "Seal the next generation of a key.", json=True)
    key(parser)
    parser.add_argument("--secret", type=Path, metavar="FILE", help="the key, mode 0600; - = stdin (default: random)")
    parser = verb("remove", "remove a key", "Remove a key from the store: what it protected must be encrypted anew.")
    key(parser)
    parser.add_argument("--generation", type=int, default=0, metavar="N", help="this one alone (default: all)")
    parser = verb("epoch", "end earlier approvals", "Count the TPM's epoch up: approvals of earlier ones are over.")
    parser.add_argument("minimum", type=int, metavar="N", help="at least to this value; it never goes back")
