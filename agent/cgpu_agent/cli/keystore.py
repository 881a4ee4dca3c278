"""``cgpuctl key init`` and the operator's other verbs: the keys sealed to this VM's TPM."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from cgpu_agent.api.v1 import sealed_keys_pb2
from cgpu_agent.cli import output
from cgpu_agent.cli.inputs import read_file, read_secret
from cgpu_agent.client import Admin
from cgpu_agent.errors import Misuse

_SECONDS: Final = 120.0
"""A slow TPM takes seconds for what it does here."""
_MAX_SECRET: Final = 128
_MAX_PASSWORD: Final = 64


def run(arguments: argparse.Namespace) -> int:
    admin = Admin(arguments.socket, timeout=_SECONDS)
    try:
        return _VERBS[arguments.verb](admin, arguments)
    finally:
        admin.close()


def _init(admin: Admin, arguments: argparse.Namespace) -> int:
    admin.create_sealed_keys(
        _authority(arguments.authority),
        arguments.fleet,
        owner_auth=_password(arguments.owner_auth),
        replace_lost=arguments.replace_lost,
    )
    output.say(f"made, for the fleet {arguments.fleet}; now: cgpuctl key create KEY --group NAME")
    return output.EXIT_PASS


def _adopt(admin: Admin, arguments: argparse.Namespace) -> int:
    generation = admin.adopt_sealed_keys(_authority(arguments.authority), owner_auth=_password(arguments.owner_auth))
    output.say(f"the store on disk is the right one now; generation {generation}")
    return output.EXIT_PASS


def _show(admin: Admin, arguments: argparse.Namespace) -> int:
    found = admin.show_sealed_keys()
    keys = sorted(found.keys, key=lambda key: (key.key, key.generation))
    if arguments.json:
        output.emit_json(
            {
                "approvals": found.approvals,
                "authority": found.authority.hex(),
                "epoch": found.epoch,
                "fleet": found.fleet,
                "keys": [_json(key) for key in keys],
                "open": found.open,
            }
        )
        return output.EXIT_PASS
    output.pairs(
        [
            ("fleet", found.fleet),
            ("epoch", str(found.epoch)),
            ("approvals", f"{found.approvals} installed"),
            ("latch", "open: the TPM opens keys in an approved boot" if found.open else "closed: no key opens"),
        ]
    )
    for key in keys:
        made = datetime.fromtimestamp(key.created, tz=timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")
        output.say(f"{key.key}  generation {key.generation}, group {key.group}, {made}")
    if not keys:
        output.say("no keys")
    return output.EXIT_PASS


def _create(admin: Admin, arguments: argparse.Namespace) -> int:
    return _made(admin.add_sealed_key(arguments.key, arguments.group), arguments)


def _import(admin: Admin, arguments: argparse.Namespace) -> int:
    return _made(admin.add_sealed_key(arguments.key, arguments.group, _secret(arguments.secret)), arguments)


def _rotate(admin: Admin, arguments: argparse.Namespace) -> int:
    secret = b"" if arguments.secret is None else _secret(arguments.secret)
    return _made(admin.rotate_sealed_key(arguments.key, secret), arguments)


def _remove(admin: Admin, arguments: argparse.Namespace) -> int:
    admin.remove_sealed_key(arguments.key, arguments.generation)
    which = f"generation {arguments.generation}" if arguments.generation else "all generations"
    output.say(f"{arguments.key}: removed, {which}")
    return output.EXIT_PASS


def _epoch(admin: Admin, arguments: argparse.Namespace) -> int:
    output.say(f"the epoch is {admin.raise_epoch(arguments.minimum)}")
    return output.EXIT_PASS


_VERBS: Final[dict[str, Callable[[Admin, argparse.Namespace], int]]] = {
    "init": _init,
    "adopt": _adopt,
    "show": _show,
    "create": _create,
    "import": _import,
    "rotate": _rotate,
    "remove": _remove,
    "epoch": _epoch,
}


def _made(key: sealed_keys_pb2.SealedKeyInfo, arguments: argparse.Namespace) -> int:
    if arguments.json:
        output.emit_json(_json(key))
    else:
        output.say(f"{key.key}: sealed, generation {key.generation}")
    return output.EXIT_PASS


def _json(key: sealed_keys_pb2.SealedKeyInfo) -> dict[str, str | int]:
    return {"created": key.created, "generation": key.generation, "group": key.group, "key": key.key}


def _authority(path: Path) -> bytes:
    try:
        key = load_pem_public_key(read_file(path))
    except ValueError:
        raise Misuse("BAD_KEY", f"{path} holds no public key (PEM)") from None
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _secret(path: Path) -> bytes:
    secret = read_file(path, _MAX_SECRET) if str(path) == "-" else read_secret(path, _MAX_SECRET)
    if not secret:
        raise Misuse("BAD_KEY", f"{path} is empty")
    return secret


def _password(path: Path | None) -> bytes:
    return b"" if path is None else read_secret(path, _MAX_PASSWORD).rstrip(b"\n")
