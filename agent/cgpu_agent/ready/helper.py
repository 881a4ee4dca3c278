"""Holds the GPUs' ready state for the agent, and exactly as long as the connection that asked for it.

It runs as root, so it can do nothing else, and does it for nobody else: who asks, the kernel says. Whatever ends the
agent closes the connection, and that alone clears the ready state.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Final

from cgpu_agent.backends.gpu.nvml import Nvml
from cgpu_agent.backends.gpu.nvmlfaults import NOT_SUPPORTED, UNINITIALIZED, UNKNOWN, NvmlFault
from cgpu_agent.errors import DeviceFault, Unavailable
from cgpu_agent.rpc import peer
from cgpu_agent.wire.ready import CLEAR, MAX_MESSAGE, REFUSED, SET, encode_answer

MAX_ASKING: Final = 8
"""Connections that have not said yet what they want."""
_TICK: Final = 1.0
"""Seconds between two looks at what is overdue."""
_ROOT: Final = 0


def put_ready(nvml: Nvml, ready: bool) -> int:
    """Set or clear the ready state; returns NVML's code.

    The library stays open: in confidential-computing mode a GPU whose last client leaves may refuse the next one.
    """
    code = _put(nvml, ready)
    return _put(nvml, ready) if code == UNINITIALIZED else code  # Then the driver was loaded anew, and did nothing.


def _put(nvml: Nvml, ready: bool) -> int:
    try:
        with nvml.use():
            nvml.set_ready(ready)
    except Unavailable:
        return NOT_SUPPORTED
    except DeviceFault as fault:
        return fault.code if isinstance(fault, NvmlFault) else UNKNOWN
    return 0


class Helper:
    """One helper over its life. One thread: nothing it does waits for whoever asks.

    Args:
        listener: SOCK_SEQPACKET, listening.
        put: sets or clears the ready state, and returns NVML's code.
        uid: the agent's user.
        is_agent: whether a process is the agent; see ``is_main_process``.
        patience: seconds in which a connection must say what it wants.
    """

    def __init__(
        self,
        listener: socket.socket,
        put: Callable[[bool], int],
        uid: int,
        is_agent: Callable[[int], bool],
        *,
        patience: float = 2.0,
    ) -> None:
        self._listener: Final = listener
        self._put: Final = put
        self._uid: Final = uid
        self._is_agent: Final = is_agent
        self._patience: Final = patience
        self._asking: Final[dict[socket.socket, float]] = {}
        self._lease: tuple[socket.socket, int] | None = None
        self._may_be_set = True
        self._failure = 0
        # A signal that comes just before select(2) would be heard only after it, which may be never.
        self._bell, self._ringer = socket.socketpair()
        self._bell.setblocking(False)
        self._ringer.setblocking(False)

    def serve(self) -> None:
        """Clear what nobody holds, then answer until an exception or a signal ends it; then clear."""
        self._listener.setblocking(False)
        before = signal.set_wakeup_fd(self._ringer.fileno(), warn_on_full_buffer=False)
        try:
            self._clear()
            while True:
                self._step()
        finally:
            self._clear()
            signal.set_wakeup_fd(before)

    def _step(self) -> None:
        lease = self._lease or ()
        overdue = self._asking or (self._may_be_set and not lease)
        sources = [self._bell, self._listener, *self._asking, *lease]
        heard = select.select(sources, [], [], _TICK if overdue else None)[0]
        if self._bell in heard:
            self._bell.recv(64)
        if any(source in heard for source in lease):
            self._clear()  # First of all. A word on a lease is a breach, and ends it too.
        for sock, until in list(self._asking.items()):
            if sock in heard or until <= time.monotonic():
                del self._asking[sock]
                self._answer(sock)
        if self._listener in heard:
            self._admit()
        if self._may_be_set and self._lease is None:
            self._clear()

    def _admit(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # It left again.
        sock.setblocking(False)
        if len(self._asking) < MAX_ASKING:
            self._asking[sock] = time.monotonic() + self._patience
        else:
            sock.close()

    def _answer(self, sock: socket.socket) -> None:
        pidfd = None
        answer = REFUSED
        try:
            word, caller = sock.recv(MAX_MESSAGE), peer.credentials(sock)
            if word == CLEAR and caller.uid in (_ROOT, self._uid):
                answer = encode_answer(self._clear())
            elif word == SET and caller.uid == self._uid and self._lease is None:
                pidfd = self._agent(sock, caller.pid)
            if pidfd is not None:
                answer = encode_answer(self._set(sock, pidfd))
            elif answer == REFUSED and word:
                sys.stderr.write(f"<4>refused a request of uid {caller.uid}, pid {caller.pid}\n")
            sock.send(answer)
        except OSError:
            pass  # It asked nothing, or is gone; a lease that is gone is noticed like any other.
        if self._lease is None or self._lease[0] is not sock:
            sock.close()

    def _agent(self, sock: socket.socket, pid: int) -> int | None:
        """A pidfd of the connector, if it is the agent, lives, and waits for the answer without another word."""
        try:
            pidfd = peer.pidfd(sock)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise
            pidfd = os.pidfd_open(pid)  # Before Linux 6.5: of whoever has that pid now.
        try:
            known = self._is_agent(pid) and not select.select([sock.fileno(), pidfd], [], [], 0)[0]
        except OSError:
            known = False
        if known:
            return pidfd
        os.close(pidfd)
        return None

    def _set(self, sock: socket.socket, pidfd: int) -> int:
        self._may_be_set = True
        code = self._put(True)
        if code == 0:
            self._lease = (sock, pidfd)
        else:
            os.close(pidfd)
        return code

    def _clear(self) -> int:
        """End the lease, if there is one, and clear; what cannot be cleared is tried again."""
        lease, self._lease = self._lease, None
        self._may_be_set = True
        code = self._put(False)
        self._may_be_set = code not in (0, NOT_SUPPORTED)
        if lease is not None:
            lease[0].close()  # Not before: who sees it end finds the ready state cleared, if it can be.
            os.close(lease[1])
        if self._may_be_set and code != self._failure:
            sys.stderr.write(f"<3>the GPUs' ready state cannot be cleared (NVML: {code})\n")
        self._failure = code
        return code
