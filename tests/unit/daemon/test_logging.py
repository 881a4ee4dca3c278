"""One event is one line, and no value can pass for another value, another line or another priority."""

from __future__ import annotations

import io
import json
import logging
import re
import shlex
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from cgpu_agent.daemon.logging import configure, render

FORGERIES = [
    "x\n<0>forged event uid=0",
    "x\r<0>forged",
    'x" uid=0 y="',
    "x uid=0",
    'x\\" uid=0',
    "x\\",
    "\x1b[2K\x1b[1A<6>all is well",
    "x\x00y",
    "x\u2028<0>y",
    "x\x85<0>y",
    "\u202e",
    "",
    "=",
    '"',
]


@pytest.fixture
def journal() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handlers = logging.root.handlers[:]
    level = logging.root.level
    configure("info", stream)
    yield stream
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()


def read(line: str) -> dict[str, str]:
    """Read a line as a log processor does."""
    match = re.fullmatch(r"<(\d)>([^=\"\n]*?)((?: [a-z_]+=(?:[^\s\"=\\]+|\"(?:[^\"\\]|\\.)*\"))*)", line)
    assert match, line
    found = {"priority": match[1], "event": match[2]}
    for key, value in re.findall(r" ([a-z_]+)=([^\s\"=\\]+|\"(?:[^\"\\]|\\.)*\")", match[3]):
        assert key not in found
        found[key] = json.loads(value) if value.startswith('"') else value
    return found


@pytest.mark.parametrize("value", FORGERIES)
def test_value_cannot_forge_anything(journal: io.StringIO, value: str) -> None:
    structlog.get_logger().warning("call refused", method=value, uid=1234)
    (line,) = journal.getvalue().splitlines()
    assert line.isascii()
    assert line.isprintable()
    assert read(line) == {"priority": "4", "event": "call refused", "method": value, "uid": "1234"}


@given(st.text())
def test_any_text_comes_back_from_its_line(value: str) -> None:
    line = render(None, "info", {"event": "e", "a": value, "b": value})
    assert line.isprintable()
    assert line.isascii()
    assert read(line) == {"priority": "6", "event": "e", "a": value, "b": value}


def test_plain_values_stay_bare(journal: io.StringIO) -> None:
    structlog.get_logger().info("ready", version="0.1.0", socket="/run/cgpu-agent/agent.sock", none=None, flag=True)
    assert journal.getvalue() == '<6>ready version=0.1.0 socket=/run/cgpu-agent/agent.sock none="" flag=True\n'


@pytest.mark.parametrize(
    ("method", "priority"), [("debug", 7), ("info", 6), ("warning", 4), ("error", 3), ("critical", 2)]
)
def test_priority_is_that_of_the_call(method: str, priority: int) -> None:
    assert render(None, method, {"event": "e"}) == f"<{priority}>e"


def test_lines_below_the_level_are_not_written(journal: io.StringIO) -> None:
    configure("error", journal)
    structlog.get_logger().warning("quiet")
    structlog.get_logger().error("loud")
    assert journal.getvalue() == "<3>loud\n"


def test_library_that_logs_an_exception_writes_one_line_without_its_text(journal: io.StringIO) -> None:
    try:
        raise ValueError("secret")
    except ValueError:
        logging.getLogger("cgpu_agent.rpc.frontdoor").exception("the front door failed\n<0>forged")
    (line,) = journal.getvalue().splitlines()
    assert "secret" not in line
    assert read(line) == {
        "priority": "3",
        "event": "library",
        "logger": "cgpu_agent.rpc.frontdoor",
        "text": "the front door failed\n<0>forged",
        "error": "ValueError",
    }


def test_grpc_does_not_log_exceptions_of_handlers(journal: io.StringIO) -> None:
    logging.getLogger("grpc._cython.cygrpc").error("Unexpected [ValueError] raised by servicer method")
    assert journal.getvalue() == ""


def test_line_can_be_split_by_a_shell(journal: io.StringIO) -> None:
    structlog.get_logger().info("e", path="/a b")
    assert shlex.split(journal.getvalue()) == ["<6>e", "path=/a b"]
