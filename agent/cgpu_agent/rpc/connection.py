"""One caller's connection, as an RPC handler sees it: who, still there, still the same."""

from __future__ import annotations

import socket

from cgpu_agent.domain.caller import Caller
from cgpu_agent.errors import Denied
from cgpu_agent.rpc.admission import Seat
from cgpu_agent.rpc.exe_digest import ExeDigests
from cgpu_agent.rpc.identify import Identified
from cgpu_agent.rpc.pump import Flow


class Connection:
    """A caller's socket joined to a socket of the inner server.

    Look it up once at the start of an RPC and keep it: the door forgets it when the caller leaves, while the RPC may
    still run. All public methods may be called from any thread.

    Attributes:
        peer: grpc's name for the inner connection (``context.peer()``).
        identified: the caller's process; ``None`` for a caller without an identity.
    """

    def __init__(
        self,
        name: str,
        sockets: tuple[socket.socket, socket.socket],
        seat: Seat,
        identity: Identified | Denied,
        digests: ExeDigests,
    ) -> None:
        self.peer = f"unix:{name}"
        self.identified = None if isinstance(identity, Denied) else identity
        self._identity = identity
        self.name = name
        self.seat = seat
        self.outside, self.inside = sockets
        self.inward = Flow(self.outside, self.inside)
        self.outward = Flow(self.inside, self.outside)
        self.watched: list[int] = []
        self.closed = False
        self._digests = digests

    @property
    def refusal(self) -> Denied | None:
        """Why there is no identity; every RPC of such a caller is answered with it.

        A new one each time: an exception that is raised again and again keeps every traceback.
        """
        identity = self._identity
        return Denied(identity.slug, identity.message) if isinstance(identity, Denied) else None

    @property
    def caller(self) -> Caller | None:
        """The caller, or ``None`` when ``refusal`` says why not."""
        return None if self.identified is None else self.identified.caller

    def alive(self) -> bool:
        """Whether the connection is open and the process that opened it lives."""
        return not self.closed and (self.identified is None or self.identified.alive())

    def check(self) -> None:
        """Check that the caller is there and still the same; to be called right before something is handed over.

        Raises:
            Denied: ``CALLER_UNIDENTIFIED``, ``CALLER_GONE`` or ``CALLER_CHANGED``.
        """
        self._require_identity().still_the_same()

    async def exe_digest(self) -> str:
        """SHA-256 hex of the caller's program; see ``ExeDigests.digest`` for what it raises."""
        return await self._digests.digest(self._require_identity())

    def _require_identity(self) -> Identified:
        identity = self._identity
        if isinstance(identity, Denied):
            raise Denied(identity.slug, identity.message)
        return identity

    def close(self) -> None:
        """Close both sockets, then the pidfd. For the door, which drops the name first."""
        self.closed = True
        self.outside.close()
        self.inside.close()
        if self.identified is not None:
            self.identified.close()
