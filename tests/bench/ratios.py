"""What a benchmark yields: pairs of medians measured in turns, and the table they are told in."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Pair:
    """One thing of ours beside what it is compared with; both measured in this run, in turns.

    Attributes:
        ours, theirs: medians over the rounds, in ``unit``.
        ratio: median of the rounds' own ratios ours/theirs, so that a slow moment of the machine weighs on both.
        goal: what the ratio should be, e.g. ``<= 1.3``; empty where nothing is promised.
    """

    title: str
    against: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    goal: str = ""

    @classmethod
    def of(
        cls, title: str, against: str, unit: str, ours: Sequence[float], theirs: Sequence[float], goal: str = ""
    ) -> Pair:
        """From as many numbers on both sides, one of each side for every round."""
        ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
        middle = statistics.median
        return cls(title, against, unit, middle(ours), middle(theirs), middle(ratios), goal)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; ``None`` without one."""
        if not self.goal:
            return None
        sign, bound = self.goal.split()
        return self.ratio <= float(bound) if sign == "<=" else self.ratio >= float(bound)

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "met": self.met}


def per_second(work: Callable[[], object], seconds: float) -> float:
    """How often ``work`` can be done in a second."""
    count, begun = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < seconds:
        work()
        count += 1
    return count / elapsed


def seconds_each(work: Callable[[], object], times: int) -> float:
    """Median time of one ``work``."""
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def show(pairs: Sequence[Pair]) -> None:
    """The table: ratios first, with the two numbers behind each."""
    width = max(len(pair.title) for pair in pairs)
    print(f"{'':{width}}   ratio  goal        ours         against")
    for pair in pairs:
        goal = pair.goal + {True: " met", False: " MISSED", None: ""}[pair.met]
        print(
            f"{pair.title:{width}}  {pair.ratio:6.2f}  {goal:13}{_number(pair.ours, pair.unit):>10}  "
            f"{_number(pair.theirs, pair.unit):>10} {pair.against}"
        )


def _number(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"
    if unit == "B":
        return f"{value / 2**20:.1f} MiB" if value >= 2**20 else f"{value / 2**10:.1f} KiB"
    return f"{value:.0f} {unit}" if value >= 10 else f"{value:.2f} {unit}"
