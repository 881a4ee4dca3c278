"""cgpu-agent(8) tells every event that the agent writes to the journal, with its fields: alerts are built on them."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from cgpu_agent.daemon.logging import render

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "man" / "cgpu-agent.8"
SOURCES = ROOT / "agent" / "cgpu_agent"
LEVELS = {"debug", "info", "warning", "error", "critical"}


def fields_of(call: ast.Call, function: ast.AST) -> set[str]:
    """Names of the fields; of ``**fields`` those that the function puts there."""
    names = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
    if len(names) < len(call.keywords):
        for node in ast.walk(function):
            keys = node.keys if isinstance(node, ast.Dict) else []
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                keys = [node.slice]
            names |= {key.value for key in keys if isinstance(key, ast.Constant)}
    return names


@cache
def written() -> dict[str, set[str]]:
    """Fields by event, from the calls of structlog in the agent's floors."""
    found: dict[str, set[str]] = {}
    for folder in ("daemon", "rpc", "domain", "backends"):
        for path in (SOURCES / folder).rglob("*.py"):
            for function in ast.walk(ast.parse(path.read_text())):
                if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    continue
                for call in ast.walk(function):
                    made = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
                    if made and call.func.attr in LEVELS and ast.unparse(call.func.value) == "log":
                        event = ast.literal_eval(call.args[0])
                        found.setdefault(event, set()).update(fields_of(call, function))
    return found


def told() -> dict[str, set[str]]:
    section = re.split(r"^\.SH ", PAGE.read_text(), flags=re.MULTILINE)
    (journal,) = [part for part in section if part.startswith("JOURNAL\n")]
    entries = re.findall(r"^\.TP\n\.B (.+)\n(?:\.I (.+)\n)?", journal, flags=re.MULTILINE)
    return {event: set(fields.split()) for event, fields in entries}


def test_events_are_found_in_the_source() -> None:
    assert len(written()) > 15
    assert written()["call refused"] == {"method", "reason", "uid", "pid", "unit", "cause"}


def test_every_event_is_told_with_its_fields() -> None:
    assert told() == written() | {"library": {"logger", "text", "error"}}


@pytest.mark.parametrize("event", sorted(written()))
def test_an_event_is_words_that_cannot_be_taken_for_a_field(event: str) -> None:
    assert re.fullmatch(r"[A-Za-z][A-Za-z ,]*", event)
    assert all(re.fullmatch(r"[a-z_]+", field) for field in written()[event])
    assert render(None, "info", {"event": event, "reason": "A_B"}) == f"<6>{event} reason=A_B"
