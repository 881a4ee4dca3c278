"""An EAR says for whom, until when and by whom; its signature is one that a stock JOSE library checks."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from joserfc import jwk, jwt
from joserfc.errors import BadSignatureError

from cgpu_agent.cedar.engine import Policies
from cgpu_agent.cedar.files import appraisal_schema, default_appraisal
from cgpu_agent.errors import Misuse
from cgpu_agent.verifier.appraisal import PARTS, appraise
from cgpu_agent.verifier.ear import SigningKey, ear_claims, key_thumbprint, sign_ear
from cgpu_agent.verifier.evidence import RelyingParty, verify_evidence
from fixtures.attest import rsa_key
from fixtures.bundles import GENUINE, NONCE, PARTY, caller, stating

POLICY = Policies.load(default_appraisal(), appraisal_schema(), "policy")
ARGUMENTS: dict[str, Any] = {
    "verifier_id": {"build": "test 1", "developer": "us"},
    "audience": "https://broker.example",
    "issued_at": 1_780_000_000,
    "expires_at": 1_780_000_300,
    "jti": "one",
}


def claims(data: bytes | None = None, party: RelyingParty = PARTY, **changed: Any) -> dict[str, Any]:
    result = verify_evidence(GENUINE.encode() if data is None else data, party)
    return ear_claims(appraise(result, POLICY, None), **(ARGUMENTS | changed))


def spki(key: Any) -> bytes:
    der: bytes = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return der


def test_claims_follow_the_profile() -> None:
    found = json.loads(json.dumps(claims()))
    assert found["eat_profile"] == "tag:github.com,2023:veraison/ear"
    assert found["ear.verifier-id"] == ARGUMENTS["verifier_id"]
    assert (found["iat"], found["exp"], found["jti"]) == (1_780_000_000, 1_780_000_300, "one")
    assert found["aud"] == "https://broker.example"
    assert base64.urlsafe_b64decode(found["eat_nonce"] + "=") == NONCE
    assert found["cgpu.purpose"] == "evidence"
    assert tuple(found["submods"]) == PARTS
    for submod in found["submods"].values():
        assert submod["ear.status"] in {"affirming", "warning", "none", "contraindicated"}
        assert submod["ear.appraisal-policy-id"] == f"sha256:{POLICY.digest}"
        assert len(submod["ear.trustworthiness-vector"]) == 8


def test_the_agents_words_stand_apart_from_what_is_signed() -> None:
    submods = claims()["submods"]
    assert submods["workload"]["cgpu.reported"]["caller"] == caller()
    assert submods["workload"]["cgpu.reported"]["measured_by"] == "nothing"
    assert submods["workload"]["cgpu.signed"] == {}
    assert submods["boot"]["cgpu.signed"]["secure_boot"] == "enabled"
    assert submods["boot"]["cgpu.reported"] == {}


def test_the_gpus_that_nobody_asked_for_are_there_with_status_none() -> None:
    gpus = claims()["submods"]["gpus"]
    assert gpus["ear.status"] == "none"
    assert gpus["cgpu.reason"].startswith("not-asked")


def test_a_bound_key_is_named_by_its_thumbprint_and_its_possession_is_only_claimed() -> None:
    key = spki(ec.generate_private_key(ec.SECP256R1()))
    found = claims(stating(public_key=key))["cnf"]
    assert found["cgpu.possession"] == "claimed"
    assert found["jkt"] == key_thumbprint(key)
    assert base64.urlsafe_b64decode(found["cgpu.spki-sha256"] + "=") == hashlib.sha256(key).digest()
    assert "cnf" not in claims()


def test_a_bound_key_that_cannot_be_read_is_named_by_its_bytes_alone() -> None:
    for odd in (b"\x30\x03\x02\x01\x05", b"", spki(ed448.Ed448PrivateKey.generate())):
        assert set(claims(stating(public_key=odd))["cnf"]) == {"cgpu.possession", "cgpu.spki-sha256"}


KEYS: list[tuple[str, Any, Any]] = [
    ("ES256", "EC", ec.generate_private_key(ec.SECP256R1())),
    ("ES384", "EC", ec.generate_private_key(ec.SECP384R1())),
    ("RS256", "RSA", rsa_key()),
    ("EdDSA", "OKP", ed25519.Ed25519PrivateKey.generate()),
]


@pytest.mark.parametrize(("algorithm", "kind", "key"), KEYS)
def test_thumbprints_are_those_of_a_stock_jose_library(algorithm: str, kind: Any, key: Any) -> None:
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert key_thumbprint(spki(key)) == jwk.JWKRegistry.import_key(pem, kind).thumbprint()


def test_refused_evidence_gives_a_result_that_answers_no_nonce() -> None:
    found = claims(party=replace(PARTY, audience="somebody else"))
    assert found["cgpu.status"] == "contraindicated"
    assert {"eat_nonce", "cnf", "cgpu.purpose"}.isdisjoint(found)
    assert {each["ear.status"] for each in found["submods"].values()} == {"contraindicated"}
    assert all(not each["cgpu.signed"] and not each["cgpu.reported"] for each in found["submods"].values())


@pytest.mark.parametrize(
    "changed",
    [
        {"verifier_id": {"build": "x"}},
        {"verifier_id": {"build": "x", "developer": "y", "more": "z"}},
        {"audience": ""},
        {"jti": ""},
        {"expires_at": 1_780_000_000},
    ],
)
def test_refuses_to_make_a_token_for_nobody_or_for_ever(changed: dict[str, Any]) -> None:
    with pytest.raises(Misuse) as caught:
        claims(**changed)
    assert caught.value.slug == "BAD_EAR"


@pytest.mark.parametrize(("algorithm", "kind", "key"), KEYS)
@pytest.mark.filterwarnings("ignore:EdDSA is deprecated")
def test_signs_by_the_type_of_the_key(algorithm: str, kind: Any, key: SigningKey) -> None:
    made = claims()
    token = sign_ear(made, key)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    verifier = jwk.JWKRegistry.import_key(public, kind)
    opened = jwt.decode(token, verifier, algorithms=[algorithm])
    assert opened.claims == json.loads(json.dumps(made))
    assert opened.header == {"alg": algorithm, "kid": verifier.thumbprint(), "typ": "JWT"}
    head, body, signature = token.split(".")
    other = base64.urlsafe_b64encode(json.dumps({**made, "cgpu.status": "affirming"}).encode()).rstrip(b"=").decode()
    assert other != body
    with pytest.raises(BadSignatureError):
        jwt.decode(f"{head}.{other}.{signature}", verifier, algorithms=[algorithm])


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP521R1()),
        ec.generate_private_key(ec.SECP256K1()),
        rsa.generate_private_key(65537, 1024),
        ed448.Ed448PrivateKey.generate(),
    ],
    ids=["p521", "secp256k1", "rsa1024", "ed448"],
)
def test_refuses_to_sign_with_another_key(key: Any) -> None:
    with pytest.raises(Misuse) as caught:
        sign_ear({}, key)
    assert caught.value.slug == "BAD_EAR_KEY"
