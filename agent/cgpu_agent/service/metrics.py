"""A few numbers in Prometheus' text format 0.0.4. Label values are our own words, so their number is bounded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Final

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_COUNTERS: Final[Mapping[str, str]] = {
    "cgpu_verifier_requests_total": "Answered requests.",
    "cgpu_verifier_verdicts_total": "Judged bundles; slug is the reason of a refusal.",
    "cgpu_verifier_verification_seconds_total": "Seconds spent in judging bundles.",
    "cgpu_verifier_enrolments_total": "AK certificates issued, by EK class.",
}


class Metrics:
    """Counters, and gauges read when asked; one event loop's.

    Args:
        gauges: (help, reading) by metric name.
    """

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        self._gauges: Final = gauges
        self._counts: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Add to a counter of ``_COUNTERS``."""
        text = ",".join(f'{key}="{_escaped(labels[key])}"' for key in sorted(labels))
        self._counts[name][f"{{{text}}}" if text else ""] += value

    def render(self) -> str:
        """The exposition."""
        lines: list[str] = []
        for name, what in _COUNTERS.items():
            lines += [f"# HELP {name} {what}", f"# TYPE {name} counter"]
            lines += [f"{name}{labels} {value:g}" for labels, value in sorted(self._counts[name].items())]
        for name, (what, read) in self._gauges.items():
            lines += [f"# HELP {name} {what}", f"# TYPE {name} gauge", f"{name} {read():g}"]
        return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
