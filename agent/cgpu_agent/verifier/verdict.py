"""A verification as a list of named steps, so that a verdict can say which check refused, and which never ran.

A check is a function that returns a sentence when it passes, returns ``Skip`` when there was nothing to compare with,
and raises when it refuses. The first refusal ends it: every later step is on record, as skipped. Whatever a check
raises is a refusal: an ``AgentError`` with its own slug, anything else as ``INTERNAL``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Generic, TypeVar

from cgpu_agent.errors import AgentError

C = TypeVar("C")


class Outcome(str, Enum):
    """What a step came to; the values are part of the verdict's JSON."""

    PASS = "pass"  # noqa: S105 - an outcome, not a password
    REFUSE = "refuse"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Skip:
    """Returned by a check that was given nothing to compare with. A skipped step proves nothing.

    Attributes:
        slug: stable reason (``NO_NONCE``), for policies to test.
        reason: one sentence, safe to show.
    """

    slug: str
    reason: str


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a verdict.

    Attributes:
        number: position in its list, from 1; says the order, not the identity.
        id: stable name, dotted from the general to the particular (``quote.nonce``).
        title: what the step asks, as a claim that holds when it passes.
        outcome: pass, refuse or skip.
        slug: stable reason of a refusal or a skip (``AFTER_REFUSAL`` when an earlier step refused), else ``None``.
        detail: one sentence, safe to show.
    """

    number: int
    id: str
    title: str
    outcome: Outcome
    slug: str | None
    detail: str

    def to_json(self) -> dict[str, object]:
        """The step as the verdict's JSON has it."""
        return {
            "detail": self.detail,
            "id": self.id,
            "number": self.number,
            "outcome": self.outcome.value,
            "slug": self.slug,
            "title": self.title,
        }


@dataclass(frozen=True, slots=True)
class Check(Generic[C]):
    """A step before it ran: ``judge`` gets the case and returns the passing detail, or ``Skip``, or raises."""

    id: str
    title: str
    judge: Callable[[C], str | Skip]


class Steps:
    """Records steps in order; after a refusal nothing passes any more.

    Independent evidence (one GPU and the next) gets a recorder each, so that one refusal hides nothing of the other;
    ``include`` then brings their steps into the recorder of the whole.
    """

    __slots__ = ("_refusal", "_steps")

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._refusal: Step | None = None

    @property
    def all(self) -> tuple[Step, ...]:
        """Every step so far."""
        return tuple(self._steps)

    @property
    def refusal(self) -> Step | None:
        """The first step that refused."""
        return self._refusal

    @property
    def accepted(self) -> bool:
        """Whether something passed and nothing refused. An empty list is not accepted.

        Steps that were skipped for want of input do not count against it: whoever needs them asks for ``passed``.
        """
        return self._refusal is None and any(step.outcome is Outcome.PASS for step in self._steps)

    def passed(self, step_id: str) -> bool:
        """Whether the step ran and passed, every time where it ran more than once."""
        found = [step for step in self._steps if step.id == step_id]
        return bool(found) and all(step.outcome is Outcome.PASS for step in found)

    def check(self, step_id: str, title: str, judge: Callable[[], str | Skip]) -> bool:
        """Run one check, unless an earlier one refused, and record it. Returns whether it passed."""
        outcome, slug, detail = self._judge(judge)
        self._add(Step(len(self._steps) + 1, step_id, title, outcome, slug, detail))
        return outcome is Outcome.PASS

    def run(self, checks: Sequence[Check[C]], case: C) -> bool:
        """Run checks in order over one case. Returns ``accepted``."""
        for check in checks:
            self.check(check.id, check.title, partial(check.judge, case))
        return self.accepted

    def include(self, steps: Iterable[Step], prefix: str = "") -> None:
        """Append steps that another recorder made, their ids prefixed (``gpu.0.``). Their refusal refuses here too.

        A pass that comes in after a refusal here is recorded as it was: it was judged on its own.
        """
        for step in steps:
            self._add(replace(step, number=len(self._steps) + 1, id=prefix + step.id))

    def to_json(self) -> list[dict[str, object]]:
        """Every step as JSON."""
        return [step.to_json() for step in self._steps]

    def _add(self, step: Step) -> None:
        self._steps.append(step)
        if step.outcome is Outcome.REFUSE and self._refusal is None:
            self._refusal = step

    def _judge(self, judge: Callable[[], str | Skip]) -> tuple[Outcome, str | None, str]:
        if self._refusal is not None:
            return Outcome.SKIP, "AFTER_REFUSAL", f"not judged: step {self._refusal.id} refused"
        try:
            found = judge()
        except AgentError as error:
            return Outcome.REFUSE, error.slug, error.message
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # noqa: BLE001 - a panic in cryptography's Rust core is no Exception, and no pass either
            return Outcome.REFUSE, "INTERNAL", "the check failed in a way that it does not know; nothing is concluded"
        if isinstance(found, Skip):
            return Outcome.SKIP, found.slug, found.reason
        return Outcome.PASS, None, found
