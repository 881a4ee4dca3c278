"""Fetches what a verification will need from NVIDIA's services, and keeps what verifies.

The services are not trusted: a manifest counts by its signature and only for the name it was asked by, an OCSP
response by its signer, and only with this request's nonce.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from http import HTTPStatus
from typing import Final

from cgpu_agent.cli.collateralstore import Item, Store, attempt
from cgpu_agent.cli.https import Service
from cgpu_agent.errors import HostileInput, Unavailable
from cgpu_agent.verifier.gpu import CHECKED_IN_DEVICE_CHAIN, CHECKED_IN_RIM_CHAIN, verify_device
from cgpu_agent.verifier.gpucase import DeviceEvidence, GpuParty
from cgpu_agent.verifier.gpuchain import PinnedPath, PinnedRoots
from cgpu_agent.verifier.ocspquery import NONCE_SIZE, ocsp_request, require_answer
from cgpu_agent.verifier.rim import verified_rim
from cgpu_agent.wire.rim import parse_rim
from cgpu_agent.wire.rimservice import MAX_ENVELOPE, is_rim_id, parse_envelope, require_named

MAX_OCSP: Final = 64 << 10
"""Bytes of a response, with its responder's certificate."""


@dataclass
class Fetcher:
    """One run of ``cgpuctl collateral fetch``.

    Attributes:
        rims: NVIDIA's RIM service, or a mirror.
        ocsp: its OCSP responder.
        store: where what verifies goes.
        device_roots, rim_roots: root keys that are trusted.
        at: the moment of judgement, with a time zone.
    """

    rims: Service
    ocsp: Service
    store: Store
    device_roots: PinnedRoots
    rim_roots: PinnedRoots
    at: datetime
    _wanted: list[str] = field(default_factory=list)
    _chains: list[tuple[PinnedPath, Sequence[int]]] = field(default_factory=list)
    _silent: list[Service] = field(default_factory=list)

    def fetch(self, evidence: Iterable[DeviceEvidence], rim_ids: Iterable[str]) -> list[Item]:
        """What these devices, and these manifests, need. Every failure is an item, and none ends the others."""
        self._wanted += rim_ids
        items = [
            attempt("device", f"device {number}", partial(self._device, f"device {number}", each))
            for number, each in enumerate(evidence)
        ]
        items += [attempt("rim", rim_id, partial(self._rim, rim_id)) for rim_id in dict.fromkeys(self._wanted)]
        questions = {
            path.facts[position].sha256: (path, position)
            for path, positions in self._chains
            for position in positions
        }
        return items + [
            attempt("ocsp", path.facts[position].subject_text, partial(self._status, path, position))
            for path, position in questions.values()
        ]

    def _device(self, name: str, evidence: DeviceEvidence) -> Item:
        """Ask for nothing in the name of a device that did not sign: chain and signature come first."""
        result = verify_device(evidence, GpuParty(at=self.at, device_roots=self.device_roots))
        if result.facts is None:
            refusal = result.refusal
            if refusal is None:
                raise LookupError("a device that passed has no facts")
            raise HostileInput(refusal.slug or "INTERNAL", refusal.detail)
        self._wanted += result.facts.rim_ids
        self._chains.append((result.facts.path, CHECKED_IN_DEVICE_CHAIN))
        return Item("device", name, "read", detail=f"needs {', '.join(result.facts.rim_ids)}")

    def _rim(self, rim_id: str) -> Item:
        if not is_rim_id(rim_id):
            raise HostileInput("NO_RIM", "the device does not say enough of itself to name its RIM")
        status, data = self._ask(self.rims, f"/v1/rim/{rim_id}", None, MAX_ENVELOPE)
        if status == HTTPStatus.NOT_FOUND:
            raise Unavailable("NO_RIM", "the service does not publish it")
        _require_ok(status)
        named, document = parse_envelope(data)
        if named != rim_id:
            raise HostileInput("WRONG_RIM", f"the service answers with {named}")
        parsed = parse_rim(document)
        verified = verified_rim(parsed, roots=self.rim_roots, at=self.at)
        require_named(rim_id, verified.rim)
        self._chains.append((verified.path, CHECKED_IN_RIM_CHAIN))
        path, new = self.store.keep_rim(parsed, verified)
        return Item("rim", rim_id, "stored" if new else "unchanged", path.name)

    def _status(self, path: PinnedPath, position: int) -> Item:
        nonce = secrets.token_bytes(NONCE_SIZE)
        status, data = self._ask(self.ocsp, "/", ocsp_request(path, position, nonce), MAX_OCSP)
        _require_ok(status)
        said = require_answer(data, path, position, nonce, self.at)
        kept, _ = self.store.replace_ocsp(data)
        name = path.facts[position].subject_text
        if said.status == "revoked":
            return Item("ocsp", name, "revoked", kept.name, "CERTIFICATE_REVOKED", f"revoked: {said.reason}")
        return Item("ocsp", name, "stored", kept.name)

    def _ask(self, service: Service, path: str, body: bytes | None, limit: int) -> tuple[int, bytes]:
        if service in self._silent:
            raise Unavailable("SERVICE_SILENT", "not asked: the service did not answer before")
        try:
            return service.exchange(path, body, "application/ocsp-request", limit)
        except Unavailable as error:
            self._silent.append(service)  # many questions must not be many timeouts
            raise Unavailable("SERVICE_SILENT", error.message) from error


def _require_ok(status: int) -> None:
    if status != HTTPStatus.OK:
        word = ", a redirect, which is not followed" if 300 <= status < 400 else ""
        raise Unavailable("SERVICE_REFUSED", f"the service answers with HTTP status {status}{word}")
