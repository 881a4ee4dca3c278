"""Lease messages: what is written is read again, and nothing else is."""

from __future__ import annotations

import pytest

from cgpu_agent.errors import AgentError, Denied, DeviceFault, Exhausted, HostileInput, Misuse, Unavailable
from cgpu_agent.wire.lease import MAX_MESSAGE, LeaseRequest, encode_grant, encode_refusal, parse_answer

REQUEST = LeaseRequest(1 << 40, source=True)
ID = bytes(range(16))
REFUSAL = encode_refusal(Exhausted("LEASE_LIMIT", "too many", retry_after=1.5))


@pytest.mark.parametrize(
    "request_",
    [
        REQUEST,
        LeaseRequest(0, source=False),
        LeaseRequest((1 << 64) - 1, source=True),
        LeaseRequest(7, source=False, writable=True),
    ],
)
def test_a_request_is_read_as_it_was_written(request_: LeaseRequest) -> None:
    assert LeaseRequest.parse(request_.encode()) == request_


def test_the_bytes_are_those_of_the_documentation() -> None:
    assert REQUEST.encode().hex() == "636770752f6c656173652f3100" + "01" + "0000010000000000"
    writable = LeaseRequest(1 << 40, source=False, writable=True)
    assert writable.encode().hex() == "636770752f6c656173652f3100" + "02" + "0000010000000000"
    assert encode_grant(ID).hex() == "636770752f6c656173652f3100" + "01" + ID.hex()


@pytest.mark.parametrize("kind", [Misuse, Denied, Exhausted, Unavailable])
@pytest.mark.parametrize("retry", [None, 0.001, 2.5])
def test_a_refusal_is_read_as_the_error_that_it_is(kind: type[AgentError], retry: float | None) -> None:
    told = parse_answer(encode_refusal(kind("SOME_SLUG", "why it is", retry_after=retry)))
    assert isinstance(told, AgentError)
    assert (type(told), told.slug, told.message, told.retry_after) == (kind, "SOME_SLUG", "why it is", retry)


def test_any_other_error_is_a_state_and_any_text_fits() -> None:
    told = parse_answer(encode_refusal(DeviceFault("X", "é" * 999)))
    assert isinstance(told, Unavailable)
    assert told.message == "?" * 256
    assert len(encode_refusal(DeviceFault("X" * 64, "é" * 999))) < MAX_MESSAGE


def test_a_grant_is_its_id() -> None:
    assert parse_answer(encode_grant(ID)) == ID


@pytest.mark.parametrize("whole", [encode_grant(ID), REFUSAL], ids=["grant", "refusal"])
def test_a_cut_or_prolonged_answer_is_none(whole: bytes) -> None:
    for bad in (*(whole[:size] for size in range(len(whole))), whole + b"\0"):
        with pytest.raises(HostileInput):
            parse_answer(bad)


def test_a_cut_or_prolonged_request_is_none() -> None:
    whole = REQUEST.encode()
    for bad in (*(whole[:size] for size in range(len(whole))), whole + b"\0"):
        with pytest.raises(HostileInput):
            LeaseRequest.parse(bad)


@pytest.mark.parametrize(
    "bad",
    [
        b"cgpu/lease/2\0" + REFUSAL[13:],
        REFUSAL[:13] + b"\2" + REFUSAL[14:],
        REFUSAL[:14] + b"\4" + REFUSAL[15:],
        REFUSAL.replace(b"LEASE_LIMIT", b"lease_limit"),
        REFUSAL.replace(b"too many", b"too\nmany"),
        REFUSAL.replace(b"too many", b"too m\xc3ny"),
    ],
    ids=["magic", "verdict", "kind", "slug", "control character", "not ASCII"],
)
def test_an_answer_of_another_form_is_none(bad: bytes) -> None:
    with pytest.raises(HostileInput) as raised:
        parse_answer(bad)
    assert raised.value.slug == "BAD_LEASE_MESSAGE"


def test_a_kind_that_nobody_knows_is_none() -> None:
    for kind in range(3, 256):
        with pytest.raises(HostileInput) as raised:
            LeaseRequest.parse(REQUEST.encode().replace(b"\0\1", bytes([0, kind]), 1))
        assert raised.value.slug == "BAD_LEASE_MESSAGE"
