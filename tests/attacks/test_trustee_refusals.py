"""Whoever sits between agent and broker, or plays the broker, gets no key released to him and none taken from him.

What the broker refuses here shows what our evidence binds: it judges for real, though it is a stand-in for Trustee.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cgpu_agent.backends.base import MAX_SECRET
from cgpu_agent.backends.keys.jwe import AnswerKey
from cgpu_agent.backends.tpm.software import Swtpm
from cgpu_agent.errors import AgentError, Denied, Unavailable
from cgpu_agent.wire.kbs import MAX_RESPONSE, MAX_TOKEN
from fixtures.kbs import ORIGIN, Answer, Kbs, digest, encrypted, error
from fixtures.kbsvm import KEY, Vm, azure_vm, bare_vm
from fixtures.lanes import board, vendor
from fixtures.swtpm import running_swtpm

pytestmark = pytest.mark.swtpm

SECRET = b"secret " * 4
STEPS = ("auth", "attest", "resource")


@pytest.fixture(scope="module")
def swtpm() -> Iterator[Swtpm]:
    with running_swtpm() as tpm:
        yield tpm


@pytest.fixture
def vm(swtpm: Swtpm, tmp_path: Path) -> Vm:
    return bare_vm(swtpm, tmp_path)


@pytest.fixture(params=["tpm", "az-snp-vtpm"])
def any_vm(request: pytest.FixtureRequest, swtpm: Swtpm, tmp_path: Path) -> Iterator[Vm]:
    if request.param == "tpm":
        yield bare_vm(swtpm, tmp_path)
    else:
        with azure_vm(swtpm, tmp_path) as (vm, _):
            yield vm


def refused(vm: Vm, kbs: Kbs) -> tuple[type[AgentError], str]:
    with pytest.raises(AgentError) as caught:
        vm.release(kbs)
    assert "in words" not in caught.value.message, "what the broker writes is shown to nobody"
    return type(caught.value), caught.value.slug


# --- what the broker, or somebody in its place, answers ---


def test_a_secret_for_another_key(vm: Vm) -> None:
    kbs = Kbs()
    kbs.on_answer["resource"] = lambda _: (200, {}, encrypted(AnswerKey().jwk, SECRET))
    assert refused(vm, kbs) == (Unavailable, "BROKER_ANSWER")


def test_an_old_challenge_and_the_old_answer_to_it(vm: Vm) -> None:
    kept: list[Answer] = []

    def keep(answer: Answer) -> Answer:
        kept.append(answer)
        return kept[0]

    kbs = Kbs(nonces=[base64.b64encode(bytes(32)).decode()] * 2)
    kbs.on_answer["resource"] = keep
    assert [each.secret for each in vm.release(kbs)] == [SECRET]
    assert refused(vm, kbs) == (Unavailable, "BROKER_ANSWER")


def test_a_session_that_stands_for_another_vms_token(vm: Vm) -> None:
    kbs = Kbs()
    vm.release(kbs)
    (other,) = kbs.sessions.values()

    def attested(answer: Answer) -> Answer:
        list(kbs.sessions.values())[-1].token = other.token
        return answer

    kbs.on_answer["attest"] = attested
    assert refused(vm, kbs) == (Unavailable, "BROKER_ANSWER")


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("step", STEPS)
def test_a_redirect_is_not_followed(vm: Vm, step: str, status: int) -> None:
    kbs = Kbs()
    kbs.on_answer[step] = lambda answer: (status, {"location": "https://kbs.evil/kbs/v0/auth"}, answer[2])
    assert refused(vm, kbs) == (Unavailable, "BROKER_ANSWER")
    assert len(kbs.log) == STEPS.index(step) + 1
    assert all(url.startswith(ORIGIN) for _, url, _, _ in kbs.log)


UNREADABLE = (Unavailable, "BROKER_ANSWER")
ABSENT = (Unavailable, "KEY_ABSENT")
REFUSED = (Denied, "KEY_REFUSED")


@pytest.mark.parametrize("status", [401, 403, 404, 418, 500])
@pytest.mark.parametrize(
    ("step", "variant", "expected"),
    [
        ("auth", "AttestationError", UNREADABLE),
        ("auth", "PluginNotFound", UNREADABLE),
        ("attest", "AttestationError", REFUSED),
        ("resource", "AttestationError", UNREADABLE),
        ("resource", "PolicyDeny", REFUSED),
        ("resource", "PluginInternalError", ABSENT),
        ("resource", "PluginNotFound", ABSENT),
        ("resource", "InvalidRequestPath", ABSENT),
        ("resource", "TokenNotFound", (Unavailable, "BROKER_UNREACHABLE")),
        ("resource", "TokenVerifierError", UNREADABLE),
        ("resource", "PolicyEngineError", UNREADABLE),
        ("resource", "JweError", UNREADABLE),
        ("resource", "Unheard", UNREADABLE),
    ],
)
def test_errors_are_told_apart_by_type_and_never_by_status(
    vm: Vm, step: str, variant: str, expected: tuple[type[AgentError], str], status: int
) -> None:
    kbs = Kbs()
    kbs.on_answer[step] = lambda _: error(variant, status)
    assert refused(vm, kbs) == expected
    assert len(kbs.log) == STEPS.index(step) + 1, "nothing is tried twice"


@pytest.mark.parametrize("step", STEPS)
def test_an_error_that_is_called_a_success(vm: Vm, step: str) -> None:
    kbs = Kbs()
    kbs.on_answer[step] = lambda answer: (200, answer[1], error("PolicyDeny")[2])
    assert refused(vm, kbs) == UNREADABLE


@pytest.mark.parametrize("step", STEPS)
def test_a_success_that_is_called_an_error(vm: Vm, step: str) -> None:
    kbs = Kbs()
    kbs.on_answer[step] = lambda answer: (401, *answer[1:])
    assert refused(vm, kbs) == UNREADABLE


@pytest.mark.parametrize(
    ("status", "slug"), [(429, "BROKER_UNREACHABLE"), (503, "BROKER_UNREACHABLE"), (400, "BROKER_ANSWER")]
)
def test_something_before_the_broker_answers_in_its_place(vm: Vm, status: int, slug: str) -> None:
    kbs = Kbs()
    kbs.on_answer["auth"] = lambda _: (status, {}, b"<html>")
    assert refused(vm, kbs) == (Unavailable, slug)


SESSION = "kbs-session-id=" + "0" * 32


@pytest.mark.parametrize(
    "cookie",
    [
        None,
        "",
        "session=" + "0" * 32,
        SESSION[:-1],
        SESSION + "0",
        SESSION[:-1] + "G",
        SESSION[:-1] + "A",
        " " + SESSION,
        SESSION + ", kbs-session-id=" + "1" * 32,
        SESSION + "\r\nX: y",
        SESSION + "; a\r\nX: y",
    ],
)
def test_cookies_that_are_none_of_the_protocols(vm: Vm, cookie: str | None) -> None:
    kbs = Kbs()
    headers = {} if cookie is None else {"set-cookie": cookie}
    kbs.on_answer["auth"] = lambda answer: (200, headers, answer[2])
    assert refused(vm, kbs) == UNREADABLE
    assert len(kbs.log) == 1


def test_a_cookie_that_is_changed_later_is_not_taken(vm: Vm) -> None:
    kbs = Kbs()
    kbs.on_answer["attest"] = lambda answer: (200, {"set-cookie": SESSION}, answer[2])
    vm.release(kbs)
    assert kbs.log[1][2]["Cookie"] == kbs.log[2][2]["Cookie"] != SESSION


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"{}", b"\xff", b'{"a":' * 50, b"[" * 100_000])
@pytest.mark.parametrize("step", STEPS)
def test_answers_that_are_not_the_protocols(vm: Vm, step: str, body: bytes) -> None:
    kbs = Kbs()
    kbs.on_answer[step] = lambda answer: (200, answer[1], body)
    assert refused(vm, kbs) == UNREADABLE


@pytest.mark.parametrize(("step", "size"), [("auth", 1 << 13), ("attest", MAX_TOKEN), ("resource", MAX_RESPONSE)])
def test_answers_that_are_too_large_even_if_the_client_below_let_them_through(vm: Vm, step: str, size: int) -> None:
    kbs = Kbs()
    kbs.on_answer[step] = lambda answer: (*answer[:2], answer[2] + b" " * size)
    assert refused(vm, kbs) == UNREADABLE


def test_secrets_that_are_too_large(vm: Vm) -> None:
    assert [len(each.secret) for each in vm.release(Kbs({KEY: b"k" * MAX_SECRET}))] == [MAX_SECRET]
    assert refused(vm, Kbs({KEY: b"k" * (MAX_SECRET + 1)})) == UNREADABLE
    assert refused(vm, Kbs({KEY: b""})) == UNREADABLE


# --- what somebody on the way, or in another VM, makes of our requests ---


def edited(kbs: Kbs, change: Callable[[dict[str, Any]], None]) -> None:
    """Alter the attestation on its way."""

    def edit(body: bytes) -> bytes:
        message = json.loads(body)
        change(message)
        return json.dumps(message).encode()

    kbs.on_request["attest"] = edit


def test_evidence_does_not_vouch_for_anybody_elses_key(any_vm: Vm) -> None:
    kbs = Kbs()
    edited(kbs, lambda message: message["runtime-data"].update({"tee-pubkey": AnswerKey().jwk}))
    assert refused(any_vm, kbs) == REFUSED


def test_evidence_of_another_session_is_refused(any_vm: Vm) -> None:
    """Whole, and with the nonce of the new session written over its own."""
    kbs = Kbs()
    any_vm.release(kbs)
    old = kbs.log[1][3]
    kbs.on_request["attest"] = lambda _: old
    assert refused(any_vm, kbs) == REFUSED

    def renewed(message: dict[str, Any]) -> None:
        nonce = message["runtime-data"]["nonce"]
        message.update(json.loads(old))
        message["runtime-data"]["nonce"] = nonce

    edited(kbs, renewed)
    assert refused(any_vm, kbs) == REFUSED


def test_gpus_cannot_be_taken_away_or_exchanged(any_vm: Vm) -> None:
    """Not even for genuine ones that answer the right nonce: the quote is over the very text of their evidence."""
    any_vm.gpus = board()
    kbs = Kbs()
    any_vm.release(kbs)

    def without(message: dict[str, Any]) -> None:
        message["tee-evidence"]["additional_evidence"] = ""

    def exchanged(message: dict[str, Any]) -> None:
        found = json.loads(message["tee-evidence"]["additional_evidence"])
        nonce, device = digest(message["runtime-data"])[:32], vendor().device()
        found["nvidia"]["device_evidence_list"][0] |= {
            "evidence": base64.b64encode(device.report(nonce)).decode(),
            "certificate": base64.b64encode(device.chain).decode(),
        }
        message["tee-evidence"]["additional_evidence"] = json.dumps(found)

    def spaced(message: dict[str, Any]) -> None:
        found = message["tee-evidence"]["additional_evidence"]
        message["tee-evidence"]["additional_evidence"] = " " + found

    for change in (without, exchanged, spaced):
        edited(kbs, change)
        assert refused(any_vm, kbs) == REFUSED


def test_reports_of_gpus_are_for_this_session_and_key(any_vm: Vm) -> None:
    """A VM without GPUs that was handed the reports of another one's session."""
    any_vm.gpus = board()
    kbs = Kbs()
    any_vm.release(kbs)
    stale = json.loads(json.loads(kbs.log[1][3])["tee-evidence"]["additional_evidence"])
    nonce = base64.b64decode(stale["nvidia"]["device_evidence_list"][0]["evidence"])[4:36]
    assert nonce == digest(json.loads(kbs.log[1][3])["runtime-data"])[:32]

    class Borrowed(type(board()[0])):  # type: ignore[misc]
        def report(self, _nonce: bytes) -> bytes:  # type: ignore[override]
            return bytes(super().report(nonce))

    any_vm.gpus = tuple(Borrowed(each.chip, each.signers, each.pdi) for each in board())
    assert refused(any_vm, kbs) == REFUSED


def test_a_broker_of_another_version_does_not_get_evidence(vm: Vm) -> None:
    kbs = Kbs()
    kbs.on_request["auth"] = lambda body: body.replace(b"0.4.0", b"0.1.1")
    assert refused(vm, kbs) == UNREADABLE
    assert len(kbs.log) == 1
