"""Builds the daemon out of its parts and runs it: the only module that names concrete devices."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any, cast, get_args

import structlog

from cgpu_agent import __version__
from cgpu_agent.backends.devicememory import TransferGpus
from cgpu_agent.backends.gpu.nvmlgpus import NvmlGpus
from cgpu_agent.backends.gpu.software.client import SoftwareGpus
from cgpu_agent.backends.logs import SystemLogs
from cgpu_agent.backends.notify import Notifier, passed_descriptors
from cgpu_agent.backends.platform.detect import detect
from cgpu_agent.backends.platform.store import PlatformStore
from cgpu_agent.backends.platform.tsm import ConfigFs
from cgpu_agent.backends.tpm.owner import TpmOwner
from cgpu_agent.backends.tpm.transport import open_tpm
from cgpu_agent.backends.vmclock import vm_generation
from cgpu_agent.daemon import config as configuration
from cgpu_agent.daemon import logging as journal
from cgpu_agent.daemon import status
from cgpu_agent.daemon.approvals import load_approvals
from cgpu_agent.daemon.brokerconfig import BROKER_TABLES
from cgpu_agent.daemon.brokers import make_brokers
from cgpu_agent.daemon.build import build_digest
from cgpu_agent.daemon.config import Config, GpuConfig, LogLevel
from cgpu_agent.daemon.gpus import load_judge, load_rules, offer_transfers
from cgpu_agent.daemon.handover import SYSTEMD_LOG, Handover, take_over
from cgpu_agent.daemon.metrics import families
from cgpu_agent.daemon.policy import load_policy
from cgpu_agent.daemon.servers import Guarded, add_admin, add_public, guarded, lease_door
from cgpu_agent.daemon.watchdog import Heartbeat, Watchdog
from cgpu_agent.domain.audit import AuditLog
from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.core import Core, Settings, is_final
from cgpu_agent.domain.gpujudge import GpuJudge
from cgpu_agent.domain.gpurecord import GpuRecords
from cgpu_agent.domain.gpus import GpuSessions
from cgpu_agent.domain.gpustate import Reason
from cgpu_agent.domain.leases import LeaseLimits, Leases
from cgpu_agent.domain.opening import Opening
from cgpu_agent.domain.platform import PlatformBelow
from cgpu_agent.domain.policy import Action, Decision, Key, Policy
from cgpu_agent.domain.quota import InFlight
from cgpu_agent.domain.rate import Rate
from cgpu_agent.domain.release import KeySpec, Release
from cgpu_agent.domain.sealedkeys import SealedKeys
from cgpu_agent.domain.store import Store
from cgpu_agent.domain.timefloor import TimeFloor
from cgpu_agent.domain.vault import Vault
from cgpu_agent.errors import AgentError, Misuse
from cgpu_agent.rpc.admission import DoorLimits
from cgpu_agent.rpc.auditor import Auditor
from cgpu_agent.rpc.environment import self_check_environment
from cgpu_agent.rpc.identify import Identifier
from cgpu_agent.rpc.interceptor import LogThrottle
from cgpu_agent.rpc.keptleases import PER_LEASE
from cgpu_agent.rpc.methods import admin_authorizer, public_authorizer
from cgpu_agent.rpc.metricsdoor import MetricsDoor
from cgpu_agent.wire.bundle import MAX_CERTIFICATE
from cgpu_agent.wire.metrics import exposition

_DRAIN_SECONDS = 5.0
_STATUS_SECONDS = 1.0
_PROBE_SECONDS = 5.0
_RENEW_SECONDS = 3600.0
_DISK_SECONDS = 60.0
_FIXED = ("runtime_dir", "state_dir", "sockets", "tpm", "logs", "platform", "gpu", "limits", "key", *BROKER_TABLES)
"""What of the configuration takes a restart."""

log = structlog.get_logger()


class SystemClock:
    """The kernel's clocks."""

    def monotonic(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def time(self) -> float:
        return time.time()


def _open_gpus(config: GpuConfig) -> NvmlGpus | SoftwareGpus | None:
    """The GPUs that the configuration names. NVIDIA's driver may come later; its absence is a state, not an error."""
    if config.backend == "none":
        return None
    if config.backend.startswith("software:"):
        return SoftwareGpus(Path(config.backend.removeprefix("software:")))
    return NvmlGpus(helper=None if config.ready_helper == "none" else Path(config.ready_helper))


def _lease_limits(config: Config) -> LeaseLimits:
    limits = config.limits
    sizes = (limits.lease_mib, limits.lease_mib_per_uid, limits.lease_mib_in_all)
    return LeaseLimits(*(size << 20 for size in sizes))


class App:
    """One run of the daemon.

    Args:
        config: as loaded.
        config_path: where to read it again at a reload; ``None`` = defaults, nothing to read.
        notifier: the service manager's ear.
    """

    def __init__(self, config: Config, config_path: Path | None, notifier: Notifier) -> None:
        self._config = config
        self._started_with = config
        self._log_level = config.log_level
        self._config_path = config_path
        self._notifier = notifier
        self._policy = load_policy(config)
        self._reload_problem: str | None = None
        self._throttle = LogThrottle()
        self._capabilities = self_check_environment()
        self._build = build_digest()
        passed = take_over(passed_descriptors(), notifier)
        private = Path(config.runtime_dir)
        self._tpm = TpmOwner(open_tpm(config.tpm.device), command_timeout=config.tpm.command_seconds)
        self._core = Core(
            tpm=self._tpm,
            logs=SystemLogs(self._boot_log_paths(), Path(config.logs.systemd), passed.named.get(SYSTEMD_LOG)),
            store=Store(private),
            clock=SystemClock(),
            settings=self._settings(),
            vm_generation=vm_generation,
        )
        self._core.platform = self._platform(config)
        self._open_audit(Path(config.state_dir))
        self._judge = load_judge(config.gpu)
        self._transfer_gpus: TransferGpus | None = None
        self._core.gpus = self._gpu_sessions(config)
        self._core.vault = self._vault(config)
        self._core.release = self._release(config)
        recorder = self._recorder = Auditor(self._core.audit)
        self._core.certify(self._ak_certificate())
        limits = DoorLimits(max_connections=config.limits.connections, max_per_uid=config.limits.connections_per_uid)
        identifier = Identifier(self._capabilities)
        in_flight = InFlight(config.limits.calls_per_uid, config.limits.calls)
        api = passed.listener("api", config.sockets.api, 0o666)
        admin = passed.listener("admin", config.sockets.admin, 0o600)
        lease = passed.listener("lease", config.sockets.lease, 0o666, socket.SOCK_SEQPACKET)
        self._public = guarded(
            "api",
            api,
            private / "a",
            identifier,
            public_authorizer(lambda: self._policy, self._core.facts),
            in_flight,
            limits,
            add_public(self._core),
            recorder,
            lambda: self._policy.wants_executable,
        )
        self._admin = guarded(
            "admin",
            admin,
            private / "b",
            identifier,
            admin_authorizer(os.geteuid()),
            InFlight(16, 16),
            DoorLimits(max_connections=16, max_per_uid=8),
            add_admin(self._core, self),
            recorder,
        )
        self._leases = leases = Leases(_lease_limits(config))
        self._core.opening = Opening(self._core.release, leases)
        offer_transfers(self._core, config.limits, self._transfer_gpus, leases, self._trust_epoch)
        self._lease_door = lease_door(
            self._core,
            leases,
            lease,
            identifier,
            DoorLimits(max_connections=config.limits.leases, max_per_uid=config.limits.leases_per_uid),
            lambda: self._policy.wants_executable,
            lambda caller: self._policy.decide(caller, Action.GPU_TRANSFER, self._core.facts()).allowed,
            self._lease_store(config),
            recorder,
        )
        self._metrics_door = self._open_metrics(passed, config.sockets.metrics, identifier)
        self._kept_leases = passed.leases
        self._started = self._kept_up = time.monotonic()
        self._watchdog = Watchdog(notifier, self._heartbeats(config))

    def _heartbeats(self, config: Config) -> dict[str, Heartbeat]:
        """Whose silence ends this run of the agent. The event loop's does, because it feeds the watchdog."""
        slow = 60.0 + 4.0 * config.tpm.request_seconds
        found: dict[str, Heartbeat] = {
            "TPM thread": (self._tpm.heartbeat_age, 2.0 * config.tpm.request_seconds),
            "front door": (self._public.door.heartbeat_age, 10.0),
            "admin door": (self._admin.door.heartbeat_age, 10.0),
            "lease door": (self._lease_door.heartbeat_age, 10.0),
            "upkeep": (lambda now: now - self._kept_up, slow),
        }
        if self._core.audit is not None:
            found["audit writer"] = (self._core.audit.heartbeat_age, _DISK_SECONDS)
        if self._core.gpus is not None:
            found["GPU watch"] = (self._core.gpus.heartbeat_age, slow)
        return found

    def _platform(self, config: Config) -> PlatformBelow:
        store, seconds = PlatformStore(Path(config.platform.collateral)), float(config.tpm.request_seconds)
        return PlatformBelow(lambda: detect(self._tpm, store, ConfigFs(), timeout=seconds), timeout=seconds)

    def _vault(self, config: Config) -> Vault | None:
        """The sealed keys; ``None`` where no state is kept."""
        try:
            files = Store(Path(config.state_dir) / "keys")
        except AgentError as error:
            log.warning("no sealed keys", reason=error.slug)
            return None
        seconds = float(config.tpm.request_seconds)
        return Vault(self._tpm, SealedKeys(files), load_approvals(config.sealed), self._core.clock, timeout=seconds)

    def _open_metrics(self, passed: Handover, path: str, identifier: Identifier) -> MetricsDoor | None:
        """Where metrics are read; ``None`` where nobody asked for it."""
        if "metrics" not in passed.named and path == "none":
            return None
        return MetricsDoor(passed.listener("metrics", path, 0o600), identifier, self.metrics)

    def _lease_store(self, config: Config) -> Notifier | None:
        """Who keeps leases over a restart."""
        room, wanted = self._notifier.store_size, PER_LEASE * config.limits.leases
        if not room:
            return None
        if room < wanted:
            log.warning("not every lease will outlive a restart", file_descriptor_store_max=room, wanted=wanted)
        return self._notifier

    def _release(self, config: Config) -> Release:
        core = self._core
        keys = {
            each.id: KeySpec(Key(each.id, each.broker, each.group), each.path or each.id, each.seconds)
            for each in config.key
        }
        limit = "too many keys were asked for; wait a little"
        return Release(
            keys,
            make_brokers(config, self._tpm, core.logs, core.clock, core.vault),
            self._decide_key,
            self._trust_epoch,
            core.audit,
            core,
            Rate(core.clock, config.limits.keys_per_minute, "KEY_LIMIT", limit),
            core.clock,
        )

    def _decide_key(self, caller: Caller, action: Action, key: Key) -> Decision:
        decision = self._policy.decide(caller, action, self._core.facts(), key)
        if decision.log_detail and self._throttle.allow(time.monotonic()):
            log.error("the policy could not be evaluated", action=action.value, detail=decision.log_detail)
        return decision

    def _trust_epoch(self) -> tuple[int, str]:
        """What was decided in one epoch is void in the next."""
        gpus = self._core.gpus
        return (0 if gpus is None else gpus.trust_epoch, self._policy.digest)

    def _gpu_sessions(self, config: Config) -> GpuSessions | None:
        gpus = _open_gpus(config.gpu)
        if gpus is None:
            return None
        self._transfer_gpus = gpus
        core = self._core
        try:
            floor = TimeFloor(core.clock, Store(Path(config.state_dir)))
        except AgentError as error:
            log.warning("the time floor is not kept", reason=error.slug)
            floor = TimeFloor(core.clock, None)
        records = GpuRecords(lambda: core.boot)
        return GpuSessions(gpus, self._judge, records, core.clock, floor, load_rules(config.gpu))

    def _open_audit(self, folder: Path) -> None:
        """Without an audit log the agent serves what needs no record, and says so."""
        core = self._core
        try:
            core.audit = AuditLog(folder, core.settings.boot_id, core.clock)
        except AgentError as error:
            core.audit_problem = error
            log.error("no audit log", reason=error.slug, folder=str(folder))

    async def _audit(self, event: str) -> None:
        """Put an event of the agent's own on record; what stands in the way is a state to show, not to end on."""
        if self._core.audit is None:
            return
        try:
            await self._core.audit.record(event, self._agent_digests())
        except AgentError as error:
            self._core.audit_problem = error

    async def _audit_denials(self, *, now: bool = False) -> None:
        """Put counted refusals on record; a write that succeeds also ends an earlier trouble."""
        if self._core.audit is None:
            return
        try:
            if await self._core.audit.flush_denials(now=now):
                self._core.audit_problem = None
        except AgentError as error:
            self._core.audit_problem = error

    def _ak_certificate(self) -> bytes | None:
        """The configured certificate of the platform AK; before enrolment there may be none yet."""
        configured = self._started_with.tpm.ak_certificate
        if configured == "nv":
            return None
        try:
            with Path(configured).open("rb") as file:
                return file.read(2 * MAX_CERTIFICATE)
        except OSError as error:
            log.warning("no AK certificate", file=configured, why=error.strerror)
            return None

    def _boot_log_paths(self) -> list[Path]:
        paths = [Path(self._config.logs.boot)]
        credentials = os.environ.get("CREDENTIALS_DIRECTORY")
        if credentials:
            paths.insert(0, Path(credentials) / "eventlog")
        return paths

    def _agent_digests(self) -> dict[str, str]:
        return {
            "build": self._build,
            "config": self._config.digest,
            "policy": self._policy.digest,
            "version": __version__,
        }

    def _settings(self) -> Settings:
        tpm = self._config.tpm
        return Settings(
            boot_id=Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
            platform_ak_handle=tpm.platform_ak_handle,
            create_platform_ak=self._config.create_platform_ak,
            register=tpm.register,
            evidence_pcrs=tpm.evidence_pcrs,
            agent=self._agent_digests(),
            request_seconds=tpm.request_seconds,
            identity_strength=self._capabilities.identity_strength,
            tpm_seconds_per_minute=self._config.limits.tpm_seconds_per_minute,
        )

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            AgentError: the daemon could not begin to serve.
        """
        stop, reload = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        # Before READY=1: a reload signal that arrives early must not kill.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, reload.set)
        self._notifier.status("Starting")
        gpus = self._core.gpus
        if gpus is not None:
            await gpus.start()  # first of all: nobody watched the GPUs while the agent was away
        await self._audit("agent-start")
        await self._resume_leases()
        for server in self._servers:
            await server.start()
        self._lease_door.start()
        if self._metrics_door is not None:
            self._metrics_door.start()
        stopped = asyncio.create_task(stop.wait())
        establishing = asyncio.create_task(self._establish())
        tasks = {stopped, establishing}
        try:
            # Give the TPM a moment, so that "started" usually means "serving"; but a silent TPM is a state to show,
            # not a reason to fail the start.
            await asyncio.wait(tasks, timeout=self._config.tpm.request_seconds, return_when=asyncio.FIRST_COMPLETED)
            await self._show()
            self._notifier.ready()
            log.info("ready", version=__version__, socket=self._public.public_path)
            tasks |= {
                asyncio.create_task(work)
                for work in (self._beat(), self._keep_up(), self._probe(), self._renew(), self._reloads(reload))
            }
            if gpus is not None:
                tasks |= {asyncio.create_task(work) for work in (gpus.run(), self._tell_gpus(gpus))}
            running: set[asyncio.Task[Any]] = tasks
            while not stop.is_set():
                ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    task.result()  # one that failed ends the daemon, and systemd starts another
        finally:
            await self._shut(tasks)

    async def _resume_leases(self) -> None:
        """Before anybody can ask for one."""
        kept, self._kept_leases = self._kept_leases, []
        if kept:
            resumed = await asyncio.to_thread(self._lease_door.resume, kept)
            log.info("leases of the last run go on", kept=len(kept), resumed=resumed)

    @property
    def _servers(self) -> tuple[Guarded, Guarded]:
        return self._public, self._admin

    async def _shut(self, tasks: set[asyncio.Task[Any]]) -> None:
        self._notifier.stopping()
        self._core.stop()
        self._notifier.status("Stopping: finishing running calls")
        log.info("stopping")
        if self._core.gpus is not None:
            await self._core.gpus.stop()
        with contextlib.suppress(asyncio.TimeoutError):  # which closes the latch; the next start does it for sure
            await asyncio.wait_for(self._follow(), _DRAIN_SECONDS)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        if self._core.channels is not None:
            await self._core.channels.stop()
        await asyncio.gather(*(server.stop(_DRAIN_SECONDS) for server in self._servers))
        await asyncio.to_thread(self._lease_door.close)
        if self._metrics_door is not None:
            await asyncio.to_thread(self._metrics_door.close)
        await self._recorder.settle()
        await self._audit_denials(now=True)
        await self._audit("agent-stop")
        if self._core.release is not None:
            self._core.release.close()
        await asyncio.get_running_loop().run_in_executor(None, self._tpm.close)

    async def _establish(self) -> None:
        """Reach the TPM, patiently: a vTPM may come late, or come back."""
        wait = 1.0
        while True:
            try:
                await self._core.establish()
            except AgentError as error:
                final = is_final(error)
                log.error("evidence is not available", reason=error.slug, why=error.message, final=final)
                await self._show()
                if final:
                    return
                await asyncio.sleep(wait)
                wait = min(wait * 2, 30.0)
            else:
                log.info("serving evidence", agent_ak=self._core.boot.keys.agent_ak_name.hex())
                return

    async def _beat(self) -> None:
        """Show the state, and that it moves. Waits for nobody, so that it can also show what does not."""
        while True:
            await asyncio.sleep(_STATUS_SECONDS)
            self._watchdog.feed(time.monotonic())
            await self._show()

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(_STATUS_SECONDS)
            self._kept_up = time.monotonic()
            if await self._core.watch_vm():
                log.error("this VM was restored from a snapshot, or copied")
                await self._audit("vm-restored")
            await self._audit_denials()
            await self._follow()

    async def _follow(self) -> None:
        """Have the latch of the sealed keys as the machine is."""
        if self._core.vault is not None:
            await self._core.vault.follow(self._core.trusted)

    async def _probe(self) -> None:
        while True:
            await asyncio.sleep(_PROBE_SECONDS)
            if self._core.established:
                with contextlib.suppress(AgentError):  # kept as the core's state
                    await self._core.boot.probe()

    async def _renew(self) -> None:
        """Look again now and then for what the platform renews while the machine runs."""
        while True:
            await asyncio.sleep(_RENEW_SECONDS)
            await self._renew_once()

    async def _renew_once(self) -> None:
        with contextlib.suppress(AgentError):  # a TPM that does not answer is the probe's to tell
            if await self._core.renew():
                log.info("the platform AK has another certificate")

    async def _tell_gpus(self, gpus: GpuSessions) -> None:
        """Every change of the GPUs, in the journal."""
        told: object = None
        async for view in gpus.watch():
            if view.state != told:
                told = view.state
                await self._follow()
                reason = view.reason
                log.info("GPUs", state=told, line=view.line, reason=None if reason is None else reason.slug)
            for session in view.sessions:
                if session.phase == "rejected" and session.reason is not None:
                    uuid, why = session.info.uuid, session.reason
                    log.warning("GPU rejected", uuid=uuid, reason=why.slug, why=why.message)

    async def _show(self) -> None:
        """Make systemd's line and grpc.health tell the same truth."""
        await self._public.set_serving(self._core.ready())
        await self._admin.set_serving(True)
        line = status.line(self._core, self._servers, self._watchdog.stuck(time.monotonic()), self._reload_problem)
        self._notifier.status(line)

    async def _reloads(self, asked: asyncio.Event) -> None:
        while await asked.wait():
            asked.clear()
            await self._reload()

    async def _reload(self) -> None:
        """Read configuration and policy again; a bad file changes nothing but the status line."""
        self._notifier.reloading()
        try:
            fresh = configuration.load(self._config_path)
            policy = await asyncio.to_thread(load_policy, fresh)
            judge = await asyncio.to_thread(load_judge, self._started_with.gpu)
            approvals = await asyncio.to_thread(load_approvals, self._started_with.sealed)
        except Misuse as error:
            self._reload_problem = error.message
            log.error("configuration not reloaded", why=error.message)
        else:
            if self._core.vault is not None:
                self._core.vault.use(approvals)
            await self._apply(fresh, policy, judge)
        await self._show()
        self._notifier.ready()

    async def _apply(self, fresh: Config, policy: Policy, judge: GpuJudge) -> None:
        fixed = [name for name in _FIXED if getattr(fresh, name) != getattr(self._started_with, name)]
        self._reload_problem = f"restart to apply changes to {', '.join(fixed)}" if fixed else None
        changed = fresh.source != self._config.source or policy.digest != self._policy.digest
        self._use_log_level(fresh.log_level)
        await self._trust(judge, policy)
        self._config = fresh
        self._policy = policy
        self._core.certify(self._ak_certificate())
        await self._renew_once()
        if changed:
            await self._audit("agent-reload")
            try:
                await self._core.reloaded(self._agent_digests())
            except AgentError as error:
                log.error("the reload was not measured", reason=error.slug, why=error.message)
        log.info("configuration reloaded", changed=changed, restart_for=fixed)

    async def _trust(self, judge: GpuJudge, policy: Policy) -> None:
        """Drop the GPUs where what is trusted, or who may do what, is about to change."""
        gpus = self._core.gpus
        if gpus is None:
            return
        if judge.digest != self._judge.digest:
            self._judge = judge
            await gpus.use(judge)
        elif policy.digest != self._policy.digest:
            await gpus.distrust(Reason("POLICY_CHANGED", "the policy has changed"))

    def metrics(self) -> str:
        """See ``rpc.admin.Operated``, as for what follows."""
        core = self._core
        problems = status.problems(core, self._watchdog.stuck(time.monotonic()), self._reload_problem)
        state = status.state_of(core, problems)
        return exposition(families(core, self._servers, self._tpm, self._leases, state, problems, self._build))

    def log_level(self) -> tuple[str, str]:
        return self._log_level, self._config.log_level

    def set_log_level(self, level: str) -> None:
        if level not in get_args(LogLevel):
            raise Misuse("BAD_LOG_LEVEL", f"the level must be one of {', '.join(get_args(LogLevel))}")
        log.warning("log level set", level=level)
        self._use_log_level(cast(LogLevel, level))

    def _use_log_level(self, level: LogLevel) -> None:
        self._log_level = level
        journal.configure(level)

    def status(self) -> status.pb.GetStatusResponse:
        return status.compose(
            self._core,
            self._servers,
            self._watchdog.stuck(time.monotonic()),
            self._reload_problem,
            uptime=time.monotonic() - self._started,
            register=self._started_with.tpm.register,
            evidence_pcrs=self._started_with.tpm.evidence_pcrs,
            identity_strength=self._capabilities.identity_strength,
        )
