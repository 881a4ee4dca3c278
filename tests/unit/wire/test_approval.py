"""Approval files: strict, and every field of theirs is signed or selects what is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.approval import sign_approval
from cgpu_agent.wire.approval import (
    MAX_APPROVAL,
    approved_policy,
    is_name,
    parse_approval,
    policy_ref,
    signed_bytes,
)
from fixtures.owner import Owner

OWNER = Owner(number=7)
PCRS = {0: bytes(32), 11: b"\1" * 32}
APPROVAL = sign_approval(OWNER.pem, fleet="fleet-a", groups=["prod", "dev"], pcrs=PCRS, epoch=3)


def refused(**changes: Any) -> str:
    document = json.loads(APPROVAL.encode())
    for name, value in changes.items():
        if value is ...:
            del document[name]
        else:
            document[name] = value
    with pytest.raises(HostileInput) as caught:
        parse_approval(json.dumps(document).encode())
    return caught.value.slug


def test_file_is_read_back_as_it_was_written() -> None:
    assert parse_approval(APPROVAL.encode()) == APPROVAL
    assert set(APPROVAL.signatures) == {"prod", "dev", "latch"}


@pytest.mark.parametrize("name", ["authority", "epoch", "fleet", "format", "pcrs", "signatures"])
def test_every_field_must_be_there(name: str) -> None:
    assert refused(**{name: ...}) == "BAD_FIELD"


@pytest.mark.parametrize(
    ("changes", "slug"),
    [
        ({"format": "cgpu-approval/1"}, "BAD_FORMAT"),
        ({"extra": 1}, "UNKNOWN_KEY"),
        ({"authority": ""}, "BAD_KEY"),
        ({"authority": "AAAA"}, "BAD_KEY"),
        ({"authority": "A" * 4000}, "BAD_FIELD"),
        ({"fleet": ""}, "BAD_FIELD"),
        ({"fleet": "../etc"}, "BAD_FIELD"),
        ({"epoch": 0}, "BAD_FIELD"),
        ({"epoch": 1 << 63}, "BAD_FIELD"),
        ({"epoch": True}, "BAD_FIELD"),
        ({"pcrs": {}}, "BAD_FIELD"),
        ({"pcrs": {"24": "00" * 32}}, "BAD_FIELD"),
        ({"pcrs": {"07": "00" * 32}}, "BAD_FIELD"),
        ({"pcrs": {"7": "00" * 20}}, "BAD_FIELD"),
        ({"pcrs": {"7": "AA" * 32}}, "BAD_FIELD"),
        ({"signatures": {}}, "BAD_FIELD"),
        ({"signatures": {"prod": "AAAA"}}, "BAD_FIELD"),
        ({"signatures": {"Prod": "A" * 86 + "=="}}, "BAD_FIELD"),
        ({"signatures": {f"g{i}": "A" * 86 + "==" for i in range(65)}}, "BAD_FIELD"),
    ],
)
def test_anything_else_is_refused(changes: dict[str, Any], slug: str) -> None:
    assert refused(**changes) == slug


def test_large_and_repeated_input_is_refused() -> None:
    for data, slug in (
        (b" " * (MAX_APPROVAL + 1), "TOO_LARGE"),
        (b'{"epoch":1,"epoch":2}', "DUPLICATE_KEY"),
        (APPROVAL.encode() + b"{}", "BAD_JSON"),
    ):
        with pytest.raises(HostileInput) as caught:
            parse_approval(data)
        assert caught.value.slug == slug


@given(st.integers(0, len(APPROVAL.encode()) - 1), st.binary(max_size=3))
def test_altered_file_is_refused_or_is_another_approval(position: int, change: bytes) -> None:
    data = APPROVAL.encode()
    altered = data[:position] + change + data[position + 1 :]
    try:
        found = parse_approval(altered)
    except HostileInput:
        return
    assert (found == APPROVAL) == (json.loads(altered) == json.loads(data))


def test_all_that_an_approval_says_is_in_what_is_signed() -> None:
    signed = {
        signed_bytes(PCRS, 3, "fleet-a", "prod"),
        signed_bytes(PCRS, 4, "fleet-a", "prod"),
        signed_bytes({0: bytes(32)}, 3, "fleet-a", "prod"),
        signed_bytes({**PCRS, 11: bytes(32)}, 3, "fleet-a", "prod"),
        signed_bytes({0: bytes(32), 12: b"\1" * 32}, 3, "fleet-a", "prod"),
        signed_bytes(PCRS, 3, "fleet-b", "prod"),
        signed_bytes(PCRS, 3, "fleet-a", "dev"),
    }
    assert len(signed) == 7


def test_bytes_do_not_move_between_fleet_and_group() -> None:
    assert policy_ref("ab", "c") != policy_ref("a", "bc")
    assert all(len(policy_ref(*each)) == 32 for each in [("", ""), ("a", "b")])


def test_order_of_pcrs_does_not_matter() -> None:
    assert approved_policy(dict(sorted(PCRS.items(), reverse=True)), 3) == approved_policy(PCRS, 3)


@pytest.mark.parametrize("name", ["a", "0", "prod", "a.b-c_d", "x" * 64])
def test_names(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize("name", ["", "A", "-a", "a-", ".", "a/b", "a b", "a\n", "x" * 65, "\u00e9"])
def test_no_names(name: str) -> None:
    assert not is_name(name)
