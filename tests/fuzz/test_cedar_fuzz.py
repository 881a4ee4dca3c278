"""Any text in place of a policy is loaded or refused with our own error; no caller gets more than a permit says."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from cgpu_agent.cedar.engine import Policies, problems
from cgpu_agent.cedar.files import agent_schema, default_policy
from cgpu_agent.cedar.text import Malformed, split
from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.policy import OPEN, Action, Facts, Policy
from cgpu_agent.domain.policy_lint import lint
from cgpu_agent.errors import Misuse

GRANTS = """
@id("unit") permit(principal is CGpu::Workload, action == CGpu::Action::"boot.measure", resource)
when { principal.has_unit && principal.unit == "a.service" && principal.uid == 7 };
@id("not-in-containers") forbid(principal, action, resource == CGpu::Vm::"this") unless { !principal.has_container };
@id("ready") @risk("why") permit(principal, action in [CGpu::Action::"boot.raw_quote"], resource)
when { if context.boot.endorsed then principal.groups.contains(27) else ["x"].contains(context.gpus) };
"""
SEEDS = (default_policy(), GRANTS)
PIECES = [
    *"()[]{};,@\"'\\*?:.<>=!&|+-% \n\r\t\0",
    *(
        "//",
        "::",
        "if ",
        " then ",
        " else ",
        "permit",
        "forbid",
        "when {",
        "unless {",
        " has ",
        " like ",
        " in ",
        " is ",
    ),
    *(
        "principal",
        "action",
        "resource",
        "context",
        "?principal",
        '@id("x")',
        "true",
        "9223372036854775808",
        "\ud800",
    ),
    *('ip("1")', 'decimal("1.0")', ".contains(", "CGpu::Action::", "\u2028", "\u0085", "\u00e9", "__cedar"),
]


@st.composite
def mutated(draw: st.DrawFn) -> str:
    text = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 40)))
        piece = draw(st.sampled_from(PIECES) | st.just(text[start:end]))
        text = text[:start] + piece * draw(st.sampled_from([0, 1, 1, 2, 50])) + text[end:]
    return text


def taken_or_refused(text: str) -> None:
    found = problems(text, agent_schema())
    try:
        policies = Policies.load(text, agent_schema(), "text")
    except Misuse as error:
        assert error.slug == "BAD_POLICY"  # noqa: PT017 - either outcome is good
        assert found
        return
    assert not found
    assert len(set(policies.ids)) == len(policies.ids) == len(split(text))
    lint(text)


@given(mutated())
def test_a_mutated_policy_is_taken_or_refused(text: str) -> None:
    taken_or_refused(text)


@given(st.lists(st.sampled_from(PIECES), max_size=60).map("".join))
def test_any_heap_of_words_is_taken_or_refused(text: str) -> None:
    taken_or_refused(text)


@given(mutated())
def test_what_is_split_is_what_was_written(text: str) -> None:
    try:
        sources = split(text)
    except Malformed:
        return
    position = 0
    for source in sources:
        position = text.index(source.text, position) + len(source.text)
        assert source.line == text.count("\n", 0, position - len(source.text)) + 1


IDS = st.integers(0, 0xFFFFFFFF) | st.sampled_from([0, 7, 27])
CALLERS = st.builds(
    Caller,
    uid=IDS,
    gid=IDS,
    groups=st.none() | st.lists(IDS, max_size=3).map(tuple),
    pid=st.integers(1, 1 << 22),
    unit=st.none() | st.text(max_size=12) | st.just("a.service"),
    container=st.none() | st.text(max_size=12) | st.just("0" * 64),
    cgroup=st.none() | st.text(max_size=12),
    exe_at_identify=st.none(),
    identity_strength=st.sampled_from(["pidfd", "pid"]),
)
FACTS = st.builds(
    Facts, state=st.text(max_size=8), endorsed=st.booleans(), boot_log=st.booleans(), gpus=st.text(max_size=3)
)
DEFAULT, GRANTED, NOTHING = Policy.default(), Policy.load(GRANTS, "grants"), Policy.load("", "nothing")


@given(CALLERS, st.sampled_from(Action), FACTS)
def test_nobody_gets_what_no_permit_gives(caller: Caller, action: Action, facts: Facts) -> None:
    assert not NOTHING.decide(caller, action, facts).allowed
    assert DEFAULT.decide(caller, action, facts).allowed == (action in OPEN and not _surrogates(caller, facts))


@given(CALLERS, st.sampled_from(Action), FACTS)
def test_a_permit_holds_for_exactly_whom_it_names(caller: Caller, action: Action, facts: Facts) -> None:
    named = action is Action.MEASURE and caller.unit == "a.service" and caller.uid == 7
    raw = action is Action.RAW_QUOTE and (27 in (caller.groups or ()) if facts.endorsed else facts.gpus == "x")
    wanted = (named or raw) and caller.container is None and not _surrogates(caller, facts)
    decision = GRANTED.decide(caller, action, facts)
    assert decision.allowed == wanted
    assert GRANTED.decide(dataclasses.replace(caller), action, facts) == decision


def _surrogates(caller: Caller, facts: Facts) -> bool:
    """Half a character is not text to Cedar, and whoever is named by it is denied."""
    texts = (caller.unit, caller.container, caller.cgroup, facts.state, facts.gpus)
    return any("\ud800" <= char <= "\udfff" for text in texts if text for char in text)
