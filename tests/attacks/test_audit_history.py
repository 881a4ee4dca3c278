"""Attack 20: the audit log is rewritten between two quotes; whoever kept a bundle sees it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from cgpu_agent.cli.main import main
from cgpu_agent.domain.audit import AuditLog
from cgpu_agent.wire.audit import AuditHead
from cgpu_agent.wire.manifest import AuditAnchor
from fixtures.bundles import made


class StoppedClock:
    def monotonic(self) -> float:
        return 0.0

    def time(self) -> float:
        return 1.0


class Agent:
    """An agent's audit log, and the bundles a relying party keeps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = AuditLog(folder / "state", "00000000-0000-0000-0000-000000000001", StoppedClock())
        self.path = folder / "state" / "audit.jsonl"

    def decides(self, number: int) -> None:
        asyncio.run(self.log.record("call", {"n": number}))

    def quotes(self, name: str) -> str:
        path = self.folder / name
        path.write_bytes(made(manifest_with={"audit": AuditAnchor(self.log.head, self.log.quoted)}))
        self.log.quoted = self.log.head
        return str(path)


@pytest.fixture
def agent(tmp_path: Path) -> Agent:
    return Agent(tmp_path)


def verdict(agent: Agent, capsys: pytest.CaptureFixture[str], *bundles: str) -> tuple[int, str | None]:
    since = [word for bundle in bundles for word in ("--since", bundle)]
    code = main(["audit", "verify", str(agent.path), *since, "--json"])
    document = json.loads(capsys.readouterr().out)
    return code, document.get("reason", {}).get("slug")


def test_a_log_that_only_grew_is_whole(agent: Agent, capsys: pytest.CaptureFixture[str]) -> None:
    empty = agent.quotes("0.json")
    agent.decides(1)
    first = agent.quotes("1.json")
    agent.decides(2)
    second = agent.quotes("2.json")
    agent.decides(3)
    assert verdict(agent, capsys, empty, first, second) == (0, None)


def test_a_tail_rewritten_after_a_quote_is_seen(agent: Agent, capsys: pytest.CaptureFixture[str]) -> None:
    agent.decides(1)
    before = agent.path.read_bytes()
    agent.decides(2)
    bundle = agent.quotes("bundle.json")
    agent.path.write_bytes(before)
    fork = AuditLog(agent.path.parent, "00000000-0000-0000-0000-000000000001", StoppedClock())
    asyncio.run(fork.record("call", {"n": 9}))
    assert verdict(agent, capsys) == (0, None)  # in itself the forged log is flawless
    assert verdict(agent, capsys, bundle) == (1, "AUDIT_FORKED")


def test_an_old_log_put_back_is_seen(agent: Agent, capsys: pytest.CaptureFixture[str]) -> None:
    agent.decides(1)
    before = agent.path.read_bytes()
    agent.decides(2)
    bundle = agent.quotes("bundle.json")
    agent.path.write_bytes(before)
    assert verdict(agent, capsys, bundle) == (1, "AUDIT_SHORT")


def test_the_head_quoted_before_is_held_against_the_log_too(agent: Agent, capsys: pytest.CaptureFixture[str]) -> None:
    agent.decides(1)
    agent.log.quoted = AuditHead(0, bytes(32))  # what a manifest said that this relying party never saw
    agent.decides(2)
    bundle = agent.quotes("bundle.json")
    assert verdict(agent, capsys, bundle) == (1, "AUDIT_FORKED")


@pytest.mark.parametrize("damage", ["altered", "dropped", "torn"])
def test_a_damaged_log_is_refused_in_itself(agent: Agent, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    for number in range(3):
        agent.decides(number)
    first, second, third = agent.path.read_bytes().splitlines(keepends=True)
    agent.path.write_bytes(
        {
            "altered": first + second.replace(b'"n":1', b'"n":7') + third,
            "dropped": first + third,
            "torn": first + second + third[:-2],
        }[damage]
    )
    code, slug = verdict(agent, capsys)
    assert code == 1
    assert slug in ("AUDIT_BROKEN", "AUDIT_TORN")
