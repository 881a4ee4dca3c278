"""Makes the daemon's parts as its configuration says; it and ``brokers`` alone name concrete devices."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import structlog

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
from cgpu_agent.daemon.approvals import load_approvals
from cgpu_agent.daemon.bounds import shortage
from cgpu_agent.daemon.brokers import make_brokers
from cgpu_agent.daemon.config import Config, GpuConfig, Limits
from cgpu_agent.daemon.gpus import load_rules, offer_transfers
from cgpu_agent.daemon.handover import SYSTEMD_LOG, Handover, take_over
from cgpu_agent.daemon.reload import InForce
from cgpu_agent.daemon.servers import Guarded, add_admin, add_public, guarded, lease_door
from cgpu_agent.domain.audit import AuditLog
from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.core import Core, Settings
from cgpu_agent.domain.gpurecord import GpuRecords
from cgpu_agent.domain.gpus import GpuSessions
from cgpu_agent.domain.leases import LeaseLimits, Leases
from cgpu_agent.domain.opening import Opening
from cgpu_agent.domain.platform import PlatformBelow
from cgpu_agent.domain.policy import Action, Decision, Key
from cgpu_agent.domain.quota import InFlight
from cgpu_agent.domain.rate import Rate
from cgpu_agent.domain.release import KeySpec, Release
from cgpu_agent.domain.sealedkeys import SealedKeys
from cgpu_agent.domain.store import Store
from cgpu_agent.domain.timefloor import TimeFloor
from cgpu_agent.domain.vault import Vault
from cgpu_agent.errors import AgentError
from cgpu_agent.rpc.admin import Operated
from cgpu_agent.rpc.admission import DoorLimits
from cgpu_agent.rpc.auditor import Auditor
from cgpu_agent.rpc.environment import self_check_environment
from cgpu_agent.rpc.identify import Identifier
from cgpu_agent.rpc.interceptor import LogThrottle
from cgpu_agent.rpc.keptleases import PER_LEASE, KeptLease
from cgpu_agent.rpc.leasedoor import LeaseDoor
from cgpu_agent.rpc.methods import admin_authorizer, public_authorizer
from cgpu_agent.rpc.metricsdoor import MetricsDoor

log = structlog.get_logger()


class SystemClock:
    """The kernel's clocks."""

    def monotonic(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def time(self) -> float:
        return time.time()


@dataclass(frozen=True, slots=True)
class Parts:
    """What one run of the daemon consists of. ``kept``: leases of the run before, to go on with."""

    tpm: TpmOwner
    core: Core
    recorder: Auditor
    public: Guarded
    admin: Guarded
    leases: Leases
    lease_door: LeaseDoor
    metrics_door: MetricsDoor | None
    kept: list[KeptLease]


def make_parts(config: Config, in_force: InForce, notifier: Notifier, daemon: Operated) -> Parts:
    """Make everything, and start nothing.

    Args:
        in_force: asked at each decision, since a reload changes it.
        notifier: keeps leases over a restart.
        daemon: what the operator's socket asks.

    Raises:
        AgentError: there can be no daemon of this configuration, or here.
    """
    capabilities = self_check_environment()
    tpm_config, limits, private = config.tpm, config.limits, Path(config.runtime_dir)
    passed = take_over(passed_descriptors(), notifier)
    tpm = TpmOwner(open_tpm(tpm_config.device), command_timeout=tpm_config.command_seconds)
    core = Core(
        tpm=tpm,
        logs=SystemLogs(_boot_log_paths(config), Path(config.logs.systemd), passed.named.get(SYSTEMD_LOG)),
        store=Store(private),
        clock=SystemClock(),
        settings=Settings(
            boot_id=Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
            platform_ak_handle=tpm_config.platform_ak_handle,
            create_platform_ak=config.create_platform_ak,
            register=tpm_config.register,
            evidence_pcrs=tpm_config.evidence_pcrs,
            agent=in_force.digests(),
            request_seconds=tpm_config.request_seconds,
            identity_strength=capabilities.identity_strength,
            tpm_seconds_per_minute=limits.tpm_seconds_per_minute,
            short_of_memory=shortage(limits),
        ),
        vm_generation=vm_generation,
    )
    core.platform = _platform(config, tpm)
    _open_audit(core, Path(config.state_dir))
    gpus = _open_gpus(config.gpu)
    if gpus is not None:
        core.gpus = _gpu_sessions(config, core, gpus, in_force)
    core.vault = _vault(config, core)
    core.release = _release(config, core, in_force)
    core.certify(in_force.ak_certificate())
    leases = Leases(_lease_limits(limits))
    core.opening = Opening(core.release, leases)
    offer_transfers(core, limits, gpus, leases, lambda: _trust_epoch(core, in_force))

    recorder, identifier = Auditor(core.audit), Identifier(capabilities)
    api = passed.listener("api", config.sockets.api, 0o666)
    admin = passed.listener("admin", config.sockets.admin, 0o600)
    lease = passed.listener("lease", config.sockets.lease, 0o666, socket.SOCK_SEQPACKET)
    return Parts(
        tpm=tpm,
        core=core,
        recorder=recorder,
        public=guarded(
            "api",
            api,
            private / "a",
            identifier,
            public_authorizer(lambda: in_force.policy, core.facts),
            InFlight(limits.calls_per_uid, limits.calls),
            DoorLimits(max_connections=limits.connections, max_per_uid=limits.connections_per_uid),
            add_public(core),
            recorder,
            lambda: in_force.policy.wants_executable,
        ),
        admin=guarded(
            "admin",
            admin,
            private / "b",
            identifier,
            admin_authorizer(os.geteuid()),
            InFlight(16, 16),
            DoorLimits(max_connections=16, max_per_uid=8),
            add_admin(core, daemon),
            recorder,
        ),
        leases=leases,
        lease_door=lease_door(
            core,
            leases,
            lease,
            identifier,
            DoorLimits(max_connections=limits.leases, max_per_uid=limits.leases_per_uid),
            lambda: in_force.policy.wants_executable,
            lambda caller: in_force.policy.decide(caller, Action.GPU_TRANSFER, core.facts()).allowed,
            _lease_store(limits, notifier),
            recorder,
        ),
        metrics_door=_metrics_door(passed, config.sockets.metrics, identifier, daemon),
        kept=passed.leases,
    )


# -- what the agent stands on


def _boot_log_paths(config: Config) -> list[Path]:
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    return [*([Path(credentials) / "eventlog"] if credentials else []), Path(config.logs.boot)]


def _platform(config: Config, tpm: TpmOwner) -> PlatformBelow:
    store, seconds = PlatformStore(Path(config.platform.collateral)), float(config.tpm.request_seconds)
    return PlatformBelow(lambda: detect(tpm, store, ConfigFs(), timeout=seconds), timeout=seconds)


def _open_audit(core: Core, folder: Path) -> None:
    """Without an audit log the agent serves what needs no record, and says so."""
    try:
        core.audit = AuditLog(folder, core.settings.boot_id, core.clock)
    except AgentError as error:
        core.audit_problem = error
        log.error("no audit log", reason=error.slug, folder=str(folder))


# -- GPUs


def _open_gpus(config: GpuConfig) -> NvmlGpus | SoftwareGpus | None:
    """The GPUs that the configuration names. NVIDIA's driver may come later; its absence is a state, not an error."""
    if config.backend == "none":
        return None
    if config.backend.startswith("software:"):
        return SoftwareGpus(Path(config.backend.removeprefix("software:")))
    return NvmlGpus(helper=None if config.ready_helper == "none" else Path(config.ready_helper))


def _gpu_sessions(config: Config, core: Core, gpus: NvmlGpus | SoftwareGpus, in_force: InForce) -> GpuSessions:
    try:
        floor = TimeFloor(core.clock, Store(Path(config.state_dir)))
    except AgentError as error:
        log.warning("the time floor is not kept", reason=error.slug)
        floor = TimeFloor(core.clock, None)
    records = GpuRecords(lambda: core.boot)
    return GpuSessions(gpus, in_force.judge, records, core.clock, floor, load_rules(config.gpu))


def _trust_epoch(core: Core, in_force: InForce) -> tuple[int, str]:
    """What was decided in one epoch is void in the next."""
    return (0 if core.gpus is None else core.gpus.trust_epoch, in_force.policy.digest)


# -- keys


def _vault(config: Config, core: Core) -> Vault | None:
    """The sealed keys; ``None`` where no state is kept."""
    try:
        files = Store(Path(config.state_dir) / "keys")
    except AgentError as error:
        log.warning("no sealed keys", reason=error.slug)
        return None
    seconds = float(config.tpm.request_seconds)
    return Vault(core.tpm, SealedKeys(files), load_approvals(config.sealed), core.clock, timeout=seconds)


def _release(config: Config, core: Core, in_force: InForce) -> Release:
    throttle = LogThrottle()

    def decide(caller: Caller, action: Action, key: Key) -> Decision:
        decision = in_force.policy.decide(caller, action, core.facts(), key)
        if decision.log_detail and throttle.allow(time.monotonic()):
            log.error("the policy could not be evaluated", action=action.value, detail=decision.log_detail)
        return decision

    keys = {
        each.id: KeySpec(Key(each.id, each.broker, each.group), each.path or each.id, each.seconds)
        for each in config.key
    }
    limit = "too many keys were asked for; wait a little"
    return Release(
        keys,
        make_brokers(config, core.tpm, core.logs, core.clock, core.vault),
        decide,
        lambda: _trust_epoch(core, in_force),
        core.audit,
        core,
        Rate(core.clock, config.limits.keys_per_minute, "KEY_LIMIT", limit),
        core.clock,
    )


# -- leases and numbers


def _lease_limits(limits: Limits) -> LeaseLimits:
    sizes = (limits.lease_mib, limits.lease_mib_per_uid, limits.lease_mib_in_all)
    return LeaseLimits(*(size << 20 for size in sizes))


def _lease_store(limits: Limits, notifier: Notifier) -> Notifier | None:
    """Who keeps leases over a restart."""
    room, wanted = notifier.store_size, PER_LEASE * limits.leases
    if not room:
        return None
    if room < wanted:
        log.warning("not every lease will outlive a restart", file_descriptor_store_max=room, wanted=wanted)
    return notifier


def _metrics_door(passed: Handover, path: str, identifier: Identifier, daemon: Operated) -> MetricsDoor | None:
    """Where metrics are read; ``None`` where nobody asked for it."""
    if "metrics" not in passed.named and path == "none":
        return None
    return MetricsDoor(passed.listener("metrics", path, 0o600), identifier, daemon.metrics)
