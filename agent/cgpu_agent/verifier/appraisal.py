"""Appraises verified evidence part by part: the relying party's policy decides, and every decision names its rule.

Verification comes first and is no matter of policy: refused evidence is contraindicated in every part. Then Cedar is
asked whether each part is affirmed, and else whether it is accepted; what no rule speaks for is contraindicated. What
was not asked for has status ``none``, so that silence is never mistaken for approval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from cgpu_agent.cedar.engine import Decision, Entity, Policies
from cgpu_agent.verifier.coverage import Coverage, agent_coverage
from cgpu_agent.verifier.evidence import EvidenceResult
from cgpu_agent.verifier.facts import Facts, gather
from cgpu_agent.verifier.reference import Difference, Reference, compare
from cgpu_agent.verifier.remedy import remedies
from cgpu_agent.verifier.trustvector import vector

Status = Literal["affirming", "warning", "none", "contraindicated"]
"""Tiers of AR4SI."""

PARTS: Final = ("platform", "boot", "agent", "gpus", "workload")
GOOD: Final = frozenset({"affirming", "warning"})
"""Statuses under which a relying party goes on."""

_FROM_BEST: Final[tuple[Status, ...]] = ("affirming", "warning", "none", "contraindicated")
"""For the worst of several: a part that is required and was never looked at is worse than one with a warning."""


@dataclass(frozen=True, slots=True)
class PartAppraisal:
    """What the policy says of one part.

    Attributes:
        part: one of ``PARTS``.
        status: the tier.
        rules: ``@id`` of the policies that decided; empty where none did.
        reason: one sentence, safe to show.
        better: what would make the status better, in phrases; ``None`` when nothing this verifier knows would.
        required: whether the whole is no better than this part.
        vector: AR4SI trustworthiness vector.
    """

    part: str
    status: Status
    rules: tuple[str, ...]
    reason: str
    better: tuple[str, ...] | None
    required: bool
    vector: Mapping[str, int]

    def to_json(self) -> dict[str, object]:
        """As a verdict's JSON has it."""
        return {
            "better": None if self.better is None else list(self.better),
            "reason": self.reason,
            "required": self.required,
            "rules": list(self.rules),
            "status": self.status,
            "vector": dict(self.vector),
        }


@dataclass(frozen=True, slots=True)
class Appraisal:
    """The verdict of a relying party.

    Attributes:
        result: of the verification.
        policy_digest: SHA-256 of the policy text, hex.
        parts: in the order of ``PARTS``.
        status, reason: of the whole: the worst of the required parts.
        facts: what the policy was asked about; ``None`` when the evidence was refused.
        coverage: what measures the agent; ``None`` likewise.
        reference_given: whether there was a reference to compare with.
        differences: in what the evidence differs from it.
    """

    result: EvidenceResult
    policy_digest: str
    parts: tuple[PartAppraisal, ...]
    status: Status
    reason: str
    facts: Facts | None
    coverage: Coverage | None
    reference_given: bool
    differences: tuple[Difference, ...]

    @property
    def good(self) -> bool:
        """Whether to go on: affirmed, or accepted with a warning."""
        return self.status in GOOD

    def to_json(self) -> dict[str, object]:
        """As a verdict's JSON has it."""
        return {
            "agent_coverage": None if self.coverage is None else self.coverage.to_json(),
            "differences": [each.to_json() for each in self.differences],
            "parts": {each.part: each.to_json() for each in self.parts},
            "policy_sha256": self.policy_digest,
            "reason": self.reason,
            "simulated": self.result.simulated,
            "status": self.status,
        }


def appraise(
    result: EvidenceResult, policy: Policies, reference: Reference | None, *, explain: bool = True
) -> Appraisal:
    """Judge what evidence showed by a policy and by reference values. Never raises for the evidence.

    Args:
        result: of ``verify_evidence``.
        policy: loaded with ``cedar/appraisal.cedarschema``.
        reference: expected values, or ``None``.
        explain: also look for what would change each answer, which asks the policy many times more.
    """
    if not result.accepted:
        return _refused(result, policy, reference)
    coverage = agent_coverage(result, _command_lines(reference))
    differences = () if reference is None else compare(result, reference)
    facts, workload = gather(result, coverage.kind, reference, differs=bool(differences))
    bench = _Bench(policy, workload, facts, explain)
    parts = tuple(bench.judge(part) for part in PARTS)
    status, reason = _whole(parts)
    return Appraisal(
        result, policy.digest, parts, status, reason, facts, coverage, reference is not None, differences
    )


def _command_lines(reference: Reference | None) -> frozenset[str]:
    return frozenset() if reference is None or reference.command_lines is None else reference.command_lines


def _refused(result: EvidenceResult, policy: Policies, reference: Reference | None) -> Appraisal:
    refusal = result.refusal
    step = "no step passed" if refusal is None else f"step {refusal.id} [{refusal.slug}]: {refusal.detail}"
    reason = f"the evidence was refused, {step}"
    parts = tuple(
        PartAppraisal(part, "contraindicated", (), reason, None, required=True, vector=vector(part, None))
        for part in PARTS
    )
    return Appraisal(result, policy.digest, parts, "contraindicated", reason, None, None, reference is not None, ())


def _whole(parts: tuple[PartAppraisal, ...]) -> tuple[Status, str]:
    required = [each for each in parts if each.required]
    if not required:
        return "none", "the policy requires no part, so it says nothing of the whole"
    worst = max(required, key=lambda each: _FROM_BEST.index(each.status))
    return worst.status, f"{worst.part}: {worst.reason}"


@dataclass(frozen=True, slots=True)
class _Bench:
    """One policy and one set of facts, asked part by part."""

    policy: Policies
    workload: Entity
    facts: Facts
    explain: bool

    def ask(self, action: str, part: str, facts: Facts) -> Decision:
        return self.policy.decide(
            principal=self.workload,
            action=action,
            resource=Entity("CGpu::Part", part, {}),
            context=facts.context(),
        )

    def judge(self, part: str) -> PartAppraisal:
        status, decision, reason = self._decide(part)
        return PartAppraisal(
            part,
            status,
            decision.policy_ids,
            reason,
            self._better(part, status) if self.explain else None,
            required=self._required(part),
            vector=vector(part, self.facts),
        )

    def _required(self, part: str) -> bool:
        # A rule that failed to say whether a part is required must not have made the whole look better.
        decision = self.ask("require", part, self.facts)
        return decision.allowed or bool(decision.log_detail)

    def _decide(self, part: str) -> tuple[Status, Decision, str]:
        if part == "gpus" and self.facts.gpus == "not-asked":
            return "none", Decision(False, (), ""), "not-asked: the evidence was asked of the boot alone"
        affirm = self.ask("affirm", part, self.facts)
        if affirm.allowed:
            return "affirming", affirm, f"affirmed by {_named(affirm)}"
        accept = self.ask("accept", part, self.facts)
        if accept.allowed:
            return "warning", accept, f"accepted by {_named(accept)}, affirmed by no rule"
        return "contraindicated", accept, f"neither affirmed nor accepted: {accept.reason}"

    def _better(self, part: str, status: Status) -> tuple[str, ...] | None:
        if status in ("affirming", "none"):
            return None
        action = "affirm" if status == "warning" else "accept"
        found = remedies(self.facts, lambda facts: self.ask(action, part, facts).allowed)
        if found is None and action == "accept":
            found = remedies(self.facts, lambda facts: self.ask("affirm", part, facts).allowed)
        return found


def _named(decision: Decision) -> str:
    return f"rule {', '.join(decision.policy_ids)}"
