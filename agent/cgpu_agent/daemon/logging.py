"""Structured lines on stderr, where journald adds time, unit and priority."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog

_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def _priority(_logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    event["_priority"] = _PRIORITIES.get(method, 6)
    return event


class _JournalRenderer:
    """``<PRIORITY>event key=value``: the prefix is how stderr lines carry a priority (sd-daemon(3))."""

    def __init__(self) -> None:
        self._render = structlog.processors.LogfmtRenderer(bool_as_flag=False)

    def __call__(self, logger: object, name: str, event: structlog.typing.EventDict) -> str:
        priority = event.pop("_priority", 6)
        text = event.pop("event", "")
        rest = self._render(logger, name, event)
        return f"<{priority}>{text}{' ' if rest else ''}{rest}"


def configure(level: str, stream: TextIO | None = None) -> None:
    """Set up structlog for the process.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``.
        stream: where lines go; stderr by default.
    """
    structlog.configure(
        processors=[_priority, _JournalRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(stream or sys.stderr),
        cache_logger_on_first_use=False,
    )
    # grpc logs unhandled exceptions of handlers with their text; the gate reports those itself.
    logging.getLogger("grpc").setLevel(logging.CRITICAL)
