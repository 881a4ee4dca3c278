"""How cgpuctl speaks: aligned text for people, JSON for programs, one place for colour and exit codes."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterable, Sequence

from cgpu_agent.errors import AgentError
from cgpu_agent.verifier.verdict import Step

EXIT_PASS = 0
EXIT_REFUSED = 1
EXIT_USAGE = 2

_COLOURS = {"pass": "32", "refuse": "31", "skip": "33", "ok": "32", "warn": "33", "fail": "31"}


def use_escapes() -> None:
    """Let a character that stdout's encoding lacks come out as an escape, and not as a crash."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """Text from outside, fit for a terminal: control characters are shown as escapes, never sent."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def coloured(text: str, kind: str) -> str:
    """``text`` in the colour of an outcome, on a terminal that wants colour (https://no-color.org)."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ or kind not in _COLOURS:
        return text
    return f"\x1b[{_COLOURS[kind]}m{text}\x1b[0m"


def say(text: str = "") -> None:
    """One line on stdout."""
    print(text)


def emit_json(value: object, *, indent: int | None = 2) -> None:
    """One JSON document on stdout, in ASCII and without control characters (JSON itself lets DEL pass).

    Without ``indent`` it is one line.
    """
    print(json.dumps(value, indent=indent, sort_keys=True).replace("\x7f", "\\u007f"))


def pairs(rows: Iterable[tuple[str, str]], indent: str = "  ") -> None:
    """Label and value in two columns; values are made printable."""
    rows = list(rows)
    width = max((len(label) for label, _ in rows), default=0)
    for label, value in rows:
        say(f"{indent}{label.ljust(width)}  {printable(value)}")


def steps(found: Sequence[Step]) -> None:
    """A verdict's steps, one line each."""
    width = max((len(step.id) for step in found), default=0)
    for step in found:
        outcome = step.outcome.value
        reason = f" [{step.slug}]" if step.slug else ""
        line = f"{step.number:>3}  {step.id.ljust(width)}  {printable(step.detail)}{reason}"
        say(f"  {coloured(outcome.ljust(6), outcome)} {line}")


def progress(text: str) -> None:
    """How far a long command is, on stderr."""
    print(f"cgpuctl: {printable(text)}", file=sys.stderr, flush=True)


def complain(error: AgentError) -> None:
    """What went wrong, on stderr."""
    print(f"cgpuctl: {printable(str(error))}", file=sys.stderr)
