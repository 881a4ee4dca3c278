"""The backend: ``backends.base.Gpus`` over the socket of software GPUs.

It fetches and hands on; it judges nothing. Everything runs on the caller's event loop, and each message has a
deadline, so a GPU that hangs holds up nobody but those who wait for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Final, Literal, TypeVar

from cgpu_agent.backends.base import GpuEvent, GpuEvidence, GpuInfo
from cgpu_agent.backends.gpu.hub import Hub
from cgpu_agent.backends.gpu.software import commands
from cgpu_agent.backends.gpu.software.commands import Inventory
from cgpu_agent.backends.gpu.software.frames import DRIVER
from cgpu_agent.backends.gpu.software.link import Link
from cgpu_agent.backends.gpu.software.requester import Requester, Session, chain_pem
from cgpu_agent.backends.gpu.software.transferclient import Transfers
from cgpu_agent.errors import DeviceFault, HostileInput, Misuse, Unavailable
from cgpu_agent.wire.spdm import MAX_REPORT, NONCE_SIZE
from cgpu_agent.wire.strictjson import Fields

T = TypeVar("T")

_WATCH_TIMEOUT: Final = 5.0
_MAX_FILE: Final = 48 * 1024


class _Peer:
    """One endpoint, asked one thing at a time; its connection is made anew after a failure."""

    def __init__(self, path: Path, endpoint: int) -> None:
        self._path: Final = path
        self._endpoint: Final = endpoint
        self._turn: Final = asyncio.Lock()
        self._link: Link | None = None
        self._requester: Requester | None = None
        self.busy_until: float | None = None

    async def run(self, work: Callable[[Link, float], Awaitable[T]], deadline: float) -> T:
        """Run ``work``, which must be idempotent, when its turn comes: twice if a kept connection proves dead.

        Raises ``DeviceFault`` (``GPU_TIMEOUT``) and what ``work`` raises.
        """
        try:
            await asyncio.wait_for(self._turn.acquire(), max(0.0, deadline - time.monotonic()))
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise DeviceFault("GPU_TIMEOUT", "the GPU is busy", retry_after=1.0) from error
        self.busy_until = deadline
        try:
            kept = self._link
            if kept is not None and not kept.broken:
                try:
                    return await work(kept, deadline)
                except DeviceFault as fault:
                    if fault.slug != "GPU_DRIVER":
                        raise
            self._requester = None
            self._link = Link(self._path, self._endpoint)
            return await work(self._link, deadline)
        finally:
            self.busy_until = None
            self._turn.release()

    async def requester(self, link: Link, deadline: float) -> Requester:
        """The conversation on this link, negotiated once. Within ``run`` only."""
        if self._requester is None:
            self._requester = await Requester.connect(link, deadline)
        return self._requester

    def close(self) -> None:
        if self._link is not None:
            self._link.close()


class SoftwareGpus:
    """``Gpus`` of a software GPU process; see ``backends.base``.

    Args:
        path: its Unix socket. It need not be there yet.
        interval: seconds between two looks of the watch.
    """

    kind: Literal["nvml", "software", "none"] = "software"

    def __init__(self, path: Path, *, interval: float = 0.5) -> None:
        self._path: Final = path
        self._interval: Final = interval
        self._driver: Final = _Peer(path, DRIVER)
        self._watched: Final = _Peer(path, DRIVER)
        self._peers: Final[dict[int, _Peer]] = {}
        self._hub: Final = Hub()
        self._watch: asyncio.Task[None] | None = None
        self._seen: Inventory | None = None
        self._closed = False

    async def pci(self, *, timeout: float) -> tuple[str, ...]:
        return (await self._inventory(self._driver, _deadline(timeout))).pci

    async def list(self, *, timeout: float) -> tuple[GpuInfo, ...]:
        found = await self._inventory(self._driver, _deadline(timeout))
        return tuple(found.gpus.values())

    async def evidence(self, uuid: str, nonce: bytes, *, timeout: float) -> GpuEvidence:
        if len(nonce) != NONCE_SIZE:
            raise Misuse("BAD_NONCE", f"the nonce of a GPU report has {NONCE_SIZE} bytes")
        deadline = _deadline(timeout)
        peer = await self._find(uuid, deadline)

        async def collect(link: Link, until: float) -> GpuEvidence:
            chain = await (await peer.requester(link, until)).chain(until)
            result = _result(await link.vendor(commands.encode_request("report", nonce=nonce.hex()), until))
            try:
                report = result.base64("report", MAX_REPORT)
                result.end()
                return GpuEvidence(report, chain_pem(chain))
            except HostileInput as error:
                raise _no_answer() from error

        return await peer.run(collect, deadline)

    async def ready(self, *, timeout: float) -> bool | None:
        result = await self._ask(_deadline(timeout), "ready")
        try:
            found = result.boolean("ready")
            result.end()
        except HostileInput as error:
            raise _no_answer() from error
        return found

    async def set_ready(self, ready: bool, *, timeout: float) -> None:
        try:
            await self._ask(_deadline(timeout), "set-ready", ready=ready)
        except DeviceFault as fault:
            raise DeviceFault(fault.slug, fault.message, outcome_unknown=True) from fault

    async def establish_session(self, uuid: str, *, timeout: float) -> Session:
        """Open an SPDM session with a GPU, on a connection of its own. Raises as ``evidence``.

        Whether ``Session.chain`` is that of accepted evidence is for the caller to compare.
        """
        deadline = _deadline(timeout)
        endpoint = await self._endpoint(uuid, deadline)
        link = Link(self._path, endpoint)
        try:
            return await (await Requester.connect(link, deadline)).session(deadline)
        except BaseException:
            link.close()
            raise

    async def establish_transfers(self, uuid: str, *, timeout: float) -> Transfers:
        """Open an SPDM session with a GPU for encrypted transfers. Raises as ``establish_session``."""
        return Transfers(await self.establish_session(uuid, timeout=timeout), self._path)

    async def collateral(self, *, timeout: float) -> dict[str, bytes]:
        """What a relying party needs to judge these GPUs: file name -> content. Raises ``DeviceFault``."""
        deadline = _deadline(timeout)
        try:
            names = (await self._ask(deadline, "collateral", name=None)).items("names", 32)
            found: dict[str, bytes] = {}
            for name in names:
                found[str(name)] = (await self._ask(deadline, "collateral", name=name)).base64("content", _MAX_FILE)
        except HostileInput as error:
            raise _no_answer() from error
        return found

    async def misbehave(self, name: str, *, gpu: int | None = None, timeout: float) -> None:
        """Tell GPU number ``gpu`` (from 1), or all, to be bad: one of ``commands.MISBEHAVIOURS``."""
        await self._ask(_deadline(timeout), "misbehave", name=name, gpu=gpu)

    async def behave(self, *, timeout: float) -> None:
        """End every misbehaviour."""
        await self._ask(_deadline(timeout), "behave")

    def events(self) -> AsyncIterator[GpuEvent]:
        follower = self._hub.follow()
        if self._watch is None and not self._closed:
            self._watch = asyncio.get_running_loop().create_task(self._watching())
        return follower

    def heartbeat_age(self, now: float) -> float:
        peers = (self._driver, self._watched, *self._peers.values())
        overdue = [now - peer.busy_until for peer in peers if peer.busy_until is not None]
        return max([0.0, *overdue])

    def close(self) -> None:
        self._closed = True
        if self._watch is not None:
            self._watch.cancel()
        self._hub.close()
        for peer in (self._driver, self._watched, *self._peers.values()):
            peer.close()

    # --- the driver ---

    async def _ask(self, deadline: float, command: str, **arguments: object) -> Fields:
        request = commands.encode_request(command, **arguments)
        return _result(await self._driver_run(self._driver, request, deadline))

    async def _inventory(self, peer: _Peer, deadline: float) -> Inventory:
        result = _result(await self._driver_run(peer, commands.encode_request("inventory"), deadline))
        try:
            found = Inventory.parse(result)
        except HostileInput as error:
            raise _no_answer() from error
        if self._seen is None:
            self._seen = found
        return found

    async def _driver_run(self, peer: _Peer, request: bytes, deadline: float) -> bytes:
        if self._closed:
            raise DeviceFault("GPU_DRIVER", "the GPUs are no longer in use")
        return await peer.run(lambda link, until: link.vendor(request, until), deadline)

    async def _endpoint(self, uuid: str, deadline: float) -> int:
        found = await self._inventory(self._driver, deadline)
        for endpoint, info in found.gpus.items():
            if info.uuid == uuid:
                return endpoint
        raise DeviceFault("GPU_LOST", "the driver does not see this GPU")

    async def _find(self, uuid: str, deadline: float) -> _Peer:
        endpoint = await self._endpoint(uuid, deadline)
        return self._peers.setdefault(endpoint, _Peer(self._path, endpoint))

    # --- the watch ---

    async def _watching(self) -> None:
        while True:
            before = self._seen
            try:
                found = await self._inventory(self._watched, _deadline(_WATCH_TIMEOUT))
            except DeviceFault as fault:
                self._hub.lose("driver", fault.message)
            else:
                self._hub.regain("driver")
                for event in changes(before, found):
                    self._hub.publish(event)
                self._seen = found
            await asyncio.sleep(self._interval)


def changes(before: Inventory | None, after: Inventory) -> list[GpuEvent]:
    """What happened between two looks at the driver; what cannot be told is ``watch-lost``."""
    if before is None:
        return []
    events: list[GpuEvent] = []
    old = {info.bdf: info.uuid for info in before.gpus.values()}
    new = {info.bdf: info.uuid for info in after.gpus.values()}
    if before.instance != after.instance:
        events.append(GpuEvent("driver-reloaded", None, "the GPUs' process was started anew"))
    events += [GpuEvent("vanished", bdf, f"{uuid} is gone") for bdf, uuid in old.items() if new.get(bdf) != uuid]
    events += [GpuEvent("appeared", bdf, f"{uuid} is there") for bdf, uuid in new.items() if old.get(bdf) != uuid]
    if not events and before.generation != after.generation:
        events.append(GpuEvent("watch-lost", None, "something changed and changed back between two looks"))
    return events


def _deadline(timeout: float) -> float:
    return time.monotonic() + timeout


def _result(answer: bytes) -> Fields:
    try:
        found = commands.parse_answer(answer)
    except HostileInput as error:
        raise _no_answer() from error
    if isinstance(found, str):
        raise Unavailable("GPU_UNSUPPORTED", "a software GPU has no such thing")
    return found


def _no_answer() -> DeviceFault:
    return DeviceFault("GPU_ERROR", "the GPU's driver sent something that is no answer")
