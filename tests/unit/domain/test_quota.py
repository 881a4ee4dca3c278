"""Running calls are counted by uid and in all, and every slot comes back."""

from __future__ import annotations

import contextlib

import pytest

from cgpu_agent.domain.quota import Budget, InFlight
from cgpu_agent.errors import Exhausted


def test_uid_at_its_limit_does_not_stop_another() -> None:
    in_flight = InFlight(2, 10)
    with in_flight.hold(1), in_flight.hold(1):
        with pytest.raises(Exhausted) as caught, in_flight.hold(1):
            pass
        assert caught.value.slug == "TOO_MANY_CALLS"
        assert caught.value.retry_after
        with in_flight.hold(2):
            assert in_flight.running == 3


def test_limit_of_all_holds_for_everybody() -> None:
    in_flight = InFlight(2, 2)
    with in_flight.hold(1), in_flight.hold(2), pytest.raises(Exhausted), in_flight.hold(3):
        pass
    with in_flight.hold(3):
        assert in_flight.running == 1


def test_slot_comes_back_however_the_call_ends() -> None:
    in_flight = InFlight(1, 1)
    for error in (ValueError, KeyboardInterrupt):
        with contextlib.suppress(error), in_flight.hold(1):
            raise error
    with in_flight.hold(1):
        assert in_flight.running == 1
    assert in_flight.running == 0


def test_uids_that_have_nothing_running_leave_nothing_behind() -> None:
    in_flight = InFlight(2, 5)
    for uid in range(1000):
        with in_flight.hold(uid):
            pass
    assert in_flight._by_uid == {}


def test_a_budget_is_each_uids_own_and_comes_back() -> None:
    budget = Budget(10, "DEVICE_MEMORY", "too much")
    budget.take(1, 7)
    with pytest.raises(Exhausted) as raised:
        budget.take(1, 4)
    assert raised.value.slug == "DEVICE_MEMORY"
    budget.take(1, 3)
    budget.take(2, 10)
    budget.give(1, 7)
    budget.take(1, 7)
    for uid in (1, 2):
        budget.give(uid, 10)
    assert not budget._taken
