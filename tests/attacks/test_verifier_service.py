"""Attacks on the service that turns evidence into tokens: replay (26), relay (8), and the token for a broker (4)."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cgpu_agent.service import config as configuration
from cgpu_agent.service import material, nonces
from cgpu_agent.service.judge import Judge, Refusal
from cgpu_agent.service.replica import ReplicaKeys
from cgpu_agent.wire import strictjson
from fixtures import bundles
from fixtures.verifier import Verifier, bundle, certify_ak, now

ROLE = Path(__file__).resolve().parents[2] / "docs" / "recipes" / "openbao-role.json"


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Verifier:
    return Verifier(tmp_path_factory.mktemp("verifier"))


@pytest.fixture(scope="module")
def judge(verifier: Verifier) -> Judge:
    return material.load(configuration.load(verifier.config)).judge


@pytest.fixture(scope="module")
def at() -> int:
    return int(now().timestamp())


def nonce_of(judge: Judge, at: int) -> bytes:
    return nonces.issue(judge.replica_keys, judge.party.audience, now=at)


def value_at(claims: Any, pointer: str) -> Any:
    """What a JSON pointer (RFC 6901) leads to, or ``None``."""
    for name in pointer.split("/")[1:]:
        claims = claims.get(name) if isinstance(claims, dict) else None
    return claims


def refusal(found: dict[str, Any] | Refusal) -> tuple[str, str]:
    assert isinstance(found, Refusal), found
    return found.step, found.slug


class TestReplay:
    def test_a_bundle_posted_again_gives_the_same_token_life(self, verifier: Verifier, judge: Judge, at: int) -> None:
        posted = bundle(nonce_of(judge, at), certify_ak(verifier.ak_root))
        first, later = judge.judge(posted, now=at), judge.judge(posted, now=at + 100)
        assert isinstance(first, dict)
        assert first == later
        assert (first["iat"], first["exp"]) == (at, at + judge.token_seconds)

    def test_another_replica_gives_the_same_token(self, verifier: Verifier, judge: Judge, at: int) -> None:
        posted = bundle(nonce_of(judge, at), certify_ak(verifier.ak_root))
        other = material.load(configuration.load(verifier.config)).judge
        assert other is not judge
        assert other.judge(posted, now=at + 5) == judge.judge(posted, now=at)

    def test_other_evidence_for_the_nonce_is_another_token(self, verifier: Verifier, judge: Judge, at: int) -> None:
        nonce, certificate = nonce_of(judge, at), certify_ak(verifier.ak_root)
        found = [judge.judge(bundle(nonce, certificate, salt=bytes([salt]) * 16), now=at) for salt in (1, 2)]
        assert len({each["jti"] for each in found if isinstance(each, dict)}) == 2

    def test_refuses_a_bundle_once_its_nonce_is_old(self, verifier: Verifier, judge: Judge, at: int) -> None:
        posted = bundle(nonce_of(judge, at), certify_ak(verifier.ak_root))
        late = judge.judge(posted, now=at + judge.nonce_seconds + 1)
        assert refusal(late) == ("statement.nonce", "NONCE_EXPIRED")

    def test_refuses_a_nonce_of_the_callers_own(self, verifier: Verifier, judge: Judge, at: int) -> None:
        posted = bundle(b"a nonce of my own choice", certify_ak(verifier.ak_root))
        assert refusal(judge.judge(posted, now=at)) == ("statement.nonce", "NONCE_UNKNOWN")


class TestRelay:
    def test_refuses_evidence_made_for_another_relying_party(self, verifier: Verifier, judge: Judge, at: int) -> None:
        posted = bundle(nonce_of(judge, at), certify_ak(verifier.ak_root), audience="https://elsewhere.example")
        assert refusal(judge.judge(posted, now=at)) == ("statement.audience", "WRONG_AUDIENCE")

    def test_refuses_our_name_around_another_services_nonce(self, verifier: Verifier, judge: Judge, at: int) -> None:
        foreign = nonces.issue(judge.replica_keys, "https://elsewhere.example", now=at)
        assert refusal(judge.judge(bundle(foreign, certify_ak(verifier.ak_root)), now=at))[1] == "NONCE_UNKNOWN"
        stolen = nonces.issue(ReplicaKeys((b"x" * 32,)), judge.party.audience, now=at)
        assert refusal(judge.judge(bundle(stolen, certify_ak(verifier.ak_root)), now=at))[1] == "NONCE_UNKNOWN"

    def test_the_token_says_for_whom_it_is_and_which_key_is_still_to_prove(
        self, verifier: Verifier, judge: Judge, at: int
    ) -> None:
        spki = bundles.AGENT_AK.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        posted = bundle(nonce_of(judge, at), certify_ak(verifier.ak_root), public_key=spki)
        found = judge.judge(posted, now=at)
        assert isinstance(found, dict)
        assert found["aud"] == judge.party.audience
        assert found["cnf"]["cgpu.possession"] == "claimed"


class TestBroker:
    """Any workload can get evidence, and a token for it. It must not open what is released to the agent alone."""

    def token(self, verifier: Verifier, judge: Judge, at: int) -> dict[str, Any]:
        found = judge.judge(bundle(nonce_of(judge, at), certify_ak(verifier.ak_root)), now=at)
        assert isinstance(found, dict)
        return found

    def test_the_token_of_a_workload_says_evidence(self, verifier: Verifier, judge: Judge, at: int) -> None:
        assert self.token(verifier, judge, at)["cgpu.purpose"] == "evidence"

    def test_the_shipped_role_does_not_take_it(self, verifier: Verifier, judge: Judge, at: int) -> None:
        role = json.loads(ROLE.read_text())
        unmet = {
            claim
            for claim, wanted in role["bound_claims"].items()
            if value_at(self.token(verifier, judge, at), claim)
            not in (wanted if isinstance(wanted, list) else [wanted])
        }
        assert {"/cgpu.purpose", "/cgpu.key_id"} <= unmet

    def test_the_shipped_role_binds_purpose_audience_and_key_and_lends_little(self) -> None:
        role = json.loads(ROLE.read_text())
        assert role["bound_claims"]["/cgpu.purpose"] == "release"
        assert role["bound_claims"]["/cgpu.key_id"]
        assert role["bound_audiences"]
        assert role["token_max_ttl"] == "60s"
        assert 0 < role["token_num_uses"] <= 2

    def test_a_purpose_that_is_not_configured_gets_no_token(self, verifier: Verifier, judge: Judge, at: int) -> None:
        strict = replace(judge, party=replace(judge.party, purposes=frozenset({"release"})))
        posted = bundle(nonce_of(judge, at), certify_ak(verifier.ak_root))
        assert refusal(strict.judge(posted, now=at)) == ("statement.purpose", "PURPOSE_NOT_ACCEPTED")

    def test_a_statement_that_nobody_signed_gets_no_token(self, verifier: Verifier, judge: Judge, at: int) -> None:
        posted = bundle(nonce_of(judge, at), certify_ak(verifier.ak_root))

        def rewrite(document: dict[str, Any]) -> None:
            statement = json.loads(base64.b64decode(document["statement"]))
            document["statement"] = strictjson.b64(strictjson.dumps({**statement, "salt": "ff" * 16}))

        found = judge.judge(bundles.bent_json(rewrite, posted), now=at)
        assert refusal(found) == ("manifest.inclusion", "NOT_INCLUDED")


class TestSimulators:
    """Attack 27, at the end of the way: what vouches for a simulator never vouches for more."""

    def test_a_simulators_root_makes_a_simulated_token(self, verifier: Verifier, judge: Judge, at: int) -> None:
        posted = bundle(nonce_of(judge, at), certify_ak(verifier.simulated_ak_root))
        found = judge.judge(posted, now=at)
        assert isinstance(found, dict)
        assert found["cgpu.simulated"] is True
        assert found["cgpu.status"] == "contraindicated"

    def test_refuses_an_ak_that_nobody_vouches_for(self, judge: Judge, at: int) -> None:
        assert refusal(judge.judge(bundle(nonce_of(judge, at), None), now=at)) == (
            "platform-ak.endorsement",
            "UNENDORSED",
        )
