"""The committed evidence vectors, for other implementations too: what they say is what this one does."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cgpu_agent.verifier.certificate import load_certificates
from cgpu_agent.verifier.evidence import RelyingParty, verify_evidence
from fixtures.make_vectors import EDITS, FOLDER, computed, edited, trees

VECTORS: dict[str, Any] = json.loads((FOLDER / "vectors.json").read_text())
BUNDLE = (FOLDER / "bundle.json").read_bytes()


def party(folder: Path = FOLDER) -> RelyingParty:
    said = VECTORS["party"]
    return RelyingParty(
        audience=said["audience"],
        nonce=bytes.fromhex(said["nonce"]),
        at=datetime.fromisoformat(said["at"]),
        roots=load_certificates((folder / "ak-root.pem").read_bytes()),
    )


def test_the_bundle_is_accepted() -> None:
    assert verify_evidence(BUNDLE, party()).refusal is None


def test_every_value_on_the_way_is_as_told() -> None:
    assert computed(BUNDLE) == VECTORS["computed"]


def test_trees_are_as_told() -> None:
    assert trees() == VECTORS["trees"]


@pytest.mark.parametrize("case", VECTORS["refusals"], ids=lambda case: case["name"])
def test_every_edit_is_refused_as_told(case: dict[str, Any]) -> None:
    refusal = verify_evidence(edited(json.loads(BUNDLE), case["pointer"], case["value"]), party()).refusal
    assert refusal is not None
    assert (refusal.id, refusal.slug) == (case["step"], case["slug"])


def test_the_vectors_hold_every_edit() -> None:
    assert [case["name"] for case in VECTORS["refusals"]] == [name for name, _, _ in EDITS]
