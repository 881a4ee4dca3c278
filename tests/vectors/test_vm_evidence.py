"""Evidence of real measured boots, recorded by ``make test-vm``: what the host changed about a boot shows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from cgpu_agent.verifier.evidence import EvidenceResult, RelyingParty, verify_evidence
from cgpu_agent.verifier.reference import compare, parse_reference

MEANT = frozenset("01234567") | {"9", "11", "13"}
GRUBS = frozenset("0123456789") | {"13", "14"}


@dataclass(frozen=True)
class Recorded:
    folder: Path
    known: dict[str, Any]

    def judged(self, name: str) -> EvidenceResult:
        party = RelyingParty(
            audience=self.known["audience"],
            nonce=bytes.fromhex(self.known["nonces"][name]),
            at=datetime.fromisoformat(self.known["at"]),
            roots=[x509.load_pem_x509_certificate((self.folder / "ca.pem").read_bytes())],
        )
        return verify_evidence((self.folder / f"{name}.json").read_bytes(), party)

    def differences(self, result: EvidenceResult) -> set[str]:
        reference = parse_reference((self.folder / "reference.json").read_bytes())
        return {each.what for each in compare(result, reference)}


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    folder = Path(__file__).parent / "vm-evidence"
    return Recorded(folder, json.loads((folder / "vectors.json").read_text()))


@pytest.mark.parametrize(
    ("name", "secure_boot", "explained", "differences"),
    [
        ("enrolled", "enabled", MEANT, set()),
        ("changed", "enabled", MEANT, {"pcr-4", "pcr-9", "pcr-11", "command-line"}),
        ("insecure", "disabled", MEANT, {"pcr-0", "pcr-4", "pcr-7", "secure-boot-authority"}),
        (
            "grub",
            "enabled",
            GRUBS,
            {"pcr-4", "pcr-7", "pcr-9", "pcr-11", "secure-boot-authority", "command-line"},
        ),
    ],
)
def test_a_real_boot_is_judged(
    recorded: Recorded, name: str, secure_boot: str, explained: frozenset[str], differences: set[str]
) -> None:
    result = recorded.judged(name)
    assert result.accepted, result.refusal
    assert result.endorsement is not None
    assert result.secure_boot is not None
    assert result.endorsement.kind == "operator-ek"
    assert result.secure_boot.state == secure_boot
    assert {str(index) for index, found in result.registers.items() if found.status == "explained"} == explained
    assert result.registers[10].status == "unexplained"
    assert recorded.differences(result) == differences
