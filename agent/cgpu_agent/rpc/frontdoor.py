"""The front door: accepts callers, asks the kernel who they are, and joins each to the gRPC server behind it.

grpc shows a handler nothing of a unix caller but the *name* of its socket. So the door connects onward from a socket
that it bound to a fresh random name in a directory nobody else can enter; grpc reports that name as
``context.peer()``, and the name leads back to the identity. The order of the steps is what makes that safe: register
the name before connecting, unlink it at once, and when the caller leaves forget the name before closing anything.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from cgpu_agent.errors import Denied, Unavailable
from cgpu_agent.rpc import peer
from cgpu_agent.rpc.addresses import Listener, PrivateDirectory
from cgpu_agent.rpc.admission import Admission, DoorLimits, DoorStats, Seat
from cgpu_agent.rpc.connection import Connection
from cgpu_agent.rpc.exe_digest import ExeDigests
from cgpu_agent.rpc.fairshare import CONNECTION, FairShare
from cgpu_agent.rpc.identify import Identified, Identifier
from cgpu_agent.rpc.pressure import Pressure
from cgpu_agent.rpc.pump import BUFFER_SIZE, Flow, Moved
from cgpu_agent.rpc.reactor import Reactor

logger = logging.getLogger(__name__)

_READABLE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_ENDING = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_WRITABLE = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR
_SOCKET_EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
_SELF_CHECK_SECONDS = 5.0
_LEAST_SHARE = 256
_PAUSE_SECONDS = 0.02
_TURNED_AWAY_SECONDS = 0.1
_MOST_TURNED_AWAY = 128


class FrontDoor:
    """One epoll thread between the public socket and the inner gRPC server, in the process of that server.

    Start it when the inner server listens. Everything but the public methods runs on the door's own thread, which
    never waits for a caller. Only that thread changes the table of connections; ``lookup`` reads it from others.

    Args:
        listeners: the public sockets (``bind_listener``, ``adopt_listener``); the door owns them from now on.
        inner: path of the inner server's socket, in a private directory (see ``PrivateDirectory``).
        identifier: how callers are identified here.
        limits: bounds.
        on_open, on_close: called on the door's thread with each identified caller, before its first RPC and after its
            connection is gone; they must not block.
    """

    def __init__(
        self,
        listeners: Sequence[Listener],
        inner: str,
        identifier: Identifier,
        *,
        limits: DoorLimits | None = None,
        on_open: Callable[[Identified], None] | None = None,
        on_close: Callable[[Identified], None] | None = None,
    ) -> None:
        self._listeners = list(listeners)
        for listener in self._listeners:
            peer.refuse_descriptors(listener.sock)
        self._directory = PrivateDirectory(inner)
        self._identifier = identifier
        self._limits = limits or DoorLimits()
        self._on_open = on_open
        self._on_close = on_close
        self._admission = Admission(self._limits)
        self._digests = ExeDigests()
        self._table: dict[str, Connection] = {}
        self._unfinished: dict[Flow, Connection] = {}
        self._turned_away = 0
        self._shares = FairShare()
        self._pressure: Pressure | None = None
        self._paused: dict[Seat, dict[Flow, Connection]] = {}
        self._held: dict[Flow, Connection] = {}
        self._knocking: list[Listener] = []
        self._buffer = memoryview(bytearray(BUFFER_SIZE))
        self._counts: Counter[str] = Counter()
        self._reactor = Reactor(self._obey)
        self._stopping = False
        self._closing = False
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    # -- from any thread

    def start(self) -> None:
        """Begin to accept. On the event loop of the inner server."""
        self._pressure = Pressure(asyncio.get_running_loop(), self._directory.inner, self._reactor.ring)
        self._directory.verify()
        for listener in self._listeners:
            self._resume(listener)
        self._thread = threading.Thread(target=self._run, name="front-door", daemon=True)
        self._thread.start()

    def lookup(self, peer_name: str) -> Connection | None:
        """The connection behind ``context.peer()``; ``None`` if it did not come through the door, or has left."""
        return self._table.get(peer_name)

    def stats(self) -> DoorStats:
        """Counters and levels."""
        open_now = list(self._table.values())
        held = sum(connection.inward.held + connection.outward.held for connection in open_now)
        counts = self._counts
        return DoorStats(
            open=len(open_now),
            held_bytes=held,
            accepted=counts["accepted"],
            refused_by_limit=counts["refused_by_limit"],
            cut_dead=counts["cut_dead"],
            unidentified=counts["unidentified"],
            out_of_resources=counts["out_of_resources"],
            inner_unavailable=counts["inner_unavailable"],
        )

    def heartbeat_age(self, now: float) -> float:
        """Seconds (``time.monotonic`` scale) that the thread has been at its present turn; infinite when it ended.

        A waiting thread counts as alive.
        """
        if self._thread is None or not self._thread.is_alive():
            return math.inf
        return self._reactor.busy_for(now)

    async def verify_self(self, probe: Callable[[], Awaitable[int]]) -> None:
        """Prove, before serving anybody, that identities reach handlers.

        Args:
            probe: makes a call through the public socket and returns the caller's pid as its handler saw it.

        Raises:
            Unavailable: ``FRONTDOOR_SELF_CHECK``.
        """
        try:
            seen = await asyncio.wait_for(probe(), _SELF_CHECK_SECONDS)
        except Exception as error:
            raise Unavailable("FRONTDOOR_SELF_CHECK", "a call to the daemon's own socket failed") from error
        if seen != os.getpid():
            raise Unavailable("FRONTDOOR_SELF_CHECK", "a call to the daemon's own socket came with a wrong identity")

    def stop_accepting(self) -> None:
        """Take no new callers; connections stay. Returns once that is so. Idempotent.

        A socket bound here is closed and removed: new callers fail at once. One from systemd stays: they wait.
        """
        self._stopping = True
        if self._off_thread() and self._reactor.ring():
            self._stopped.wait()
        else:
            self._close_listeners()

    def close(self) -> None:
        """Stop accepting, cut every connection (which cancels its RPCs) and end the thread. Idempotent."""
        self.stop_accepting()
        self._closing = True
        if self._thread is None:
            self._shut()
        elif self._off_thread():
            self._reactor.ring()
            self._thread.join()

    def _off_thread(self) -> bool:
        return self._thread is not None and self._thread is not threading.current_thread()

    # -- the thread

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
        except Exception:
            # Fail closed: the door shuts, the heartbeat ends, the watchdog restarts the daemon.
            logger.exception("the front door failed")
        finally:
            self._shut()

    def _turn(self) -> None:
        unfinished = list(self._unfinished)
        self._reactor.turn(wait=not unfinished)
        for flow in unfinished:
            self._move(self._unfinished.pop(flow), flow)
        while self._knocking:
            self._accept(self._knocking.pop())

    def _obey(self) -> None:
        if self._stopping:
            self._close_listeners()
        held, self._held = self._held, {}
        for flow, connection in held.items():
            self._move(connection, flow)

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            self._reactor.unwatch(listener.sock.fileno())
            listener.close()
        self._listeners.clear()
        self._knocking.clear()
        self._stopped.set()

    def _shut(self) -> None:
        self._close_listeners()
        for connection in list(self._table.values()):
            self._drop(connection)
        self._reactor.close()

    # -- new callers

    def _knock(self, listener: Listener, _mask: int) -> None:
        self._knocking.append(listener)

    def _accept(self, listener: Listener) -> None:
        for _ in range(self._limits.accepts_per_wake):
            try:
                sock, _address = listener.sock.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError:
                self._pause(listener)
                return
            try:
                peer.refuse_descriptors(sock)  # it connected before there was a door
                sock.setblocking(False)
                self._receive(sock)
            except Denied:
                self._counts["cut_dead"] += 1
                sock.close()
            except OSError:
                sock.close()
                self._pause(listener)
                return

    def _pause(self, listener: Listener) -> None:
        """Stop asking for a while: a listener that cannot accept would keep epoll awake."""
        self._counts["out_of_resources"] += 1
        self._reactor.unwatch(listener.sock.fileno())
        self._reactor.after(self._limits.accept_backoff, partial(self._resume, listener))

    def _resume(self, listener: Listener) -> None:
        if listener in self._listeners:
            self._reactor.watch(listener.sock.fileno(), select.EPOLLIN, partial(self._knock, listener))

    def _receive(self, sock: socket.socket) -> None:
        """Admit and identify. Raises ``Denied`` for a dead caller and ``OSError`` when out of resources."""
        credentials = peer.credentials(sock)
        seat: Seat = "own" if credentials.pid == os.getpid() else credentials.uid
        refusal = None
        try:
            self._identifier.require_identity(credentials)
        except Denied as error:
            seat, refusal = "unidentified", error
            self._counts["unidentified"] += 1
        if not self._admission.enter(seat):
            self._turn_away(sock)
            return
        inside = None
        try:
            inside = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            inside.setblocking(False)
            identity = refusal or self._identifier.identify(sock, credentials)
        except BaseException:
            self._admission.leave(seat)
            if inside is not None:
                inside.close()
            raise
        self._counts["accepted"] += 1
        self._shares.took(seat, CONNECTION, time.monotonic())
        self._open(Connection(self._directory.fresh_name(), (sock, inside), seat, identity, self._digests))

    def _turn_away(self, sock: socket.socket) -> None:
        """Close, mostly in a moment: who comes back at once, again and again, does not keep the door busy."""
        self._turned_away += 1

        def close() -> None:
            self._turned_away -= 1
            self._counts["refused_by_limit"] += 1
            sock.close()

        if self._turned_away > _MOST_TURNED_AWAY:
            close()
        else:
            self._reactor.after(_TURNED_AWAY_SECONDS, close)

    def _open(self, connection: Connection) -> None:
        """Give the connection its name, register that, and only then connect."""
        self._tell(self._on_open, connection)
        self._table[connection.peer] = connection
        try:
            connection.inside.bind(connection.name)
            self._connect(connection, self._limits.connect_tries)
        except OSError:
            self._drop(connection)

    def _connect(self, connection: Connection, tries: int) -> None:
        if connection.closed:
            return
        try:
            try:
                connection.inside.connect(self._directory.inner)
            finally:
                # The socket keeps its name; the file has no further use, also after a failure.
                Path(connection.name).unlink(missing_ok=True)
            self._join(connection)
        except BlockingIOError:
            # A full queue answers at once and never signals when there is room.
            if tries > 1:
                self._reactor.after(self._limits.connect_retry, partial(self._connect, connection, tries - 1))
            else:
                self._refuse_inside(connection)
        except OSError:
            self._refuse_inside(connection)

    def _refuse_inside(self, connection: Connection) -> None:
        self._counts["inner_unavailable"] += 1
        self._drop(connection)

    def _join(self, connection: Connection) -> None:
        if peer.credentials(connection.inside).pid != os.getpid():
            raise ConnectionRefusedError("another process listens at the inner socket")
        pidfd = None if connection.identified is None else connection.identified.pidfd
        if pidfd is not None:
            connection.watched.append(pidfd)
            self._reactor.watch(pidfd, select.EPOLLIN, partial(self._cut, connection))
        for flow, back in ((connection.inward, connection.outward), (connection.outward, connection.inward)):
            fd = flow.source.fileno()
            connection.watched.append(fd)
            self._reactor.watch(fd, _SOCKET_EVENTS, partial(self._socket_ready, connection, flow, back))

    # -- callers at work

    def _socket_ready(self, connection: Connection, flow: Flow, back: Flow, mask: int) -> None:
        """Go on with the flow that this socket is the source of, and with the one that waits for it as its sink."""
        if mask & _READABLE:
            self._move(connection, flow, drain=bool(mask & _ENDING))
        if mask & _WRITABLE and back.held:
            self._move(connection, back)

    def _move(self, connection: Connection, flow: Flow, *, drain: bool = True) -> None:
        seat = connection.seat
        if connection.closed or flow in self._unfinished or flow in self._held or flow in self._paused.get(seat, ()):
            return
        if flow is connection.inward:
            moved = self._move_inward(connection, flow, drain=drain)
        else:
            moved = flow.move(self._buffer, self._limits.bytes_per_wake, drain=drain)
        if moved is Moved.MORE:
            self._unfinished[flow] = connection
        elif moved is Moved.ENDED:
            self._drop(connection)

    def _move_inward(self, connection: Connection, flow: Flow, *, drain: bool) -> Moved | None:
        """What a caller says goes on as its uid's share allows; ``None``: not now."""
        now, seat, pressure = time.monotonic(), connection.seat, self._pressure
        most, share = self._limits.bytes_per_wake, None
        if seat == "own" or (pressure is not None and not pressure.pressed(now)):
            pressure = None
        if pressure is not None:
            share = self._shares.allowed(seat, now)
            most = pressure.room if share is None else share
        if share is not None and share < _LEAST_SHARE:
            if seat not in self._paused:
                self._paused[seat] = {}
                self._reactor.after(_PAUSE_SECONDS, partial(self._end_pause, seat))
            self._paused[seat][flow] = connection
            return None
        if most <= 0:
            self._held[flow] = connection
            return None
        before = flow.moved
        moved = flow.move(self._buffer[:most], most, drain=drain)
        took = flow.moved - before
        self._shares.took(seat, took, now)
        if pressure is not None and share is None:
            pressure.took(took, now)
        return moved

    def _end_pause(self, seat: Seat) -> None:
        for flow, connection in self._paused.pop(seat).items():
            self._move(connection, flow)

    def _cut(self, connection: Connection, _mask: int) -> None:
        """The connecting process died: whoever still holds its socket is somebody else."""
        self._counts["cut_dead"] += 1
        self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        """Forget the name, then close: from here on it means nobody. Idempotent."""
        if connection.closed:
            return
        self._table.pop(connection.peer, None)
        for fd in connection.watched:
            self._reactor.unwatch(fd)
        connection.close()
        self._admission.leave(connection.seat)
        self._tell(self._on_close, connection)

    def _tell(self, listener: Callable[[Identified], None] | None, connection: Connection) -> None:
        if listener is None or connection.identified is None:
            return
        try:
            listener(connection.identified)
        except Exception:
            logger.exception("a listener of the front door failed")
