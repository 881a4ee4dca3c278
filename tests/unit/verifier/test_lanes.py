"""Evidence with GPUs, and with a hardware report: what is accepted, and what a policy and people make of it."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import Any

import pytest

from cgpu_agent.cedar.engine import Entity, Policies
from cgpu_agent.cedar.files import appraisal_schema, default_appraisal
from cgpu_agent.verifier.appraisal import Appraisal, appraise
from cgpu_agent.verifier.claims import claims_of
from cgpu_agent.verifier.collateral import Collateral
from cgpu_agent.verifier.evidence import EvidenceResult, RelyingParty, verify_evidence
from cgpu_agent.verifier.facts import Facts, gather
from cgpu_agent.verifier.gpuchain import spki_digest
from cgpu_agent.verifier.gpufloor import Floors
from cgpu_agent.verifier.platformcase import PlatformParty, SnpFloor
from cgpu_agent.verifier.reference import make_reference, parse_reference
from cgpu_agent.verifier.report_html import report
from cgpu_agent.wire.gpuinventory import GpuInventory, GpuWords
from fixtures import boots
from fixtures.bundles import PARTY, PLATFORM_AK, PLATFORM_CERTIFICATE, ROOT, name_of
from fixtures.gpu import DRIVER
from fixtures.lanes import (
    asking,
    board,
    gpu_judge,
    gpu_party,
    gpu_record,
    hardware_judge,
    inventory,
    on_hardware,
    words_of,
)
from fixtures.pki import NOW
from fixtures.platform import PARTY as PLATFORM_PARTY
from fixtures.platform import PINS

PINNED = frozenset({name_of(PLATFORM_AK)})


def judged(data: bytes, party: RelyingParty) -> EvidenceResult:
    result = verify_evidence(data, party)
    assert result.accepted, result.refusal
    return result


def facts_of(result: EvidenceResult) -> Facts:
    return gather(result, "nothing", None, differs=False)[0]


@cache
def policy() -> Policies:
    return Policies.load(default_appraisal(), appraisal_schema(), "policy")


def status(appraisal: Appraisal, part: str) -> str:
    return next(each.status for each in appraisal.parts if each.part == part)


class TestGpus:
    def test_all_of_them_prove_themselves_to_the_batch(self) -> None:
        result = judged(asking(), gpu_judge())
        assert result.gpus is not None
        assert [device.accepted for device in result.gpus.devices] == [True, True]
        assert all(step.outcome.value == "pass" for step in result.steps if step.id.startswith("gpus."))

    def test_one_machine_with_more_of_them(self) -> None:
        def eight(nonce: bytes) -> tuple[GpuInventory, tuple[GpuWords, ...]]:
            words = words_of(board(8), nonce)
            return inventory(words, expected=8), words

        result = judged(asking(eight), gpu_judge(gpu_count=8))
        assert facts_of(result).gpu_count == 8

    def test_what_was_not_compared_is_told(self) -> None:
        bare = gpu_party(collateral=Collateral(), allow_no_rim=True)
        facts = facts_of(judged(asking(), gpu_judge(gpu_party=bare)))
        assert (facts.gpu_measurements, facts.gpu_revocation, facts.gpu_floor) == (
            "not-compared",
            "unknown",
            "none-configured",
        )

    def test_what_was_compared_is_told(self) -> None:
        facts = facts_of(judged(asking(), gpu_judge(gpu_party=gpu_party(floors=Floors(driver=DRIVER)))))
        assert (facts.gpu_measurements, facts.gpu_floor) == ("match", "kept")
        assert facts.gpu_architectures == {"hopper"}

    def test_a_root_other_than_nvidias_is_a_simulators(self) -> None:
        result = judged(asking(), gpu_judge())
        assert result.simulated
        assert result.endorsement is not None
        assert not result.endorsement.simulated
        assert facts_of(result).gpu_simulated

    @pytest.mark.parametrize(
        ("worse", "fact", "value"),
        [
            ({"cc": False}, "gpu_cc", "off"),
            ({"cc": None}, "gpu_cc", "unknown"),
            ({"cc_environment": "sim"}, "gpu_production", "no"),
            ({"cc_environment": None}, "gpu_production", "unknown"),
            ({"dev_tools": True}, "gpu_dev_tools", "on"),
            ({"dev_tools": None}, "gpu_dev_tools", "unknown"),
            ({"trusted": False}, "gpu_ready", False),
        ],
    )
    def test_what_is_said_of_several_is_said_of_the_worst(
        self, worse: dict[str, Any], fact: str, value: object
    ) -> None:
        def answer(nonce: bytes) -> tuple[GpuInventory, tuple[GpuWords, ...]]:
            words = words_of(board(), nonce)
            return inventory(words, devices=(gpu_record(words[0], 0), gpu_record(words[1], 1, **worse))), words

        good, bad = (facts_of(judged(asking(*gpus), gpu_judge())) for gpus in ((), (answer,)))
        assert getattr(good, fact) != value
        assert getattr(bad, fact) == value

    def test_are_required_by_default_where_they_were_asked_for_and_simulated_ones_refused(self) -> None:
        found = appraise(judged(asking(), gpu_judge(pinned_names=PINNED)), policy(), None)
        assert status(found, "gpus") == "contraindicated"
        assert found.status == "contraindicated"

    def test_claims_keep_apart_what_is_signed_and_what_is_said(self) -> None:
        result = judged(asking(), gpu_judge())
        found = appraise(result, policy(), None)
        claims = claims_of("gpus", result, found.facts, found.coverage)
        assert [device["driver"] for device in claims.signed["devices"]] == [DRIVER, DRIVER]
        assert "cc" not in json.dumps(claims.signed)
        assert [device["cc"] for device in claims.reported["devices"]] == [True, True]
        assert claims.reported["measured_by"] == "nothing"

    def test_the_page_shows_each(self) -> None:
        result = judged(asking(), gpu_judge())
        page = report(appraise(result, policy(), None), at=NOW, gaps=())
        for device in board():
            assert device.pdi.hex().upper() in page.upper()
        assert "0000:02:00.0" in page


@cache
def best() -> tuple[Facts, Entity]:
    """What no throw-away root can have: the facts of NVIDIA's own GPUs in a measured VM."""
    data = asking(**boots.with_command_line(boots.VERITY))
    result = judged(data, gpu_judge(pinned_names=PINNED, gpu_party=gpu_party(floors=Floors(driver=DRIVER))))
    reference = parse_reference(make_reference(result, pcrs=range(10)))
    facts, workload = gather(result, "verity-root", reference, differs=False)
    return replace(facts, gpu_simulated=False, gpu_revocation="checked"), workload


class TestDefaultPolicyOfGpus:
    @staticmethod
    def answers(**changed: Any) -> tuple[bool, bool]:
        """Whether they are affirmed, and whether accepted."""
        facts, workload = best()
        part, context = Entity("CGpu::Part", "gpus", {}), replace(facts, **changed).context()
        affirm, accept = (
            policy().decide(principal=workload, action=action, resource=part, context=context).allowed
            for action in ("affirm", "accept")
        )
        return affirm, accept

    def test_affirms_the_best(self) -> None:
        assert self.answers() == (True, True)

    @pytest.mark.parametrize(
        "missing",
        [
            {"gpu_revocation": "unknown"},
            {"gpu_floor": "none-configured"},
            {"agent_coverage": "nothing"},
            {"secure_boot": "unknown"},
            {"reference": "not-given"},
        ],
        ids=str,
    )
    def test_accepts_with_a_warning_what_lacks_a_little(self, missing: dict[str, object]) -> None:
        assert self.answers(**missing) == (False, True)

    @pytest.mark.parametrize(
        "bad",
        [
            {"gpu_simulated": True},
            {"gpu_measurements": "not-compared"},
            {"gpu_cc": "off"},
            {"gpu_cc": "unknown"},
            {"gpu_production": "no"},
            {"gpu_dev_tools": "on"},
            {"gpu_dev_tools": "unknown"},
            {"gpu_ready": False},
            {"simulated": True},
            {"endorsement": "none"},
            {"reference": "differs"},
            {"gpus": "not-asked"},
        ],
        ids=str,
    )
    def test_accepts_nothing_else(self, bad: dict[str, object]) -> None:
        assert self.answers(**bad) == (False, False)


class TestHardware:
    def test_endorses_the_ak_without_a_certificate(self) -> None:
        result = judged(on_hardware(), hardware_judge())
        assert result.endorsement is not None
        assert result.endorsement.kind == "amd-sev-snp"
        assert facts_of(result).platform_freshness == "this-batch"

    def test_is_worth_more_than_a_certificate(self) -> None:
        data = on_hardware(platform_certificate=PLATFORM_CERTIFICATE)
        result = judged(data, hardware_judge(roots=PARTY.roots))
        assert result.endorsement is not None
        assert result.endorsement.kind == "amd-sev-snp"
        assert result.endorsement.path is not None

    def test_below_a_root_that_does_not_ship_is_a_simulators(self) -> None:
        assert judged(on_hardware(), hardware_judge()).simulated

    def test_does_not_wash_off_a_simulators_certificate(self) -> None:
        data = on_hardware(platform_certificate=PLATFORM_CERTIFICATE)
        party = hardware_judge(simulated_roots=(ROOT.certificate,))
        assert judged(data, party).simulated

    def test_floors_are_told(self) -> None:
        assert facts_of(judged(on_hardware(), hardware_judge())).platform_floor == "none-configured"
        floors = replace(PLATFORM_PARTY, snp_floor=SnpFloor(bootloader=4, snp=24, microcode=219))
        assert facts_of(judged(on_hardware(), hardware_judge(platform_party=floors))).platform_floor == "kept"

    def test_its_word_is_at_the_moment_of_the_judge(self) -> None:
        stale = PlatformParty(at=NOW + timedelta(days=4000), pins=PINS)
        assert verify_evidence(on_hardware(), hardware_judge(platform_party=stale)).accepted

    def test_that_endorses_nothing_may_be_allowed(self) -> None:
        as_shipped = hardware_judge(platform_party=None, allow_unendorsed=True)
        result = judged(on_hardware(), as_shipped)
        assert result.endorsement is not None
        assert result.endorsement.kind == "none"
        refusal = verify_evidence(on_hardware(), replace(as_shipped, allow_unendorsed=False)).refusal
        assert refusal is not None
        assert refusal.id == "platform.report"

    def test_below_azures_root_the_cloud_operator_is_trusted_and_the_verdict_says_so(self) -> None:

        pins = replace(PINS, azure_vtpm_roots=frozenset({spki_digest(ROOT.certificate)}))
        party = replace(PARTY, platform_party=PlatformParty(at=NOW, pins=pins))
        result = judged(on_hardware(None, platform_certificate=PLATFORM_CERTIFICATE), party)
        assert result.endorsement is not None
        assert result.endorsement.kind == "azure-trusted-launch"
        assert "cloud operator trusted" in result.endorsement.detail
        found = appraise(result, policy(), None)
        assert status(found, "platform") == "contraindicated"  # the VM was not named
        named = judged(
            on_hardware(None, platform_certificate=PLATFORM_CERTIFICATE), replace(party, pinned_names=PINNED)
        )
        assert status(appraise(named, policy(), None), "platform") == "warning"
