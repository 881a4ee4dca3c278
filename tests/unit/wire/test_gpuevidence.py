"""NVIDIA's JSON lists of evidence: read strictly."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.gpuevidence import EvidenceItem, encode_evidence, parse_evidence

ITEM = EvidenceItem("HOPPER", "ab" * 32, b"report", b"chain", "550.90.07", None)


def refused(value: object) -> str:
    with pytest.raises(HostileInput) as caught:
        parse_evidence(json.dumps(value).encode())
    return caught.value.slug


def plain(**changed: Any) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(encode_evidence([ITEM]))[0]
    return loaded | changed


def test_reads_what_it_writes() -> None:
    items = (ITEM, replace(ITEM, arch="LS10", driver=None, vbios="96.10.55.00.01"))
    assert parse_evidence(encode_evidence(items)) == items
    assert parse_evidence(b"[]") == ()


def test_a_known_version_is_allowed() -> None:
    assert parse_evidence(json.dumps([plain(version="1.0")]).encode()) == (ITEM,)


@pytest.mark.parametrize(
    ("value", "slug"),
    [
        ({}, "BAD_JSON"),
        ([1], "BAD_JSON"),
        ([plain()] * 65, "BAD_JSON"),
        ([plain(arch="hopper")], "BAD_FIELD"),
        ([plain(arch="RUBIN")], "BAD_FIELD"),
        ([plain(nonce="AB" * 32)], "BAD_FIELD"),
        ([plain(nonce="ab" * 31)], "BAD_FIELD"),
        ([plain(evidence="AAA")], "BAD_FIELD"),
        ([plain(evidence=None)], "BAD_FIELD"),
        ([plain(certificate="A" * 100_000)], "BAD_FIELD"),
        ([plain(driver_version=550)], "BAD_FIELD"),
        ([plain(version="2.0")], "BAD_FIELD"),
        ([plain(ready=True)], "UNKNOWN_KEY"),
    ],
)
def test_refuses(value: object, slug: str) -> None:
    assert refused(value) == slug


@pytest.mark.parametrize("key", ["arch", "nonce", "evidence", "certificate"])
def test_refuses_a_device_without(key: str) -> None:
    item = plain()
    del item[key]
    assert refused([item]) == "BAD_FIELD"
