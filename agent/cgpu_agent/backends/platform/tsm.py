"""Reports by way of the kernel: configfs-tsm, for guests that run on the CPU's isolation without a paravisor.

Source: Linux, Documentation/ABI/testing/configfs-tsm-report. A directory made below ``report`` is a request of its
own; ``generation`` counts what was written to it, so that whoever made it sees when somebody else wrote, too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Protocol

from cgpu_agent.backends.base import PlatformKind, PlatformReport
from cgpu_agent.backends.worker import Faults, Job, Worker
from cgpu_agent.errors import DeviceFault, HostileInput, Misuse, Unavailable
from cgpu_agent.wire.snp import parse_snp_report
from cgpu_agent.wire.snpcertificates import parse_certificate_table
from cgpu_agent.wire.tdx import parse_td_quote

ROOT: Final = Path("/sys/kernel/config/tsm/report")
MAX_BLOB: Final = 32 << 10
_MAX_TEXT: Final = 64
_ATTEMPTS: Final = 4

_KINDS: Final[dict[str, PlatformKind]] = {"sev_guest": "tsm-snp", "tdx_guest": "tsm-tdx"}
_BOUND: Final[dict[PlatformKind, Callable[[bytes], bytes]]] = {
    "tsm-snp": lambda data: parse_snp_report(data).report_data,
    "tsm-tdx": lambda data: parse_td_quote(data).body.report_data,
}


class Requests(Protocol):
    """The directory ``report``: requests by name, and their attributes. Every method raises ``OSError``."""

    def make(self, name: str) -> None: ...

    def remove(self, name: str) -> None: ...

    def read(self, name: str, attribute: str, limit: int) -> bytes:
        """Content, at most one byte more than ``limit``."""

    def write(self, name: str, attribute: str, data: bytes) -> None: ...


class ConfigFs:
    """``Requests`` in the kernel."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root: Final = root

    def make(self, name: str) -> None:
        (self._root / name).mkdir(mode=0o700)

    def remove(self, name: str) -> None:
        (self._root / name).rmdir()

    def read(self, name: str, attribute: str, limit: int) -> bytes:
        with (self._root / name / attribute).open("rb", buffering=0) as file:
            parts = bytearray()
            while len(parts) <= limit and (part := file.read(limit + 1 - len(parts))):
                parts += part
        return bytes(parts)

    def write(self, name: str, attribute: str, data: bytes) -> None:
        # The kernel takes what was written when the file is closed, and says there what is wrong with it.
        descriptor = os.open(self._root / name / attribute, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)


class Tsm:
    """``Platform`` by configfs-tsm. The kernel may hold the thread that asks, so it has one of its own.

    Args:
        requests: the kernel's directory.
        kind: as ``find_kind`` found it.
    """

    def __init__(self, requests: Requests, kind: PlatformKind) -> None:
        self.kind: PlatformKind = kind
        self._requests: Final = requests
        self._worker: Final = Worker("tsm", _perform, lambda: None, _FAULTS, queue_limit=16)

    async def report(self, user_data: bytes | None, *, timeout: float) -> PlatformReport:
        if user_data is not None and len(user_data) != 64:
            raise Misuse("BAD_USER_DATA", "a platform report binds 64 bytes")
        data = bytes(64) if user_data is None else user_data
        report, table = await self._worker.run(lambda _: self._ask(data), timeout=timeout)
        missing = [("platform-claims", "a bare report names no vTPM")]
        certificates: tuple[bytes, ...] = ()
        if self.kind == "tsm-snp":
            reason = "the host gave none"
            try:
                certificates = parse_certificate_table(table)
            except HostileInput as error:
                reason = error.message
            if not certificates:
                missing.append(("platform-certificates", reason))
        return PlatformReport(self.kind, report, certificates, fresh=user_data is not None, missing=tuple(missing))

    def close(self) -> None:
        """Stop the thread. Idempotent."""
        self._worker.close()

    def _ask(self, user_data: bytes) -> tuple[bytes, bytes]:
        """The report for these bytes, and what the host put beside it."""
        for _ in range(_ATTEMPTS):
            with _request(self._requests) as name:
                found = self._ask_once(name, user_data)
            if found is not None:
                break
        else:
            raise DeviceFault("TSM_ERROR", "others kept writing to our request for a report", retry_after=1.0)
        if _BOUND[self.kind](found[0]) != user_data:
            raise HostileInput("REPORT_DATA_MISMATCH", "the kernel's report is for other user data")
        return found

    def _ask_once(self, name: str, user_data: bytes) -> tuple[bytes, bytes] | None:
        """Report and auxiliary blob; ``None`` where somebody else wrote to the request meanwhile."""
        before = self._generation(name)
        if _provider(self._requests, name) != self.kind:
            raise DeviceFault("TSM_ERROR", "the kernel's reports come from somewhere else than before")
        self._requests.write(name, "inblob", user_data)
        report = _read(self._requests, name, "outblob", MAX_BLOB)
        try:
            table = _read(self._requests, name, "auxblob", MAX_BLOB)
        except FileNotFoundError:
            table = b""
        return (report, table) if self._generation(name) == before + 1 else None

    def _generation(self, name: str) -> int:
        text = _read(self._requests, name, "generation", _MAX_TEXT).strip()
        if not text.isdigit():
            raise HostileInput("BAD_VALUE", "the kernel's count of writes is no number")
        return int(text)


def find_kind(requests: Requests) -> PlatformKind | None:
    """What makes reports here: ``None`` where nothing does, or something that is not known.

    Raises ``DeviceFault`` ``TSM_ERROR``: there is such an interface, but it cannot be used.
    """
    try:
        with _request(requests) as name:
            return _provider(requests, name)
    except DeviceFault as fault:
        cause = fault.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOENT, errno.ENXIO, errno.ENOTTY):
            return None
        raise


def _provider(requests: Requests, name: str) -> PlatformKind | None:
    text = _read(requests, name, "provider", _MAX_TEXT).strip()
    return _KINDS.get(text.decode("ascii", "replace"))


def _read(requests: Requests, name: str, attribute: str, limit: int) -> bytes:
    data = requests.read(name, attribute, limit)
    if len(data) > limit:
        raise HostileInput("TOO_LARGE", f"the kernel's {attribute} has more than {limit} bytes")
    return data


@contextlib.contextmanager
def _request(requests: Requests) -> Iterator[str]:
    """A request of our own, gone afterwards. ``OSError`` becomes ``DeviceFault``."""
    name = f"cgpu-agent-{secrets.token_hex(8)}"
    try:
        requests.make(name)
        try:
            yield name
        finally:
            requests.remove(name)
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "unknown error")
        raise DeviceFault(
            "TSM_ERROR", f"the kernel's interface for reports failed ({code})", retry_after=1.0
        ) from error


def _perform(job: Job) -> None:
    try:
        job.settle(job.work(None), None)
    except BaseException as error:  # noqa: BLE001 - the thread outlives whatever goes wrong in a job
        job.settle(None, error)


_FAULTS: Final = Faults(
    lambda: DeviceFault("TSM_TIMEOUT", "the kernel made no report in time", retry_after=1.0),
    lambda: DeviceFault("TSM_CLOSED", "the kernel's interface for reports is no longer in use"),
    lambda: Unavailable("TSM_QUEUE_FULL", "too many wait for a report of the kernel", retry_after=1.0),
)
