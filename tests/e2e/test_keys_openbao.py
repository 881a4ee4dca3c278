"""A key from a real OpenBao by a real verifier's token: who gets it, who does not, and what is left behind."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from cgpu_agent.backends.base import ReleasedKey
from cgpu_agent.backends.keys.openbao import OpenBao, OpenBaoConfig
from cgpu_agent.errors import AgentError, Denied, Unavailable
from cgpu_agent.wire.statement import KeyRelease
from cgpu_agent.wire.strictjson import b64
from fixtures.bundles import caller
from fixtures.openbao import (
    ENTRY,
    PATH,
    POLICY,
    RELEASE,
    SECRET,
    Bao,
    DirectHttp,
    Vm,
    keep,
    needs_openbao,
    running_bao,
    running_broker,
    running_cluster,
    trust,
)
from fixtures.verifier import Verifier

pytestmark = needs_openbao


@dataclass
class World:
    """A verifier service behind TLS, and an OpenBao that trusts it and has the key."""

    verifier: Verifier
    bao: Bao
    config: OpenBaoConfig
    cas: tuple[Path, ...]

    def http(self, **extra: str) -> DirectHttp:
        return DirectHttp(self.cas, {name.replace("_", "-"): value for name, value in extra.items()})

    def release(
        self,
        vm: Vm | None = None,
        *,
        http: DirectHttp | None = None,
        path: str = PATH,
        timeout: float = 30,
        **changed: Any,
    ) -> ReleasedKey:
        broker = OpenBao(replace(self.config, **changed), http or self.http())
        return asyncio.run(broker.release(path, vm or Vm(self.verifier), timeout=timeout))

    def refused(self, vm: Vm | None = None, **how: Any) -> AgentError:
        with pytest.raises(AgentError) as caught:
            self.release(vm, **how)
        return caught.value


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running_broker(tmp_path_factory.mktemp("openbao")) as found:
        yield World(*found)


def client_token(http: DirectHttp) -> str:
    (login,) = (each for each in http.sent if each.url.endswith("/login"))
    assert login.status == 200
    return str(httpx.Response(200, content=login.answer).json()["auth"]["client_token"])


def known(bao: Bao, token: str) -> bool:
    """Whether OpenBao knows this client token."""
    return bao.client.post("/auth/token/lookup", json={"token": token}).is_success


def statuses(http: DirectHttp) -> dict[str, int]:
    """By the last word of the path."""
    return {each.url.rpartition("/")[2]: each.status for each in http.sent}


class TestRelease:
    def test_the_workload_of_the_role_gets_the_key_and_its_version(self, world: World) -> None:
        version = keep(world.bao)
        assert world.release() == ReleasedKey(SECRET, version)
        assert keep(world.bao, b64(b"the next one")) == version + 1
        assert world.release() == ReleasedKey(b"the next one", version + 1)

    def test_the_client_token_is_revoked(self, world: World) -> None:
        http = world.http()
        world.release(http=http)
        assert http.sent[-1].url.endswith("/auth/token/revoke-self")
        assert http.sent[-1].status == 204
        assert not known(world.bao, client_token(http))

    def test_it_would_have_lived_on(self, world: World) -> None:
        """The control for the test above: what it asks OpenBao tells a living token from a dead one."""

        class Forgetful(DirectHttp):
            async def request(self, method: str, url: str, **how: Any) -> Any:
                if url.endswith("/revoke-self"):
                    raise Unavailable("EGRESS_UNREACHABLE", "the other side cannot be reached")
                return await super().request(method, url, **how)

        http = Forgetful(world.cas)
        world.release(http=http)
        assert known(world.bao, client_token(http))

    def test_it_is_revoked_where_the_key_is_refused(self, world: World) -> None:
        http = world.http()
        assert world.refused(http=http, path="models/other").slug == "KEY_REFUSED"
        assert not known(world.bao, client_token(http))

    def test_a_deleted_key_is_absent_and_its_client_token_gone(self, world: World) -> None:
        keep(world.bao)
        assert world.bao.client.delete(f"/{ENTRY}").is_success
        http = world.http()
        try:
            assert world.refused(http=http).slug == "KEY_ABSENT"
        finally:
            keep(world.bao)
        assert not known(world.bao, client_token(http))

    def test_a_wrapped_key(self, world: World) -> None:
        bao, policy = world.bao, POLICY.replace("# path", "path").replace("#   cap", "  cap").replace("# }", "}")
        bao.put("/sys/mounts/transit", {"type": "transit"})
        bao.put("/transit/keys/models", {})
        bao.put("/sys/policies/acl/unwrap", {"policy": policy})
        role = bao.client.get("/auth/jwt/role/shipped").json()["data"]
        role.pop("bound_cidrs", None)
        bao.put("/auth/jwt/role/wrapped", {**role, "token_policies": ["unwrap"], "token_num_uses": 3})
        how = {"role": "wrapped", "transit": "transit/decrypt/models"}
        try:
            for bound, expected in ((ENTRY, None), ("kv/data/models/other", "BROKER_ANSWER")):
                wrapping = {"plaintext": b64(SECRET), "associated_data": b64(bound.encode())}
                version = keep(bao, bao.put("/transit/encrypt/models", wrapping)["data"]["ciphertext"])
                if expected is None:
                    assert world.release(**how) == ReleasedKey(SECRET, version)
                else:
                    assert world.refused(**how).slug == expected
        finally:
            keep(bao)

    def test_in_a_namespace(self, world: World) -> None:
        world.bao.put("/sys/namespaces/team", {})
        client = httpx.Client(
            base_url=world.bao.client.base_url,
            headers={"X-Vault-Token": "root", "X-Vault-Namespace": "team"},
            verify=world.bao.tls,
        )
        with client:
            trust(replace(world.bao, client=client), world.verifier)
        assert world.release(namespace="team") == ReleasedKey(SECRET, 1)


class TestRefusals:
    @pytest.mark.parametrize(
        "stated",
        [
            {"purpose": "evidence", "release": None},
            {"release": KeyRelease("openbao", "kv/data/models/other", None)},
            {"release": KeyRelease("trustee", ENTRY, None)},
            {"caller": caller(unit="neighbour.service")},
            {"caller": caller(unit=None)},
        ],
        ids=["any-workloads-evidence", "other-key", "other-broker", "other-unit", "no-unit"],
    )
    def test_the_role_refuses_what_the_verifier_affirms(self, world: World, stated: dict[str, Any]) -> None:
        """Attack 4: evidence and a token for it are for everybody; the key is not."""
        http = world.http()
        error = world.refused(Vm(world.verifier, {**RELEASE, **stated}), http=http)
        assert isinstance(error, Denied)
        assert error.slug == "KEY_REFUSED"
        assert statuses(http) == {"nonce": 200, "verify": 200, "login": 400}

    def test_a_simulator_gets_none(self, world: World) -> None:
        http = world.http()
        assert world.refused(Vm(world.verifier, vouched="simulated_ak_root"), http=http).slug == "KEY_REFUSED"
        assert statuses(http) == {"nonce": 200, "verify": 200, "login": 400}

    def test_an_ak_that_nobody_vouches_for_gets_none(self, world: World) -> None:
        http = world.http()
        error = world.refused(Vm(world.verifier, vouched="ek_root"), http=http)
        assert (error.slug, statuses(http)) == ("KEY_REFUSED", {"nonce": 200, "verify": 422})
        assert "UNKNOWN_ISSUER" in error.message or "UNENDORSED" in error.message

    def test_the_verifier_is_who_the_evidence_is_for(self, world: World) -> None:
        http = world.http()
        assert world.refused(http=http, audience="https://elsewhere.example").slug == "BROKER_ANSWER"
        assert statuses(http) == {"nonce": 200}

    def test_another_cas_server_is_not_asked(self, world: World) -> None:
        error = world.refused(http=DirectHttp(world.cas[:1]), timeout=2)
        assert (error.slug, error.retry_after) == ("BROKER_UNREACHABLE", 5.0)


class TestReplay:
    def test_a_client_token_is_spent_with_its_release(self, world: World) -> None:
        http = world.http()
        world.release(http=http)
        again = httpx.get(
            f"{world.bao.address}/v1/{ENTRY}",
            headers={"X-Vault-Token": client_token(http)},
            verify=world.bao.tls,
        )
        assert again.status_code == 403

    def test_the_verifiers_token_opens_that_key_and_no_other_while_it_lasts(self, world: World) -> None:
        """OpenBao does not count tokens: who has one can come again. It is sent to the verifier's peers alone."""
        http = world.http()
        world.release(http=http)
        (login,) = (each for each in http.sent if each.url.endswith("/login"))
        replayed = httpx.post(login.url, content=login.body, verify=world.bao.tls)
        auth = replayed.json()["auth"]
        assert (auth["num_uses"], auth["lease_duration"], auth["policies"]) == (2, 60, ["read-model-llama"])
        other = httpx.get(
            f"{world.bao.address}/v1/kv/data/models/other",
            headers={"X-Vault-Token": auth["client_token"]},
            verify=world.bao.tls,
        )
        assert other.status_code == 403

    def test_evidence_posted_again_makes_no_longer_life(self, world: World) -> None:
        http = world.http()
        world.release(http=http)
        (verify,) = (each for each in http.sent if each.url.endswith("/verify"))
        with world.verifier.client() as client:
            again = client.post("/v1/verify", content=verify.body).text
        first, later = (_claims(token) for token in (verify.answer.decode(), again))
        assert (first["jti"], first["exp"]) == (later["jti"], later["exp"])


def _claims(token: str) -> dict[str, Any]:
    payload = token.split(".")[1]
    return dict(httpx.Response(200, content=base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))).json())


class TestNodes:
    def test_a_sealed_one_leaves_it_to_the_next(self, world: World, tmp_path: Path) -> None:
        with running_bao(tmp_path) as sealed:
            assert sealed.client.put("/sys/seal").is_success
            http = DirectHttp((*world.cas, sealed.ca))
            assert world.release(http=http, addresses=(sealed.address, world.bao.address)).secret == SECRET
            assert 503 in [each.status for each in http.sent]

    def test_a_cluster(self, world: World, tmp_path: Path) -> None:
        with running_cluster(tmp_path) as (active, standby):
            trust(active, world.verifier)
            both = replace(world, cas=(world.cas[0], active.ca))
            nodes = (standby.address, active.address)

            # A standby forwards what it cannot do, and is not behind with what it just let somebody log in with.
            for _ in range(3):
                http = both.http()
                assert both.release(http=http, addresses=nodes[:1]).secret == SECRET
                assert not known(active, client_token(http))

            # One that redirects: to where the operator said, or nowhere.
            http = both.http(x_vault_no_request_forwarding="1")
            assert both.release(http=http, addresses=nodes).secret == SECRET
            assert [each.status for each in http.sent if each.url.startswith(standby.address)] == [307]
            http = both.http(x_vault_no_request_forwarding="1")
            assert both.refused(http=http, addresses=nodes[:1]).slug == "BROKER_ANSWER"
            assert not [each for each in http.sent if each.url.startswith(active.address)]
