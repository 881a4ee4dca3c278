"""Attacks on the relying party's conclusion: true evidence of the wrong thing, and silence taken for consent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from cgpu_agent.cedar.engine import Policies
from cgpu_agent.cedar.files import appraisal_schema, default_appraisal
from cgpu_agent.verifier.appraisal import Appraisal, PartAppraisal, appraise
from cgpu_agent.verifier.ear import ear_claims
from cgpu_agent.verifier.evidence import RelyingParty, verify_evidence
from cgpu_agent.verifier.reference import Reference, make_reference, parse_reference
from fixtures import boots
from fixtures.attest import Signer, ecc_key, rsa_key
from fixtures.bundles import AUDIENCE, GENUINE, PARTY, PLATFORM_AK, ROOT, made, name_of, stating
from fixtures.pki import Authority

POLICY = Policies.load(default_appraisal(), appraisal_schema(), "the default policy")
PINNING = replace(PARTY, pinned_names=frozenset({name_of(PLATFORM_AK)}))
ANY_INSTANCE = (
    default_appraisal()
    + """
@id("any-instance-of-this-image")
permit (principal, action == CGpu::Action::"accept", resource == CGpu::Part::"platform")
when { context.endorsement == "ak-certificate" && !context.simulated && context.reference == "match" };
"""
)


def judge(
    data: bytes, party: RelyingParty = PINNING, reference: Reference | None = None, policy: str = ""
) -> Appraisal:
    policies = Policies.load(policy, appraisal_schema(), "policy") if policy else POLICY
    return appraise(verify_evidence(data, party), policies, reference)


def part(appraisal: Appraisal, name: str) -> PartAppraisal:
    return next(each for each in appraisal.parts if each.part == name)


def expected(data: bytes, **options: Any) -> Reference:
    return parse_reference(make_reference(verify_evidence(data, PINNING), pcrs=range(10), **options))


MEASURED = made(**boots.with_command_line(boots.VERITY))


class TestAgentEditedOnItsDisk:
    """Attack 2A: the image boots as ever, the agent's files were changed while it was off."""

    def test_the_agents_words_are_never_affirmed_without_something_that_measures_it(self) -> None:
        found = judge(GENUINE.encode(), reference=expected(GENUINE.encode()))
        assert part(found, "boot").status == "affirming"
        assert part(found, "agent").status == part(found, "workload").status == "warning"
        assert found.status != "affirming"

    def test_they_are_where_a_root_hash_is_measured_and_expected(self) -> None:
        assert judge(MEASURED, reference=expected(MEASURED)).status == "affirming"

    @pytest.mark.parametrize(
        "changed",
        [
            boots.with_shown_command_line(boots.VERITY),
            boots.with_command_line(boots.VERITY, command="/vmlinuz root=/dev/sda1"),
            boots.with_two_command_lines(boots.VERITY, "/vmlinuz root=/dev/sda1"),
        ],
        ids=["shown-not-digested", "label-only", "one-of-two"],
    )
    def test_a_command_line_that_a_hostile_host_dresses_up_measures_nothing(self, changed: dict[str, Any]) -> None:
        found = judge(made(**changed))
        assert found.coverage is not None
        assert found.coverage.kind == "nothing"
        assert part(found, "agent").status != "affirming"

    def test_a_root_hash_that_nobody_expected_affirms_nothing(self) -> None:
        # Anybody can demand the hash of an image of his own.
        for reference in (None, expected(GENUINE.encode())):
            found = judge(MEASURED, reference=reference)
            assert found.coverage is not None
            assert found.coverage.kind == "verity-root"
            assert part(found, "agent").status != "affirming"

    def test_a_reference_that_leaves_loader_and_initrd_open_affirms_no_agent(self) -> None:
        loose = parse_reference(make_reference(verify_evidence(MEASURED, PINNING)))
        found = judge(MEASURED, reference=loose)
        assert part(found, "boot").status == "affirming"
        assert part(found, "agent").status == "warning"


class TestWholeVmCuckoo:
    """Attack 2B: the same public image in the attacker's own subscription, with a certificate as good as any."""

    OTHER = Signer(ecc_key())
    CUCKOO = made(
        platform=OTHER,
        platform_certificate=ROOT.issue(OTHER.key.public_key()).public_bytes(Encoding.DER),
        **boots.with_command_line(boots.VERITY),
    )

    def test_anothers_vm_is_refused_by_a_relying_party_that_names_its_own(self) -> None:
        assert judge(self.CUCKOO).status == "contraindicated"
        found = judge(self.CUCKOO, reference=expected(MEASURED))
        assert found.status == "contraindicated"
        assert [each.what for each in found.differences] == ["instance"]

    def test_a_relying_party_that_names_no_vm_trusts_none(self) -> None:
        found = judge(MEASURED, PARTY)
        assert part(found, "platform").status == "contraindicated"
        assert found.status == "contraindicated"

    def test_any_vm_of_the_image_is_accepted_only_by_a_policy_that_says_so(self) -> None:
        image = expected(MEASURED, any_instance=True)
        assert judge(self.CUCKOO, PARTY, image).status == "contraindicated"
        found = judge(self.CUCKOO, PARTY, image, ANY_INSTANCE)
        assert part(found, "platform").rules == ("any-instance-of-this-image",)
        assert found.status == "warning"
        assert judge(GENUINE.encode(), PARTY, image, ANY_INSTANCE).status == "contraindicated"


class TestRelayedBundle:
    """Attack 8: a relying party forwards what it was shown to another one."""

    def test_a_bundle_for_another_audience_is_contraindicated_whatever_the_policy(self) -> None:
        anything = '@id("anything") permit (principal, action, resource);'
        found = judge(stating(audience="https://somebody.else"), PINNING, None, anything)
        assert {each.status for each in found.parts} == {"contraindicated"}
        assert "WRONG_AUDIENCE" in found.reason

    def test_the_result_names_its_audience_its_end_and_the_key_still_to_be_proven(self) -> None:
        claims = ear_claims(
            judge(stating(public_key=b"\x30\x03\x02\x01\x05")),
            verifier_id={"build": "b", "developer": "d"},
            audience="https://broker.example",
            issued_at=1,
            expires_at=2,
            jti="j",
        )
        assert (claims["aud"], claims["exp"]) == ("https://broker.example", 2)
        assert claims["cnf"]["cgpu.possession"] == "claimed"
        assert claims["submods"]["workload"]["cgpu.reported"]["audience"] == AUDIENCE


class TestSimulator:
    """Attack 27: a software TPM with a certificate that looks like any other."""

    SIMULATING = replace(PINNING, roots=(), simulated_roots=(ROOT.certificate,))

    def test_a_simulators_root_verifies_and_is_trusted_for_nothing(self) -> None:
        result = verify_evidence(MEASURED, self.SIMULATING)
        assert result.accepted
        assert result.simulated
        found = judge(MEASURED, self.SIMULATING, expected(MEASURED))
        assert {each.status for each in found.parts if each.part != "gpus"} == {"contraindicated"}
        assert part(found, "platform").vector["hardware"] == 96
        assert not any(part(found, "boot").vector.values())

    def test_a_certificate_that_leads_to_both_roots_is_a_simulators(self) -> None:
        both = replace(PINNING, roots=(ROOT.certificate,), simulated_roots=(ROOT.certificate,))
        assert verify_evidence(GENUINE.encode(), both).simulated

    def test_simulated_roots_vouch_for_nothing_else(self) -> None:
        other = Authority.root("a simulator")
        beside = replace(PINNING, simulated_roots=(other.certificate,))
        result = verify_evidence(GENUINE.encode(), beside)
        assert result.accepted
        assert not result.simulated
        alone = replace(PINNING, roots=(), simulated_roots=(other.certificate,))
        refusal = verify_evidence(GENUINE.encode(), alone).refusal
        assert refusal is not None
        assert (refusal.id, refusal.slug) == ("platform-ak.endorsement", "UNKNOWN_ISSUER")

    def test_a_simulator_cannot_deny_itself_by_what_it_says(self) -> None:
        certificate = ROOT.issue(rsa_key().public_key(), "Genuine TPM, not simulated").public_bytes(Encoding.DER)
        assert verify_evidence(made(platform_certificate=certificate), self.SIMULATING).simulated


class TestSkippedLane:
    """Attack 28: evidence without GPUs, and a verdict that does not mention any."""

    GPUS_TOO = (
        default_appraisal()
        + '@id("gpus-too") permit (principal, action == CGpu::Action::"require", resource == CGpu::Part::"gpus");'
    )

    def test_gpus_that_were_not_asked_for_are_in_the_result_as_not_asked(self) -> None:
        found = judge(MEASURED, reference=expected(MEASURED))
        assert part(found, "gpus").status == "none"
        assert part(found, "gpus").reason.startswith("not-asked")
        assert found.facts is not None
        assert found.facts.lane == "boot"

    def test_a_policy_that_names_gpus_is_not_satisfied_by_their_absence(self) -> None:
        found = judge(MEASURED, reference=expected(MEASURED), policy=self.GPUS_TOO)
        assert found.status == "none"
        assert not found.good

    def test_no_policy_can_affirm_gpus_that_nobody_looked_at(self) -> None:
        found = judge(MEASURED, policy='@id("anything") permit (principal, action, resource);')
        assert part(found, "gpus").status == "none"
        assert found.status == "none"
