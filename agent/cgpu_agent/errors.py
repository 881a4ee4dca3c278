"""One exception tree, so that every failure carries a stable slug and a message that is safe to show.

``slug`` is part of the API (it becomes ``ErrorInfo.reason``); ``message`` may reach a client, so it never holds
exception text, paths of other users, or secrets. What went wrong inside goes to the log, as ``__cause__``.
"""

from __future__ import annotations


class AgentError(Exception):
    """Base of everything this package raises on purpose.

    Args:
        slug: stable UPPER_SNAKE_CASE reason, part of the API.
        message: one sentence for a person, safe to send to any client.
        retry_after: seconds after which trying again makes sense; ``None`` when it does not.
    """

    def __init__(self, slug: str, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.slug = slug
        self.message = message
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.message} [{self.slug}]"


class Misuse(AgentError):
    """The request itself is wrong: fix the call (gRPC ``INVALID_ARGUMENT``)."""


class Denied(AgentError):
    """The caller may not do this, or is not who it must be (``PERMISSION_DENIED``)."""


class Exhausted(AgentError):
    """A quota or limit of this caller is used up (``RESOURCE_EXHAUSTED``)."""


class Unavailable(AgentError):
    """It cannot be done now: a state, not a fault of the caller (``UNAVAILABLE`` or ``FAILED_PRECONDITION``)."""


class HostileInput(AgentError):
    """Bytes from outside break their format, or a check on them failed. Never a crash, never a partial result."""


class DeviceFault(AgentError):
    """A device answered wrongly, late or not at all.

    ``outcome_unknown`` is true when a command that changes state may have been carried out.
    """

    def __init__(
        self, slug: str, message: str, *, retry_after: float | None = None, outcome_unknown: bool = False
    ) -> None:
        super().__init__(slug, message, retry_after=retry_after)
        self.outcome_unknown = outcome_unknown
