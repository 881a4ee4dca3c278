"""Ways to get from a policy more than it says: each is refused, and none ends the process."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from cgpu_agent.cedar.engine import Entity, Policies
from cgpu_agent.cedar.files import agent_schema
from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.policy import Action, Facts, Policy, workload
from cgpu_agent.errors import Misuse
from fixtures.machine import WORKLOAD

ALL = '@id("all") permit(principal, action, resource);\n'
SERVING = Facts(state="serving", endorsed=True, boot_log=True)


def decide(text: str, caller: Caller = WORKLOAD, action: Action = Action.RAW_QUOTE) -> Any:
    return Policy.load(text, "test").decide(caller, action, SERVING)


@pytest.mark.parametrize(
    "condition",
    [
        "principal.uid * 9223372036854775807 > 5",
        "context.boot.endorsed && principal.uid + 9223372036854775807 > 5",
        'CGpu::Workload::"not-there".uid == 1',
        'resource == CGpu::Vm::"this" && CGpu::Workload::"not-there".root',
    ],
)
def test_a_forbid_that_fails_denies_instead_of_being_skipped(condition: str) -> None:
    assert decide(ALL).allowed
    decision = decide(f'{ALL}@id("guard") forbid(principal, action, resource) when {{ {condition} }};')
    assert not decision.allowed
    assert decision.reason == "a policy could not be evaluated"


def test_a_guard_on_a_fact_that_nobody_collected_does_not_vanish() -> None:
    policies = Policies.load(ALL, agent_schema(), "test")
    principal, vm = workload(WORKLOAD), Entity("CGpu::Vm", "this", {})
    whole = SERVING.context()
    assert policies.decide(principal=principal, action="boot.pcrs", resource=vm, context=whole).allowed
    lacking = [
        {},
        {"gpus": "not-asked"},
        {"boot": whole["boot"]},
        *({**whole, "boot": {k: v for k, v in whole["boot"].items() if k != name}} for name in whole["boot"]),
    ]
    for context in lacking:
        assert not policies.decide(principal=principal, action="boot.pcrs", resource=vm, context=context).allowed
    for name in principal.attrs:
        attrs = {key: value for key, value in principal.attrs.items() if key != name}
        stripped = dataclasses.replace(principal, attrs=attrs)
        assert not policies.decide(principal=stripped, action="boot.pcrs", resource=vm, context=whole).allowed


def test_a_policy_cannot_rest_on_a_fact_that_the_schema_does_not_promise() -> None:
    for condition in ("context.gpu.trusted", 'principal.image == ""', "!context.simulated"):
        with pytest.raises(Misuse):
            decide(f'{ALL}@id("guard") forbid(principal, action, resource) when {{ {condition} }};')


HOSTILE = [
    'x.service"',
    'x.service" || true || "',
    "x.service\\",
    "x\\x2dservice",
    "x.service\n",
    "x.service\0",
    '"); permit(principal, action, resource); //',
    "\u202ex.service",
    "\u0430.service",
    "*",
    "x.service*",
    "",
    "\ud800",
    "x" * 4096,
    '{"__entity": {"type": "CGpu::Vm", "id": "this"}}',
]
BY_UNIT = (
    '@id("unit") permit(principal, action, resource) when { principal.has_unit && principal.unit == "a.service" };'
)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("field", ["unit", "container", "cgroup"])
def test_a_hostile_name_is_only_ever_a_text(field: str, name: str) -> None:
    caller = dataclasses.replace(WORKLOAD, **{"unit": "b.service", field: name})
    assert not decide(BY_UNIT, caller).allowed


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "\ud800"])
def test_a_hostile_name_denies_nobody_what_is_open(name: str) -> None:
    assert decide(ALL, dataclasses.replace(WORKLOAD, unit=name)).allowed


def test_callers_are_entities_by_digest_not_by_name() -> None:
    entity = workload(dataclasses.replace(WORKLOAD, unit='a" || true'))
    assert entity.id == dataclasses.replace(WORKLOAD, unit='a" || true').digest().hex()


@pytest.mark.parametrize("number", [1234.0, True, -1, 1 << 32, 1 << 63, "1234", None, float("nan")])
@pytest.mark.parametrize("field", ["uid", "gid"])
def test_an_id_that_no_kernel_gives_out_is_denied_everything(field: str, number: object) -> None:
    policy = Policy.load(ALL, "test")
    assert policy.decide(dataclasses.replace(WORKLOAD, uid=1, gid=1), Action.PCRS, SERVING).allowed
    assert policy.decide(WORKLOAD, Action.PCRS, SERVING).allowed  # kept: 1234.0 must not be found as 1234
    assert not policy.decide(dataclasses.replace(WORKLOAD, **{field: number}), Action.PCRS, SERVING).allowed


@pytest.mark.parametrize("groups", [(1.0,), (-1,), (True,), ("27",), (1 << 32,)])
def test_a_group_that_no_kernel_gives_out_is_denied_everything(groups: tuple[Any, ...]) -> None:
    assert not decide(ALL, dataclasses.replace(WORKLOAD, groups=groups)).allowed


def test_a_containers_root_is_not_root() -> None:
    text = '@id("root") permit(principal, action, resource) when { principal.root };'
    host = dataclasses.replace(WORKLOAD, uid=0, gid=0)
    assert decide(text, host).allowed
    assert not decide(text, dataclasses.replace(host, container="0" * 64)).allowed
    assert not decide(text, dataclasses.replace(host, identity_strength="pid", unit=None, cgroup=None)).allowed
    assert not decide(text).allowed


def test_a_name_that_a_tenant_made_below_its_own_cgroup_is_no_unit() -> None:
    """What the front door leaves of ``/system.slice/docker-<id>.scope/a.service``: the container, and no unit."""
    tenant = dataclasses.replace(
        WORKLOAD, unit="docker-" + "0" * 64 + ".scope", container="0" * 64, cgroup="/system.slice/docker-x.scope"
    )
    assert not decide(BY_UNIT, tenant).allowed
    assert not decide(BY_UNIT, dataclasses.replace(tenant, unit=None)).allowed
    assert decide(BY_UNIT, dataclasses.replace(WORKLOAD, unit="a.service")).allowed


def test_without_a_pidfd_no_rule_by_name_holds() -> None:
    weak = dataclasses.replace(WORKLOAD, unit=None, container=None, cgroup=None, identity_strength="pid")
    for condition in ('principal.unit == "a.service"', "principal.has_unit", "principal.has_container"):
        text = f'@id("a") permit(principal, action, resource) when {{ {condition} }};'
        assert not decide(text, weak).allowed


def test_a_second_policy_of_the_same_id_cannot_hide() -> None:
    with pytest.raises(Misuse, match="is taken by the policy of line 1"):
        Policy.load(ALL + ALL, "test")


def test_a_forbid_that_is_a_template_is_refused_instead_of_lying_idle() -> None:
    with pytest.raises(Misuse, match="templates"):
        Policy.load(ALL + '@id("t") forbid(principal == ?principal, action, resource);', "test")


HEAD = '@id("a") permit(principal is CGpu::Workload, action, resource) when { '
DEEP = {
    "parentheses": HEAD + "(" * 10_000 + "true" + ")" * 10_000 + " };",
    "sets": HEAD + "[" * 10_000 + "1" + "]" * 10_000 + " == [1] };",
    "records": HEAD + "{a: " * 10_000 + "1" + "}" * 10_000 + " == {a: 1} };",
    "open brackets": HEAD + "(" * 200_000,
    "if in then": HEAD + "if true then " * 5_000 + "true" + " else true" * 5_000 + " };",
    "if in else": HEAD + "if true then true else " * 5_000 + "true };",
    "attributes": HEAD + "principal" + ".a" * 100_000 + " == 1 };",
    "has": HEAD + "principal has a" + ".a" * 100_000 + " };",
    "calls": HEAD + "principal" + ".contains(1)" * 20_000 + " };",
    "products": HEAD + "1" + " * 1" * 50_000 + " == 1 };",
    "alternatives": HEAD + "principal.root" + " || principal.root" * 10_000 + " };",
    "most attributes": HEAD + "principal" + ".a" * 2_000 + " == 1 };",
    "most alternatives": HEAD + "principal.root" + " || principal.root" * 1_000 + " };",
    "most products": HEAD + "1" + " * 1" * 2_000 + " == 1 };",
    "most brackets": HEAD + "(" * 30 + "true" + ")" * 30 + " };",
    "most ifs": HEAD + "if true then " * 30 + "true" + " else true" * 30 + " };",
    "both": HEAD + ("true" + " && true" * 50 + " && (") * 30 + "true" + ")" * 30 + " };",
    "negations": HEAD + "!" * 4_000 + "true };",
    "path": HEAD + "A" + "::A" * 2_000 + '::"x" == principal };',
}
SURVIVE = """
import sys, threading
from cgpu_agent.cedar.engine import Policies
from cgpu_agent.cedar.files import agent_schema
from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.policy import Action, Facts, Policy
from cgpu_agent.domain.policy_lint import lint
from cgpu_agent.errors import Misuse

def go(text):
    try:
        Policy.load(text, "test").decide(Caller(1, 1, (), 1, None, None, None, None, "pid"), Action.MEASURE, Facts())
        lint(text)
    except Misuse as error:
        assert error.slug == "BAD_POLICY"
    done.append(text)

done = []
texts = sys.stdin.read().split("\\0")
threading.stack_size(1 << 20)  # an eighth of what Linux gives by default
for text in texts:
    thread = threading.Thread(target=go, args=(text,))
    thread.start()
    thread.join()
assert done == texts
"""


def test_no_nesting_and_no_chain_ends_the_process() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", SURVIVE], input="\0".join(DEEP.values()), capture_output=True, text=True, timeout=300
    )
    assert (answer.returncode, answer.stderr) == (0, "")


def test_the_child_would_tell_if_it_died() -> None:
    """The guard is what saves it: Cedar itself does not survive the same text."""
    program = "import cedarpy, sys; cedarpy.PolicySet.from_str(sys.stdin.read())"
    answer = subprocess.run(
        [sys.executable, "-c", program], input=DEEP["parentheses"], capture_output=True, text=True, timeout=300
    )
    assert answer.returncode < 0
