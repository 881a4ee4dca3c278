"""Attacks 23 and 25: what Azure's services answer, or somebody in their place, when a key is asked for."""

from __future__ import annotations

import base64
import json
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from cgpu_agent.backends.tpm.commands import Commands
from cgpu_agent.backends.tpm.software import Swtpm
from cgpu_agent.errors import AgentError, Denied, Unavailable
from cgpu_agent.wire.tpm import PcrSelection, parse_public, pcr_policy
from fixtures import maa
from fixtures.azure_tpm import PLATFORM_AK
from fixtures.azurekeys import ACCESS, VAULT, VAULT_CERTIFICATE, WEB_CA, Answer, b64, unb64url, web_certificate
from fixtures.azurevm import OLDER, SECRET, VERSION, AzureVm, azure_vm
from fixtures.pki import NOW, Authority
from fixtures.platform import base64url
from fixtures.swtpm import running_swtpm

pytestmark = pytest.mark.swtpm

RELEASE = "/keys/model/release?api-version=7.4"
ATTEST = "/attest/AzureGuest?api-version=2020-10-01"
PCRS = PcrSelection.of("sha256", range(8))
OTHER = rsa.generate_private_key(65537, 2048)
OTHER_CA_KEY = rsa.generate_private_key(65537, 2048)


@pytest.fixture(scope="module")
def shared_swtpm() -> Iterator[Swtpm]:
    """One for all."""
    with running_swtpm() as tpm:
        yield tpm


@pytest.fixture
def vm(shared_swtpm: Swtpm, tmp_path: Path) -> Iterator[AzureVm]:
    with azure_vm(shared_swtpm, tmp_path) as found:
        yield found


def failure(vm: AzureVm, name: str = "model") -> AgentError:
    """How the release fails; whatever that says, no secret is in it."""
    with pytest.raises(AgentError) as caught:
        vm.release(name)
    told = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    for secret in (ACCESS, repr(SECRET)[2:-1], SECRET.hex(), b64(SECRET), *vm.cloud.nonces):
        assert secret not in told
    return caught.value


def not_believed(vm: AzureVm, slug: str, name: str = "model") -> None:
    error = failure(vm, name)
    assert (type(error), error.slug) == (Unavailable, "BROKER_ANSWER")
    assert error.message.endswith(f"({slug})"), error.message


def change(*path: str, to: object) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A document with one member replaced, or dropped (``...``)."""

    def apply(document: dict[str, Any]) -> dict[str, Any]:
        copy: dict[str, Any] = json.loads(json.dumps(document))
        inner = copy
        for name in path[:-1]:
            inner = inner[name]
        if to is ...:
            del inner[path[-1]]
        else:
            inner[path[-1]] = to
        return copy

    return apply


# --- the token ---


@pytest.mark.parametrize(
    ("bend", "slug"),
    [
        (change("x-ms-runtime", "client-payload", "nonce", to=b64(b"0" * 64)), "NONCE_MISMATCH"),
        (change("x-ms-runtime", "client-payload", to=...), "BAD_TOKEN"),
        (change("x-ms-runtime", "client-payload", "nonce", to=...), "BAD_TOKEN"),
        (change("iss", to="https://sharedeus.eus.attest.azure.net"), "UNKNOWN_ISSUER"),
        (change("iss", to="https://sharedweu.weu.test.attest.azure.net"), "UNKNOWN_ISSUER"),
        (change("exp", to=maa.NOW_SECONDS), "TOKEN_EXPIRED"),
        (change("exp", to=maa.NOW_SECONDS + 86400), "BAD_LIFETIME"),
        (change("x-ms-runtime", "keys", to=[]), "WRONG_KEY"),
        (change("x-ms-runtime", "keys", to=7), "WRONG_KEY"),
        (change("x-ms-runtime", "keys", to=...), "WRONG_KEY"),
        (change("x-ms-isolation-tee", "x-ms-sevsnpvm-is-debuggable", to=True), "DEBUG_ENABLED"),
    ],
)
def test_a_token_that_is_not_the_answer(
    vm: AzureVm, bend: Callable[[dict[str, Any]], dict[str, Any]], slug: str
) -> None:
    vm.cloud.bent.claims = bend
    not_believed(vm, slug)
    assert not vm.cloud.released


def test_a_token_that_somebody_else_signed(vm: AzureVm) -> None:
    vm.cloud.bent.maa_key = maa.OTHER_KEY
    not_believed(vm, "BAD_SIGNATURE")


def test_a_token_that_names_its_own_key_set(vm: AzureVm) -> None:
    """``jku`` is followed nowhere: the key set is the configured service's."""
    vm.cloud.bent.header = {**maa.HEADER, "jku": "https://elsewhere.example/certs"}
    vm.release()
    assert not any("elsewhere" in url for _, url, _ in vm.cloud.requests)


@pytest.mark.parametrize("twice", [False, True])
def test_a_token_for_another_key_is_not_sent_to_the_vault(vm: AzureVm, *, twice: bool) -> None:
    """It would take our right to use the vault along, and the vault would wrap the secret for somebody else."""
    theirs = {
        "e": "AQAB",
        "kid": "TpmEphemeralEncryptionKey",
        "kty": "RSA",
        "n": base64url(OTHER.public_key().public_numbers().n),
    }

    def bend(claims: dict[str, Any]) -> dict[str, Any]:
        claims["x-ms-runtime"]["keys"] = [theirs] + (claims["x-ms-runtime"]["keys"] if twice else [])
        return claims

    vm.cloud.bent.claims = bend
    not_believed(vm, "WRONG_KEY")
    assert not vm.cloud.released


def test_a_vm_that_the_service_does_not_vouch_for(vm: AzureVm) -> None:
    vm.cloud.bent.claims = change("x-ms-isolation-tee", "x-ms-compliance-status", to="azure-signed-cvm")
    error = failure(vm)
    assert (type(error), error.slug) == (Denied, "KEY_REFUSED")
    assert not any(url.startswith(VAULT) for _, url, _ in vm.cloud.requests), "it is for us to say, too"


def test_the_answer_to_an_earlier_request(vm: AzureVm) -> None:
    """Its key is forgotten, so it does not even open."""
    kept: list[Answer] = []

    def replay(path: str, answer: Answer) -> Answer:
        if path != ATTEST:
            return answer
        kept.append(answer)
        return kept[0]

    vm.cloud.bent.answer = replay
    vm.release()
    not_believed(vm, "BAD_WRAP")


@pytest.mark.parametrize(
    "bend",
    [
        change("EncryptedInnerKey", to=b64(bytes(255))),
        change("EncryptedInnerKey", to=b64(b"\1" + bytes(256))),
        change("EncryptedInnerKey", to=b64(b"\1" * 256)),
        change("EncryptionParams", "Iv", to=b64(bytes(12))),
        change("EncryptionParams", "Iv", to=b64(bytes(11))),
        change("EncryptionParams", to=...),
        change("AuthenticationData", to=b64(bytes(16))),
        change("AuthenticationData", to=b64(bytes(4))),
        change("Jwt", to=b64(b"e30.e30.")),
        change("Jwt", to=""),
        change("Jwt", to=...),
        change("Jwt", to=7),
    ],
)
def test_a_sealed_token_that_was_changed(vm: AzureVm, bend: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    vm.cloud.bent.sealed = bend
    assert failure(vm).slug == "BROKER_ANSWER"
    assert not vm.cloud.released


def test_a_wrapped_key_with_the_zero_of_its_sign(vm: AzureVm) -> None:
    """257 bytes, the first of them zero: some write a number of 256 bytes so."""

    def bend(sealed: dict[str, Any]) -> dict[str, Any]:
        return {**sealed, "EncryptedInnerKey": b64(b"\0" + base64.b64decode(sealed["EncryptedInnerKey"]))}

    vm.cloud.bent.sealed = bend
    assert vm.release()[0].secret == SECRET


# --- what we send, altered on its way: the service judges it ---


def altered(vm: AzureVm, name: str, value: Callable[[dict[str, Any]], object]) -> None:
    def bend(path: str, body: bytes) -> bytes:
        if path != ATTEST:
            return body
        told = json.loads(unb64url(json.loads(body)["AttestationInfo"]))
        told["TpmInfo"][name] = value(told["TpmInfo"])
        return json.dumps({"AttestationInfo": maa.b64url(json.dumps(told).encode())}).encode()

    vm.cloud.bent.request = bend


def of_another_boot(vm: AzureVm) -> dict[str, bytes]:
    """A key of this very TPM, certified by its AK, that holds at other PCR values."""
    commands = Commands(vm.swtpm.transport())
    values = {**commands.pcr_read(PCRS), 7: b"\1" * 32}
    key = commands.create_decryption_key(pcr_policy(PCRS, values))
    certified = commands.certify(key, PLATFORM_AK, b"")
    commands.close()
    public = len(key.public).to_bytes(2, "big") + key.public
    return {
        "EncKeyPub": public,
        "EncKeyCertifyInfo": certified.attest,
        "EncKeyCertifyInfoSignature": certified.signature[6:],
    }


def test_the_peer_judges_what_it_is_sent(vm: AzureVm) -> None:
    """Otherwise the tests above would show nothing."""
    stale = of_another_boot(vm)
    changes: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
        ("PCRs", lambda tpm: [{**each, "Digest": b64(b"\1" * 32)} for each in tpm["PCRs"]]),
        ("PCRs", lambda tpm: tpm["PCRs"][:-1]),
        ("PcrSignature", lambda tpm: tpm["EncKeyCertifyInfoSignature"]),
        ("PcrQuote", lambda tpm: tpm["EncKeyCertifyInfo"]),
        ("EncKeyPub", lambda tpm: tpm["AikPub"]),
        ("EncKeyPub", lambda _tpm: b64(stale["EncKeyPub"])),
        ("EncKeyCertifyInfo", lambda tpm: tpm["PcrQuote"]),
        ("AikCert", lambda _tpm: b64(VAULT_CERTIFICATE.public_bytes(maa.Encoding.DER))),
    ]
    for name, value in changes:
        altered(vm, name, value)
        error = failure(vm)
        assert (type(error), error.slug) == (Denied, "KEY_REFUSED"), name

    def whole(path: str, body: bytes) -> bytes:
        told = json.loads(unb64url(json.loads(body)["AttestationInfo"])) if path == ATTEST else {}
        told.get("TpmInfo", {}).update({name: b64(value) for name, value in stale.items()})
        return json.dumps({"AttestationInfo": maa.b64url(json.dumps(told).encode())}).encode() if told else body

    vm.cloud.bent.request = whole
    assert failure(vm).slug == "KEY_REFUSED"
    assert parse_public(stale["EncKeyPub"][2:]).auth_policy


def test_a_report_that_names_another_ak(shared_swtpm: Swtpm, tmp_path: Path) -> None:
    with azure_vm(shared_swtpm, tmp_path, other_ak=True) as vm:
        assert failure(vm).slug == "KEY_REFUSED"


# --- the vault's answer ---


@pytest.mark.parametrize(
    ("bend", "slug"),
    [
        (change("request", "nonce", to="0" * 64), "NONCE_MISMATCH"),
        (change("request", "nonce", to=...), "BAD_FIELD"),
        (change("request", "enc", to="CKM_RSA_AES_KEY_WRAP"), "WRONG_ALGORITHM"),
        (
            change("response", "key", "key", "kid", to=f"{VAULT}/keys/other/{VERSION}"),
            "WRONG_KEY",
        ),
        (
            change("response", "key", "key", "kid", to=f"https://else.vault.azure.net/keys/model/{VERSION}"),
            "WRONG_KEY",
        ),
        (change("response", "key", "key", "kid", to=f"{VAULT}/keys/model"), "WRONG_KEY"),
        (change("response", "key", "key", "kid", to=f"{VAULT}/keys/model/../x"), "WRONG_KEY"),
        (change("response", "key", "key", "kid", to=f"{VAULT}/keys/model/{'Z' * 32}"), "WRONG_KEY"),
        (change("response", "key", "key", "kty", to="password"), "BAD_FIELD"),
        (change("response", "key", "key", "key_hsm", to="e30"), "BAD_FIELD"),
        (change("response", "key", "key", "key_hsm", to=...), "BAD_FIELD"),
        (change("response", to=None), "BAD_JSON"),
    ],
)
def test_a_release_that_is_not_the_answer(
    vm: AzureVm, bend: Callable[[dict[str, Any]], dict[str, Any]], slug: str
) -> None:
    vm.cloud.bent.payload = bend
    not_believed(vm, slug)


def test_another_version_than_the_one_that_was_named(vm: AzureVm) -> None:
    kid = f"{VAULT}/keys/model/{VERSION}"
    vm.cloud.bent.payload = change("response", "key", "key", "kid", to=kid)
    not_believed(vm, "WRONG_KEY", f"model/{OLDER}")


def test_a_release_of_an_earlier_request(vm: AzureVm) -> None:
    kept: list[Answer] = []

    def replay(path: str, answer: Answer) -> Answer:
        if path != RELEASE:
            return answer
        kept.append(answer)
        return kept[0]

    vm.cloud.bent.answer = replay
    vm.release()
    not_believed(vm, "NONCE_MISMATCH")


def test_a_release_that_another_key_signed(vm: AzureVm) -> None:
    vm.cloud.bent.vault_key = OTHER
    not_believed(vm, "BAD_SIGNATURE")


def other_ca() -> Authority:
    return Authority.root("web", key=OTHER_CA_KEY)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "x5c",
    [
        (web_certificate(OTHER, "unit.vault.azure.net", other_ca()), other_ca().certificate),
        (web_certificate(OTHER, "else.example"), WEB_CA.certificate),
        (web_certificate(OTHER, "*.azure.net"), WEB_CA.certificate),
        (web_certificate(OTHER, "unit.vault.azure.net", not_after=NOW - timedelta(days=1)), WEB_CA.certificate),
        (VAULT_CERTIFICATE, WEB_CA.certificate),
        (WEB_CA.certificate,),
    ],
    ids=["other-ca", "other-host", "wildcard-too-wide", "expired", "thumbprint", "ca"],
)
def test_a_release_signed_by_whoever_has_some_certificate(vm: AzureVm, x5c: tuple[Any, ...]) -> None:
    vm.cloud.bent.vault_key, vm.cloud.bent.x5c = OTHER, x5c
    if x5c[0] is VAULT_CERTIFICATE:
        vm.cloud.bent.jws = change("x5t#S256", to=maa.b64url(bytes(32)))
    not_believed(vm, "BAD_CHAIN")


@pytest.mark.parametrize(
    ("bend", "slug"),
    [
        (change("alg", to="none"), "WRONG_ALGORITHM"),
        (change("alg", to="HS256"), "WRONG_ALGORITHM"),
        (change("crit", to=["x"]), "CRITICAL_HEADER"),
        (change("x5c", to=[]), "BAD_FIELD"),
        (change("x5c", to=["!"]), "BAD_TOKEN"),
        (change("x5c", to=[7]), "BAD_CERTIFICATE"),
        (change("x5c", to=...), "BAD_FIELD"),
        (change("x5c", to=["AAAA"] * 9), "BAD_FIELD"),
    ],
)
def test_a_header_that_asks_for_less(
    vm: AzureVm, bend: Callable[[dict[str, Any]], dict[str, Any]], slug: str
) -> None:
    vm.cloud.bent.jws = lambda header: bend({name: value for name, value in header.items() if name != "x5t#S256"})
    not_believed(vm, slug)


@pytest.mark.parametrize("cut", [0, 8, 255, 256, 264, 271, 272, 288, 295])
def test_a_wrapped_key_that_was_cut(vm: AzureVm, cut: int) -> None:
    vm.cloud.bent.ciphertext = lambda ciphertext: ciphertext[:cut]
    not_believed(vm, "BAD_WRAP" if cut % 8 == 0 and cut >= 272 else "BAD_FIELD")


@pytest.mark.parametrize("at", [0, 255, 256, -1])
def test_a_wrapped_key_that_was_changed(vm: AzureVm, at: int) -> None:
    def flip(ciphertext: bytes) -> bytes:
        changed = bytearray(ciphertext)
        changed[at] ^= 1
        return bytes(changed)

    vm.cloud.bent.ciphertext = flip
    not_believed(vm, "BAD_WRAP")


def test_a_key_larger_than_any_may_be(vm: AzureVm) -> None:
    vm.cloud.keys["model", VERSION] = ("oct", bytes(8193))
    not_believed(vm, "BAD_FIELD")


@pytest.mark.parametrize("mechanism", ["CKM_RSA_AES_KEY_WRAP", "RSA_AES_KEY_WRAP_256"])
def test_bytes_that_other_clients_lose(vm: AzureVm, mechanism: str) -> None:
    """One in 256 ciphertexts ends in a zero byte, one begins with one; some decoders drop either."""
    vm.mechanism = mechanism
    vm.cloud.bent.kek = lambda sealed: sealed[0] == 0
    vm.cloud.bent.wrapped = lambda wrapped: wrapped[-1] == 0
    assert vm.release()[0].secret == SECRET
    vm.cloud.bent.kek = lambda sealed: sealed[-1] == 0
    assert vm.release()[0].secret == SECRET


@pytest.mark.parametrize(
    "bend",
    [
        lambda text: text + "=" * (-len(text) % 4 or 4),
        lambda text: text + "A",
        lambda text: b64(unb64url(text) + b"  \xff"),
        lambda text: text[:8] + "\n" + text[8:],
        lambda text: text[:-1],
    ],
    ids=["padding", "length", "alphabet", "newline", "cut"],
)
def test_base64_that_others_read_in_another_way(vm: AzureVm, bend: Callable[[str], str]) -> None:
    vm.cloud.bent.hsm = bend
    assert failure(vm).slug == "BROKER_ANSWER"


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"value":7}', b'{"value":"a.b"}', '{"value":"ä.b.c"}'.encode(), b'{"value":"","value":""}'],
)
@pytest.mark.parametrize("path", [ATTEST, "/certs", RELEASE])
def test_answers_that_are_none(vm: AzureVm, path: str, body: bytes) -> None:
    vm.cloud.bent.answer = lambda of, answer: (200, {}, body) if of == path else answer
    assert failure(vm).slug == "BROKER_ANSWER"
