"""``cgpuctl policy``: what is wrong with a policy, and what it means for a caller."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from cgpu_agent.cedar import engine
from cgpu_agent.cedar.files import APPRAISAL_SCHEMA, agent_schema, default_policy
from cgpu_agent.cedar.text import MAX_BYTES, Problem
from cgpu_agent.cli import output
from cgpu_agent.cli.inputs import read_file
from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.policy import OF_KEYS, Action, Decision, Facts, Key, Policy
from cgpu_agent.domain.policy_lint import lint
from cgpu_agent.errors import Misuse

_CONTAINER = "0" * 63 + "1"
Row = tuple[str, Action, Decision]


def run(arguments: argparse.Namespace) -> int:
    return _check(arguments) if arguments.verb == "check" else _explain(arguments)


def _text(path: Path) -> str:
    try:
        return read_file(path, MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise Misuse("BAD_POLICY", f"{path}: is not UTF-8 text") from None


def _schema(kind: str) -> str:
    if kind == "agent":
        return agent_schema()
    try:
        return APPRAISAL_SCHEMA.read_text(encoding="utf-8")
    except OSError:
        raise Misuse("NO_SCHEMA", "this version knows no policies of verifiers") from None


def _check(arguments: argparse.Namespace) -> int:
    text = _text(arguments.file)
    errors = engine.problems(text, _schema(arguments.kind))
    risks: tuple[Problem, ...] = () if errors or arguments.kind != "agent" else lint(text)
    found = [("error", problem) for problem in errors] + [("risk", problem) for problem in risks]
    if arguments.json:
        output.emit_json(
            [{"kind": kind, "line": p.line, "message": p.message, "policy": p.policy} for kind, p in found]
        )
    else:
        for kind, problem in found:
            output.say(f"{output.coloured(kind, 'fail')}: {output.printable(f'{arguments.file}: {problem}')}")
        if not found:
            output.say(f"{output.coloured('ok', 'ok')}: {output.printable(str(arguments.file))}")
    return output.EXIT_REFUSED if found else output.EXIT_PASS


def _explain(arguments: argparse.Namespace) -> int:
    path: Path | None = arguments.policy
    what = "the default policy" if path is None else str(path)
    policy = Policy.load(default_policy() if path is None else _text(path), what)
    facts = Facts(state="serving", endorsed=True, boot_log=True, gpus=arguments.gpus)
    key = None if arguments.key is None else Key(arguments.key, arguments.broker, arguments.key_group)
    rows = [
        (who, action, policy.decide(caller, action, facts, key if action in OF_KEYS else None))
        for who, caller in _callers(arguments)
        for action in Action
        if key is not None or action not in OF_KEYS
    ]
    if arguments.json:
        output.emit_json({"decisions": [_document(row) for row in rows], "policy_digest": policy.digest})
    else:
        _table(what, rows, arguments.gpus)
    return output.EXIT_PASS


def _document(row: Row) -> dict[str, object]:
    who, action, decision = row
    return {
        "action": action.value,
        "allowed": decision.allowed,
        "caller": who,
        "policies": list(decision.policy_ids),
        "reason": decision.reason,
    }


def _table(what: str, rows: list[Row], gpus: str) -> None:
    output.say(
        f"By {output.printable(what)}, while the agent serves with a certified AK and a boot log, GPUs {gpus}:"
    )
    width = max(len(action.value) for action in Action)
    last = ""
    for who, action, decision in rows:
        if who != last:
            output.say(f"\n{output.printable(who)}")
            last = who
        answer = "allow" if decision.allowed else "deny"
        mark = output.coloured(answer.ljust(5), "pass" if decision.allowed else "refuse")
        output.say(f"  {action.value.ljust(width)}  {mark}  {', '.join(decision.policy_ids) or decision.reason}")


def _callers(arguments: argparse.Namespace) -> Iterator[tuple[str, Caller]]:
    """The caller of the command line; a few typical ones where nothing is said of it."""
    uid, unit, container, groups = arguments.uid, arguments.unit, arguments.container, arguments.groups
    if (uid, unit, container, groups) == (None, None, None, None):
        yield "uid 1000 in no unit", _caller(1000)
        yield "uid 1000 in example.service", _caller(1000, unit="example.service")
        yield "uid 0 on the host", _caller(0)
        yield "uid 0 in a container", _caller(0, container=_CONTAINER)
        weak = Caller(1000, 1000, (), 1, None, None, None, None, "pid")
        yield "uid 1000 where the kernel hands out no pidfds (before Linux 6.5)", weak
        return
    uid = 1000 if uid is None else uid
    words = [f"uid {uid}"]
    words += [f"unit {unit}"] if unit else []
    words += [f"container {container}"] if container else []
    words += [f"groups {' '.join(map(str, groups))}"] if groups else []
    yield ", ".join(words), _caller(uid, unit=unit, container=container, groups=tuple(groups or ()))


def _caller(
    uid: int, *, unit: str | None = None, container: str | None = None, groups: tuple[int, ...] = ()
) -> Caller:
    if container and not unit:
        unit = f"docker-{container}.scope"  # as systemd's own rule has it
    cgroup = f"/system.slice/{unit}" if unit else "/user.slice"
    return Caller(uid, uid, tuple(sorted(groups)), 1, unit or None, container or None, cgroup, None, "pidfd")
