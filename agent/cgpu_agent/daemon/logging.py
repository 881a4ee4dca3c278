"""Structured lines on stderr, where journald adds time and unit: one line an event, whatever its values hold."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import structlog

_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
_PLAIN = re.compile(r"[!#-<>-\[\]-~]+")
"""Printable ASCII but for the space and what gives a line its structure: quotes, equals signs, backslashes."""


def _quoted(value: object) -> str:
    """A value as logfmt: bare where nothing in it could be read as anything else, else as a JSON string in ASCII."""
    text = "" if value is None else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def render(_logger: object, method: str, event: Mapping[str, Any]) -> str:
    """``<PRIORITY>event key=value``: the prefix is how stderr lines carry a priority (sd-daemon(3)).

    Args:
        event: ``event`` is text of the program's own, and so are the keys; values may be anybody's.
    """
    words = [f"<{_PRIORITIES.get(method, 6)}>{event.get('event', '')}"]
    words += [f"{key}={_quoted(value)}" for key, value in event.items() if key != "event"]
    return " ".join(words)


class _OneLine(logging.Handler):
    """Lines of libraries: their text may repeat what a stranger sent, so it is a value, and tracebacks stay out."""

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, object] = {"logger": record.name, "text": record.getMessage()}
        if record.exc_info and record.exc_info[0] is not None:
            fields["error"] = record.exc_info[0].__name__
        structlog.get_logger().log(record.levelno, "library", **fields)


def configure(level: str, stream: TextIO | None = None) -> None:
    """Set up logging for the process.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``.
        stream: where lines go; stderr by default.
    """
    structlog.configure(
        processors=[render],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(stream or sys.stderr),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[_OneLine()], level=logging.WARNING, force=True)
    # grpc logs unhandled exceptions of handlers with their text; the gate reports those itself.
    logging.getLogger("grpc").setLevel(logging.CRITICAL)
