"""A verdict is a list of steps in which nothing passes after a refusal, and nothing passes by accident."""

from __future__ import annotations

import json

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.verdict import Check, Outcome, Skip, Step, Steps


def refuse(slug: str = "BAD") -> str:
    raise HostileInput(slug, "it is bad")


def crash(error: BaseException) -> str:
    raise error


class RustPanic(BaseException):
    """Shaped like what a panic in an extension module raises."""


def test_an_empty_list_is_not_accepted() -> None:
    assert not Steps().accepted


def test_a_list_of_skips_is_not_accepted() -> None:
    steps = Steps()
    steps.check("a", "A", lambda: Skip("NOTHING", "nothing to compare"))
    assert not steps.accepted
    assert steps.refusal is None


def test_records_a_pass_a_skip_and_a_refusal_in_order() -> None:
    steps = Steps()
    assert steps.check("a", "A holds", lambda: "yes")
    assert not steps.check("b", "B holds", lambda: Skip("NOTHING", "nothing to compare"))
    assert steps.accepted
    assert not steps.check("c", "C holds", refuse)
    assert not steps.accepted
    assert steps.all == (
        Step(1, "a", "A holds", Outcome.PASS, None, "yes"),
        Step(2, "b", "B holds", Outcome.SKIP, "NOTHING", "nothing to compare"),
        Step(3, "c", "C holds", Outcome.REFUSE, "BAD", "it is bad"),
    )
    assert steps.refusal == steps.all[2]


def test_runs_nothing_after_a_refusal_and_says_why() -> None:
    ran: list[str] = []
    steps = Steps()
    steps.check("first", "", refuse)
    assert not steps.check("second", "", lambda: ran.append("second") or "fine")
    assert not steps.check("third", "", lambda: refuse("WORSE"))
    assert ran == []
    assert [step.outcome for step in steps.all] == [Outcome.REFUSE, Outcome.SKIP, Outcome.SKIP]
    assert steps.all[1].slug == "AFTER_REFUSAL"
    assert "first" in steps.all[1].detail
    assert steps.refusal is not None
    assert steps.refusal.slug == "BAD"


@pytest.mark.parametrize("error", [ValueError("secret"), KeyError("k"), RecursionError(), MemoryError(), RustPanic()])
def test_refuses_on_whatever_a_check_raises_and_hides_its_text(error: BaseException) -> None:
    steps = Steps()
    assert not steps.check("a", "A", lambda: crash(error))
    assert steps.refusal is not None
    assert steps.refusal.slug == "INTERNAL"
    assert "secret" not in json.dumps(steps.to_json())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()])
def test_lets_the_process_be_stopped(error: BaseException) -> None:
    with pytest.raises(type(error)):
        Steps().check("a", "A", lambda: crash(error))


def test_runs_a_plan_over_one_case() -> None:
    checks = (
        Check("a", "A", lambda case: case.append("a") or "went"),
        Check("b", "B", lambda case: refuse() if case == ["a"] else "b"),
        Check("c", "C", lambda case: case.append("c") or "went"),
    )
    steps, case = Steps(), list[str]()
    assert not steps.run(checks, case)
    assert case == ["a"]
    assert [step.id for step in steps.all] == ["a", "b", "c"]


def test_passed_wants_every_run_of_that_step() -> None:
    steps = Steps()
    steps.check("a", "A", lambda: "once")
    assert steps.passed("a")
    assert not steps.passed("b")
    steps.check("a", "A", lambda: Skip("NOTHING", "nothing"))
    assert not steps.passed("a")


def test_includes_other_steps_renumbered_and_refuses_with_them() -> None:
    gpu = [Steps(), Steps()]
    gpu[0].check("chain", "C", refuse)
    gpu[1].check("chain", "C", lambda: "fine")
    whole = Steps()
    whole.check("quote", "Q", lambda: "fine")
    for index, each in enumerate(gpu):
        whole.include(each.all, f"gpu.{index}.")
    assert [(step.number, step.id) for step in whole.all] == [(1, "quote"), (2, "gpu.0.chain"), (3, "gpu.1.chain")]
    assert whole.passed("gpu.1.chain")
    assert not whole.accepted
    assert whole.refusal is not None
    assert whole.refusal.id == "gpu.0.chain"
    assert not whole.check("after", "", lambda: "fine")


def test_json_has_the_same_members_for_every_outcome() -> None:
    steps = Steps()
    steps.check("a", "A", lambda: "yes")
    steps.check("b", "B", refuse)
    found = json.loads(json.dumps(steps.to_json()))
    assert found[0] == {"detail": "yes", "id": "a", "number": 1, "outcome": "pass", "slug": None, "title": "A"}
    assert found[1]["outcome"] == "refuse"
    assert found[0].keys() == found[1].keys()
