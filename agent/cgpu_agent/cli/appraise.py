"""The appraisal half of ``cgpuctl verify``: which policy and reference, how its verdict is shown and handed on."""

from __future__ import annotations

import argparse
import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from cgpu_agent import __version__
from cgpu_agent.cedar.engine import Policies
from cgpu_agent.cedar.files import appraisal_schema, default_appraisal
from cgpu_agent.cli import output
from cgpu_agent.cli.files import write_whole
from cgpu_agent.cli.inputs import read_file
from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.verifier.appraisal import Appraisal, appraise
from cgpu_agent.verifier.ear import SigningKey, ear_claims, sign_ear
from cgpu_agent.verifier.evidence import EvidenceResult
from cgpu_agent.verifier.reference import MAX_REFERENCE, Reference, parse_reference
from cgpu_agent.verifier.report_html import report
from cgpu_agent.wire.merkle import leaf_hash

_VERIFIER_ID = {"build": f"cgpuctl {__version__}", "developer": "cgpu-agent"}
_LIFETIME = 300
_MAX_POLICY = 256 << 10
_KINDS = {"affirming": "ok", "warning": "warn", "none": "warn", "contraindicated": "fail"}


@dataclass(frozen=True, slots=True)
class Judge:
    """The relying party's policy and expectations.

    Attributes:
        policy, policy_name: what decides, and what people call it.
        reference: expected values.
        decisive: whether the exit status follows the policy: only where somebody asked for one.
    """

    policy: Policies
    policy_name: str
    reference: Reference | None
    decisive: bool

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Judge:
        """Raises ``Misuse``: ``BAD_POLICY``, ``BAD_REFERENCE``, ``NO_JWT_KEY`` and what ``read_file`` raises."""
        if (arguments.jwt is None) != (arguments.jwt_key is None):
            raise Misuse("NO_JWT_KEY", "--jwt and --jwt-key go together: an EAR is signed by a key of yours")
        if arguments.policy is None:
            name, text = "the default policy", default_appraisal()
        else:
            name, text = str(arguments.policy), _text(arguments.policy)
        policy = Policies.load(text, appraisal_schema(), name)
        reference = None if arguments.reference is None else read_reference(arguments.reference)
        return cls(policy, name, reference, decisive=arguments.appraise or arguments.policy is not None)

    def appraise(self, result: EvidenceResult) -> Appraisal:
        return appraise(result, self.policy, self.reference)

    def lets_pass(self, appraisal: Appraisal) -> bool:
        return appraisal.good or not self.decisive

    def show(self, appraisal: Appraisal, *, explain: bool) -> None:
        """The status in one line; explained, every part with the rule that decided and what would change it."""
        said = "the exit status does not follow it" if not self.decisive else "it decides"
        output.say()
        output.say(f"appraisal by {output.printable(self.policy_name)}, {said}:")
        output.say(f"  {_coloured(appraisal.status)}  {output.printable(appraisal.reason)}")
        if not explain:
            return
        for each in appraisal.differences:
            output.say(f"  differs from the reference: {output.printable(each.detail)}")
        if appraisal.coverage is not None:
            output.say(f"  agent: {output.printable(appraisal.coverage.detail)}")
        lines = {source.id: source.line for source in self.policy.sources}
        for part in appraisal.parts:
            needed = "required" if part.required else "not required"
            output.say()
            output.say(f"  {part.part}: {_coloured(part.status)} ({needed})")
            output.say(f"    {output.printable(part.reason)}")
            for rule in part.rules:
                output.say(f"    rule {rule}: line {lines[rule]} of {output.printable(self.policy_name)}")
            if part.better:
                output.say("    it would take:")
                for phrase in part.better:
                    output.say(f"      - {phrase}")
            elif part.status in ("warning", "contraindicated") and appraisal.facts is not None:
                output.say("    nothing that evidence can show today would change this policy's answer")

    def write(
        self, appraisal: Appraisal, arguments: argparse.Namespace, *, at: datetime, gaps: Sequence[str]
    ) -> None:
        """Write the page and the token that were asked for. Of refused evidence there is a page, and no token."""
        if arguments.html is not None:
            write_whole(arguments.html, report(appraisal, at=at, gaps=gaps).encode())
        statement = appraisal.result.statement
        if arguments.jwt is not None and statement is None:
            output.complain(HostileInput("NO_EAR", "no EAR is written of refused evidence"))
        elif arguments.jwt is not None and statement is not None:
            leaf = leaf_hash(statement.encode())
            claims = ear_claims(
                appraisal,
                verifier_id=_VERIFIER_ID,
                audience=arguments.jwt_audience or arguments.audience,
                issued_at=int(at.timestamp()),
                expires_at=int(at.timestamp()) + _LIFETIME,
                jti=base64.urlsafe_b64encode(hashlib.sha256(statement.nonce + leaf).digest()).rstrip(b"=").decode(),
            )
            token = sign_ear(claims, _signing_key(arguments.jwt_key))
            write_whole(arguments.jwt, token.encode() + b"\n")


def _coloured(status: str) -> str:
    return output.coloured(status, _KINDS[status])


def _text(path: Path) -> str:
    try:
        return read_file(path, _MAX_POLICY).decode("utf-8")
    except UnicodeDecodeError:
        raise Misuse("BAD_POLICY", f"{path}: not UTF-8") from None


def read_reference(path: Path) -> Reference:
    try:
        return parse_reference(read_file(path, MAX_REFERENCE))
    except HostileInput as error:
        raise Misuse("BAD_REFERENCE", f"{path}: {error.message}") from error


def _signing_key(path: Path) -> SigningKey:
    try:
        key = load_pem_private_key(read_file(path, 65536), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Misuse("BAD_EAR_KEY", f"{path}: not an unencrypted PEM private key") from error
    return key  # type: ignore[return-value]  # sign_ear refuses what it cannot sign with
