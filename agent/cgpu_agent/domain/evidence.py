"""Evidence by group commit: callers that arrive while a quote is being made share the next one.

There are two lanes, with GPUs and without, so that boot evidence never waits for a GPU.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cgpu_agent.backends.base import Clock, TpmCommands
from cgpu_agent.domain.audit import AuditLog
from cgpu_agent.domain.boot import AGENT, BootQuote, MeasuredBoot, consistent_quote
from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.gpucollect import GpuCollection
from cgpu_agent.domain.gpus import NO_GPUS, GpuSessions
from cgpu_agent.domain.platform import PlatformBelow
from cgpu_agent.domain.turns import RoundRobin, together
from cgpu_agent.errors import AgentError, Misuse, Unavailable
from cgpu_agent.wire.bundle import Bundle, BundleFrame, SignedAttest
from cgpu_agent.wire.extradata import manifest_extra_data
from cgpu_agent.wire.gpunonce import gpu_batch_nonce
from cgpu_agent.wire.manifest import AuditAnchor, LogDigest, Manifest
from cgpu_agent.wire.merkle import Tree
from cgpu_agent.wire.metrics import Histogram
from cgpu_agent.wire.platformwords import PlatformWords
from cgpu_agent.wire.statement import (
    MAX_NONCE,
    MAX_PUBLIC_KEY,
    MAX_STATEMENT,
    MAX_USER_DATA,
    MIN_NONCE,
    KeyRelease,
    Statement,
    check_audience,
)
from cgpu_agent.wire.tpm import PcrSelection

MAX_BATCH = 256
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, MAX_BATCH)

_Waiting = tuple[bytes, "asyncio.Future[bytes]"]


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller asks for; checked by ``Evidence.get``."""

    nonce: bytes
    audience: str
    user_data: bytes | None = None
    public_key: bytes | None = None
    gpus: bool = False
    """The GPUs too."""

    def check(self) -> None:
        """Raises ``Misuse``: ``BAD_NONCE``, ``BAD_AUDIENCE``, ``BAD_BINDING``."""
        if not MIN_NONCE <= len(self.nonce) <= MAX_NONCE:
            raise Misuse("BAD_NONCE", f"the nonce must have {MIN_NONCE} to {MAX_NONCE} bytes")
        if not check_audience(self.audience):
            raise Misuse("BAD_AUDIENCE", "name the relying party: 1 to 255 bytes without control characters")
        if self.user_data is not None and len(self.user_data) > MAX_USER_DATA:
            raise Misuse("BAD_BINDING", f"user_data must have at most {MAX_USER_DATA} bytes")
        if self.public_key is not None and not 1 <= len(self.public_key) <= MAX_PUBLIC_KEY:
            raise Misuse("BAD_BINDING", f"public_key must have 1 to {MAX_PUBLIC_KEY} bytes")


@dataclass(frozen=True, slots=True)
class _Reports:
    """What others than the TPM say for one batch; ``missing`` as in ``Manifest.missing``."""

    gpus: GpuCollection | None
    platform: PlatformWords | None
    missing: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Collected:
    """What one batch shares."""

    manifest: bytes
    boot: BootQuote
    boot_log: bytes | None
    systemd_log: bytes | None
    agent_log: bytes
    reports: _Reports


class _Lane:
    """Those who wait for the next batch, and the task that makes batches while somebody waits."""

    def __init__(self) -> None:
        self.waiting: RoundRobin[_Waiting] = RoundRobin()
        self.callers = Histogram(_BATCH_SIZES)
        self.runner: asyncio.Task[None] | None = None

    def next_batch(self) -> list[_Waiting]:
        """At most ``MAX_BATCH`` of those who wait, uid by uid in turn."""
        batch: list[_Waiting] = []
        while self.waiting and len(batch) < MAX_BATCH:
            entry = self.waiting.pop()
            if not entry[1].done():  # a caller that left costs nothing
                batch.append(entry)
        return batch


class Evidence:
    """Makes bundles.

    Args:
        boot: the vTPM's side.
        clock: for the statement's (untrusted) time.
        boot_id: the kernel's boot id.
        agent: digests of the agent's build, config and policy, and its version (``Manifest.agent``).
        pcrs: PCRs of the evidence quote; must hold the agent register.
        audit: the audit log whose head every manifest holds.
        gpus: the GPUs; ``None`` where nothing looks at GPUs.
        platform: what stands below the vTPM; ``None`` where nobody asks it.
        vm_generation: as ``Manifest.vm_generation``.
    """

    def __init__(
        self,
        boot: MeasuredBoot,
        clock: Clock,
        *,
        boot_id: str,
        agent: Mapping[str, str],
        pcrs: tuple[int, ...],
        audit: AuditLog | None = None,
        gpus: GpuSessions | None = None,
        platform: PlatformBelow | None = None,
        vm_generation: Callable[[], int | None] = lambda: None,
    ) -> None:
        if boot.log.register not in pcrs:
            raise ValueError("the evidence quote must cover the agent register")
        self._boot = boot
        self._clock = clock
        self._boot_id = boot_id
        self.agent = dict(agent)
        self.audit = audit
        self._selection = PcrSelection.of("sha256", pcrs)
        self._gpus = gpus
        self._platform = platform
        self._vm_generation = vm_generation
        self._boot_lane, self._gpu_lane = _Lane(), _Lane()

    @property
    def callers(self) -> Mapping[str, Histogram]:
        """How many callers shared each quote, by lane."""
        return {"boot": self._boot_lane.callers, "gpus": self._gpu_lane.callers}

    async def get(self, caller: Caller, request: Request, release: KeyRelease | None = None) -> bytes:
        """A bundle for this caller.

        Args:
            caller: whom the statement names.
            request: what the caller, or a key broker, asks for.
            release: the key that the agent wants let go for the caller. No caller can set it.

        Raises:
            Misuse: see ``Request.check``.
            Unavailable: ``NO_GPUS``.
            Unavailable, DeviceFault: the batch failed; the next one starts clean.
        """
        request.check()
        if request.gpus and self._gpus is None:
            raise Unavailable(NO_GPUS.slug, NO_GPUS.message)
        statement = Statement(
            purpose="evidence" if release is None else "release",
            audience=request.audience,
            nonce=request.nonce,
            user_data=request.user_data,
            public_key=request.public_key,
            lane="gpus" if request.gpus else "boot",
            caller=caller.claims(),
            salt=os.urandom(16),
            boot_id=self._boot_id,
            time=int(self._clock.time()),
            release=release,
        ).encode()
        if len(statement) > MAX_STATEMENT:
            raise Unavailable("STATEMENT_TOO_LARGE", "the caller's identity does not fit into a statement")
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        lane = self._gpu_lane if request.gpus else self._boot_lane
        lane.waiting.push(caller.uid, (statement, answer))
        if lane.runner is None or lane.runner.done():
            lane.runner = asyncio.create_task(self._run(lane))
        return await answer

    async def _run(self, lane: _Lane) -> None:
        """One batch after the other until nobody waits. A running quote gathers the next batch; nothing lingers."""
        gpus = self._gpus if lane is self._gpu_lane else None
        while batch := lane.next_batch():
            failure: AgentError = Unavailable("EVIDENCE_FAILED", "evidence could not be collected", retry_after=1.0)
            try:
                served = await self._serve(batch, gpus)
                lane.callers.add(len(served))
                for answer, bundle in served:
                    if not answer.done():
                        answer.set_result(bundle)
            except AgentError as error:
                failure = error
            except Exception as error:  # noqa: BLE001 - a batch must never end the batches after it
                failure.__cause__ = error
            finally:
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(failure)

    async def _serve(
        self, batch: list[_Waiting], gpus: GpuSessions | None
    ) -> list[tuple[asyncio.Future[bytes], bytes]]:
        tree = Tree([statement for statement, _ in batch])
        reports = await self._ask(tree, gpus)

        def job(tpm: TpmCommands) -> _Collected:
            return self._collect(tpm, tree, reports)

        collected = await self._boot.run(AGENT, job)
        if gpus is not None and reports.gpus is not None:
            gpus.require_still(reports.gpus)
        frame = BundleFrame(self._shared(collected))
        return [
            (answer, frame.fill(statement, index, tree.path(index)))
            for index, (statement, answer) in enumerate(batch)
        ]

    async def _ask(self, tree: Tree, gpus: GpuSessions | None) -> _Reports:
        """Everybody but the TPM, at once: each answer is made for this batch, so none can be there before it."""

        async def devices() -> GpuCollection | None:
            return (
                None
                if gpus is None
                else await gpus.collect(gpu_batch_nonce(self._boot.keys.agent_ak_name, tree.root))
            )

        async def platform() -> tuple[PlatformWords | None, tuple[tuple[str, str], ...]]:
            return (None, ()) if self._platform is None else await self._platform.words(tree.root)

        found, (words, missing) = await together(devices(), platform())
        return _Reports(found, words, missing)

    def _collect(self, tpm: TpmCommands, tree: Tree, reports: _Reports) -> _Collected:
        """Everything that the quote must cover at one instant; runs as one TPM job."""
        boot_log = self._boot.logs.boot()
        self._boot.log.settle(tpm)
        agent_log = self._boot.log.data
        with self._boot.logs.systemd() as systemd_log:
            manifest = self._manifest(tree, boot_log, systemd_log, agent_log, reports)
            encoded = manifest.encode()
            found, attest = consistent_quote(
                tpm,
                self._boot.keys.agent_ak,
                manifest_extra_data(encoded),
                self._selection,
                self._boot.known_pcrs,
            )
        self._boot.check_counters(attest.clock_info)
        self._boot.log.check(found.pcrs)
        if self.audit is not None and manifest.audit is not None:
            self.audit.quoted = manifest.audit.head
        return _Collected(encoded, found, boot_log, systemd_log, agent_log, reports)

    def _manifest(
        self, tree: Tree, boot_log: bytes | None, systemd_log: bytes | None, agent_log: bytes, reports: _Reports
    ) -> Manifest:
        missing = list(reports.missing)
        if self.audit is None:
            missing.append(("audit-log", "none is kept"))
        if boot_log is None:
            missing.append(("boot-log", "this machine hands over no firmware log"))
        if systemd_log is None:
            missing.append(("systemd-log", "no tpm2-measure.log (systemd before 255, or nothing measured)"))
        if self._boot.keys.platform_ak_certificate is None:
            missing.append(("platform-ak-certificate", "no certificate in NV, none configured"))
        return Manifest(
            root=tree.root,
            tree_size=tree.size,
            agent_ak_name=self._boot.keys.agent_ak_name,
            reset_count=self._boot.keys.clock.reset_count,
            restart_count=self._boot.keys.clock.restart_count,
            agent=self.agent,
            register=self._boot.log.register,
            boot_log=None if boot_log is None else LogDigest.of(boot_log),
            systemd_log=None if systemd_log is None else LogDigest.of(systemd_log),
            agent_log=LogDigest.of(agent_log),
            missing=tuple(missing),
            audit=None if self.audit is None else AuditAnchor(self.audit.head, self.audit.quoted),
            gpus=None if reports.gpus is None else reports.gpus.inventory(),
            platform=None if reports.platform is None else reports.platform.digest(),
            vm_generation=self._vm_generation(),
        )

    def _shared(self, collected: _Collected) -> Bundle:
        """The part of a bundle that is the same for the whole batch."""
        keys, quote = self._boot.keys, collected.boot.quote
        return Bundle(
            statement=b"",
            manifest=collected.manifest,
            leaf_index=0,
            inclusion_path=(),
            quote=SignedAttest(quote.attest, quote.signature),
            agent_ak=keys.agent_ak.public,
            agent_ak_certify=SignedAttest(keys.agent_ak_certify.attest, keys.agent_ak_certify.signature),
            platform_ak=keys.platform_ak,
            platform_ak_certificate=keys.platform_ak_certificate,
            ek_certificates=keys.ek_certificates,
            pcrs=collected.boot.pcrs,
            boot_log=collected.boot_log,
            systemd_log=collected.systemd_log,
            agent_log=collected.agent_log,
            gpus=None if collected.reports.gpus is None else collected.reports.gpus.words(),
            platform=collected.reports.platform,
        )
