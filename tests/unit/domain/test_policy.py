"""Few things are open to all; everything else needs a permit that the kernel's facts about the caller satisfy."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from cgpu_agent.cedar.files import agent_schema, default_policy
from cgpu_agent.domain.policy import OF_KEYS, OPEN, Action, Decision, Facts, GpuName, Key, Policy, workload
from cgpu_agent.errors import Misuse
from fixtures.machine import WORKLOAD

CLOSED = [action for action in Action if action not in OPEN]
SERVING = Facts(state="serving", endorsed=True, boot_log=True)
KEY = Key("models/llama", "sealed", "models")


def permit(condition: str, action: Action = Action.MEASURE) -> Policy:
    return Policy.load(
        f'@id("it") permit(principal is CGpu::Workload, action == CGpu::Action::"{action.value}", '
        f'resource == CGpu::Vm::"this") when {{ {condition} }};',
        "test",
    )


def allowed(condition: str, facts: Facts = SERVING, **caller: Any) -> bool:
    return permit(condition).decide(dataclasses.replace(WORKLOAD, **caller), Action.MEASURE, facts).allowed


def test_the_schema_knows_exactly_our_actions() -> None:
    blocks = re.findall(r"action\n(.*?)appliesTo", agent_schema(), re.DOTALL)
    named = [set(re.findall(r'^ +"([^"]+)"', block, re.MULTILINE)) for block in blocks]
    of_keys = {action.value for action in OF_KEYS}
    loads = {Action.KEY_LOAD.value}
    assert named == [{action.value for action in Action} - of_keys, of_keys - loads, loads]


def test_a_principal_has_exactly_the_attributes_of_the_schema() -> None:
    declared = re.search(r"entity Workload = \{(.*?)\};", agent_schema(), re.DOTALL)
    assert declared is not None
    assert set(re.findall(r"^ +(\w+):", declared.group(1), re.MULTILINE)) == set(workload(WORKLOAD).attrs)


EXE = "ab" * 32
BY_EXE = (
    '@id("it") permit(principal is CGpu::Workload, action == CGpu::Action::"boot.measure", resource) '
    f'when {{ principal.unit == "trainer.service" && principal.exe_at_identify == "{EXE}" }};'
)


def test_only_a_policy_that_speaks_of_programs_wants_them_hashed() -> None:
    assert Policy.load(BY_EXE, "my policy").wants_executable
    assert not Policy.default().wants_executable
    in_a_comment = f"// principal.exe_at_identify\n{BY_EXE.split(' when', maxsplit=1)[0]};"
    assert not Policy.load(in_a_comment, "my policy").wants_executable


@pytest.mark.parametrize(("exe", "allowed"), [(EXE, True), ("cd" * 32, False), (None, False)])
def test_a_rule_by_program_holds_for_that_program_only(exe: str | None, allowed: bool) -> None:
    caller = dataclasses.replace(WORKLOAD, unit="trainer.service", exe_at_identify=exe)
    assert Policy.load(BY_EXE, "my policy").decide(caller, Action.MEASURE, SERVING).allowed is allowed


@pytest.mark.parametrize("action", CLOSED)
@pytest.mark.parametrize("uid", [0, 1234])
def test_closed_action_is_denied_by_default_even_to_root(action: Action, uid: int) -> None:
    caller, key = dataclasses.replace(WORKLOAD, uid=uid), KEY if action in OF_KEYS else None
    decision = Policy.default().decide(caller, action, SERVING, key)
    assert decision == Decision(False, (), "no policy allows this")


def test_what_speaks_for_the_vm_or_stays_in_its_log_is_closed() -> None:
    assert {Action.RAW_QUOTE, Action.MEASURE, Action.ACTIVATE_CREDENTIAL} <= set(CLOSED)


@pytest.mark.parametrize("action", sorted(OPEN))
@pytest.mark.parametrize("facts", [Facts(), SERVING])
def test_open_action_is_allowed_to_every_identified_caller(action: Action, facts: Facts) -> None:
    weak = dataclasses.replace(WORKLOAD, unit=None, cgroup=None, groups=None, identity_strength="pid")
    for caller in (WORKLOAD, weak):
        decision = Policy.default().decide(caller, action, facts)
        assert decision == Decision(True, ("open-to-all",), "allowed by policy open-to-all")


def test_the_examples_of_the_default_policy_work_once_uncommented() -> None:
    text = re.sub(r"^// ?(?=@id|permit|when|  principal\.|  context\.|};)", "", default_policy(), flags=re.MULTILINE)
    policy = Policy.load(text, "uncommented")
    enrol = dataclasses.replace(WORKLOAD, unit="enrol.service")
    assert policy.decide(enrol, Action.ACTIVATE_CREDENTIAL, SERVING).policy_ids == ("enrolment",)
    trainer = dataclasses.replace(WORKLOAD, unit="trainer.service")
    assert policy.decide(trainer, Action.MEASURE, SERVING).policy_ids == ("trainer-may-measure",)
    assert not policy.decide(dataclasses.replace(trainer, uid=1), Action.MEASURE, SERVING).allowed
    assert not policy.decide(WORKLOAD, Action.ACTIVATE_CREDENTIAL, SERVING).allowed
    ready = dataclasses.replace(SERVING, gpus="ready")
    assert policy.decide(WORKLOAD, Action.KEY_GET, ready, KEY).policy_ids == ("inference-gets-its-model-key",)
    simulated = dataclasses.replace(ready, gpus_simulated=True)
    for facts, key in ((SERVING, KEY), (simulated, KEY), (ready, Key("models/other", "sealed"))):
        assert not policy.decide(WORKLOAD, Action.KEY_GET, facts, key).allowed
    assert not policy.decide(WORKLOAD, Action.KEY_PLAIN, ready, KEY).allowed


@pytest.mark.parametrize("action", list(Action))
def test_an_action_about_the_wrong_thing_is_denied(action: Action) -> None:
    """A permit for everything is none for a key that nobody named, nor for a machine in place of a key."""
    everything = Policy.load('@id("all") permit(principal, action, resource);', "test")
    assert everything.decide(WORKLOAD, action, SERVING, KEY).allowed is (action in OF_KEYS)
    assert everything.decide(WORKLOAD, action, SERVING).allowed is (action not in OF_KEYS)


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ('resource == CGpu::Key::"models/llama"', True),
        ('resource.broker == "sealed" && resource.group == "models"', True),
        ('resource.group == ""', False),
        ('resource == CGpu::Key::"models"', False),
    ],
)
def test_every_fact_about_a_key_can_be_asked(condition: str, holds: bool) -> None:
    text = (
        '@id("it") permit(principal, action == CGpu::Action::"key.get", resource is CGpu::Key) '
        f"when {{ {condition} }};"
    )
    assert Policy.load(text, "test").decide(WORKLOAD, Action.KEY_GET, SERVING, KEY).allowed is holds


def test_loading_can_be_permitted_for_one_gpu() -> None:
    text = (
        '@id("it") permit(principal, action == CGpu::Action::"key.load", resource is CGpu::Key) '
        'when { context.gpu.uuid == "GPU-1" && context.gpu.ueid == "77" };'
    )
    policy = Policy.load(text, "test")
    for gpu, holds in ((GpuName("GPU-1", "77"), True), (GpuName("GPU-1", "78"), False), (GpuName(), False)):
        key = dataclasses.replace(KEY, gpu=gpu)
        assert policy.decide(WORKLOAD, Action.KEY_LOAD, SERVING, key).allowed is holds
        assert not policy.decide(WORKLOAD, Action.KEY_OPEN, SERVING, key).allowed


def test_a_permit_allows_its_action_and_no_other() -> None:
    policy = permit('principal.unit == "inference.service"')
    assert policy.decide(WORKLOAD, Action.MEASURE, SERVING) == Decision(True, ("it",), "allowed by policy it")
    for action in Action:
        assert policy.decide(WORKLOAD, action, SERVING).allowed == (action is Action.MEASURE)


@pytest.mark.parametrize(
    ("condition", "caller"),
    [
        ("principal.uid == 1234", {}),
        ("principal.gid == 7", {"gid": 7}),
        ("principal.groups.contains(27)", {"groups": (5, 27)}),
        ("principal.groups_known", {"groups": ()}),
        ('principal.has_unit && principal.unit == "inference.service"', {}),
        ('principal.has_container && principal.container == "c0ffee"', {"container": "c0ffee"}),
        ('principal.cgroup like "/system.slice/*"', {}),
        ('principal.identity_strength == "pidfd"', {}),
        ("principal.root", {"uid": 0}),
    ],
)
def test_every_fact_about_a_caller_can_be_asked(condition: str, caller: dict[str, Any]) -> None:
    assert allowed(condition, **caller)


@pytest.mark.parametrize(
    ("condition", "caller"),
    [
        ("principal.uid == 1234", {"uid": 1235}),
        ("principal.groups.contains(27)", {"groups": None}),
        ("principal.groups_known", {"groups": None}),
        ('principal.unit == "inference.service"', {"unit": None}),
        ('principal.unit == "inference"', {}),
        ("principal.has_unit", {"unit": None}),
        ("principal.has_container", {}),
        ("principal.root", {}),
        ("principal.root", {"uid": 0, "container": "0" * 64}),
        ("principal.root", {"uid": 0, "identity_strength": "pid"}),
    ],
)
def test_a_fact_that_is_not_so_or_not_known_does_not_hold(condition: str, caller: dict[str, Any]) -> None:
    assert not allowed(condition, **caller)


@pytest.mark.parametrize(
    ("condition", "facts"),
    [
        ("context.boot.endorsed", {"endorsed": True}),
        ("context.boot.boot_log", {"boot_log": True}),
        ('context.boot.state == "serving"', {"state": "serving"}),
    ],
)
def test_a_fact_about_the_machine_holds_only_once_it_is_known(condition: str, facts: dict[str, Any]) -> None:
    assert allowed(condition, Facts(**facts))
    assert not allowed(condition, Facts())


def test_gpus_are_not_asked() -> None:
    assert allowed('context.gpus == "not-asked"')


def test_a_kept_decision_is_that_of_the_same_question_only() -> None:
    policy = permit('principal.uid == 1234 && context.boot.state == "serving"')
    for _ in range(2):
        assert policy.decide(WORKLOAD, Action.MEASURE, SERVING).allowed
        assert not policy.decide(dataclasses.replace(WORKLOAD, uid=1235), Action.MEASURE, SERVING).allowed
        assert not policy.decide(WORKLOAD, Action.RAW_QUOTE, SERVING).allowed
        assert not policy.decide(WORKLOAD, Action.MEASURE, Facts()).allowed


def test_a_caller_in_very_many_groups_is_decided_alike() -> None:
    assert allowed("principal.groups.contains(70000)", groups=tuple(range(70_001)))


def test_the_digest_is_that_of_the_text() -> None:
    assert Policy.default().digest == Policy.load(default_policy(), "again").digest
    assert Policy.default().digest != Policy.load(default_policy() + "\n", "again").digest


def test_a_bad_policy_is_refused_by_name() -> None:
    with pytest.raises(Misuse, match="my file: line 1, policy it: attribute `uuid`"):
        Policy.load(
            '@id("it") permit(principal is CGpu::Workload, action, resource) when { principal.uuid == 1 };', "my file"
        )
