"""A few numbers for Prometheus. Label values are our own words, so their number is bounded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Final

from cgpu_agent.wire.metrics import Family, exposition

_COUNTERS: Final[Mapping[str, str]] = {
    "cgpu_verifier_requests_total": "Answered requests.",
    "cgpu_verifier_verdicts_total": "Judged bundles; slug is the reason of a refusal.",
    "cgpu_verifier_verification_seconds_total": "Seconds spent in judging bundles.",
    "cgpu_verifier_enrolments_total": "AK certificates issued, by EK class.",
}

_Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counters, and gauges read when asked; one event loop's.

    Args:
        gauges: (help, reading) by metric name.
    """

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        self._gauges: Final = gauges
        self._counts: defaultdict[str, defaultdict[_Labels, float]] = defaultdict(lambda: defaultdict(float))

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Add to a counter of ``_COUNTERS``."""
        self._counts[name][tuple(sorted(labels.items()))] += value

    def render(self) -> str:
        """The exposition."""
        families = [
            Family(name, "counter", what, [(dict(key), value) for key, value in sorted(self._counts[name].items())])
            for name, what in _COUNTERS.items()
        ]
        families += [Family(name, "gauge", what, [({}, read())]) for name, (what, read) in self._gauges.items()]
        return exposition(families)
