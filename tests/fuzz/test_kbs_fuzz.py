"""Hostile bytes in place of a key broker's answers: read or refused, never another secret, never a crash."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgpu_agent.backends.keys.jwe import AnswerKey
from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.kbs import parse_challenge, parse_error, parse_response, parse_token
from fixtures.kbs import encrypted, error

KEY = AnswerKey()
SECRET = b"secret " * 4
RESPONSE = encrypted(KEY.jwk, SECRET)
NONCE = base64.b64encode(bytes(range(32))).decode()
SEEDS: dict[Callable[[bytes], object], bytes] = {
    parse_challenge: json.dumps({"nonce": NONCE, "extra-params": {"selected-hash-algorithm": "sha384"}}).encode(),
    parse_token: b'{"token":"eyJh.eyJi.c2ln"}',
    parse_error: error("PolicyDeny")[2],
    parse_response: RESPONSE,
}


@st.composite
def mutated(draw: st.DrawFn, seed: bytes) -> bytes:
    """The message with bytes replaced, cut out, or put in between."""
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=6))
    return bytes(data)


@pytest.mark.parametrize("parse", SEEDS, ids=lambda parse: parse.__name__)
def test_parsers_refuse_or_read(parse: Callable[[bytes], object]) -> None:
    parse(SEEDS[parse])

    @settings(max_examples=250, deadline=None)
    @given(mutated(SEEDS[parse]) | st.binary(max_size=200))
    def run(data: bytes) -> None:
        with contextlib.suppress(HostileInput):
            parse(data)

    run()


@settings(max_examples=200, deadline=None)
@given(mutated(RESPONSE))
def test_no_altered_response_opens_to_something_else(message: bytes) -> None:
    with contextlib.suppress(HostileInput):
        assert KEY.open(parse_response(message)) == SECRET


def test_no_flipped_bit_opens_to_something_else() -> None:
    for at in range(len(RESPONSE)):
        flipped = RESPONSE[:at] + bytes((RESPONSE[at] ^ (1 << at % 7),)) + RESPONSE[at + 1 :]
        with contextlib.suppress(HostileInput):
            assert KEY.open(parse_response(flipped)) == SECRET
