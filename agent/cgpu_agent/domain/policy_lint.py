"""What a valid policy should not say without a reason: sensitive permits for callers whom nothing really names.

Found by asking more than by reading: each permit, alone, is put before callers of whom one fact is known, taken from
the policy's own numbers. Whoever may and should not is reported, however the condition is written. What cannot be
asked (patterns, names that do not last, actions not named) is read from the policy's words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Final, get_args

from cgpu_agent.backends.base import BrokerKind
from cgpu_agent.cedar.engine import Policies
from cgpu_agent.cedar.files import agent_schema
from cgpu_agent.cedar.text import Problem, Source
from cgpu_agent.domain.caller import Caller, IdentityStrength
from cgpu_agent.domain.policy import NO_GPU, OF_KEYS, OPEN, Action, Facts, GpuName, Key, Policy

_SENSITIVE: Final = tuple(action for action in Action if action not in OPEN)
_SITUATIONS: Final = tuple(
    Facts(state, endorsed, boot_log, *gpus)
    for state, endorsed, boot_log, gpus in product(
        ("serving", "degraded", "starting", "refusing", "stopping"),
        (True, False),
        (True, False),
        (("ready", False), ("ready", True), ("not-ready", False), ("none", False), ("not-asked", False)),
    )
)
_STRANGER: Final = 4_123_456_789
_ID_MAX: Final = 0xFFFFFFFE
_CONTAINER: Final = "5c" * 32
_UNIT: Final = "any.service"
_MAX_NUMBERS: Final = 64
_MAX_KEYS: Final = 16
_PATTERN: Final = re.compile(r"(?:[^\\]|\\.)*?\*")
_CONTAINER_ID: Final = re.compile(r"[0-9a-f]{64}")
_LOGIN: Final = re.compile(r"user@[0-9]+\.service|session-[^/]+\.scope")


@dataclass(frozen=True, slots=True)
class Probe:
    """A caller of whom little is known, and what it means when a policy is content with that."""

    caller: Caller
    means: str


def lint(text: str) -> tuple[Problem, ...]:
    """What to say about the policies that no ``@risk("why")`` excuses.

    Raises:
        Misuse: ``BAD_POLICY``, when ``text`` is not even valid.
    """
    policies = Policies.load(text, agent_schema(), "the policy")
    return tuple(problem for source in policies.sources for problem in _of_policy(source))


def _of_policy(source: Source) -> Iterator[Problem]:
    alone = Policy.load(source.text, source.name)
    if not _always_answers(alone):
        yield Problem(
            source.name, source.line, "cannot be evaluated for some callers, and then denies them everything"
        )
    excuse = source.annotations.get("risk")
    if excuse is not None and not excuse.strip():
        yield Problem(source.name, source.line, '@risk needs its reason: @risk("why")')
    if source.effect == "permit" and excuse is None:
        for message in dict.fromkeys(_risks(source, alone)):
            yield Problem(source.name, source.line, f'{message} (if that is meant: @risk("why"))')


def _always_answers(alone: Policy) -> bool:
    callers = [_caller(strength) for strength in get_args(IdentityStrength)]
    return not any(
        alone.decide(caller, action, _SITUATIONS[0], key).log_detail
        for caller in callers
        for action in Action
        for key in _resources(action, ())
    )


def _resources(action: Action, words: Iterable[str]) -> list[Key | None]:
    """What an action can be about: for keys, those that a policy's own words may name, by id, group or broker."""
    if action not in OF_KEYS:
        return [None]
    texts = dict.fromkeys(word.strip('"') for word in words if word.startswith('"'))
    brokers = [broker for broker in get_args(BrokerKind) if broker in texts] or ["sealed"]
    named = list(texts)[:_MAX_KEYS]
    gpus = [NO_GPU, *(GpuName(text, text) for text in named)] if action is Action.KEY_LOAD else [NO_GPU]
    return [Key(text, broker, text, gpu) for text in [*named, "any/key"] for broker in brokers for gpu in gpus]


def _risks(source: Source, alone: Policy) -> Iterator[str]:
    unbounded = ("action", ",") in zip(source.words, source.words[1:], strict=False)
    escapes = any("\\" in word for word in source.words)  # an action's name may be written in them
    actions = [action for action in _SENSITIVE if unbounded or escapes or f'"{action.value}"' in source.words]
    if not actions:
        return
    if unbounded:
        yield "names no action, so that it permits those of later versions, too"
    yield from _read(source)
    yield from _asked(source, alone, actions)


def _read(source: Source) -> Iterator[str]:
    for before, word in zip(source.words, source.words[1:], strict=False):
        if not word.startswith('"'):
            continue
        if before == "like" and _PATTERN.match(word):
            yield "goes by a pattern, which a name made later can fit"
        if _CONTAINER_ID.search(word) and "exe_at_identify" not in source.words:
            yield "goes by a container id, and there is another one at each start"
        if _LOGIN.search(word):
            yield "goes by the unit of a login, in which its user runs anything"


def _asked(source: Source, alone: Policy, actions: list[Action]) -> Iterator[str]:
    situations = _SITUATIONS if "context" in source.words else _SITUATIONS[:1]

    def allowed(caller: Caller, action: Action) -> bool:
        return any(
            alone.decide(caller, action, facts, key).allowed
            for facts in situations
            for key in _resources(action, source.words)
        )

    told: set[int] = set()
    for probe in _probes(source):
        if probe.caller.uid in told:
            continue
        found = [action.value for action in actions if allowed(probe.caller, action)]
        if not found:
            continue
        yield f"permits {', '.join(found)} to {probe.means}"
        told.add(probe.caller.uid)
        if _STRANGER == probe.caller.uid == probe.caller.gid and not probe.caller.groups:
            return  # what it says of single callers is no news any more


def _probes(source: Source) -> Iterator[Probe]:
    """Callers known by one fact, the least known ones first."""
    strengths = get_args(IdentityStrength)
    for strength in strengths:
        yield Probe(_caller(strength), "everybody")
    yield Probe(_caller("pidfd", unit=_UNIT), "every unit")
    yield Probe(_caller("pidfd", container=_CONTAINER), "every container")
    root = "uid 0 alone, which is root in containers, too (principal.root is not)"
    yield Probe(_caller("pidfd", uid=0, container=_CONTAINER), root)
    yield Probe(_caller("pid", uid=0), root)
    digests = [word.strip('"') for word in source.words if _CONTAINER_ID.fullmatch(word.strip('"'))]
    for digest in dict.fromkeys([*digests[:_MAX_NUMBERS], _CONTAINER]):
        means = "a program by its digest alone, whoever runs it and whatever it is told to do"
        yield Probe(_caller("pidfd", uid=_STRANGER - 1, exe=digest), means)
    numbers = {int(word) for word in source.words if word.isdecimal() and len(word) <= len(str(_ID_MAX))}
    for number in sorted(number for number in numbers if number <= _ID_MAX)[:_MAX_NUMBERS]:
        for strength in strengths:
            if number:  # 0 without a container is root itself
                yield Probe(_caller(strength, uid=number), f"uid {number} alone, whatever it runs")
            yield Probe(_caller(strength, gid=number), f"gid {number} alone, whatever it runs")
            yield Probe(_caller(strength, groups=(number,)), f"members of group {number}, whatever they run")
        yield Probe(_caller("pidfd", uid=number, unit=_UNIT), f"uid {number} in every unit")
        yield Probe(_caller("pidfd", uid=number, container=_CONTAINER), f"uid {number} in every container")


def _caller(
    strength: IdentityStrength,
    *,
    uid: int = _STRANGER,
    gid: int = _STRANGER,
    groups: tuple[int, ...] = (),
    unit: str | None = None,
    container: str | None = None,
    exe: str | None = None,
) -> Caller:
    cgroup = None if strength == "pid" else f"/system.slice/{unit or 'any.scope'}"
    return Caller(uid, gid, groups, 1, unit, container, cgroup, exe, strength)
