"""Answers of the root helper: what it encodes is parsed, and nothing else."""

from __future__ import annotations

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.ready import CLEAR, MAX_MESSAGE, REFUSED, SET, encode_answer, parse_answer


@pytest.mark.parametrize("code", [0, 2, 10, 999])
def test_a_code_comes_through(code: int) -> None:
    assert parse_answer(encode_answer(code)) == code
    assert parse_answer(REFUSED) is None


def test_every_message_is_shorter_than_what_is_read() -> None:
    assert max(map(len, (SET, CLEAR, REFUSED, encode_answer(999)))) < MAX_MESSAGE


@pytest.mark.parametrize(
    "data",
    [b"", b"nvml", b"nvml ", b"nvml 00", b"nvml 1000", b"nvml -1", b"nvml 0 ", b"nvml 0\n", b" nvml 0", b"refused "],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(HostileInput) as caught:
        parse_answer(data)
    assert caught.value.slug == "BAD_READY_ANSWER"
