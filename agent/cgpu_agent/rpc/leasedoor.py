"""Where memory is leased: a socket beside the public one, because gRPC cannot carry descriptors.

Each connection has a thread of its own, and is one lease. So nothing here waits for anybody else: not even closing a
descriptor that came from a caller, which asks the file system behind it, and that can be the caller's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import math
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any, Final

import structlog

from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.leases import Lease, Leases
from cgpu_agent.errors import AgentError, Denied, Exhausted, HostileInput, Misuse, Unavailable
from cgpu_agent.rpc import peer
from cgpu_agent.rpc.addresses import Listener
from cgpu_agent.rpc.admission import Admission, DoorLimits, Seat
from cgpu_agent.rpc.identify import Identified, Identifier
from cgpu_agent.rpc.keptleases import KeptLease, Store, kept_name
from cgpu_agent.wire.lease import MAX_MESSAGE, LeaseRequest, encode_grant, encode_refusal

logger = logging.getLogger(__name__)
log = structlog.get_logger()

EXCHANGE_SECONDS: Final = 5.0
"""In which a caller must have said what it wants."""
_PERMIT_SECONDS: Final = 15.0
_CLOSE_SECONDS: Final = 3.0
_MAX_REFUSING: Final = 64
_REFUSED_SECONDS: Final = 0.1
_UCRED_SIZE: Final = 12

Permit = Callable[[Identified], Coroutine[Any, Any, "LeaseKinds"]]


@dataclass(frozen=True, slots=True)
class LeaseKinds:
    """Which memory a process may have on lease: to have objects opened; to transfer to and from GPUs."""

    objects: bool
    transfers: bool


class LeaseDoor:
    """One thread that accepts, and one for each connection.

    Args:
        listener: SOCK_SEQPACKET; the door owns it from now on.
        permit: asked on the event loop.
        store: keeps leases while the agent starts anew; ``None`` where nobody does: they end with it.
        denied: told on the event loop of each process that may have no lease, and why.
        patience: seconds for the exchange.
    """

    def __init__(
        self,
        listener: Listener,
        identifier: Identifier,
        leases: Leases,
        permit: Permit,
        limits: DoorLimits,
        *,
        store: Store | None = None,
        denied: Callable[[Caller | None, str], None] = lambda *_: None,
        patience: float = EXCHANGE_SECONDS,
    ) -> None:
        self._listener = listener
        self._identifier = identifier
        self._leases = leases
        self._permit = permit
        self._limits = limits
        self._store = store
        self._denied = denied
        self._patience = patience
        self._admission = Admission(limits)
        self._lock = threading.Lock()
        self._open: dict[socket.socket, threading.Thread] = {}
        self._kept: set[socket.socket] = set()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC)
        self._stopping = threading.Event()
        self._refusing = 0
        self._busy_since: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    # -- on the event loop

    def resume(self, kept: Sequence[KeptLease]) -> int:
        """Go on with leases of an earlier run, and end those whose holder is gone or is not what it was.

        Returns how many go on. Done before anybody can ask for one of them.
        """
        settled = []
        for each in kept:
            done = threading.Event()
            settled.append(done)
            threading.Thread(target=self._go_on, args=(each, done), name="lease", daemon=True).start()
        for done in settled:
            done.wait(EXCHANGE_SECONDS)
        return len(self._leases)

    def start(self) -> None:
        """Begin to accept."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="lease-door", daemon=True)
        self._thread.start()

    def heartbeat_age(self, now: float) -> float:
        """Seconds (``time.monotonic`` scale) that the accepting thread has been at work; infinite when it ended."""
        if self._thread is None or not self._thread.is_alive():
            return math.inf
        since = self._busy_since
        return 0.0 if since is None else max(0.0, now - since)

    def close(self) -> None:
        """Accept nobody any more, and end all leases but those that are kept for the agent's next run.

        Waits for a moment, so not on the event loop; idempotent.
        """
        if self._stopping.is_set():
            return
        self._stopping.set()
        os.eventfd_write(self._bell, 1)
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)
        self._listener.close()
        os.close(self._bell)
        with self._lock:
            ending = {sock: thread for sock, thread in self._open.items() if sock not in self._kept}
            threads = list(ending.values())
            for sock in ending:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        until = time.monotonic() + _CLOSE_SECONDS
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    # -- the accepting thread

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._busy_since = None
                _readable((self._listener.sock.fileno(), self._bell))
                self._busy_since = time.monotonic()
                self._accept()
        except Exception:
            logger.exception("the lease door failed")

    def _accept(self) -> None:
        if self._refusing >= _MAX_REFUSING:
            self._stopping.wait(self._limits.accept_backoff)
            return
        try:
            sock, _address = self._listener.sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            self._stopping.wait(self._limits.accept_backoff)  # out of descriptors
            return
        sock.setblocking(False)
        try:
            credentials = peer.credentials(sock)
        except OSError:
            sock.close()
            return
        seat = self._seat(credentials)
        work = threading.Thread(target=self._serve, args=(sock, credentials, seat), name="lease", daemon=True)
        with self._lock:
            admitted = self._admission.enter(seat)
            if admitted:
                self._open[sock] = work
            else:
                self._refusing += 1
                work = threading.Thread(target=self._refuse, args=(sock,), name="lease-refusal", daemon=True)
        try:
            work.start()
        except RuntimeError:
            if admitted:
                self._leave(sock, seat)
            else:
                self._refuse(sock)

    def _seat(self, credentials: peer.Credentials) -> Seat:
        try:
            self._identifier.require_identity(credentials)
        except Denied:
            return "unidentified"
        return credentials.uid

    def _refuse(self, sock: socket.socket) -> None:
        self._turn_away(sock, _full())
        sock.close()  # as in ``_leave``
        with self._lock:
            self._refusing -= 1

    def _turn_away(self, sock: socket.socket, error: AgentError) -> None:
        """Say why, in a moment: who comes back at once, again and again, does not keep everybody busy."""
        self._stopping.wait(_REFUSED_SECONDS)
        _send(sock, encode_refusal(error))

    def _leave(self, sock: socket.socket, seat: Seat) -> None:
        with self._lock:
            self._kept.discard(sock)
            del self._open[sock]  # before its number can be another's: ``close`` shuts down what is in here
        sock.close()  # may wait, too: for the files of descriptors that nobody took
        with self._lock:
            self._admission.leave(seat)

    # -- a connection's thread

    def _serve(self, sock: socket.socket, credentials: peer.Credentials, seat: Seat) -> None:
        came: list[int] = []
        holder: Identified | None = None
        try:
            holder = self._identifier.identify(sock, credentials)
            self._lend(sock, holder, came)
        except AgentError as error:
            if isinstance(error, Denied) and self._loop is not None:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    caller = None if holder is None else holder.caller
                    self._loop.call_soon_threadsafe(self._denied, caller, error.slug)
            self._turn_away(sock, error)
        except OSError:
            self._turn_away(sock, Unavailable("NO_MEMORY", "the agent is out of resources", retry_after=1.0))
        except Exception:
            logger.exception("a lease failed")
        finally:
            if holder is not None:
                holder.close()
            for fd in came:
                with contextlib.suppress(OSError):
                    os.close(fd)
            self._leave(sock, seat)

    def _lend(self, sock: socket.socket, holder: Identified, came: list[int]) -> None:
        pidfd = _pidfd(holder)
        kinds = self._ask_permission(holder)
        if not (kinds.objects or kinds.transfers):
            raise _not_allowed()
        if not _readable((sock.fileno(),), self._patience):
            raise Misuse("LEASE_TIMEOUT", "the request for a lease did not come in time")
        request = _receive(sock, came)
        if not (kinds.transfers if request.writable else kinds.objects):
            raise _not_allowed()
        source = came[0] if came else None
        kept: str | None = None
        try:
            with self._leases.granted(holder, request.size, source, writable=request.writable) as lease:
                memory = lease.take_descriptor()
                try:
                    holder.still_the_same()
                    kept = self._keep(sock, holder, lease)
                    socket.send_fds(sock, [encode_grant(lease.id)], [memory])
                finally:
                    os.close(memory)
                _until_end(sock, pidfd)
        finally:
            self._forget(kept)  # once it is wiped: before that a crash would leave it to nobody

    def _keep(self, sock: socket.socket, holder: Identified, lease: Lease) -> str | None:
        """Have the lease outlive this run of the agent, from before its holder knows of it."""
        if self._store is None:
            return None
        with self._lock:
            if self._stopping.is_set():
                raise Unavailable("AGENT_STOPPING", "the agent is stopping", retry_after=1.0)
            self._kept.add(sock)
        name = kept_name(lease.id, holder.mark())
        self._store.keep(name, (sock.fileno(), lease.kept_by))
        return name

    def _forget(self, kept: str | None) -> None:
        if kept is not None and self._store is not None:
            self._store.forget(kept)

    # -- the thread of a lease of an earlier run

    def _go_on(self, kept: KeptLease, done: threading.Event) -> None:
        try:
            self._serve_again(kept, done)
        except (AgentError, OSError) as error:
            reason = error.slug if isinstance(error, AgentError) else type(error).__name__
            log.warning("a lease of the last run does not go on", reason=reason)
        except Exception:
            logger.exception("a lease failed")
        finally:
            kept.memory.close()
            self._forget(kept.name)
            done.set()

    def _serve_again(self, kept: KeptLease, done: threading.Event) -> None:
        sock = kept.connection
        credentials = peer.credentials(sock)
        seat = self._seat(credentials)
        with self._lock:
            if not self._admission.enter(seat):
                sock.close()
                raise _full()
            self._open[sock] = threading.current_thread()
            self._kept.add(sock)
        try:
            with contextlib.closing(self._identifier.identify(sock, credentials)) as holder:
                pidfd = _pidfd(holder)
                if holder.mark() != kept.mark:
                    raise Denied("CALLER_CHANGED", "the holder is not what it was when it got the lease")
                with self._leases.resumed(holder, kept.id, kept.memory):
                    done.set()
                    _until_end(sock, pidfd)
        finally:
            self._leave(sock, seat)

    def _ask_permission(self, holder: Identified) -> LeaseKinds:
        if self._loop is None:
            raise ValueError("the door was not started")
        asked = asyncio.run_coroutine_threadsafe(self._permit(holder), self._loop)
        try:
            return asked.result(_PERMIT_SECONDS)
        except (TimeoutError, FutureTimeout):
            asked.cancel()
            raise Unavailable("CALL_TIMEOUT", "the policy could not be asked in time", retry_after=1.0) from None


def _receive(sock: socket.socket, came: list[int]) -> LeaseRequest:
    """The request, and into ``came`` what came with it, good or bad: its owner closes it."""
    data, fds, flags, _address = socket.recv_fds(sock, MAX_MESSAGE, 2, socket.MSG_CMSG_CLOEXEC)
    came += fds
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        raise Misuse("BAD_LEASE_MESSAGE", "lease message: too long, or with too many descriptors")
    _silence(sock)
    try:
        request = LeaseRequest.parse(data)
    except HostileInput as error:
        raise Misuse(error.slug, error.message) from error
    if len(came) != request.source:
        raise Misuse("BAD_LEASE_MESSAGE", "lease message: not with the descriptors that it speaks of")
    for fd in came:
        # Reading is all that is asked of it; what the agent could do to the file beyond that, it does not hold.
        reads = fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_PATH) == os.O_RDONLY
        if not reads or not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Misuse("BAD_SOURCE", "a sealed object comes as a regular file, opened for reading only")
    return request


def _silence(sock: socket.socket) -> None:
    """Let the caller say nothing more, and see that nothing more was said.

    So nothing waits in the connection when it is in systemd's keeping, which would have to close what comes with it.
    """
    sock.shutdown(socket.SHUT_RD)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # or an empty message looks like none
    data, ancillary, _flags, _address = sock.recvmsg(1, socket.CMSG_SPACE(_UCRED_SIZE))
    if data or ancillary:
        raise Misuse("BAD_LEASE_MESSAGE", "lease message: more than one")


def _pidfd(holder: Identified) -> int:
    pidfd = holder.pidfd
    if pidfd is None or holder.caller.identity_strength != "pidfd":
        raise Denied("LEASE_IDENTITY", "this kernel has no SO_PEERPIDFD, without which a lease is nobody's")
    return pidfd


def _until_end(sock: socket.socket, pidfd: int) -> None:
    """Wait for the end of the connection, or of the process."""
    poll = select.poll()
    poll.register(sock, 0)  # a hang-up alone
    poll.register(pidfd, select.POLLIN)
    poll.poll()


def _readable(fds: tuple[int, ...], seconds: float | None = None) -> bool:
    """Wait until one of them has something to say, its end included. ``poll``: ``select`` ends at descriptor 1023."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def _send(sock: socket.socket, answer: bytes) -> None:
    with contextlib.suppress(OSError):
        sock.send(answer)


def _not_allowed() -> Denied:
    return Denied("NOT_ALLOWED", "not allowed: no policy lets this caller have such a lease")


def _full() -> Exhausted:
    return Exhausted("LEASE_LIMIT", "too many leases; end one, or wait", retry_after=1.0)
