"""Few things are open to all; everything else needs a grant that the kernel's facts about the caller satisfy."""

from __future__ import annotations

import dataclasses

import pytest
from cgpu_agent.domain.policy import OPEN, Action, Decision, Grant, Policy
from fixtures.machine import WORKLOAD

CLOSED = [action for action in Action if action not in OPEN]


@pytest.mark.parametrize("action", CLOSED)
def test_closed_action_is_denied_by_default(action: Action) -> None:
    assert Policy().decide(WORKLOAD, action) == Decision(False, "default-deny")


def test_what_speaks_for_the_vm_or_stays_in_its_log_is_closed() -> None:
    assert {Action.RAW_QUOTE, Action.MEASURE, Action.ACTIVATE_CREDENTIAL} <= set(CLOSED)


@pytest.mark.parametrize("action", sorted(OPEN))
def test_open_action_is_allowed(action: Action) -> None:
    assert Policy().decide(WORKLOAD, action) == Decision(True, "open")


@pytest.mark.parametrize(
    "grant", [{"uid": 1234}, {"unit": "inference.service"}, {"uid": 1234, "unit": "inference.service"}]
)
def test_grant_that_matches_allows_its_action_and_no_other(grant: dict[str, object]) -> None:
    policy = Policy([Grant(Action.MEASURE, **grant)])  # type: ignore[arg-type]
    assert policy.decide(WORKLOAD, Action.MEASURE) == Decision(True, "grant[0]")
    assert not policy.decide(WORKLOAD, Action.RAW_QUOTE).allowed


@pytest.mark.parametrize(
    "grant",
    [
        {"uid": 1235},
        {"uid": 0},
        {"unit": "inference"},
        {"unit": "other.service"},
        {"uid": 1234, "unit": "other.service"},
        {"uid": 1235, "unit": "inference.service"},
        {},
    ],
)
def test_grant_to_somebody_else_does_not_hold(grant: dict[str, object]) -> None:
    policy = Policy([Grant(Action.MEASURE, **grant)])  # type: ignore[arg-type]
    assert policy.decide(WORKLOAD, Action.MEASURE) == Decision(False, "default-deny")


def test_caller_without_a_unit_matches_no_grant_by_unit() -> None:
    caller = dataclasses.replace(WORKLOAD, unit=None)
    assert not Policy([Grant(Action.MEASURE, unit="inference.service")]).decide(caller, Action.MEASURE).allowed
    assert not Policy([Grant(Action.MEASURE)]).decide(caller, Action.MEASURE).allowed


def test_decision_names_the_grant_that_made_it() -> None:
    grants = [Grant(Action.RAW_QUOTE, uid=1), Grant(Action.RAW_QUOTE, uid=1234)]
    assert Policy(grants).decide(WORKLOAD, Action.RAW_QUOTE).rule == "grant[1]"
