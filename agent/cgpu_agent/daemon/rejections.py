"""What is news of GPUs that are rejected: the journal hears of each once, not at every attempt."""

from __future__ import annotations

from collections.abc import Sequence

from cgpu_agent.domain.gpustate import Reason, Session


class Rejections:
    """What the journal was told of devices that were rejected: each attempt finds them again, for hours."""

    def __init__(self) -> None:
        self._told: dict[str, Reason] = {}

    def news(self, sessions: Sequence[Session]) -> list[tuple[str, Reason]]:
        """Devices that are rejected, and were not, or not for this reason, since they were last trusted."""
        present = {session.info.uuid for session in sessions if session.phase != "trusted"}
        self._told = {uuid: reason for uuid, reason in self._told.items() if uuid in present}
        found = [
            (session.info.uuid, session.reason)
            for session in sessions
            if session.phase == "rejected" and session.reason is not None
        ]
        fresh = [(uuid, reason) for uuid, reason in found if self._told.get(uuid) != reason]
        self._told.update(fresh)
        return fresh
