"""So many in a minute, for each uid alone."""

from __future__ import annotations

import pytest

from cgpu_agent.domain import rate
from cgpu_agent.domain.rate import Rate
from cgpu_agent.errors import Exhausted
from fixtures.gpusessions import MovableClock


def made(clock: MovableClock, per_minute: int = 3) -> Rate:
    return Rate(clock, per_minute, "KEY_LIMIT", "too many")


def test_all_of_a_minute_may_come_at_once_and_then_one_after_the_other() -> None:
    clock = MovableClock()
    limit = made(clock)
    for _ in range(3):
        limit.take(1)
    with pytest.raises(Exhausted) as raised:
        limit.take(1)
    assert raised.value.slug == "KEY_LIMIT"
    assert raised.value.retry_after == pytest.approx(20.0)
    clock.pass_by(19.9)
    with pytest.raises(Exhausted):
        limit.take(1)
    clock.pass_by(0.2)
    limit.take(1)


def test_one_uid_takes_nothing_from_another() -> None:
    limit = made(MovableClock(), 1)
    limit.take(1)
    limit.take(2)


def test_memory_is_bounded_and_who_asks_most_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate, "MAX_UIDS", 4)
    limit = made(MovableClock(), 1)
    limit.take(0)
    for uid in range(1, 20):
        with pytest.raises(Exhausted):
            limit.take(0)
        limit.take(uid)
    assert len(limit._buckets) <= 4


def test_a_price_that_is_known_afterwards_is_paid_before_the_next() -> None:
    clock = MovableClock()
    limit = made(clock, 30)
    limit.require(1, 0.0)
    limit.spend(1, 40.0)
    with pytest.raises(Exhausted) as raised:
        limit.require(1, 0.0)
    assert raised.value.retry_after == pytest.approx(20.0)
    limit.require(2, 0.0)
    clock.pass_by(20.1)
    limit.require(1, 0.0)
