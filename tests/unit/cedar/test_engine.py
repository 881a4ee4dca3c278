"""A policy is loaded whole or refused with its place, and only a clean answer of Cedar allows."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from cgpu_agent.cedar.engine import Decision, Entity, Policies, problems
from cgpu_agent.cedar.files import agent_schema, default_policy
from cgpu_agent.errors import Misuse

SCHEMA = """
namespace T {
  entity Team;
  entity User in [Team] = { "name": String, "age": Long, "tags": Set<String>, "inner": { "on": Bool } };
  entity Doc = { "size": Long };
  action read, write appliesTo { principal: [User], resource: [Doc], context: { "calm": Bool, "level": Long } };
}
"""
READ = '@id("read") permit(principal is T::User, action == T::Action::"read", resource) when { context.calm };'
DOC = Entity("T::Doc", "d", {"size": 1})
CALM = {"calm": True, "level": 1}


def user(**attrs: Any) -> Entity:
    whole = {"name": "n", "age": 30, "tags": ("x",), "inner": {"on": True}}
    return Entity("T::User", "u", {**whole, **attrs})


def load(text: str) -> Policies:
    return Policies.load(text, SCHEMA, "the policy")


def decide(text: str, principal: Entity | None = None, action: str = "read", **context: Any) -> Decision:
    return load(text).decide(principal=principal or user(), action=action, resource=DOC, context={**CALM, **context})


def refusal(text: str) -> str:
    with pytest.raises(Misuse) as caught:
        load(text)
    assert caught.value.slug == "BAD_POLICY"
    return caught.value.message


def test_a_permit_that_holds_allows_and_is_named() -> None:
    assert decide(READ) == Decision(True, ("read",), "allowed by policy read")


def test_what_nothing_permits_is_denied() -> None:
    for decision in (decide(READ, calm=False), decide(READ, action="write"), decide("")):
        assert decision == Decision(False, (), "no policy allows this")


def test_a_forbid_beats_a_permit_and_is_named() -> None:
    text = READ + '@id("old") forbid(principal, action, resource) when { principal.age > 20 };'
    assert decide(text) == Decision(False, ("old",), "forbidden by policy old")
    assert decide(text, user(age=20)).allowed


def test_policies_that_agree_are_named_in_the_order_of_the_text() -> None:
    names = [f"p{number}" for number in (3, 10, 1, 2)]
    text = "".join(f'@id("{name}") permit(principal, action, resource);' for name in names)
    assert decide(text).policy_ids == tuple(names) == load(text).ids


def test_parents_count() -> None:
    text = '@id("team") permit(principal in T::Team::"red", action, resource);'
    member = Entity("T::User", "u", user().attrs, (("T::Team", "red"),))
    assert decide(text, member).allowed
    assert not decide(text).allowed


@pytest.mark.parametrize("tags", [("x", "y"), ["x", "y"], {"x", "y"}, frozenset({"x", "y"})])
def test_every_collection_is_a_set(tags: object) -> None:
    assert decide(
        '@id("a") permit(principal, action, resource) when { principal.tags == ["y", "x"] };', user(tags=tags)
    ).allowed


def test_digest_is_of_the_exact_text() -> None:
    assert load(READ).digest == hashlib.sha256(READ.encode()).hexdigest()
    assert load(READ + " ").digest != load(READ).digest


ALL = '@id("all") permit(principal, action, resource);'


@pytest.mark.parametrize(
    "attrs",
    [
        {"age": 30.0},
        {"age": float("nan")},
        {"age": True},
        {"age": "30"},
        {"age": None},
        {"age": 1 << 63},
        {"age": 10**5000},
        {"name": b"n"},
        {"name": None},
        {"name": "\ud800"},
        {"name": {"__entity": {"type": "T::Team", "id": "red"}}},
        {"name": {"__extn": {"fn": "ip", "arg": "10.0.0.1"}}},
        {"tags": ("x", 1)},
        {"tags": "x"},
        {"inner": {}},
        {"inner": {"on": True, "off": False}},
        {"inner": {1: True}},
        {"surplus": 1},
    ],
)
def test_a_principal_that_is_not_wholly_what_the_schema_says_is_denied(attrs: dict[str, Any]) -> None:
    assert decide(ALL).allowed
    decision = decide(ALL, user(**attrs))
    assert decision == Decision(False, (), "a policy could not be evaluated")
    assert decision.log_detail


def test_a_missing_attribute_denies() -> None:
    attrs = dict(user().attrs)
    del attrs["age"]
    assert not decide(ALL, Entity("T::User", "u", attrs)).allowed


@pytest.mark.parametrize("context", [{"calm": None}, {"calm": 1}, {"level": 1.5}, {"more": True}, {"calm": "true"}])
def test_a_context_that_is_not_wholly_what_the_schema_says_denies(context: dict[str, Any]) -> None:
    assert decide(ALL, **context) == Decision(False, (), "a policy could not be evaluated")


def test_an_incomplete_context_denies() -> None:
    for context in ({}, {"calm": True}):
        assert not load(ALL).decide(principal=user(), action="read", resource=DOC, context=context).allowed


def test_a_circular_record_denies() -> None:
    record: dict[str, Any] = {}
    record["calm"] = record
    assert not load(ALL).decide(principal=user(), action="read", resource=DOC, context=record).allowed


@pytest.mark.parametrize("kind", ["T::Nobody", "User", "T::Doc", "", "T::User\n"])
def test_a_principal_of_another_type_is_denied(kind: str) -> None:
    assert not decide(ALL, Entity(kind, "u", user().attrs)).allowed


@pytest.mark.parametrize("action", ["", "delete", 'read"', 'T::Action::"read"', "READ"])
def test_an_unknown_action_is_denied(action: str) -> None:
    assert not decide(ALL, action=action).allowed


def test_a_principal_that_is_the_resource_too_is_denied() -> None:
    both = Entity("T::Doc", "d", {"size": 2})
    assert not load(ALL).decide(principal=both, action="read", resource=DOC, context=CALM).allowed


@pytest.mark.parametrize(
    "name", ['a"b', "a\\", "a\nb", "\0", "T::User::", 'u") || (true', "\u202e", "x" * 10_000, ""]
)
def test_an_entity_id_is_never_parsed(name: str) -> None:
    text = '@id("one") permit(principal == T::User::"u", action, resource);'
    assert not decide(text, Entity("T::User", name, user().attrs)).allowed
    assert decide(ALL, Entity("T::User", name, user().attrs)).allowed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (READ + "\n\n" + READ, "line 3, policy read: its @id is taken by the policy of line 1"),
        ("permit(principal, action, resource);", 'line 1, policy #1: has no @id("name")'),
        ('\n@id("x") permit(principal, action);', "line 2, policy x: "),
        ('@id("x") allow(principal, action, resource);', "line 1, policy x: "),
        (
            '@id("x") permit(principal, action, resource) when { principal.nmae == "n" };',
            "policy x: attribute `nmae`",
        ),
        ('@id("x") permit(principal, action, resource) when { principal.age == "n" };', "line 1, policy x: "),
        ('@id("x") permit(principal, action, resource) when { principal.age };', "line 1, policy x: "),
        ('@id("x") permit(principal is T::Usr, action, resource);', "policy x: unrecognized entity type `T::Usr`"),
        (
            '@id("x") permit(principal, action == T::Action::"raed", resource);',
            "line 1, policy x: unrecognized action",
        ),
        ('@id("x") permit(principal is T::Doc, action, resource);', "line 1, policy x: "),
        ('@id("x") permit(principal, action, resource) when { principal.tags == [] };', "line 1, policy x: "),
        ('@id("x") @id("y") permit(principal, action, resource);', "line 1, policy x: duplicate"),
        ('@id("x") permit(principal == ?principal, action, resource);', "line 1: ?principal: templates"),
    ],
)
def test_a_bad_policy_is_refused_with_id_and_line(text: str, said: str) -> None:
    message = refusal(text)
    assert message.startswith("the policy: line")
    assert said in message


def test_all_problems_of_a_kind_are_found_at_once() -> None:
    wrong = "".join(
        f'@id("p{n}")\npermit(principal, action, resource) when {{ principal.no{n} }};\n' for n in range(5)
    )
    found = problems(wrong, SCHEMA)
    assert [(problem.policy, problem.line) for problem in found] == [(f"p{n}", 1 + 2 * n) for n in range(5)]
    assert "(and 4 more)" in refusal(wrong)
    assert problems(READ, SCHEMA) == ()


def test_what_is_said_of_a_policy_is_one_bounded_line() -> None:
    message = refusal(f'@id("x") permit(principal, action, resource) when {{ principal.{"a" * 50_000} }};')
    assert len(message) < 500
    assert "\n" not in message


def test_a_schema_that_is_not_one_is_not_the_policys_fault() -> None:
    with pytest.raises(Misuse) as caught:
        Policies.load(READ, "entity", "x")
    assert caught.value.slug == "BAD_SCHEMA"


def test_the_default_policy_is_valid() -> None:
    assert problems(default_policy(), agent_schema()) == ()
