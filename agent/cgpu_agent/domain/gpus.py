"""Drives the GPU sessions: looks, asks, has it judged, and opens or closes the system-wide ready state.

Whatever casts doubt closes the ready state first; only then does anything else happen. The first act of every start
is to close it, because nobody watched the devices while the agent was away.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from cgpu_agent.backends.base import Clock, GpuEvent, GpuEvidence, GpuInfo, Gpus
from cgpu_agent.domain.gpucollect import GpuCollection
from cgpu_agent.domain.gpuexam import ASK_SECONDS, NONCE_SIZE, GpuExaminer, Refused
from cgpu_agent.domain.gpujudge import Judge
from cgpu_agent.domain.gpurecord import Recorder
from cgpu_agent.domain.gpurules import GpuRules, doubt_of
from cgpu_agent.domain.gpustate import Attempt, GpuState, Reason, Session, Verdict
from cgpu_agent.domain.timefloor import TimeFloor
from cgpu_agent.domain.turns import together
from cgpu_agent.errors import AgentError, DeviceFault, Exhausted, Misuse, Unavailable

POLL_SECONDS: Final = 5.0
_GAP_SECONDS: Final = 5.0  # between the beginnings of two attempts
_CALLER_GAP_SECONDS: Final = 30.0  # the same, where a caller wants one
_LONGEST_WAIT: Final = 300.0
_ASLEEP_SECONDS: Final = 60.0

_LOST = frozenset({"GPU_LOST", "GPU_DRIVER"})
_UNSUPPORTED = "GPU_UNSUPPORTED"
_EVIDENCE = "evidence"
NO_GPUS: Final = Reason("NO_GPUS", "this machine has no GPUs")
STOPPED: Final = Reason("AGENT_STOPPED", "the agent is stopping")
FOREIGN: Final = Reason("GPU_READY_FOREIGN", "the GPUs' ready state was set by somebody else, and was cleared")


@dataclass(frozen=True, slots=True)
class GpuView:
    """The GPUs at one moment.

    Attributes:
        backend: ``nvml``, ``software`` or ``none``.
        state: ``ready`` only while every GPU is trusted and the ready state is set.
        reason: why they are not ready.
        attesting: an attestation is running.
    """

    backend: str
    state: Literal["none", "ready", "not-ready"]
    reason: Reason | None
    epoch: int
    attesting: bool
    sessions: tuple[Session, ...]

    @property
    def line(self) -> str:
        """In words."""
        if self.reason is not None:
            return f"GPUs not ready: {self.reason.message}"
        count = sum(session.phase == "trusted" for session in self.sessions)
        simulated = any(session.verdict is not None and session.verdict.simulated for session in self.sessions)
        return f"{count}/{len(self.sessions)} {'simulated ' if simulated else ''}GPUs trusted"


class GpuSessions:
    """All GPUs of this VM. One event loop's.

    Args:
        judge: see ``Judge``; replace it with ``use``.
        recorder: where the result is put on record, before it takes effect.
        rng: for the jitter of re-attestation.
        nonce: makes 32 fresh bytes.

    Attributes:
        attestations: how many ended ``trusted`` or ``refused``.
    """

    def __init__(
        self,
        gpus: Gpus,
        judge: Judge,
        recorder: Recorder,
        clock: Clock,
        floor: TimeFloor,
        rules: GpuRules,
        *,
        rng: random.Random | None = None,
        nonce: Callable[[], bytes] = lambda: secrets.token_bytes(NONCE_SIZE),
    ) -> None:
        self._gpus = gpus
        self._judge = judge
        self._recorder = recorder
        self._clock = clock
        self._floor = floor
        self._rules = rules
        self._rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._examiner = GpuExaminer(gpus, clock, floor, rules, nonce)
        self.state = GpuState()
        self._device_gate = asyncio.Lock()
        self._may_be_set = True
        self._stuck: Reason | None = None
        self._foreign: Reason | None = None
        self._stopped = False
        self._running: asyncio.Task[None] | None = None
        self._began = -_LONGEST_WAIT
        self._due = -_LONGEST_WAIT
        self._failures = 0
        self.attestations: Counter[str] = Counter()
        self._trusted_at: float | None = None
        self._ticked = clock.monotonic()
        self._recorded = False
        self._unrecorded: Reason | None = None
        self._changed = asyncio.Event()
        self._wake = asyncio.Event()

    # What others see

    @property
    def trust_epoch(self) -> int:
        """What was decided about the GPUs in one epoch is void in the next."""
        return self.state.epoch

    def view(self) -> GpuView:
        state = self.state
        ready = state.gate == "open"
        there = self._examiner.present or bool(state.inventory) or self._rules.count > 0
        kind: Literal["none", "ready", "not-ready"] = "ready" if ready else "not-ready" if there else "none"
        reason = None if ready else state.why if kind == "not-ready" else NO_GPUS
        return GpuView(self._gpus.kind, kind, reason, state.epoch, self._running is not None, state.sessions)

    def trusted(self, uuid: str) -> Verdict:
        """The verdict on a GPU that may be used now.

        Raises:
            Misuse: ``UNKNOWN_GPU``.
            Unavailable: ``GPU_NOT_TRUSTED``.
        """
        session = next((each for each in self.state.sessions if each.info.uuid == uuid), None)
        if session is None:
            raise Misuse("UNKNOWN_GPU", "there is no GPU of this uuid")
        verdict = session.verdict
        if self.state.gate != "open" or verdict is None or verdict.until <= self._clock.monotonic():
            why = session.reason or self.state.why
            raise Unavailable("GPU_NOT_TRUSTED", f"the GPU is not trusted now: {why.slug}", retry_after=2.0)
        return verdict

    @property
    def age(self) -> float | None:
        """Seconds since all GPUs were last attested with success."""
        return None if self._trusted_at is None else self._clock.monotonic() - self._trusted_at

    def line(self) -> str:
        """For the status line; empty where there are no GPUs."""
        view, age = self.view(), self.age
        if view.state == "none":
            return ""
        return view.line if view.reason is not None or age is None else f"{view.line} {int(age // 60)} min ago"

    def problems(self) -> list[Reason]:
        """What an operator should look at."""
        view = self.view()
        if view.state == "none":
            return []
        found = [self._stuck, self._foreign, view.reason]
        return [each for each in found if each is not None]

    async def watch(self) -> AsyncGenerator[GpuView, None]:
        """The view now and after each change, until the sessions stop; who is slow sees the newest only."""
        seen: GpuView | None = None
        while True:
            changed, last, view = self._changed, self._stopped, self.view()
            if view != seen:
                seen = view
                yield view
            if last:
                return
            await changed.wait()

    def heartbeat_age(self, _now: float) -> float:
        """Seconds since the last look at clocks and devices began.

        A device that hangs is not counted: that ends its calls and closes the ready state, while a restart could not
        even end a thread that the driver holds, and would take the boot's evidence away with the GPUs'.
        """
        return self._clock.monotonic() - self._ticked

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # Life

    async def start(self) -> None:
        """Close the ready state before anything else; report it if it was open."""
        found = None
        with contextlib.suppress(AgentError):
            found = await self._gpus.ready(timeout=ASK_SECONDS)
        await self._enforce()
        if found:
            self._found_foreign()

    async def run(self) -> None:
        """Watch over the devices until cancelled; ``start`` was awaited before."""
        await asyncio.gather(self._listen(), self._poll())

    async def stop(self) -> None:
        """Close the ready state and let the devices go. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        self.state.doubt(STOPPED)
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
        await self._enforce()
        self._wake.set()
        self._gpus.close()

    async def _poll(self) -> None:
        while not self._stopped:
            self._wake.clear()
            await self.tick()
            # Not wait_for, which may lose a cancellation that comes together with what it waits for.
            woken = asyncio.ensure_future(self._wake.wait())
            try:
                await asyncio.wait([woken], timeout=POLL_SECONDS)
            finally:
                woken.cancel()

    async def _listen(self) -> None:
        while not self._stopped:
            with contextlib.suppress(AgentError):
                async for event in self._gpus.events():
                    await self.on_event(event)
            if not self._stopped:
                await self.on_event(GpuEvent("watch-lost", None, "the watch ended"))
                await asyncio.sleep(POLL_SECONDS)

    async def on_event(self, event: GpuEvent) -> None:
        """Something happened to the devices."""
        reason = doubt_of(event)
        if reason is not None:
            await self.distrust(reason, lost=event.bdf if event.kind == "vanished" else None)

    async def distrust(self, reason: Reason, *, lost: str | None = None) -> None:
        """Close the ready state now, and attest again."""
        self.state.doubt(reason, lost=lost)
        await self._enforce()
        self._due = min(self._due, self._clock.monotonic())
        self._wake.set()

    async def use(self, judge: Judge) -> None:
        """Judge by something else from now on."""
        self._judge = judge
        await self.distrust(Reason("GPU_TRUST_CHANGED", "what the agent trusts for GPUs has changed"))

    async def tick(self) -> None:
        """Look at clocks and devices; begin to attest when it is time."""
        if self._stopped:
            return
        now = self._clock.monotonic()
        asleep, self._ticked = now - self._ticked > _ASLEEP_SECONDS, now
        if self.state.expire(now):
            self._due = now
        if self._floor.stepped():
            self.state.doubt(Reason("CLOCK_STEPPED", "the clock was set while the agent ran"))
            self._due = now
        if asleep:
            self.state.doubt(Reason("RESUMED", "the machine or the agent stood still for a while"))
            self._due = now
        await self._enforce()
        await self._look()
        if self._running is None and self._examiner.present and now >= max(self._due, self._began + _GAP_SECONDS):
            self._begin()

    async def settled(self) -> None:
        """Wait until no attestation is running."""
        while self._running is not None:
            await asyncio.wait([self._running])

    # The ready state

    async def _enforce(self) -> None:
        """Bring the devices' ready state down to what the sessions allow; never raises."""
        async with self._device_gate:
            if self.state.gate == "closed" and self._may_be_set:
                await self._clear()
        self._tell()
        if self.state.gate == "closed" and self._recorded:
            self._recorded, self._unrecorded = False, self.state.why
        await self._record_drop()

    async def _clear(self) -> None:
        try:
            await self._gpus.set_ready(False, timeout=ASK_SECONDS)
        except AgentError as error:
            if error.slug != _UNSUPPORTED:
                self._stuck = Reason("GPU_GATE_STUCK", f"the GPUs' ready state cannot be cleared: {error.message}")
                return
        self._may_be_set, self._stuck = False, None

    async def _record_drop(self) -> None:
        if self._unrecorded is None:
            return
        reason, self._unrecorded = self._unrecorded, None
        try:
            await self._recorder.dropped(reason)
        except AgentError:
            self._unrecorded = self._unrecorded or reason  # tried again before the next verdict is recorded

    def _found_foreign(self) -> None:
        self._foreign = FOREIGN
        self._unrecorded = FOREIGN
        self._may_be_set = True
        self.state.doubt(FOREIGN)

    # Looking

    async def _look(self) -> None:
        """Compare the devices and their ready state with what is believed of them."""
        try:
            if not self.state.see(await self._examiner.inventory()):
                self._due = min(self._due, self._clock.monotonic())
            if self._examiner.present:
                await self._compare_ready()
        except AgentError as error:
            if error.slug != _UNSUPPORTED:
                self._cannot_look(error)
        await self._enforce()

    async def _compare_ready(self) -> None:
        async with self._device_gate:  # an opening is not looked at half-way
            found = await self._gpus.ready(timeout=ASK_SECONDS)
            if found and self.state.gate == "closed" and not self._may_be_set:
                self._found_foreign()
            elif found is False and self.state.gate == "open":
                self.state.doubt(Reason("GPU_READY_CLEARED", "somebody cleared the GPUs' ready state"))
                self._due = min(self._due, self._clock.monotonic())

    def _cannot_look(self, error: AgentError) -> None:
        reason = Reason(error.slug, error.message)
        if self.state.gate != "closed" or (self._running is not None and self.state.why != reason):
            self.state.doubt(reason)
        else:
            self.state.why = reason  # no new doubt, and no new epoch, every few seconds

    # Attesting

    async def attest(self) -> None:
        """Attest now, or join the attestation that runs. While it runs nothing is dropped.

        Raises:
            Unavailable: ``NO_GPUS``.
            Exhausted: ``GPU_ATTEST_LIMIT``: the last one is only just over.
        """
        if not self._examiner.present or self._stopped:
            raise Unavailable(NO_GPUS.slug, NO_GPUS.message)
        if self._running is None:
            wait = self._began + _CALLER_GAP_SECONDS - self._clock.monotonic()
            if wait > 0:
                raise Exhausted("GPU_ATTEST_LIMIT", "the GPUs were attested only just now", retry_after=wait)
            self._begin()
        if self._running is not None:
            await asyncio.shield(self._running)

    def _begin(self) -> None:
        self._began = self._clock.monotonic()
        self._due = self._began + _LONGEST_WAIT
        self._running = asyncio.create_task(self._attempt())
        self._running.add_done_callback(self._ended)

    def _ended(self, _task: asyncio.Task[None]) -> None:
        self._running = None
        now = self._clock.monotonic()
        trusted = self.state.gate == "open"
        self.attestations["trusted" if trusted else "refused"] += 1
        if trusted:
            self._failures = 0
            self._trusted_at = now
            self._due = now + self._rules.reattest_seconds * self._rng.uniform(0.5, 0.8)
        else:
            self._failures += 1
            wait = min(_GAP_SECONDS * 2 ** min(self._failures, 8), _LONGEST_WAIT)
            self._due = min(self._due, now + wait * self._rng.uniform(0.8, 1.0))
        self._tell()

    async def _attempt(self) -> None:
        try:
            await self._attest_all()
        except Exception:
            self.state.doubt(Reason("INTERNAL", "the attestation of the GPUs failed within the agent"))
            raise
        finally:
            await self._enforce()

    async def _attest_all(self) -> None:
        await self._enforce()
        if self.state.gate == "closed" and self._may_be_set:
            return  # it cannot be closed: see ``_stuck``
        try:
            attempt = self.state.begin(await self._examiner.inventory())
        except AgentError as error:
            self._cannot_look(error)
            return
        await self._enforce()
        if not attempt.devices:
            return
        try:
            verdicts = await self._examiner.examine(attempt, self._judge)
            outcome = self.state.accept(attempt, verdicts)
            if outcome == "opening":
                await self._open(attempt, verdicts)
            elif outcome == "kept":
                self.state.see(await self._examiner.inventory())
        except Refused as refused:
            self.state.refuse(attempt, refused.whole, refused.devices)
        except AgentError as error:
            self.state.refuse(attempt, Reason(error.slug, error.message), {})

    async def _open(self, attempt: Attempt, verdicts: Mapping[str, Verdict]) -> None:
        """Put the verdict on record, set the ready state, and look again: what came in between must not stay in."""
        await self._record_drop()
        if self._unrecorded is not None:
            raise Unavailable("GPU_NOT_RECORDED", "the end of the last verdict could not be recorded yet")
        await self._recorder.attested(verdicts)
        self._recorded = True
        async with self._device_gate:
            if not self.state.current(attempt):
                return
            self._may_be_set = True
            gated = True
            try:
                await self._gpus.set_ready(True, timeout=ASK_SECONDS)
            except Unavailable as error:
                if error.slug != _UNSUPPORTED:
                    raise
                gated = False
            devices = await self._examiner.inventory()
            if gated and await self._gpus.ready(timeout=ASK_SECONDS) is not True:
                raise DeviceFault("GPU_ERROR", "the GPUs did not take their ready state")
            self.state.confirm(attempt, devices)

    # Reports for evidence and for callers

    async def collect(self, nonce: bytes) -> GpuCollection:
        """Every device's report over these 32 bytes, of an inventory that stood still meanwhile.

        Whether they are trusted does not matter here: whoever reads the evidence judges for himself.

        Raises:
            Unavailable: ``NO_GPUS``; ``GPU_INVENTORY``; ``GPU_INVENTORY_CHANGED``: something happened to the devices.
            DeviceFault: from a device: there are all reports, or none.
        """
        devices = await self._seen()
        if not devices:
            raise Unavailable(NO_GPUS.slug, NO_GPUS.message)
        epoch = self.state.epoch
        answers = await together(*(self._ask(_EVIDENCE, info.uuid, nonce) for info in devices))
        await self._seen()
        trusted = frozenset(each.info.uuid for each in self.state.sessions if each.phase == "trusted")
        collection = GpuCollection(
            self._gpus.kind, self._rules.count, self.state.gate == "open", epoch, trusted, devices, answers
        )
        self.require_still(collection)
        return collection

    def require_still(self, collection: GpuCollection) -> None:
        """Raises ``Unavailable`` (``GPU_INVENTORY_CHANGED``) if anything happened to the devices since."""
        if collection.epoch != self.state.epoch:
            raise Unavailable(
                "GPU_INVENTORY_CHANGED", "something happened to the GPUs while they were asked", retry_after=2.0
            )

    async def _seen(self) -> tuple[GpuInfo, ...]:
        """The devices, by PCI address; others than before are a doubt."""
        devices = await self._examiner.inventory()
        if not self.state.see(devices):
            await self._enforce()
        return tuple(sorted(devices, key=lambda info: (info.bdf, info.uuid)))

    async def report(self, owner: int, uuid: str, nonce: bytes) -> GpuEvidence:
        """A device's report over exactly these 32 bytes.

        Raises:
            Misuse: ``UNKNOWN_GPU``, ``BAD_NONCE``.
            DeviceFault: from the device.
        """
        if len(nonce) != NONCE_SIZE:
            raise Misuse("BAD_NONCE", f"the nonce of a GPU report has {NONCE_SIZE} bytes")
        if uuid not in {info.uuid for info in self.state.inventory}:
            raise Misuse("UNKNOWN_GPU", "there is no GPU of this uuid")
        return await self._ask(owner, uuid, nonce)

    async def _ask(self, owner: object, uuid: str, nonce: bytes) -> GpuEvidence:
        try:
            return await self._examiner.ask(owner, uuid, nonce)
        except DeviceFault as error:
            if error.slug in _LOST:
                await self.distrust(
                    Reason(error.slug, error.message), lost=uuid if error.slug == "GPU_LOST" else None
                )
            raise
