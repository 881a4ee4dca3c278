"""The agent's life as the domain sees it: not ready, serving or refusing, and what an operator should know of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from cgpu_agent.backends.base import AkAlgorithm, Clock, MeasurementLogs, Tpm, TpmCommands
from cgpu_agent.domain.agentlog import AgentLog
from cgpu_agent.domain.audit import AuditLog
from cgpu_agent.domain.boot import AGENT, MeasuredBoot
from cgpu_agent.domain.channels import Channels
from cgpu_agent.domain.evidence import Evidence
from cgpu_agent.domain.gpus import GpuSessions
from cgpu_agent.domain.gpustate import Reason
from cgpu_agent.domain.keys import Keys, establish, renewed, with_certificate
from cgpu_agent.domain.loading import Loading
from cgpu_agent.domain.opening import Opening
from cgpu_agent.domain.platform import PlatformBelow
from cgpu_agent.domain.policy import Facts
from cgpu_agent.domain.rate import Rate
from cgpu_agent.domain.release import Release
from cgpu_agent.domain.store import Store
from cgpu_agent.domain.vault import Vault
from cgpu_agent.errors import AgentError, DeviceFault, Unavailable

State = Literal["starting", "serving", "degraded", "refusing", "stopping"]

_UNSEEN = -1
_RESTORED = Reason("VM_RESTORED", "this VM was restored from a snapshot, or copied")
_ESTABLISH_SECONDS = 60.0  # an RSA key made by a slow TPM takes tens of seconds


@dataclass(frozen=True, slots=True)
class Problem:
    """Something an operator should look at."""

    reason: str
    message: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Settings:
    """What the domain needs to know; the daemon fills it from its configuration."""

    boot_id: str
    platform_ak_handle: int
    create_platform_ak: AkAlgorithm | None
    register: int
    evidence_pcrs: tuple[int, ...]
    agent: Mapping[str, str]
    """Digests of build, config and policy, and the version (``Manifest.agent``)."""
    request_seconds: float
    identity_strength: str
    tpm_seconds_per_minute: int = 30
    """Of the TPM's time, for each uid."""
    short_of_memory: str | None = None
    """Why callers who take what they may would have the agent killed, if so."""


_GPU_REMEDY = "see cgpuctl gpu list and the journal"

REMEDIES: Mapping[str, str] = {
    "TPM_IO": "see that /dev/tpmrm0 exists and that the agent's user is in its group (cgpuctl doctor)",
    "TPM_TIMEOUT": "the TPM does not answer in time; see the kernel log for tpm messages",
    "TPM_RESET_DETECTED": "reboot the VM",
    "REGISTER_IN_USE": "set tpm.register to a PCR that nobody extends (10-15), or find out who is in group tss",
    "AGENT_LOG_DIVERGED": "find out what else extends the agent register (who is in group tss?), then reboot",
    "AGENT_AK": "the agent's runtime directory was emptied while the system ran; reboot the VM",
    "AUDIT_BROKEN": "look at the files in the state directory, keep them as evidence, move them away, restart",
    "AUDIT_UNAVAILABLE": "give the state directory to the agent's user, mode 0700, and see that the disk is not full",
    "NO_PLATFORM_AK": "set tpm.platform_ak_handle, or let the agent make a key with tpm.create_platform_ak",
    "STATE_DIRECTORY": "give the runtime directory to the agent's user, mode 0700, on a file system with room",
    "GPU_INVENTORY": "see that every GPU is bound to the NVIDIA driver, and that nvidia-persistenced runs",
    "GPU_CC_OFF": "have the host start the GPU in confidential-computing mode",
    "GPU_DEV_TOOLS": "have the host start the GPU without developer tools",
    "GPU_GATE_STUCK": "see the kernel log for the driver, and systemctl status cgpu-ready.socket cgpu-ready.service",
    "GPU_READY_FOREIGN": "leave setting the ready state to the agent (no unit may run nvidia-smi conf-compute -srs)",
    "NO_RIM": "put NVIDIA's reference values for this driver and firmware into gpu.collateral",
    "CLOCK_BEFORE_FLOOR": "set the clock of the host right",
    "KEY_NOT_APPROVED": "install the owner's approval of this boot (cgpuctl key policy-sign), then reload the agent",
    "KEY_APPROVAL_OLD": "install an approval of the present epoch (cgpuctl key show), then reload the agent",
    "KEYS_MISMATCH": "bring back the store of this TPM; if this one is right: cgpuctl key adopt",
    "KEY_LOST": "the TPM was cleared, or is another one: make the keys anew (cgpuctl key init --replace-lost)",
    "KEY_INDEX_LOST": "find out who is in group tss, then cgpuctl key adopt",
    "KEY_LATCH_STUCK": "find out who is in group tss, and reboot",
    "LOG_TOO_LARGE": "see what wrote so large a measurement log; no evidence is given out with a part of it",
}


@dataclass
class Core:
    """Owns the established keys; everything that serves evidence asks it for them.

    One event loop's; ``establish`` may run beside everything else.
    """

    tpm: Tpm
    logs: MeasurementLogs
    store: Store
    clock: Clock
    settings: Settings
    audit: AuditLog | None = None
    audit_problem: AgentError | None = None
    """Why no audit log is kept; then nothing happens that needs its record."""
    platform: PlatformBelow | None = None
    """``None`` where nobody asks it."""
    gpus: GpuSessions | None = None
    """``None`` where nothing looks at GPUs."""
    release: Release | None = None
    """``None`` where no keys are configured."""
    vault: Vault | None = None
    opening: Opening | None = None
    """``None`` where no memory is leased."""
    channels: Channels | None = None
    """``None`` where there are no GPUs whose memory can be had."""
    loading: Loading | None = None
    vm_generation: Callable[[], int | None] = lambda: None
    _generation: int | None = _UNSEEN
    _boot: MeasuredBoot | None = None
    _evidence: Evidence | None = None
    _failure: AgentError | None = None
    _stopping: bool = False
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _tried: asyncio.Event = field(default_factory=asyncio.Event)
    _certificate: bytes | None = None
    _unfit_certificate: AgentError | None = None

    @property
    def boot(self) -> MeasuredBoot:
        """Raises ``Unavailable``: ``NOT_READY``, or the reason why evidence is refused."""
        if self._boot is None:
            raise self._not_ready()
        return self._boot

    @property
    def evidence(self) -> Evidence:
        """Raises as ``boot`` does."""
        if self._evidence is None:
            raise self._not_ready()
        return self._evidence

    async def started(self) -> None:
        """Wait for the first attempt to reach the TPM: who calls during the start should not be told to come back.

        The wait ends after ``request_seconds``, and then for everybody: a silent TPM is no reason to keep silent.
        """
        if not self._tried.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._tried.wait(), self.settings.request_seconds)
            self._tried.set()

    @property
    def keys(self) -> Keys | None:
        return None if self._boot is None else self._boot.keys

    @property
    def established(self) -> bool:
        return self._boot is not None

    def _not_ready(self) -> Unavailable:
        failure = self._failure
        if failure is not None and is_final(failure):
            return Unavailable(failure.slug, failure.message)
        return Unavailable("NOT_READY", "the agent has not reached its TPM yet", retry_after=2.0)

    def _tpm_seconds(self) -> Rate:
        limit = "too much of the TPM's time went to this uid; wait a little"
        return Rate(self.clock, self.settings.tpm_seconds_per_minute, "TPM_LIMIT", limit)

    async def establish(self) -> None:
        """Find or make the keys and record this start. Run it again after a failure.

        Raises:
            AgentError: why not; also kept for ``state``.
        """
        async with self._lock:
            if self._boot is not None:
                return
            settings = self.settings
            log = AgentLog(self.store, settings.register)

            def first(tpm: TpmCommands) -> Keys:
                if self.vault is not None:
                    self.vault.begin(tpm, log)
                return establish(
                    tpm,
                    self.store,
                    log,
                    boot_id=settings.boot_id,
                    platform_ak_handle=settings.platform_ak_handle,
                    create=settings.create_platform_ak,
                )

            try:
                keys = await self.tpm.run(first, timeout=_ESTABLISH_SECONDS)
                boot = MeasuredBoot(
                    self.tpm, keys, log, self.logs, timeout=settings.request_seconds, seconds=self._tpm_seconds()
                )
                agent = self.settings.agent
                await boot.measure_agent({"event": "agent-start", **agent})
                if self.vault is not None:
                    self.vault.recorded()
            except AgentError as error:
                self._failure = error
                self._tried.set()
                raise
            self._failure = None
            self._evidence = Evidence(
                boot,
                self.clock,
                boot_id=settings.boot_id,
                agent=agent,
                pcrs=settings.evidence_pcrs,
                audit=self.audit,
                gpus=self.gpus,
                platform=self.platform,
                vm_generation=self.vm_generation,
            )
            self._boot = boot
            self.certify(self._certificate)
            self._tried.set()
            if self.settings.agent != agent:  # reloaded meanwhile
                await self.reloaded(self.settings.agent)

    async def reloaded(self, agent: Mapping[str, str]) -> None:
        """Record a changed configuration: it is measured, and evidence from now on carries its digest.

        Raises:
            AgentError: it could not be measured; evidence carries the digest all the same.
        """
        self.settings = replace(self.settings, agent=agent)
        if self._boot is None or self._evidence is None:
            return
        try:
            await self._boot.measure_agent({"event": "agent-reload", **agent})
        finally:
            self._evidence.agent = dict(agent)

    async def watch_vm(self) -> bool:
        """Whether the machine was restored or copied since the last look; then nothing of before is trusted."""
        now = self.vm_generation()
        before, self._generation = self._generation, now
        if before in (now, _UNSEEN):
            return False
        if self.gpus is not None:
            await self.gpus.distrust(_RESTORED)
        return True

    def certify(self, certificate: bytes | None) -> None:
        """Use this certificate of the platform AK (DER) instead of the one in NV; ``None`` changes nothing.

        One that does not fit endorses nothing and would spoil all evidence: it is not used, and is a problem to show.
        """
        self._certificate = certificate or self._certificate
        if self._boot is None or self._certificate is None:
            return
        try:
            self._boot.keys = with_certificate(self._boot.keys, self._certificate)
            self._unfit_certificate = None
        except AgentError as error:
            self._unfit_certificate = error

    async def renew(self) -> bool:
        """Take over the certificate that the platform has put into NV in place of an older one; whether it had.

        Raises ``AgentError``: NV cannot be read.
        """
        if self._boot is None or self._certificate is not None:
            return False
        boot = self._boot
        before = boot.keys.platform_ak_certificate
        found = await boot.run(AGENT, lambda tpm: renewed(tpm, boot.keys))
        boot.keys = replace(boot.keys, platform_ak_certificate=found.platform_ak_certificate)
        return found.platform_ak_certificate != before

    def stop(self) -> None:
        self._stopping = True

    def trusted(self) -> bool:
        """Whether the TPM may open sealed keys: the boot stands, and every GPU that there is is ready."""
        if self._stopping or self._boot is None or self._boot.refusal is not None:
            return False
        return self.gpus is None or self.gpus.view().state in ("ready", "none")

    def state(self) -> State:
        if self._stopping:
            return "stopping"
        if self._boot is None:
            return "refusing" if self._failure is not None and is_final(self._failure) else "starting"
        if self._boot.refusal is not None:
            return "refusing"
        return "degraded" if self.problems() else "serving"

    def ready(self) -> bool:
        """Whether a call can be answered now, as far as is known."""
        return self.state() in ("serving", "degraded") and self._boot is not None and self._boot.fault is None

    def problems(self) -> list[Problem]:
        """What is wrong or weaker than it should be, worst first."""
        found: list[Problem] = []
        failure = self._failure if self._boot is None else self._boot.refusal or self._boot.fault
        if failure is not None:
            found.append(_problem(failure))
        if self.audit_problem is not None:
            found.append(_problem(self.audit_problem))
        if self.vault is not None and self.vault.problem is not None:
            found.append(_problem(self.vault.problem))
        if self._boot is None:
            return found
        try:
            has_boot_log = self.logs.boot() is not None
        except AgentError as error:
            has_boot_log = True
            found.append(_problem(error))
        if not has_boot_log:
            found.append(
                Problem(
                    "NO_BOOT_LOG",
                    "there is no firmware event log, so nobody can tell what the PCRs mean",
                    "check /sys/kernel/security/tpm0/binary_bios_measurements and the unit's LoadCredential=",
                )
            )
        if self._unfit_certificate is not None:
            found.append(
                Problem(
                    self._unfit_certificate.slug,
                    f"tpm.ak_certificate is not used: {self._unfit_certificate.message}",
                    "enrol this VM's AK (cgpuctl ak enrol), then reload the agent",
                )
            )
        if self._boot.keys.platform_ak_certificate is None:
            found.append(
                Problem(
                    "UNENDORSED",
                    "no certificate for the platform AK: relying parties must know this TPM's AK by other means",
                    "have the AK certified (cgpuctl ak enrol), or have its Name pinned (cgpuctl status shows it)",
                )
            )
        if self.settings.identity_strength != "pidfd":
            found.append(
                Problem(
                    "WEAK_IDENTITY",
                    "this kernel has no SO_PEERPIDFD: callers are known by uid only, units and containers are not",
                    "run Linux 6.9 or newer",
                )
            )
        if self.settings.short_of_memory is not None:
            remedy = "raise the unit's MemoryMax=, or lower limits.lease_mib_in_all; then restart the agent"
            found.append(Problem("MEMORY_BOUND", self.settings.short_of_memory, remedy))
        found += self._gpu_problems()
        return found

    def _gpu_problems(self) -> list[Problem]:
        reasons = [] if self.gpus is None else self.gpus.problems()
        return [Problem(each.slug, each.message, REMEDIES.get(each.slug, _GPU_REMEDY)) for each in reasons]

    def facts(self) -> Facts:
        """What policy may ask about the machine."""
        found = {problem.reason for problem in self.problems()}
        known = self._boot is not None
        view = None if self.gpus is None else self.gpus.view()
        return Facts(
            state=self.state(),
            endorsed=known and "UNENDORSED" not in found,
            boot_log=known and not found & {"NO_BOOT_LOG", "LOG_TOO_LARGE"},
            gpus="not-asked" if view is None else view.state,
            gpus_simulated=view is not None
            and any(each.verdict is not None and each.verdict.simulated for each in view.sessions),
        )

    def line(self) -> str:
        """The state in one line, without the daemon's own numbers."""
        problems = self.problems()
        state = self.state()
        if state in ("refusing", "starting"):
            why = f": {problems[0].message}" if problems else ""
            return f"{'Refusing evidence' if state == 'refusing' else 'Starting'}{why}"
        if self._boot is None or state == "stopping":
            return "Stopping"
        if self._boot.fault is not None:
            return f"Waiting for the TPM: {self._boot.fault.message}"
        keys = self._boot.keys
        endorsed = "AK certified" if keys.platform_ak_certificate is not None else "AK unendorsed"
        lacking = {"NO_BOOT_LOG": "no boot log", "LOG_TOO_LARGE": "boot log too large"}
        told = next((lacking[p.reason] for p in problems if p.reason in lacking), "boot log present")
        parts = [f"Serving: TPM {keys.tpm.manufacturer or '?'}", endorsed, told]
        if self.gpus is not None:
            parts.append(self.gpus.line())
        if self.vault is not None and self.vault.problem is not None:
            parts.append(f"sealed keys: {self.vault.problem.message}")
        return ", ".join(filter(None, parts))


def _problem(error: AgentError) -> Problem:
    return Problem(error.slug, error.message, REMEDIES.get(error.slug, "see the journal"))


def is_final(error: AgentError) -> bool:
    """Whether trying to establish again cannot help before a reboot or a changed configuration."""
    return not isinstance(error, DeviceFault) and error.retry_after is None
