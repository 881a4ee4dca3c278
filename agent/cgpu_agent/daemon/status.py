"""The agent's state for operators: one line for ``systemctl status``, one message for ``cgpuctl status``."""

from __future__ import annotations

from collections.abc import Sequence

from cgpu_agent import __version__
from cgpu_agent.api.v1 import admin_pb2
from cgpu_agent.daemon.servers import SELF_CHECK, Guarded
from cgpu_agent.domain.core import Core, Problem, State
from cgpu_agent.domain.keys import Keys

pb = admin_pb2

_STATES = {
    "starting": pb.STATE_STARTING,
    "serving": pb.STATE_SERVING,
    "degraded": pb.STATE_DEGRADED,
    "refusing": pb.STATE_REFUSING,
    "stopping": pb.STATE_STOPPING,
}


def line(core: Core, servers: Sequence[Guarded], stuck: Sequence[str], reload_problem: str | None) -> str:
    """The state in one line of truth."""
    api = servers[0]
    denied = sum(count for (_, code), count in api.gate.calls.items() if code == "PERMISSION_DENIED")
    parts = [core.line(), f"{api.door.stats().open} callers", *_work(core), f"{denied} denied"]
    if stuck:
        parts.insert(1, f"STUCK: {', '.join(stuck)}")
    if reload_problem:
        parts.append(f"configuration: {reload_problem}")
    return "; ".join(parts)


def problems(core: Core, stuck: Sequence[str], reload_problem: str | None) -> list[Problem]:
    """Everything that an operator should look at, worst first."""
    found = core.problems()
    found += [
        Problem("STUCK", f"the {name} gives no sign of life", "systemd will restart the agent") for name in stuck
    ]
    if reload_problem:
        found.append(Problem("CONFIG_NOT_APPLIED", reload_problem, "mend the file and reload, or restart"))
    return found


def state_of(core: Core, found: Sequence[Problem]) -> State:
    """The state, with what only the daemon knows."""
    state = core.state()
    return "degraded" if state == "serving" and found else state


def _work(core: Core) -> list[str]:
    """What was done for callers since the start, as far as this machine offers it."""
    found = []
    if core.release is not None:
        released = sum(count for (_, what), count in core.release.outcomes.items() if what == "released")
        found.append(f"{released} keys released")
    if core.channels is not None and core.channels.gpus:
        found.append(f"{len(core.channels)} channels, {core.channels.speed / 1e9:.1f} GB/s")
    return found


def compose(
    core: Core,
    servers: Sequence[Guarded],
    stuck: Sequence[str],
    reload_problem: str | None,
    uptime: float,
) -> pb.GetStatusResponse:
    """Everything an operator may ask."""
    found = problems(core, stuck, reload_problem)
    stats = servers[0].door.stats()
    return pb.GetStatusResponse(
        state=_STATES[state_of(core, found)],
        status_line=line(core, servers, stuck, reload_problem),
        version=__version__,
        uptime_seconds=uptime,
        problems=[pb.Problem(reason=p.reason, message=p.message, remedy=p.remedy) for p in found],
        tpm=_tpm(core.keys, core.settings.evidence_pcrs),
        door=pb.DoorStatus(
            open=stats.open,
            accepted=stats.accepted,
            refused_by_limit=stats.refused_by_limit,
            cut_dead=stats.cut_dead,
            unidentified=stats.unidentified,
        ),
        calls=[
            pb.MethodCount(method=method, code=code, count=count)
            for server in servers
            for (method, code), count in sorted(server.gate.calls.items())
            if method != SELF_CHECK
        ],
        identity_strength=core.settings.identity_strength,
        agent_log_records=len(core.boot.log.records) if core.established else 0,
        agent_register=core.settings.register,
    )


def _tpm(keys: Keys | None, evidence_pcrs: Sequence[int]) -> pb.TpmStatus | None:
    if keys is None:
        return None
    return pb.TpmStatus(
        manufacturer=keys.tpm.manufacturer,
        reset_count=keys.clock.reset_count,
        restart_count=keys.clock.restart_count,
        platform_ak_name=keys.platform_ak_name.hex(),
        agent_ak_name=keys.agent_ak_name.hex(),
        platform_ak_endorsement="certificate" if keys.platform_ak_certificate is not None else "none",
        evidence_pcrs=evidence_pcrs,
    )
