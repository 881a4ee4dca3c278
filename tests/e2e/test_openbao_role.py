"""The shipped role on a real OpenBao: it takes a token for a release of that key, and none a workload can get."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from cgpu_agent.service import config as configuration
from cgpu_agent.service import material, nonces
from cgpu_agent.service.material import Material
from fixtures.openbao import needs_openbao, running_bao
from fixtures.verifier import AUDIENCE, Verifier, bundle, certify_ak

pytestmark = needs_openbao


@dataclass
class Broker:
    """OpenBao with the shipped role for ``material``'s tokens."""

    client: httpx.Client
    material: Material
    evidence: dict[str, Any]

    def login(self, claims: dict[str, Any]) -> httpx.Response:
        return self.client.post("/auth/jwt/login", json={"jwt": self.material.sign(claims), "role": "shipped"})

    @property
    def release(self) -> dict[str, Any]:
        """Claims that the role was written for."""
        claims = json.loads(json.dumps(self.evidence))
        claims |= {
            "cgpu.purpose": "release",
            "cgpu.broker": "openbao",
            "cgpu.key_id": "kv/data/models/llama",
            "cgpu.status": "affirming",
        }
        claims["submods"]["workload"]["cgpu.reported"]["caller"]["unit"] = "inference.service"
        return dict(claims)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    verifier = Verifier(tmp_path_factory.mktemp("verifier"))
    held = material.load(configuration.load(verifier.config))
    now = int(time.time())
    nonce = nonces.issue(held.replica_keys, AUDIENCE, now=now)
    claims = held.judge.judge(bundle(nonce, certify_ak(verifier.ak_root)), now=now)
    assert isinstance(claims, dict)
    with running_bao(tmp_path_factory.mktemp("bao")) as bao:
        bao.trust(held, AUDIENCE)
        yield Broker(bao.client, held, claims)


def test_a_token_for_this_release_is_taken_once_and_a_little(broker: Broker) -> None:
    answer = broker.login(broker.release)
    assert answer.status_code == 200, answer.text
    auth = answer.json()["auth"]
    assert (auth["num_uses"], auth["lease_duration"], auth["policies"]) == (2, 60, ["read-model-llama"])


def test_a_workloads_token_opens_nothing(broker: Broker) -> None:
    assert broker.login(broker.evidence).status_code == 400


@pytest.mark.parametrize(
    ("claim", "value"),
    [
        ("cgpu.purpose", "evidence"),
        ("cgpu.broker", "trustee"),
        ("cgpu.key_id", "kv/data/models/other"),
        ("cgpu.status", "warning"),
        ("cgpu.simulated", True),
        ("aud", "https://elsewhere.example"),
        ("exp", 1),
    ],
)
def test_each_binding_refuses_alone(broker: Broker, claim: str, value: object) -> None:
    assert broker.login({**broker.release, claim: value}).status_code == 400
