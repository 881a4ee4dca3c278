"""NVIDIA's JSON list of device evidence, as its SDK and its attestation service exchange it, read strictly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.spdm import MAX_REPORT, NONCE_SIZE
from cgpu_agent.wire.strictjson import Fields

MAX_EVIDENCE: Final = 4 << 20
MAX_ITEMS: Final = 64
MAX_CHAIN: Final = 64 * 1024
ARCHITECTURES: Final = frozenset({"AMPERE", "HOPPER", "BLACKWELL", "LS10"})


@dataclass(frozen=True, slots=True)
class EvidenceItem:
    """One device of the list. Only ``report`` and ``chain`` hold signatures; the rest are the sender's words.

    Attributes:
        arch: one of ``ARCHITECTURES``.
        nonce: lower-case hex of 32 bytes.
        report: SPDM request and response.
        chain: PEM, leaf first.
        driver, vbios: versions, or ``None``.
    """

    arch: str
    nonce: str
    report: bytes
    chain: bytes
    driver: str | None
    vbios: str | None


def parse_evidence(data: bytes) -> tuple[EvidenceItem, ...]:
    """Parse a list of evidence.

    Raises:
        HostileInput: ``TOO_LARGE``, ``BAD_JSON``, ``DUPLICATE_KEY``, ``BAD_FIELD``, ``UNKNOWN_KEY``.
    """
    found = strictjson.loads(data, "evidence list", MAX_EVIDENCE)
    if not isinstance(found, list) or len(found) > MAX_ITEMS:
        raise HostileInput("BAD_JSON", f"evidence list: not a list of at most {MAX_ITEMS} devices")
    return tuple(_item(value, number) for number, value in enumerate(found))


def _item(value: Any, number: int) -> EvidenceItem:
    fields = Fields(value, f"evidence list: device {number}")
    there = fields.keys()
    if "version" in there:
        fields.choice("version", frozenset({"1.0"}))
    item = EvidenceItem(
        arch=fields.choice("arch", ARCHITECTURES),
        nonce=fields.hex("nonce", NONCE_SIZE, NONCE_SIZE).hex(),
        report=fields.base64("evidence", MAX_REPORT),
        chain=fields.base64("certificate", MAX_CHAIN),
        driver=fields.text("driver_version", 32) if "driver_version" in there else None,
        vbios=fields.text("vbios_version", 32) if "vbios_version" in there else None,
    )
    fields.end()
    return item


def encode_evidence(items: Sequence[EvidenceItem]) -> bytes:
    """The list as JSON."""
    return strictjson.dumps(
        [
            {
                "arch": item.arch,
                "certificate": strictjson.b64(item.chain),
                "evidence": strictjson.b64(item.report),
                "nonce": item.nonce,
                **({} if item.driver is None else {"driver_version": item.driver}),
                **({} if item.vbios is None else {"vbios_version": item.vbios}),
            }
            for item in items
        ]
    )
