"""A permit that names nobody in particular is reported, however it is written; one with a reason is not."""

from __future__ import annotations

import pytest

from cgpu_agent.cedar.files import default_policy
from cgpu_agent.domain.policy_lint import lint
from cgpu_agent.errors import Misuse

CONTAINER = "0123456789abcdef" * 4


def said(condition: str, *, head: str = '@id("it")', action: str = 'action == CGpu::Action::"boot.measure"') -> str:
    text = f"{head} permit(principal is CGpu::Workload, {action}, resource) when {{ {condition} }};"
    return "\n".join(map(str, lint(text)))


def test_a_permit_to_load_into_one_gpu_is_seen_for_what_it_is() -> None:
    load = 'action == CGpu::Action::"key.load"'
    assert "permits key.load to everybody" in said('context.gpu.uuid == "GPU-1"', action=load)
    assert said('context.gpu.uuid == "GPU-1" && principal.unit == "trainer.service"', action=load) == ""


@pytest.mark.parametrize(
    "condition",
    [
        'principal.unit == "trainer.service"',
        'principal.has_unit && principal.unit == "trainer.service" && principal.uid == 1234',
        '["a.service", "b.service"].contains(principal.unit)',
        "principal.root",
        'principal.root && principal.cgroup == "/system.slice/cron.service"',
        'principal.unit == "a.service" && context.boot.endorsed && context.boot.state == "serving"',
        'principal.unit like "a.service"',
        "false",
    ],
)
def test_a_caller_that_is_named_is_fine(condition: str) -> None:
    assert said(condition) == ""


@pytest.mark.parametrize(
    ("condition", "found"),
    [
        ("true", "to everybody"),
        ('principal.unit != "a.service"', "to everybody"),
        ('principal.identity_strength == "pidfd"', "to everybody"),
        ("principal.uid > 999", "to everybody"),
        ("context.boot.endorsed", "to everybody"),
        ('context.boot.state == "refusing"', "to everybody"),
        ("principal.has_unit", "to every unit"),
        ("principal.has_container", "to every container"),
        ("principal.uid == 1234", "to uid 1234 alone"),
        ("[7, 1234].contains(principal.uid)", "to uid 1234 alone"),
        ("principal.uid > 1233 && principal.uid <= 1234", "to uid 1234 alone"),
        ("principal.uid == 1234 && !context.boot.endorsed", "to uid 1234 alone"),
        ('principal.uid == 1234 || principal.unit == "a.service"', "to uid 1234 alone"),
        ("if principal.has_container then false else principal.uid == 1234", "to uid 1234 alone"),
        ("principal.uid == 1234 && principal.has_unit", "to uid 1234 in every unit"),
        ("principal.uid == 1234 && principal.has_container", "to uid 1234 in every container"),
        (f'principal.exe_at_identify == "{"ab" * 32}"', "to a program by its digest alone"),
        ("principal.has_exe && !principal.has_unit", "to a program by its digest alone"),
        ("principal.gid == 27", "to gid 27 alone"),
        ("principal.groups.contains(27)", "to members of group 27"),
        ("principal.uid == 0", "to uid 0 alone, which is root in containers"),
        ("principal.uid == 0 && principal.has_container", "to uid 0 alone, which is root in containers"),
        ('principal.uid == 0 && principal.identity_strength == "pid"', "to uid 0 alone"),
        ('principal.unit like "worker@*.service"', "goes by a pattern"),
        ('principal.uid == 1 && principal.cgroup like "/a/*"', "goes by a pattern"),
        (f'principal.container == "{CONTAINER}"', "goes by a container id"),
        (f'principal.unit == "docker-{CONTAINER}.scope"', "goes by a container id"),
        ('principal.unit == "user@1000.service"', "goes by the unit of a login"),
        ('principal.unit == "session-3.scope"', "goes by the unit of a login"),
    ],
)
def test_a_caller_that_is_not_named_is_reported(condition: str, found: str) -> None:
    answer = said(condition)
    assert found in answer
    assert answer.startswith("line 1, policy it: ")
    assert said(condition, head='@id("it") @risk("only one program runs here")') == ""


def test_an_excuse_needs_its_reason() -> None:
    for annotation in ("@risk", '@risk("")', '@risk(" ")'):
        assert "needs its reason" in said("true", head=f'@id("it") {annotation}')


def test_a_permit_without_an_action_is_reported() -> None:
    assert "names no action" in said('principal.unit == "a.service"', action="action")


def test_open_actions_may_be_given_to_anybody() -> None:
    assert (
        said("principal.uid == 1234", action='action in [CGpu::Action::"boot.pcrs", CGpu::Action::"boot.quote"]')
        == ""
    )
    assert lint(default_policy()) == ()


def test_an_action_cannot_hide_in_escapes_or_a_list() -> None:
    for action in ('action == CGpu::Action::"boot\\u{2e}measure"', 'action in [CGpu::Action::"boot.measure"]'):
        assert "to uid 1234 alone" in said("principal.uid == 1234", action=action)


def test_a_forbid_is_nobodys_risk() -> None:
    assert lint('@id("it") forbid(principal, action, resource) when { principal.uid == 1234 };') == ()


def test_a_policy_that_cannot_be_evaluated_is_reported_whatever_it_says() -> None:
    condition = "principal.uid * 9223372036854775807 > 1"
    text = f'@id("it") @risk("x") forbid(principal is CGpu::Workload, action, resource) when {{ {condition} }};'
    assert "cannot be evaluated" in "\n".join(map(str, lint(text)))


def test_each_policy_is_judged_alone_and_with_its_line() -> None:
    good = '@id("a") forbid(principal, action, resource);\n'
    bad = '@id("b")\npermit(principal, action == CGpu::Action::"boot.measure", resource);'
    (problem,) = lint(good + bad)
    assert (problem.policy, problem.line) == ("b", 2)


def test_what_is_not_valid_is_not_judged() -> None:
    with pytest.raises(Misuse):
        lint("permit(principal, action, resource);")
