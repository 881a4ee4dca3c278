"""What recorded tokens say of the key that their answer was encrypted to, as the judge reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.verifier.azurekeys import AzureJudge, _named_modulus
from fixtures import maa
from fixtures.azurekeys import VAULT, WEB_CA
from fixtures.pki import NOW

RECORDED = ["ms-clientlibtests-azurevm-1649979780", "ms-clientlibtests-azurevm-1680173374"]


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_tokens_name_one_rsa_2048_key(shared_data: Path, name: str) -> None:
    document = json.loads((shared_data / "azure" / "maa" / f"{name}.decoded.json").read_bytes())
    modulus = _named_modulus(document["payload"])
    assert modulus is not None
    assert modulus.bit_length() == 2048


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_token_answers_nobody_today(shared_data: Path, name: str) -> None:
    token = (shared_data / "azure" / "maa" / f"{name}.jwt").read_bytes().strip()
    judge = AzureJudge(maa.ISSUER, VAULT, (WEB_CA.certificate,), lambda: NOW)
    with pytest.raises(HostileInput):
        judge.token(token, maa.jwks(), nonce="0" * 64, key=b"")


@pytest.mark.parametrize(
    "changed", [{"roots": ()}, {"vault": "https://"}, {"vault": "https://a..b"}, {"vault": "https://*.azure.net"}]
)
def test_a_judge_who_could_believe_nobody(changed: dict[str, Any]) -> None:
    given = {"issuer": maa.ISSUER, "vault": VAULT, "roots": (WEB_CA.certificate,), "now": lambda: NOW, **changed}
    with pytest.raises(Misuse):
        AzureJudge(**given)


@pytest.mark.parametrize(
    "claims",
    [
        None,
        [],
        {},
        {"x-ms-runtime": []},
        {"x-ms-runtime": {"keys": {}}},
        {"x-ms-runtime": {"keys": ["TpmEphemeralEncryptionKey"]}},
        {"x-ms-runtime": {"keys": [{"kid": "TpmEphemeralEncryptionKey"}]}},
        {"x-ms-runtime": {"keys": [{"kid": "TpmEphemeralEncryptionKey", "n": 7}]}},
        {"x-ms-runtime": {"keys": [{"kid": "TpmEphemeralEncryptionKey", "n": "ä"}]}},
        {"x-ms-runtime": {"keys": [{"kid": "TpmEphemeralEncryptionKey", "n": "AQAB"}] * 2}},
    ],
)
def test_claims_that_name_no_key(claims: object) -> None:
    assert _named_modulus(claims) is None
