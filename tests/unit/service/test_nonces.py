"""A nonce says when it was made, and only replicas of one service can make one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.service import nonces, replica
from cgpu_agent.service.replica import ReplicaKeys

KEYS = ReplicaKeys((b"k" * 32,))
AUDIENCE = "https://verifier.example"
MADE = 1_780_000_000


def issued_at(nonce: bytes, *, keys: ReplicaKeys = KEYS, audience: str = AUDIENCE, now: int = MADE) -> int:
    return nonces.issued_at(keys, nonce, audience, now=now, max_age=120)


def slug(nonce: bytes, **changed: object) -> str:
    with pytest.raises(HostileInput) as caught:
        issued_at(nonce, **changed)  # type: ignore[arg-type]
    return caught.value.slug


NONCE = nonces.issue(KEYS, AUDIENCE, now=MADE)


@given(
    now=st.integers(0, (1 << 40)), age=st.integers(-nonces.SKEW_SECONDS, 120), audience=st.text("abc:/.é", min_size=1)
)
def test_every_replica_knows_when_it_was_made(now: int, age: int, audience: str) -> None:
    nonce = nonces.issue(KEYS, audience, now=now)
    assert len(nonce) == nonces.SIZE <= 64
    assert nonces.issued_at(ReplicaKeys(KEYS.keys), nonce, audience, now=now + age, max_age=120) == now


def test_two_of_one_second_differ() -> None:
    assert nonces.issue(KEYS, AUDIENCE, now=MADE) != nonces.issue(KEYS, AUDIENCE, now=MADE)


@given(bit=st.integers(0, 8 * nonces.SIZE - 1))
def test_refuses_a_flipped_bit(bit: int) -> None:
    bent = bytearray(NONCE)
    bent[bit // 8] ^= 1 << bit % 8
    assert slug(bytes(bent)) == "NONCE_UNKNOWN"


@given(st.binary(max_size=80))
def test_refuses_what_a_stranger_made(data: bytes) -> None:
    assert slug(data) == "NONCE_UNKNOWN"


@pytest.mark.parametrize("bent", [NONCE[:-1], NONCE + b"\0", NONCE[1:], b""])
def test_refuses_another_size(bent: bytes) -> None:
    assert slug(bent) == "NONCE_UNKNOWN"


def test_refuses_that_of_another_service_with_the_same_key() -> None:
    assert slug(NONCE, audience="https://other.example") == "NONCE_UNKNOWN"


def test_refuses_that_of_another_key() -> None:
    assert slug(NONCE, keys=ReplicaKeys((b"x" * 32,))) == "NONCE_UNKNOWN"


def test_is_good_to_the_last_second() -> None:
    assert issued_at(NONCE, now=MADE + 120) == MADE
    assert slug(NONCE, now=MADE + 121) == "NONCE_EXPIRED"


def test_clocks_of_replicas_may_differ_a_little() -> None:
    assert issued_at(NONCE, now=MADE - nonces.SKEW_SECONDS) == MADE
    assert slug(NONCE, now=MADE - nonces.SKEW_SECONDS - 1) == "NONCE_FROM_FUTURE"


def test_a_key_is_exchanged_without_losing_nonces() -> None:
    new = b"n" * 32
    both = ReplicaKeys((new, KEYS.keys[0]))
    assert issued_at(NONCE, keys=both) == MADE
    fresh = nonces.issue(both, AUDIENCE, now=MADE)
    assert issued_at(fresh, keys=ReplicaKeys((new,))) == MADE
    assert slug(NONCE, keys=ReplicaKeys((new,))) == "NONCE_UNKNOWN"


def test_a_token_id_follows_from_nonce_and_statement() -> None:
    leaf = bytes(32)
    assert nonces.token_id(NONCE, leaf) == nonces.token_id(NONCE, leaf)
    assert nonces.token_id(NONCE, leaf) != nonces.token_id(NONCE, b"\1" * 32)
    assert nonces.token_id(NONCE, leaf) != nonces.token_id(nonces.issue(KEYS, AUDIENCE, now=MADE), leaf)


class TestReplicaKeys:
    def test_a_tag_for_one_use_means_nothing_in_another(self) -> None:
        assert KEYS.recognise(KEYS.tag("one", b"x"), "one", b"x")
        assert not KEYS.recognise(KEYS.tag("one", b"x"), "two", b"x")

    def test_parts_cannot_be_moved_into_one_another(self) -> None:
        assert KEYS.tag("a", b"bc", b"d") != KEYS.tag("a", b"b", b"cd") != KEYS.tag("ab", b"c", b"d")

    def test_a_generated_file_is_read_back(self) -> None:
        made = replica.generate()
        assert replica.parse(made + replica.generate()).keys[0] == replica.parse(made).keys[0]

    def test_secrets_are_not_shown(self) -> None:
        assert "k" * 8 not in repr(KEYS)
        assert (b"k" * 32).hex() not in repr(KEYS)

    @pytest.mark.parametrize(
        "data", [b"", b"00" * 31, b"00" * 33, b"AA" * 32, b"zz" * 32, b"00" * 32 + b" x", (b"00" * 32 + b"\n") * 9]
    )
    def test_refuses_a_file_that_is_none(self, data: bytes) -> None:
        with pytest.raises(Misuse) as caught:
            replica.parse(data)
        assert caught.value.slug == "BAD_REPLICA_KEY"
