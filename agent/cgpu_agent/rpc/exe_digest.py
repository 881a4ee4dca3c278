"""The digest of a caller's program: only where policy asks, never before a rate limit or on the door's thread.

The file belongs to the caller: it can be huge, and its file system can be the caller's own and never answer. So one
digest at a time for each uid, a few in all, each on a thread that may hang without holding anything else up.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from concurrent.futures import Future

from cgpu_agent.errors import AgentError, Denied, Exhausted, Unavailable
from cgpu_agent.rpc import peer
from cgpu_agent.rpc.identify import Identified

_CHUNK = 1024 * 1024


class ExeDigests:
    """Hashes callers' programs and remembers, for each connection, the result for one state of the file.

    Args:
        size_limit: bytes; a larger program has no digest.
        time_limit: seconds for one digest.
        at_once: digests in work in all; one for each uid.
    """

    def __init__(self, *, size_limit: int = 256 * 1024 * 1024, time_limit: float = 10.0, at_once: int = 4) -> None:
        self._size_limit = size_limit
        self._time_limit = time_limit
        self._at_once = at_once
        self._lock = threading.Lock()
        self._working_for: set[int] = set()

    async def digest(self, who: Identified) -> str:
        """SHA-256 (64 hex digits) of the file that the caller runs; the same file as at identification.

        Raises:
            Denied: ``CALLER_GONE``, or ``CALLER_CHANGED`` when it runs another file by now.
            Exhausted: ``EXE_DIGEST_BUSY``.
            Unavailable: ``EXE_UNREADABLE``, ``EXE_TOO_LARGE`` or ``EXE_DIGEST_TIMEOUT``.
        """
        who.still_the_same()
        if who.facts.executable is None:
            raise _unreadable()
        state = peer.executable(who.caller.pid)
        remembered = who.remembered_digest
        if remembered is not None and remembered[0] == state and who.alive():
            return remembered[1]
        uid = who.caller.uid
        with self._lock:
            if uid in self._working_for or len(self._working_for) >= self._at_once:
                raise Exhausted("EXE_DIGEST_BUSY", "another program is being hashed", retry_after=1.0)
            self._working_for.add(uid)
        result: Future[str] = Future()
        try:
            threading.Thread(target=self._work, args=(who, result), name="exe-digest", daemon=True).start()
        except RuntimeError as error:
            self._done(uid)
            raise Exhausted("EXE_DIGEST_BUSY", "no thread is free to hash a program", retry_after=1.0) from error
        try:
            return await asyncio.wait_for(asyncio.wrap_future(result), self._time_limit)
        except (asyncio.TimeoutError, TimeoutError):
            raise _timeout() from None

    def _work(self, who: Identified, result: Future[str]) -> None:
        found: str | None = None
        refusal: AgentError = _unreadable()
        try:
            found = self._hash(who)
        except AgentError as error:
            refusal = error
        except OSError as error:
            refusal.__cause__ = error
        finally:
            # Before the waiter hears of it, because it may ask again at once.
            self._done(who.caller.uid)
        if not result.set_running_or_notify_cancel():
            return
        if found is None:
            result.set_exception(refusal)
        else:
            result.set_result(found)

    def _done(self, uid: int) -> None:
        with self._lock:
            self._working_for.discard(uid)

    def _hash(self, who: Identified) -> str:
        deadline = time.monotonic() + self._time_limit
        before = peer.executable(who.caller.pid)
        if before is None:
            raise _unreadable()
        if before.size > self._size_limit:
            raise Unavailable("EXE_TOO_LARGE", f"programs above {self._size_limit} bytes are not hashed")
        digest = hashlib.sha256()
        fd = os.open(f"/proc/{who.caller.pid}/exe", os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            left = before.size
            while left and (chunk := os.read(fd, min(_CHUNK, left))):
                digest.update(chunk)
                left -= len(chunk)
                if time.monotonic() > deadline:
                    raise _timeout()
            # Same process, same file, same content from first to last byte, or no answer.
            after = peer.file_state(fd)
        finally:
            os.close(fd)
        who.still_the_same()
        if left or before != after or before.id != who.facts.executable:
            raise Denied("CALLER_CHANGED", "the caller's program changed while it was read")
        found = digest.hexdigest()
        who.remembered_digest = (before, found)
        return found


def _unreadable() -> Unavailable:
    return Unavailable("EXE_UNREADABLE", "the caller's program file cannot be read here")


def _timeout() -> Unavailable:
    return Unavailable("EXE_DIGEST_TIMEOUT", "the caller's program could not be read in time")
