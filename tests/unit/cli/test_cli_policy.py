"""``cgpuctl policy`` finds what is wrong with a policy and tells what it means, to people and to programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cgpu_agent.cedar import files
from cgpu_agent.cli.main import main
from cgpu_agent.domain.policy import OF_KEYS, OPEN, Action, Policy

GOOD = """@id("measure")
permit(principal is CGpu::Workload, action == CGpu::Action::"boot.measure", resource)
when { principal.unit == "a.service" && !principal.has_container };
@id("not-now") forbid(principal, action, resource) when { principal.groups.contains(66) };
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.cedar"
    path.write_text(GOOD)
    return path


def test_a_good_policy_passes(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "check", str(policy)]) == 0
    assert capsys.readouterr().out == f"ok: {policy}\n"
    assert main(["policy", "check", "--json", str(policy)]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_the_default_policy_passes() -> None:
    assert main(["policy", "check", str(Path(files.__file__).parent / "default.cedar")]) == 0


def test_every_error_is_told_with_policy_and_line(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy.write_text(GOOD.replace("principal.unit", "principal.unti").replace("groups", "grops"))
    assert main(["policy", "check", str(policy)]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"error: {policy}: line 1, policy measure: attribute `unti`")
    assert second.startswith(f"error: {policy}: line 4, policy not-now: attribute `grops`")
    assert main(["policy", "check", "--json", str(policy)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(entry["kind"], entry["policy"], entry["line"]) for entry in found] == [
        ("error", "measure", 1),
        ("error", "not-now", 4),
    ]


def test_a_risk_is_told_and_fails(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy.write_text(GOOD.replace('principal.unit == "a.service"', "principal.uid == 1234"))
    assert main(["policy", "check", "--json", str(policy)]) == 1
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["kind"], entry["policy"], entry["line"]) == ("risk", "measure", 1)
    assert "uid 1234 alone" in entry["message"]


def test_what_a_policy_holds_does_not_reach_the_terminal_raw(
    policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy.write_text('@id("a") permit(principal, action, resource) when { principal["\x1b[2J"] };')
    assert main(["policy", "check", str(policy)]) == 1
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"\xff", b"//" + b" " * (256 << 10)])
def test_what_is_no_policy_file_is_a_usage_error(policy: Path, content: bytes) -> None:
    policy.write_bytes(content)
    assert main(["policy", "check", str(policy)]) == 2
    assert main(["policy", "explain", "--policy", str(policy)]) == 2
    assert main(["policy", "check", str(policy.with_name("absent"))]) == 2


def test_a_verifiers_policy_has_words_of_its_own(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not files.APPRAISAL_SCHEMA.exists():
        pytest.skip("this version has no policies of verifiers")
    assert main(["policy", "check", "--kind", "verifier", str(policy)]) == 1
    assert "error" in capsys.readouterr().out
    shipped = files.APPRAISAL_SCHEMA.with_name("default-appraisal.cedar")
    assert main(["policy", "check", "--kind", "verifier", str(shipped)]) == 0
    assert main(["policy", "check", "--kind", "agent", str(shipped)]) == 1


def explained(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[tuple[str, str], dict[str, object]]:
    assert main(["policy", "explain", "--json", *arguments]) == 0
    document = json.loads(capsys.readouterr().out)
    return {(entry["caller"], entry["action"]): entry for entry in document["decisions"]}


def test_explains_the_default_policy_for_typical_callers(capsys: pytest.CaptureFixture[str]) -> None:
    found = explained(capsys)
    assert len({caller for caller, _ in found}) >= 4
    for (_, action), entry in found.items():
        assert entry["allowed"] == (action in {open_.value for open_ in OPEN})
        assert entry["policies"] == (["open-to-all"] if entry["allowed"] else [])


def test_explains_who_decides_for_the_caller_that_is_told(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ("--policy", str(policy))

    def measure(*caller: str) -> dict[str, object]:
        (entry,) = [e for (_, action), e in explained(capsys, *file, *caller).items() if action == "boot.measure"]
        return entry

    assert measure("--unit", "a.service")["policies"] == ["measure"]
    assert measure("--unit", "b.service")["reason"] == "no policy allows this"
    assert not measure("--unit", "a.service", "--container", "c0ffee")["allowed"]
    refused = measure("--unit", "a.service", "--groups", "5", "66")
    assert (refused["allowed"], refused["policies"]) == (False, ["not-now"])
    assert measure("--uid", "0")["caller"] == "uid 0"


def test_the_digest_is_the_one_that_evidence_states(capsys: pytest.CaptureFixture[str]) -> None:
    main(["policy", "explain", "--json"])
    assert json.loads(capsys.readouterr().out)["policy_digest"] == Policy.default().digest


def test_people_get_a_table(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "explain", "--policy", str(policy), "--unit", "a.service\x1b[2J"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert main(["policy", "explain", "--policy", str(policy), "--unit", "a.service"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert str(policy) in lines[0]
    assert "uid 1000, unit a.service" in lines
    rows = [line.split() for line in lines if line.startswith("  ")]
    assert ["boot.measure", "allow", "measure"] in rows
    assert {row[0] for row in rows} == {action.value for action in set(Action) - OF_KEYS}


def test_a_bad_policy_is_not_explained(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy.write_text("permit(principal, action, resource);")
    assert main(["policy", "explain", "--policy", str(policy)]) == 2
    assert "BAD_POLICY" in capsys.readouterr().err


@pytest.mark.parametrize("uid", ["-1", "4294967296"])
def test_a_uid_that_no_kernel_gives_out_may_do_nothing(uid: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not any(entry["allowed"] for entry in explained(capsys, "--uid", uid).values())


KEY_RULE = (
    '@id("model") permit(principal is CGpu::Workload, action == CGpu::Action::"key.get", '
    'resource == CGpu::Key::"models/llama") when {{ principal.has_unit && principal.unit == "a.service" && {more} }};'
)


def test_a_key_is_explained_where_it_is_named(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy.write_text(KEY_RULE.format(more='context.gpus == "ready" && resource.broker == "sealed"'))

    def answer(*more: str) -> str:
        arguments = ["policy", "explain", "--policy", str(policy), "--unit", "a.service", "--json", *more]
        assert main(arguments) == 0
        decisions = json.loads(capsys.readouterr().out)["decisions"]
        return next((str(each["allowed"]) for each in decisions if each["action"] == "key.get"), "not told")

    assert answer() == "not told"
    assert answer("--key", "models/llama", "--gpus", "ready") == "True"
    assert answer("--key", "models/llama") == "False"
    assert answer("--key", "models/other", "--gpus", "ready") == "False"
    assert answer("--key", "models/llama", "--gpus", "ready", "--broker", "openbao") == "False"


@pytest.mark.parametrize(
    "condition",
    [
        "principal.uid == 1000",
        'resource.group == "models"',
        'context.gpus == "ready" && !context.gpus_simulated',
        f'principal.has_exe && principal.exe_at_identify == "{"ab" * 32}"',
    ],
)
def test_a_rule_for_a_key_that_names_nobody_in_particular_is_reported(
    policy: Path, capsys: pytest.CaptureFixture[str], condition: str
) -> None:
    rule = '@id("it") permit(principal is CGpu::Workload, action == CGpu::Action::"key.get", resource is CGpu::Key) '
    policy.write_text(rule + f"when {{ {condition} }};")
    assert main(["policy", "check", str(policy)]) == 1
    assert "permits key.get to" in capsys.readouterr().out


def test_a_rule_for_a_key_that_names_a_unit_is_fine(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy.write_text(KEY_RULE.format(more='context.gpus == "ready"'))
    assert main(["policy", "check", str(policy)]) == 0, capsys.readouterr().out
