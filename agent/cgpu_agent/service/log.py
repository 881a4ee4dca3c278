"""Structured lines on stderr: one line an event, whatever its values hold."""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import Final

_PLAIN: Final = re.compile(r"[!#-<>-\[\]-~]+")
"""Printable ASCII but for the space and what gives a line its structure: quotes, equals signs, backslashes."""

_PRIORITIES: Final = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}

_log = logging.getLogger("cgpu_agent.service")


class _Line(logging.Formatter):
    """``<PRIORITY>event key=value``: the prefix is how stderr lines carry a priority (sd-daemon(3)).

    What libraries log may repeat what a stranger sent, so it is a value; tracebacks stay out.
    """

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = dict(getattr(record, "fields", {}))
        name = record.getMessage()
        if not record.name.startswith("cgpu_agent."):
            name, fields = "library", {"logger": record.name, "text": name}
        if record.exc_info and record.exc_info[0] is not None:
            fields["error"] = record.exc_info[0].__name__
        words = [f"<{_PRIORITIES.get(record.levelno, 6)}>{name}"]
        return " ".join(words + [f"{key}={_quoted(value)}" for key, value in fields.items()])


def _quoted(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def event(name: str, level: int = logging.INFO, **fields: object) -> None:
    """Log an event; ``name`` is a text of ours, values may be anybody's."""
    _log.log(level, name, extra={"fields": fields})


def configure(level: str) -> None:
    """Set up logging for the process: ``debug``, ``info``, ``warning`` or ``error``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Its lines at "info" are ours already, or are one for each request.
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger().level))
