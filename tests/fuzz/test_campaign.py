"""A small share of the mutation campaign in every test run; the whole of it is ``make campaign``."""

from __future__ import annotations

from fuzz.campaign import MUTATORS, judge


def test_no_mutant_of_a_bundle_is_accepted() -> None:
    outcomes, wrong = judge(0, 1600, seed=1)
    assert wrong == []
    assert sum(outcomes.values()) == 1600


def test_every_mutator_does_more_than_rewrite_the_same_bundle() -> None:
    outcomes, _ = judge(0, 800, seed=2)
    for make in MUTATORS:
        assert any(key.startswith(f"{make.__name__}: ") and "same bundle" not in key for key in outcomes), make
