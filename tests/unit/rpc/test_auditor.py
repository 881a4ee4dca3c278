"""Who is let to speak as this VM is on record before it happens, and how it ended after."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cgpu_agent.domain.audit import AuditLog
from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.policy import OF_KEYS, OPEN, Action, Decision
from cgpu_agent.errors import Unavailable
from cgpu_agent.rpc.auditor import WEIGHTY, Auditor
from cgpu_agent.rpc.methods import ACTIONS, BY_KEY, OPERATOR
from cgpu_agent.wire.audit import EMPTY, AuditRecord, follow

CALLER = Caller(1000, 1000, (), 7, "trainer.service", None, "/system.slice/trainer.service", None, "pidfd")
ALLOWED = Decision(True, ("let-the-trainer",), "allowed by policy let-the-trainer")
RAW = next(method for method, action in ACTIONS.items() if action is Action.RAW_QUOTE)
QUOTE = next(method for method, action in ACTIONS.items() if action is Action.QUOTE)


class StoppedClock:
    def monotonic(self) -> float:
        return 0.0

    def time(self) -> float:
        return 1.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


def opened(folder: Path) -> AuditLog:
    return AuditLog(folder, "00000000-0000-0000-0000-000000000001", StoppedClock())


def on_record(folder: Path) -> list[AuditRecord]:
    path = folder / "audit.jsonl"
    return follow(path.read_bytes(), EMPTY)[0] if path.exists() else []


def test_every_action_that_is_denied_by_default_is_weighty() -> None:
    assert {ACTIONS[method] for method in WEIGHTY - BY_KEY - OPERATOR} == set(Action) - OPEN - OF_KEYS
    assert BY_KEY | OPERATOR <= WEIGHTY


def test_a_weighty_call_is_on_record_before_it_is_served_and_its_end_after(folder: Path) -> None:
    async def scenario() -> None:
        auditor = Auditor(opened(folder))
        ended = await auditor.begins(CALLER, RAW, ALLOWED)
        (begun,) = on_record(folder)
        assert (begun.event, begun.data["method"], begun.data["policies"]) == ("call", RAW, ["let-the-trainer"])
        assert begun.data["caller"] == CALLER.claims()
        assert ended is not None
        ended("OK")
        assert len(on_record(folder)) == 1  # it waits for nothing
        await auditor.settle()
        assert (on_record(folder)[1].event, on_record(folder)[1].data) == ("call-ended", {"code": "OK", "of": 0})

    asyncio.run(scenario())


def test_an_open_call_needs_no_record(folder: Path) -> None:
    assert asyncio.run(Auditor(opened(folder)).begins(CALLER, QUOTE, ALLOWED)) is None
    assert asyncio.run(Auditor(None).begins(CALLER, QUOTE, ALLOWED)) is None
    assert on_record(folder) == []


def test_a_weighty_call_is_refused_where_no_record_can_be_made(folder: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        asyncio.run(Auditor(None).begins(CALLER, RAW, ALLOWED))
    assert caught.value.slug == "AUDIT_UNAVAILABLE"
    log = opened(folder)
    (folder / "audit.jsonl").mkdir()  # nothing can be appended to that
    with pytest.raises(Unavailable) as caught:
        asyncio.run(Auditor(log).begins(CALLER, RAW, ALLOWED))
    assert caught.value.slug == "AUDIT_UNAVAILABLE"


def test_made_up_method_names_of_refused_calls_stay_out_of_the_log(folder: Path) -> None:
    log = opened(folder)
    auditor = Auditor(log)
    auditor.denied(CALLER, RAW, "NOT_ALLOWED")
    auditor.denied(CALLER, "/made/up", "NOT_ALLOWED")
    auditor.denied(None, RAW, "CALLER_UNKNOWN")
    asyncio.run(log.flush_denials(now=True))
    assert [(r.data["uid"], r.data["method"]) for r in on_record(folder)] == [(1000, RAW), (1000, ""), (-1, RAW)]
