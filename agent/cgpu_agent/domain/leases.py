"""Who has which memory on lease: quotas before anything is made, and to everybody else a lease does not exist."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

from cgpu_agent.backends.memory import SharedMemory
from cgpu_agent.backends.workmemory import WorkMemory
from cgpu_agent.domain.caller import Caller
from cgpu_agent.errors import Denied, Exhausted, Misuse, Unavailable
from cgpu_agent.wire.lease import ID_SIZE


class Process(Protocol):
    """A caller's process, as the kernel identifies it."""

    @property
    def caller(self) -> Caller: ...

    @property
    def pidfd(self) -> int | None:
        """Readable when it has ended; ``None`` where the kernel has no such thing."""

    def kept(self) -> Process:
        """The same, for whoever outlives the connection; to be closed. Raises ``Denied`` (``CALLER_GONE``)."""

    def close(self) -> None:
        """Let go of its pidfd; from here on it counts as gone."""

    def is_same_process(self, other: Any) -> bool:
        """Whether the other is this very process, and lives."""

    def still_the_same(self) -> None:
        """Raises ``Denied`` when it is gone or is not what it was."""


@dataclass(frozen=True, slots=True)
class LeaseLimits:
    """Bytes of one lease, of all leases of one uid, and of all in all."""

    each: int
    per_uid: int
    total: int


class Lease:
    """Memory on lease; ``busy`` while it is being filled.

    Attributes:
        id: 128 random bits. It names the lease and gives no right to it.
    """

    def __init__(
        self, holder: Process, memory: SharedMemory | WorkMemory, source: int | None, kept: bytes | None = None
    ) -> None:
        self.id = kept or secrets.token_bytes(ID_SIZE)
        self.holder = holder
        self._memory = memory
        self.busy = False
        self._source = source
        self._restarted = kept is not None
        self._lock = threading.Lock()

    @property
    def memory(self) -> SharedMemory:
        """Where the agent writes and its holder reads. Raises ``Misuse`` (``LEASE_KIND``)."""
        self.require_kind(writable=False)
        return cast("SharedMemory", self._memory)

    @property
    def work(self) -> WorkMemory:
        """Where its holder writes. Raises ``Misuse`` (``LEASE_KIND``)."""
        self.require_kind(writable=True)
        return cast("WorkMemory", self._memory)

    def require_kind(self, *, writable: bool) -> None:
        """Raises ``Misuse`` (``LEASE_KIND``)."""
        if isinstance(self._memory, WorkMemory) is not writable:
            how = "only reads" if writable else "writes to"
            raise Misuse("LEASE_KIND", f"this lease is of memory that its holder {how}")

    @property
    def kept_by(self) -> int:
        """The descriptor by which the memory can be kept beyond this process; stays the memory's."""
        return self._memory.kept_by

    def take_descriptor(self) -> int:
        """The memory's descriptor for its holder, once; whoever takes it closes it."""
        return self._memory.take_descriptor()

    def source(self) -> int:
        """A descriptor of the sealed object that came with the lease, for the asker to close. It outlives the lease:
        a number that was closed and given out again would be another file.

        Raises ``Misuse`` (``NO_SOURCE``), ``Unavailable`` (``SOURCE_LOST``).
        """
        if self._restarted:
            raise Unavailable(
                "SOURCE_LOST",
                "the agent started anew and has the sealed object's descriptor no more; take a new lease",
                retry_after=0.1,
            )
        with self._lock:
            if self._source is None:
                raise Misuse("NO_SOURCE", "the lease came without a descriptor of a sealed object, or has ended")
            return os.dup(self._source)

    def close(self) -> None:
        """Wipe, and let go of memory and source."""
        with self._lock:
            self._source = None
        self._memory.close()


class Leases:
    """All leases. Any thread may use it."""

    def __init__(self, limits: LeaseLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._table: dict[bytes, Lease] = {}
        self._bytes: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._table)

    @property
    def total_bytes(self) -> int:
        """On lease to anybody."""
        with self._lock:
            return self._bytes.total()

    @contextlib.contextmanager
    def granted(self, holder: Process, size: int, source: int | None, *, writable: bool = False) -> Iterator[Lease]:
        """A new lease, which ends with the block, whatever happens there. ``source`` stays its owner's.

        Args:
            writable: its holder writes there, too.

        Raises:
            Misuse: ``LEASE_SIZE``.
            Exhausted: ``LEASE_LIMIT``.
            Unavailable: ``NO_MEMORY``.
        """
        make = WorkMemory if writable else SharedMemory
        with self._charged(holder.caller.uid, size), self._listed(Lease(holder, make(size), source)) as lease:
            yield lease

    @contextlib.contextmanager
    def resumed(self, holder: Process, name: bytes, memory: SharedMemory | WorkMemory) -> Iterator[Lease]:
        """A lease of an earlier run of the agent, by its name and with its memory, as ``granted``: as limits allow.

        What a lease gives is memory alone, so policy is not asked again: it will be, for whatever shall go in there
        or out.
        """
        lease = Lease(holder, memory, None, name)
        try:
            with self._charged(holder.caller.uid, memory.size), self._listed(lease):
                yield lease
        finally:
            lease.close()

    @contextlib.contextmanager
    def _listed(self, lease: Lease) -> Iterator[Lease]:
        try:
            with self._lock:
                self._table[lease.id] = lease
            yield lease
        finally:
            with self._lock:
                self._table.pop(lease.id, None)
            lease.close()

    @contextlib.contextmanager
    def borrowed(self, name: bytes, process: Process) -> Iterator[Lease]:
        """The lease of this name, for one use at a time, if this process holds it.

        Raises:
            Denied: ``NO_LEASE``, also for somebody else's; as ``still_the_same``.
            Misuse: ``LEASE_KIND``.
            Exhausted: ``LEASE_BUSY``.
        """
        with self._lock:
            lease = self._find(name, process)
            lease.require_kind(writable=False)
            if lease.busy:
                raise Exhausted("LEASE_BUSY", "the lease is being filled already", retry_after=0.5)
            lease.busy = True
        try:
            lease.holder.still_the_same()
            yield lease
        finally:
            lease.busy = False

    def work(self, name: bytes, process: Process) -> WorkMemory:
        """The memory of this name that its holder writes to, if this process is its holder; for any number of uses.

        Raises ``Denied`` (``NO_LEASE``), ``Misuse`` (``LEASE_KIND``).
        """
        with self._lock:
            return self._find(name, process).work

    def _find(self, name: bytes, process: Process) -> Lease:
        lease = self._table.get(name)
        if lease is None or not lease.holder.is_same_process(process):
            raise Denied("NO_LEASE", "this process holds no such lease")
        return lease

    @contextlib.contextmanager
    def _charged(self, uid: int, size: int) -> Iterator[None]:
        limits = self._limits
        if not 1 <= size <= limits.each:
            raise Misuse("LEASE_SIZE", f"a lease has 1 to {limits.each} bytes here (limits.lease_mib)")
        with self._lock:
            if self._bytes.get(uid, 0) + size > limits.per_uid or self._bytes.total() + size > limits.total:
                raise Exhausted("LEASE_LIMIT", "too much memory is on lease; end a lease, or wait", retry_after=1.0)
            self._bytes[uid] += size
        try:
            yield
        finally:
            with self._lock:
                self._bytes[uid] -= size
                if not self._bytes[uid]:
                    del self._bytes[uid]
