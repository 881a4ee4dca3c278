"""``cgpuctl collateral fetch|import|list``: an offline store of reference values and revocation data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

from cgpu_agent.cli import output
from cgpu_agent.cli.collateralfetch import Fetcher
from cgpu_agent.cli.collaterallist import show
from cgpu_agent.cli.collateralstore import Item, Store, attempt
from cgpu_agent.cli.gpu import evidence_of
from cgpu_agent.cli.gpudemands import roots_of
from cgpu_agent.cli.https import Service
from cgpu_agent.cli.inputs import parse_time, read_file
from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.verifier.collateralfolder import MAX_FILE
from cgpu_agent.verifier.gpuchain import NVIDIA_DEVICE_ROOTS, NVIDIA_RIM_ROOTS
from cgpu_agent.verifier.revocation import load_crl, load_ocsp
from cgpu_agent.verifier.rim import verified_rim
from cgpu_agent.wire.der import is_pem
from cgpu_agent.wire.rim import parse_rim
from cgpu_agent.wire.rimservice import is_rim_id, parse_envelope, require_named

_GOOD: Final = ("read", "stored", "unchanged")


def run(arguments: argparse.Namespace) -> int:
    if arguments.verb == "list":
        return show(arguments)
    items = _fetch(arguments) if arguments.verb == "fetch" else _import(arguments)
    done = bool(items) and all(item.result in _GOOD for item in items)
    if arguments.json:
        output.emit_json({"items": [item.to_json() for item in items], "result": "pass" if done else "refused"})
    else:
        results = [item.result for item in items]
        counts = [f"{results.count(word)} {word}" for word in (*_GOOD, "revoked", "refused") if word in results]
        output.say(f"{arguments.store}: {', '.join(counts) or 'nothing asked for'}")
    return output.EXIT_PASS if done else output.EXIT_REFUSED


def _fetch(arguments: argparse.Namespace) -> Sequence[Item]:
    wrong = next((each for each in arguments.rim_id if not is_rim_id(each)), None)
    if wrong is not None:
        raise Misuse(
            "BAD_ARGUMENT", "--rim-id is the name under which NVIDIA publishes a RIM, e.g. NV_GPU_DRIVER_..."
        )
    given = bool(arguments.evidence) or arguments.report is not None or arguments.chain is not None
    if not given and not arguments.rim_id:
        raise Misuse("BAD_ARGUMENT", "say what is needed: --evidence, --report and --chain, or --rim-id")
    fetcher = Fetcher(
        rims=_service(arguments.rim_url, "--rim-url"),
        ocsp=_service(arguments.ocsp_url, "--ocsp-url"),
        store=Store(arguments.store),
        device_roots=roots_of(arguments.device_root, NVIDIA_DEVICE_ROOTS),
        rim_roots=roots_of(arguments.rim_root, NVIDIA_RIM_ROOTS),
        at=parse_time(arguments.at),
    )
    return fetcher.fetch(evidence_of(arguments) if given else (), arguments.rim_id)


def _service(url: str, option: str) -> Service:
    if not url.lower().startswith("https:"):
        raise Misuse("BAD_URL", f"{option} must be https://HOST[:PORT]")
    return Service(url, option)


def _import(arguments: argparse.Namespace) -> Sequence[Item]:
    store, at = Store(arguments.store), parse_time(arguments.at)
    roots = roots_of(arguments.rim_root, NVIDIA_RIM_ROOTS)

    def bring(path: Path) -> Item:
        data = read_file(path, MAX_FILE)
        kind = _kind(data)
        if kind == "crl":
            kept = store.keep_crl(data)
        elif kind == "ocsp":
            kept = store.keep_ocsp(data)
        else:
            rim_id, document = parse_envelope(data) if data.lstrip()[:1] == b"{" else (None, data)
            parsed = parse_rim(document)
            verified = verified_rim(parsed, roots=roots, at=at)
            if rim_id is not None:
                require_named(rim_id, verified.rim)
            kept = store.keep_rim(parsed, verified)
        return Item(kind, str(path), "stored" if kept[1] else "unchanged", kept[0].name)

    return [attempt("file", str(path), partial(bring, path)) for path in arguments.file]


def _kind(data: bytes) -> str:
    """``rim``, ``crl`` or ``ocsp``, by content: what a file is called is nobody's word."""
    if data.lstrip()[:1] in (b"{", b"<"):
        return "rim"
    if is_pem(data):
        return "crl"
    for kind, load in (("crl", load_crl), ("ocsp", load_ocsp)):
        try:
            load(data)
        except HostileInput:
            continue
        return kind
    raise HostileInput("UNKNOWN_COLLATERAL", "neither a RIM, nor a CRL, nor a successful OCSP response")
