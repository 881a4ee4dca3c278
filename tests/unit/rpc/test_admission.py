"""Seats are counted by uid and in all, and given back."""

from __future__ import annotations

from cgpu_agent.rpc.admission import Admission, DoorLimits

LIMITS = DoorLimits(max_connections=3, max_per_uid=2, max_unidentified=1)


def test_a_uid_has_its_own_limit() -> None:
    admission = Admission(LIMITS)
    assert [admission.enter(uid) for uid in (1, 1, 1, 2)] == [True, True, False, True]


def test_the_limit_of_all_holds_for_everybody() -> None:
    admission = Admission(LIMITS)
    assert [admission.enter(uid) for uid in (1, 2, 3, 4)] == [True, True, True, False]
    admission.leave(2)
    assert admission.enter(4)


def test_callers_without_identity_take_no_seat_of_others() -> None:
    admission = Admission(LIMITS)
    assert [admission.enter("unidentified"), admission.enter("unidentified")] == [True, False]
    assert [admission.enter(uid) for uid in (1, 2, 3)] == [True] * 3
    admission.leave("unidentified")
    assert admission.enter("unidentified")


def test_this_process_always_gets_in() -> None:
    admission = Admission(LIMITS)
    assert [admission.enter(uid) for uid in (0, 0, 1)] == [True] * 3
    assert [admission.enter("own") for _ in range(10)] == [True] * 10


def test_a_refused_caller_has_no_seat_to_give_back() -> None:
    admission = Admission(LIMITS)
    for _ in range(5):
        admission.enter(1)
    admission.leave(1)
    admission.leave(1)
    assert [admission.enter(1), admission.enter(1), admission.enter(1)] == [True, True, False]
