"""Who may do what: a few actions are open to every identified caller, the rest are denied unless granted by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from cgpu_agent.domain.caller import Caller


class Action(str, Enum):
    """What a caller may ask for; the values are what a configuration names."""

    IDENTITY = "boot.identity"
    QUOTE = "boot.quote"
    RAW_QUOTE = "boot.raw_quote"
    PCRS = "boot.pcrs"
    EVENT_LOG = "boot.event_log"
    MEASURE = "boot.measure"
    ACTIVATE_CREDENTIAL = "boot.activate_credential"
    EVIDENCE = "evidence.get"


OPEN = frozenset({Action.IDENTITY, Action.QUOTE, Action.PCRS, Action.EVENT_LOG, Action.EVIDENCE})
"""Actions that tell a caller about the VM, or speak only in the caller's own name."""


@dataclass(frozen=True, slots=True)
class Grant:
    """Permission for one more action, to a unit, a uid, or both together (at least one is set)."""

    action: Action
    uid: int | None = None
    unit: str | None = None

    def matches(self, caller: Caller) -> bool:
        """Absent facts match nothing: without a pidfd a caller has no unit, so a grant by unit does not hold."""
        if self.uid is None and self.unit is None:
            return False
        return (self.uid is None or caller.uid == self.uid) and (self.unit is None or caller.unit == self.unit)


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer and what decided it."""

    allowed: bool
    rule: str


class Policy:
    """Decides by the caller's kernel-given identity alone. Immutable: a reload makes a new one."""

    def __init__(self, grants: Sequence[Grant] = ()) -> None:
        self._grants = tuple(grants)

    def decide(self, caller: Caller, action: Action) -> Decision:
        if action in OPEN:
            return Decision(True, "open")
        for number, grant in enumerate(self._grants):
            if grant.action is action and grant.matches(caller):
                return Decision(True, f"grant[{number}]")
        return Decision(False, "default-deny")
