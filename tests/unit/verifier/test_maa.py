"""Tokens of Microsoft's attestation service: honest ones, and each way in which one is not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from joserfc import jwk, jwt

from cgpu_agent.verifier import maa
from cgpu_agent.verifier.maa import MAX_TOKEN, MaaResult, verify_maa_token
from fixtures.maa import (
    CLAIMS,
    HEADER,
    ISSUER,
    KEY,
    KID,
    NOW_SECONDS,
    OTHER_KEY,
    TEE,
    WEAK_KEY,
    changed,
    hs256,
    jwks,
    numbers,
    party,
    sign,
    token,
    x5c,
)
from fixtures.pki import NOW
from fixtures.platform import AK, ID_KEY, MEASUREMENT, VM_ID, Maker

Claims = Mapping[str, Any]


def judge(data: bytes | None = None, **demands: Any) -> MaaResult:
    return verify_maa_token(token() if data is None else data, party(**demands))


def refused(result: MaaResult) -> tuple[str, str | None] | None:
    assert (result.endorsed_by, result.ak, result.token) == ("none", None, {})
    return None if result.refusal is None else (result.refusal.id, result.refusal.slug)


def with_claims(**changes: Any) -> bytes:
    return token(claims=changed(CLAIMS, **changes))


def with_tee(**changes: Any) -> bytes:
    return with_claims(x_ms_isolation_tee=changed(TEE, **changes))


def test_a_confidential_vm_in_the_words_of_our_verdicts() -> None:
    result = judge()
    assert (result.endorsed_by, result.tee, result.reason) == ("amd-sev-snp", "sev-snp", "")
    facts = result.facts
    assert (facts.measurement, facts.signer, facts.guest_svn) == (MEASUREMENT, ID_KEY, 12)
    assert facts.tcb == {"bootloader": 4, "tee": 0, "snp": 24, "microcode": 219}
    assert (facts.secure_boot, facts.vm_unique_id) == (True, VM_ID.lower())
    spki = AK.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert result.ak == hashlib.sha256(spki).hexdigest()
    assert result.token["issuer"] == ISSUER
    assert json.loads(json.dumps(result.to_json()))["warnings"] == {}


def test_a_token_that_another_library_made() -> None:
    pem = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    made = jwt.encode(dict(HEADER), dict(CLAIMS), jwk.RSAKey.import_key(pem))
    assert judge(made.encode()).endorsed_by == "amd-sev-snp"


def test_a_trusted_launch_vm() -> None:
    result = judge(with_claims(x_ms_isolation_tee=...))
    assert (result.endorsed_by, result.tee, result.ak) == ("azure-trusted-launch", "none", None)
    assert result.facts.secure_boot is True


def test_a_tdx_vm() -> None:
    tee = {name: value for name, value in TEE.items() if "sevsnpvm" not in name}
    result = judge(with_claims(x_ms_isolation_tee=changed(tee, x_ms_attestation_type="tdxvm")))
    assert (result.endorsed_by, result.tee) == ("intel-tdx", "tdx")


@pytest.mark.parametrize(
    "made",
    [
        with_tee(x_ms_compliance_status=...),
        with_tee(x_ms_compliance_status="azure-signed-cvm"),
        token(claims=changed({**CLAIMS, **TEE}, x_ms_isolation_tee=..., x_ms_compliance_status=...)),
    ],
)
def test_genuine_hardware_under_code_that_nobody_names_endorses_nothing(made: bytes) -> None:
    """The service signs a token for any guest on any such processor, also for one that invented its AK."""
    result = judge(made, nonce=None)
    assert result.refusal is None
    assert (result.endorsed_by, result.reason, result.tee) == ("none", "unknown paravisor", "sev-snp")


def test_without_a_nonce_the_doubt_is_said() -> None:
    result = judge(nonce=None)
    assert result.endorsed_by == "amd-sev-snp"
    assert "NO_NONCE" in result.to_json()["warnings"]  # type: ignore[operator]


@pytest.mark.parametrize(
    "keys",
    [
        jwks(x5c()),
        jwks(numbers()),
        jwks({**numbers(), "x5c": x5c()["x5c"], "alg": "RS256", "use": "sig"}),
        jwks({"kty": "EC"}, x5c(), {**x5c(), "kid": "another"}),
    ],
)
def test_a_key_set_in_any_of_its_forms(keys: bytes) -> None:
    assert judge(jwks=keys).endorsed_by == "amd-sev-snp"


@pytest.mark.parametrize("issuer", [ISSUER, f"{ISSUER}/"])
def test_a_slash_at_the_end_is_no_other_issuer(issuer: str) -> None:
    assert judge(issuers=(issuer,)).endorsed_by == "amd-sev-snp"
    assert judge(with_claims(iss=issuer)).endorsed_by == "amd-sev-snp"


SECRETS = [
    KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
    jwks(),
]


@pytest.mark.parametrize("secret", SECRETS)
def test_a_public_key_is_no_secret(secret: bytes) -> None:
    assert refused(judge(hs256(secret))) == ("maa.format", "WRONG_ALGORITHM")


@pytest.mark.parametrize("algorithm", ["none", "None", "HS256", "RS384", "PS256", "ES256", "rs256", "", None, 7, ...])
def test_no_other_algorithm(algorithm: object) -> None:
    made = token(changed(HEADER, alg=algorithm))
    unsigned = made.rpartition(b".")[0] + b"."
    for each in (made, unsigned):
        answer = refused(judge(each))
        assert answer is not None
        assert answer[0] == "maa.format"


@pytest.mark.parametrize(
    ("header", "slug"),
    [
        ({**HEADER, "crit": ["exp"], "exp": 1}, "CRITICAL_HEADER"),
        ({**HEADER, "crit": []}, "CRITICAL_HEADER"),
        ({**HEADER, "b64": False, "crit": ["b64"]}, "CRITICAL_HEADER"),
        ({**HEADER, "typ": "dpop+jwt"}, "WRONG_TYPE"),
        (changed(HEADER, kid=...), "BAD_FIELD"),
        ({**HEADER, "kid": 7}, "BAD_FIELD"),
        ({**HEADER, "kid": "x" * 300}, "BAD_FIELD"),
    ],
)
def test_refuses_headers(header: dict[str, Any], slug: str) -> None:
    assert refused(judge(token(header))) == ("maa.format", slug)


def doubled(values: Mapping[str, Any], name: str, value: object) -> bytes:
    return json.dumps(values).encode()[:-1] + f", {json.dumps(name)}: {json.dumps(value)}}}".encode()


@pytest.mark.parametrize(
    "made",
    [
        sign(doubled(HEADER, "alg", "RS256"), json.dumps(CLAIMS).encode()),
        sign(doubled(HEADER, "kid", KID), json.dumps(CLAIMS).encode()),
        sign(json.dumps(HEADER).encode(), doubled(CLAIMS, "iss", ISSUER)),
        sign(json.dumps(HEADER).encode(), doubled(CLAIMS, "exp", NOW_SECONDS + 100)),
    ],
)
def test_refuses_what_two_readers_could_read_differently(made: bytes) -> None:
    assert refused(judge(made)) == ("maa.format", "DUPLICATE_KEY")


GOOD = token()


@pytest.mark.parametrize(
    "made",
    [
        b"",
        b"..",
        GOOD[:-1],
        GOOD + b".",
        GOOD + b".AAAA",
        GOOD + b"=",
        GOOD + b"\n",
        GOOD.replace(b".", b"..", 1),
        GOOD.rpartition(b".")[0],
        b"\xff" + GOOD,
        sign(b"[]", json.dumps(CLAIMS).encode()),
        sign(json.dumps(HEADER).encode(), b"[]"),
        sign(json.dumps(HEADER).encode(), b'{"exp": 1.5}'),
    ],
)
def test_refuses_what_is_no_token(made: bytes) -> None:
    answer = refused(judge(made))
    assert answer is not None
    assert answer[0] == "maa.format"


def test_refuses_a_token_too_large_to_be_one() -> None:
    assert refused(judge(GOOD + b"A" * MAX_TOKEN)) == ("maa.format", "TOO_LARGE")


@pytest.mark.parametrize(
    "issuer",
    [
        "https://sharedweu.weu.test.attest.azure.net",
        "https://evil.example/sharedweu.weu.attest.azure.net",
        "https://xsharedweu.weu.attest.azure.net",
        "http://sharedweu.weu.attest.azure.net",
        f"{ISSUER}:443",
        f"{ISSUER}//",
        ISSUER.upper(),
        "",
        7,
        ...,
    ],
)
def test_refuses_any_other_issuer(issuer: object) -> None:
    answer = refused(judge(with_claims(iss=issuer)))
    assert answer is not None
    assert answer[0] == "maa.issuer"


def test_believes_nobody_unless_told() -> None:
    assert refused(judge(issuers=())) == ("maa.issuer", "UNKNOWN_ISSUER")


EC_CERTIFICATE = Maker.root("another", ec.generate_private_key(ec.SECP256R1())).certificate
OTHER_CERTIFICATE = Maker.root("another", OTHER_KEY).certificate


@pytest.mark.parametrize(
    ("keys", "slug"),
    [
        (jwks({**x5c(), "kid": "another"}), "UNKNOWN_KEY"),
        (b'{"keys": []}', "UNKNOWN_KEY"),
        (jwks(x5c(), x5c(OTHER_CERTIFICATE)), "AMBIGUOUS_KEY"),
        (jwks(numbers(WEAK_KEY)), "WEAK_KEY"),
        (jwks(x5c(Maker.root("weak", WEAK_KEY).certificate)), "WEAK_KEY"),
        (jwks({**numbers(), "x5c": x5c(OTHER_CERTIFICATE)["x5c"]}), "BAD_KEY"),
        (jwks(x5c(EC_CERTIFICATE)), "BAD_KEY"),
        (jwks({**numbers(), "x5c": x5c(EC_CERTIFICATE)["x5c"]}), "BAD_KEY"),
        (jwks({**x5c(), "kty": "EC"}), "BAD_KEY"),
        (jwks({**x5c(), "use": "enc"}), "BAD_KEY"),
        (jwks({**x5c(), "alg": "RS512"}), "BAD_KEY"),
        (jwks({**x5c(), "x5c": []}), "BAD_KEY"),
        (jwks({**x5c(), "x5c": ["????"]}), "BAD_KEY"),
        (jwks({**x5c(), "x5c": [7]}), "BAD_KEY"),
        (jwks({**x5c(), "x5c": {"0": ""}}), "BAD_KEY"),
        (jwks({**numbers(), "n": "AA"}), "BAD_KEY"),
        (b"[]", "BAD_JSON"),
        (b"", "BAD_JSON"),
    ],
)
def test_refuses_keys(keys: bytes, slug: str) -> None:
    assert refused(judge(jwks=keys)) == ("maa.key", slug)


def test_refuses_another_key_under_the_same_name() -> None:
    assert refused(judge(token(key=OTHER_KEY))) == ("maa.signature", "BAD_SIGNATURE")
    assert refused(judge(jwks=jwks(numbers(OTHER_KEY)))) == ("maa.signature", "BAD_SIGNATURE")


def test_refuses_other_claims_under_a_good_signature() -> None:
    head, _, signature = GOOD.split(b".")
    other = with_claims(secureboot=False).split(b".")[1]
    assert refused(judge(b".".join((head, other, signature)))) == ("maa.signature", "BAD_SIGNATURE")


@pytest.mark.parametrize(
    ("hours", "slug"),
    [(-0.1, "TOKEN_NOT_YET_VALID"), (8, "TOKEN_EXPIRED"), (8.01, "TOKEN_EXPIRED"), (24 * 365, "TOKEN_EXPIRED")],
)
def test_refuses_at_another_time(hours: float, slug: str) -> None:
    assert refused(judge(at=NOW + timedelta(hours=hours))) == ("maa.time", slug)


@pytest.mark.parametrize("seconds", [-60, 0, 28799])
def test_accepts_from_its_making_to_its_end(seconds: int) -> None:
    assert judge(at=NOW + timedelta(seconds=seconds)).endorsed_by == "amd-sev-snp"


@pytest.mark.parametrize(
    ("changes", "slug"),
    [
        ({"exp": NOW_SECONDS + 28801}, "BAD_LIFETIME"),
        ({"exp": NOW_SECONDS - 1}, "BAD_LIFETIME"),
        ({"exp": 1 << 40}, "BAD_TOKEN"),
        ({"exp": ...}, "BAD_TOKEN"),
        ({"exp": "1700000000"}, "BAD_TOKEN"),
        ({"exp": True}, "BAD_TOKEN"),
        ({"nbf": ...}, "BAD_TOKEN"),
        ({"iat": ...}, "BAD_TOKEN"),
        ({"iat": -1}, "BAD_TOKEN"),
        ({"nbf": NOW_SECONDS + 7200}, "TOKEN_NOT_YET_VALID"),
    ],
)
def test_refuses_times(changes: dict[str, Any], slug: str) -> None:
    assert refused(judge(with_claims(**changes))) == ("maa.time", slug)


@pytest.mark.parametrize(
    ("runtime", "slug"),
    [
        ({"client-payload": {"nonce": "QURFMDEwMg=="}}, "NONCE_MISMATCH"),
        ({"client-payload": {"nonce": ""}}, "NONCE_MISMATCH"),
        ({"client-payload": {"nonce": "ADE0101"}}, "BAD_TOKEN"),
        ({"client-payload": {}}, "BAD_TOKEN"),
        ({"client-payload": "QURFMDEwMQ=="}, "BAD_TOKEN"),
        ({}, "BAD_TOKEN"),
        (..., "BAD_TOKEN"),
    ],
)
def test_refuses_another_nonce(runtime: object, slug: str) -> None:
    assert refused(judge(with_claims(x_ms_runtime=runtime))) == ("maa.nonce", slug)


@pytest.mark.parametrize(
    ("made", "slug"),
    [
        (with_tee(x_ms_sevsnpvm_is_debuggable=True), "DEBUG_ENABLED"),
        (with_tee(x_ms_sevsnpvm_is_debuggable="false"), "DEBUG_ENABLED"),
        (with_tee(x_ms_sevsnpvm_migration_allowed=True), "MIGRATION_ALLOWED"),
        (with_tee(x_ms_attestation_type="sgx"), "WRONG_TYPE"),
        (with_tee(x_ms_attestation_type="azurevm"), "WRONG_TYPE"),
        (with_tee(x_ms_attestation_type=...), "BAD_TOKEN"),
        (with_tee(x_ms_sevsnpvm_launchmeasurement="no"), "BAD_TOKEN"),
        (with_claims(x_ms_isolation_tee="sevsnpvm"), "BAD_TOKEN"),
        (with_claims(x_ms_isolation_tee=None), "BAD_TOKEN"),
        (with_claims(x_ms_attestation_type="tpm"), "WRONG_TYPE"),
        (with_claims(x_ms_attestation_type=...), "BAD_TOKEN"),
        (with_tee(x_ms_runtime={"keys": [{"kid": "HCLAkPub", "kty": "RSA", "e": "AQAB"}]}), "BAD_TOKEN"),
        (with_tee(x_ms_runtime={"keys": [{**numbers(WEAK_KEY), "kid": "HCLAkPub"}]}), "WEAK_KEY"),
    ],
)
def test_refuses_platforms(made: bytes, slug: str) -> None:
    assert refused(judge(made)) == ("maa.platform", slug)


@pytest.mark.parametrize("runtime", [..., {}, {"keys": "none"}, {"keys": []}, 7])
def test_a_token_without_an_ak_names_none(runtime: object) -> None:
    result = judge(with_tee(x_ms_runtime=runtime))
    assert (result.endorsed_by, result.ak) == ("amd-sev-snp", None)


@pytest.mark.parametrize("missing", [step.id for step in maa.MAA_STEPS if step.id != "maa.nonce"])
def test_no_step_can_be_left_out_by_mistake(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maa, "MAA_STEPS", [step for step in maa.MAA_STEPS if step.id != missing])
    assert judge().endorsed_by == "none"


# --- recorded ---

RECORDED = {
    "ms-clientlibtests-azurevm-1649979780": ("azure-trusted-launch", "none"),
    "ms-clientlibtests-azurevm-1680173374": ("amd-sev-snp", "sev-snp"),
    "sevsnpvm-2025": ("none", "sev-snp"),
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_claims_read_as_their_service_meant_them(name: str, shared_data: Path) -> None:
    """Signed anew: of none of these tokens the key is known."""
    recorded = json.loads((shared_data / f"azure/maa/{name}.decoded.json").read_bytes())
    claims = recorded["payload"]
    made = token({**recorded["header"], "kid": KID}, claims)
    at = NOW + timedelta(seconds=claims["iat"] + 1 - NOW_SECONDS)
    result = verify_maa_token(made, party(at=at, issuers=(claims["iss"],), nonce=None))
    assert result.refusal is None
    assert (result.endorsed_by, result.tee) == RECORDED[name]


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_tokens_are_well_formed_and_no_key_here_signed_them(name: str, shared_data: Path) -> None:
    data = (shared_data / f"azure/maa/{name}.jwt").read_bytes().strip()
    header = json.loads((shared_data / f"azure/maa/{name}.decoded.json").read_bytes())["header"]
    issuer = header["jku"].removesuffix("/certs")
    result = verify_maa_token(data, party(issuers=(issuer,), jwks=jwks({**x5c(), "kid": header["kid"]})))
    assert refused(result) == ("maa.signature", "BAD_SIGNATURE")
