"""Azure's key release against a peer that judges what we send, wraps what we get, and answers as services do."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cgpu_agent.backends.base import ReleasedKey, Signed
from cgpu_agent.backends.keys.azure import AzureKeys, token_file
from cgpu_agent.backends.tpm.commands import Commands
from cgpu_agent.backends.tpm.software import Swtpm
from cgpu_agent.errors import AgentError, Denied, DeviceFault, Misuse, Unavailable
from cgpu_agent.wire.maarequest import GuestOs
from fixtures.azurekeys import MAA, VAULT, Answer
from fixtures.azurevm import OLDER, SECRET, VERSION, AzureVm, azure_vm
from fixtures.swtpm import running_swtpm

pytestmark = pytest.mark.swtpm

RELEASE = f"/keys/model/{VERSION}/release?api-version=7.4"
ATTEST = "/attest/AzureGuest?api-version=2020-10-01"


@pytest.fixture(scope="module")
def shared_swtpm() -> Iterator[Swtpm]:
    """One for all."""
    with running_swtpm() as tpm:
        yield tpm


@pytest.fixture
def vm(shared_swtpm: Swtpm, tmp_path: Path) -> Iterator[AzureVm]:
    with azure_vm(shared_swtpm, tmp_path) as found:
        yield found


def failure(vm: AzureVm, name: str = "model", **given: float) -> AgentError:
    with pytest.raises(AgentError) as caught:
        vm.release(name, **given)  # type: ignore[arg-type]
    return caught.value


@pytest.mark.parametrize("mechanism", ["CKM_RSA_AES_KEY_WRAP", "RSA_AES_KEY_WRAP_256", "RSA_AES_KEY_WRAP_384"])
@pytest.mark.parametrize("name", ["model", f"model/{VERSION}"])
def test_a_key_is_released(vm: AzureVm, mechanism: str, name: str) -> None:
    vm.mechanism = mechanism
    assert vm.release(name) == [ReleasedKey(SECRET, int(VERSION, 16) >> 65)]
    assert [(method, url) for method, url, _ in vm.cloud.requests] == [
        ("POST", MAA + ATTEST),
        ("GET", f"{MAA}/certs"),
        ("POST", f"{VAULT}/keys/{name}/release?api-version=7.4"),
    ]


def test_an_older_version_is_released_where_it_is_named(vm: AzureVm) -> None:
    old, new = vm.release(f"model/{OLDER}")[0], vm.release()[0]
    assert old.secret == b"old"
    assert old.generation != new.generation
    assert max(old.generation, new.generation) < 1 << 63


@pytest.mark.parametrize("size", [1, 7, 8, 9, 48, 8192])
def test_keys_of_every_size(vm: AzureVm, size: int) -> None:
    vm.cloud.keys["model", VERSION] = ("oct", secret := bytes(size - 1) + b"\0")
    assert vm.release()[0].secret == secret


@pytest.mark.parametrize("kind", ["RSA-HSM", "EC-HSM"])
def test_a_private_key_comes_as_pkcs8(vm: AzureVm, kind: str) -> None:
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey = (
        rsa.generate_private_key(65537, 3072) if kind == "RSA-HSM" else ec.generate_private_key(ec.SECP384R1())
    )
    der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    vm.cloud.keys["model", VERSION] = (kind, der)
    assert vm.release()[0].secret == der


@pytest.mark.parametrize("curve", ["2a8648ce3d030107", None])
def test_a_private_key_that_is_none(vm: AzureVm, curve: str | None) -> None:
    """Any bytes, and a key on a curve that nobody knows."""
    key = ec.generate_private_key(ec.SECP256R1())
    der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    altered = der.replace(bytes.fromhex(curve), bytes.fromhex("2a8648ce3d03017f")) if curve else SECRET
    assert altered != der
    vm.cloud.keys["model", VERSION] = ("EC-HSM", altered)
    assert failure(vm).slug == "BROKER_ANSWER"


def test_a_trusted_launch_vm_has_no_hardware_report(shared_swtpm: Swtpm, tmp_path: Path) -> None:
    with azure_vm(shared_swtpm, tmp_path, tee=None) as vm:
        assert vm.release()[0].secret == SECRET


def test_every_release_attests_anew(vm: AzureVm) -> None:
    """The token of the one before is good for hours, and is not used (attack 23)."""
    vm.release(times=2)
    assert len(set(vm.cloud.nonces)) == 2
    bodies = [json.loads(body) for _, url, body in vm.cloud.requests if url.startswith(VAULT)]
    assert [body["nonce"] for body in bodies] == vm.cloud.nonces
    assert bodies[0]["target"] != bodies[1]["target"]
    report_for = [hashlib.sha512(b"cgpu/maa/1" + nonce.encode()).digest() for nonce in vm.cloud.nonces]
    assert vm.user_data == report_for == vm.azure.writes


def test_the_bearer_token_goes_to_the_vault_alone(vm: AzureVm) -> None:
    seen: list[str] = []
    inner = vm.cloud.request

    async def request(method: str, url: str, **given: object) -> Answer:
        seen.extend(url for name in given["headers"] if name == "Authorization")  # type: ignore[attr-defined]
        return await inner(method, url, **given)  # type: ignore[arg-type]

    vm.cloud.request = request  # type: ignore[method-assign]
    vm.release()
    assert seen == [f"{VAULT}/keys/model/release?api-version=7.4"]


@pytest.mark.parametrize(
    "name", ["", "model/", "model/1f", "model/..", f"model/{VERSION}/x", "mo del", "modèle", "m?x"]
)
def test_a_name_that_no_vault_has_is_asked_of_nobody(vm: AzureVm, name: str) -> None:
    assert failure(vm, name).slug == "KEY_ABSENT"
    assert vm.cloud.requests == []


def test_a_key_that_is_not_there(vm: AzureVm) -> None:
    error = failure(vm, "other")
    assert (type(error), error.slug) == (Unavailable, "KEY_ABSENT")


def test_a_caller_whom_the_vault_does_not_know(vm: AzureVm) -> None:
    vm.access = "eyJ0.somebody-elses"
    error = failure(vm)
    assert (type(error), error.slug) == (Denied, "KEY_REFUSED")


@pytest.mark.parametrize("access", ["", "a b", "a\r\nHost: evil", "ä", "a" * 20_000])
def test_access_that_is_no_token_is_not_sent(vm: AzureVm, access: str) -> None:
    vm.access = access
    assert failure(vm).slug == "BROKER_ANSWER"
    assert not any(url.startswith(VAULT) for _, url, _ in vm.cloud.requests)


@pytest.mark.parametrize("path", [ATTEST, "/certs", "/keys/model/release?api-version=7.4"])
@pytest.mark.parametrize(
    ("status", "headers", "wait"),
    [
        (429, {"retry-after": "17"}, 17),
        (429, {"retry-after": "999999999"}, 600),
        (503, {}, 5),
        (500, {"retry-after": "soon"}, 5),
        (408, {}, 5),
    ],
)
def test_a_service_that_is_busy(vm: AzureVm, path: str, status: int, headers: dict[str, str], wait: float) -> None:
    vm.cloud.bent.answer = lambda of, answer: (status, headers, b"{}") if of == path else answer
    error = failure(vm)
    assert (type(error), error.slug, error.retry_after) == (Unavailable, "BROKER_UNREACHABLE", wait)


@pytest.mark.parametrize("path", [ATTEST, "/certs", "/keys/model/release?api-version=7.4"])
@pytest.mark.parametrize("status", [201, 204, 302, 307, 418])
def test_no_other_status_is_followed_or_read(vm: AzureVm, path: str, status: int) -> None:
    """A redirect would send our evidence, and the bearer token, to whoever it names."""
    headers = {"location": "https://elsewhere.example/"}
    vm.cloud.bent.answer = lambda of, answer: (status, headers, answer[2]) if of == path else answer
    assert failure(vm).slug == "BROKER_ANSWER"
    assert not any("elsewhere" in url for _, url, _ in vm.cloud.requests)


@pytest.mark.parametrize(
    "fault", [Unavailable("EGRESS_DENIED", "no"), DeviceFault("EGRESS_TLS", "no", retry_after=9.0)]
)
def test_a_service_that_cannot_be_reached(vm: AzureVm, fault: AgentError) -> None:
    vm.cloud.failing = fault
    error = failure(vm)
    assert (error.slug, error.retry_after) == ("BROKER_UNREACHABLE", fault.retry_after or 5)


def test_time_runs_out(vm: AzureVm) -> None:
    assert failure(vm, timeout=0.001).slug == "BROKER_UNREACHABLE"


@pytest.mark.parametrize("before", ["/certs", "/keys/model/release?api-version=7.4"])
def test_a_pcr_that_changes_meanwhile_ends_the_release(vm: AzureVm, before: str) -> None:
    """What was attested is no longer what runs: the TPM opens neither answer."""

    def extend(path: str) -> None:
        if path == before:
            commands = Commands(vm.swtpm.transport())
            commands.pcr_extend(7, bytes(32))
            commands.close()

    vm.cloud.seen = extend
    error = failure(vm)
    assert (type(error), error.slug, error.retry_after) == (Unavailable, "PCRS_CHANGING", 5)


def test_a_pcr_that_changes_under_the_quote(vm: AzureVm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service would refuse it like a forgery; it is a matter of trying again."""
    quote = Commands.quote

    def late(self: Commands, *given: Any) -> Signed:
        self.pcr_extend(0, bytes(32))
        return quote(self, *given)

    monkeypatch.setattr(Commands, "quote", late)
    assert failure(vm).slug == "PCRS_CHANGING"
    assert vm.cloud.requests == []


def test_a_tpm_without_azures_certificate(vm: AzureVm) -> None:
    vm.azure.certificate = b""
    assert failure(vm).slug == "NO_AK_CERTIFICATE"
    assert vm.cloud.requests == []


def test_a_report_that_nobody_proves(vm: AzureVm) -> None:
    for each in vm.store.iterdir():
        each.unlink()
    assert failure(vm).slug == "NO_PLATFORM"
    assert vm.cloud.requests == []


@pytest.mark.parametrize(
    "changed",
    [
        {"vault": "http://unit.vault.azure.net"},
        {"vault": f"{VAULT}/"},
        {"vault": f"{VAULT}:8443"},
        {"vault": "https://user@unit.vault.azure.net"},
        {"attestation": "https://"},
        {"attestation": f"{MAA}/attest"},
        {"mechanism": "none"},
        {"mechanism": ""},
    ],
)
def test_settings_that_mean_something_else(changed: dict[str, str]) -> None:
    given = {"attestation": MAA, "vault": VAULT, "guest": GuestOs("Ubuntu", 24, 4), **changed}
    with pytest.raises(Misuse):
        AzureKeys(**given)  # type: ignore[arg-type]


def test_the_token_file_is_read_anew_each_time(tmp_path: Path) -> None:
    file = tmp_path / "token"
    token = token_file(file)
    for content in (b"first\n", b"second"):
        file.write_bytes(content)
        assert asyncio.run(token()) == content.decode().strip()  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [None, "tök".encode()])
def test_no_token_is_a_reason(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "token").write_bytes(content)
    with pytest.raises(Unavailable) as caught:
        asyncio.run(token_file(tmp_path / "token")())  # type: ignore[arg-type]
    assert caught.value.slug == "NO_ACCESS_TOKEN"
