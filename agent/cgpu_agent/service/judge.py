"""Judges one bundle for the service: does it answer us, is it good evidence, and which result does the policy say.

Pure: bundle and time in, claims or a refusal out. The cheap steps come first, so that a stranger without a nonce of
ours costs no signature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from cgpu_agent.cedar.engine import Policies
from cgpu_agent.errors import HostileInput
from cgpu_agent.service import nonces
from cgpu_agent.service.replica import ReplicaKeys
from cgpu_agent.verifier.appraisal import appraise
from cgpu_agent.verifier.ear import ear_claims
from cgpu_agent.verifier.evidence import RelyingParty, verify_evidence
from cgpu_agent.verifier.reference import Reference
from cgpu_agent.wire.bundle import parse_bundle
from cgpu_agent.wire.merkle import leaf_hash
from cgpu_agent.wire.statement import Statement, parse_statement

Claims = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no token: the step that refused, its stable reason, a sentence that is safe to show."""

    step: str
    slug: str
    detail: str


@dataclass(frozen=True, slots=True)
class Judge:
    """What is demanded of every bundle.

    Attributes:
        party: audience, trust anchors and the rest; ``nonce`` and ``at`` are set for each bundle.
        policy, reference: for ``appraise``.
        replica_keys: which nonces are ours.
        nonce_seconds, token_seconds: both count from when the nonce was made.
        token_audience: ``aud`` of the token.
        verifier_id: ``ear.verifier-id``.
    """

    party: RelyingParty
    policy: Policies
    reference: Reference | None
    replica_keys: ReplicaKeys
    nonce_seconds: int
    token_seconds: int
    token_audience: str
    verifier_id: Mapping[str, str]

    def judge(self, bundle: bytes, *, now: int) -> Claims | Refusal:
        """The claims of the token, or why there is none.

        Every time in the token counts from the nonce, and its ``jti`` follows from nonce and statement: a bundle
        posted again, here or to another replica, gives no longer-lived and no different token (attack 26).

        Args:
            bundle: as received.
            now: seconds since the epoch.
        """
        step = "bundle.format"
        try:
            parsed = parse_bundle(bundle)
            statement = parse_statement(parsed.statement)
            step = "statement.nonce"
            made = self._nonce_made(statement, now)
            step = "statement.purpose"
            self._require_purpose(statement)
        except HostileInput as error:
            return Refusal(step, error.slug, error.message)
        at = datetime.fromtimestamp(now, timezone.utc)
        result = verify_evidence(bundle, replace(self.party, nonce=statement.nonce, at=at))
        refusal = result.refusal
        if refusal is not None or not result.accepted:
            step, slug, detail = ("", None, "") if refusal is None else (refusal.id, refusal.slug, refusal.detail)
            return Refusal(step, slug or "REFUSED", detail)
        return ear_claims(
            appraise(result, self.policy, self.reference, explain=False),
            verifier_id=self.verifier_id,
            audience=self.token_audience,
            issued_at=made,
            expires_at=made + self.token_seconds,
            jti=nonces.token_id(statement.nonce, leaf_hash(parsed.statement)),
        )

    def _nonce_made(self, statement: Statement, now: int) -> int:
        return nonces.issued_at(
            self.replica_keys, statement.nonce, self.party.audience, now=now, max_age=self.nonce_seconds
        )

    def _require_purpose(self, statement: Statement) -> None:
        if statement.purpose not in self.party.purposes:
            raise HostileInput("PURPOSE_NOT_ACCEPTED", "the evidence was made for a purpose that gets no token here")
