"""The agent in numbers, for Prometheus. Every label value is a word of this package: none comes from a caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, get_args

from cgpu_agent.daemon.servers import SELF_CHECK, Guarded
from cgpu_agent.domain.core import Core, Problem, State
from cgpu_agent.domain.gpustate import Phase
from cgpu_agent.domain.leases import Leases
from cgpu_agent.wire.metrics import Family, Histogram


class BusyTpm(Protocol):
    """What the TPM's owner counts."""

    @property
    def seconds(self) -> Histogram: ...
    @property
    def waiting(self) -> int: ...


def families(
    core: Core,
    servers: Sequence[Guarded],
    tpm: BusyTpm,
    leases: Leases,
    state: State,
    problems: Sequence[Problem],
) -> list[Family]:
    """Everything that is measured, as it stands."""
    program = {name: core.settings.agent[name] for name in ("version", "build")}
    return [
        Family("cgpu_agent_build_info", "gauge", "The program.", [(program, 1)]),
        Family(
            "cgpu_agent_state",
            "gauge",
            "1 for the state that the agent is in.",
            [({"state": each}, each == state) for each in get_args(State)],
        ),
        Family(
            "cgpu_agent_problem",
            "gauge",
            "1 for each problem that cgpuctl status shows.",
            [({"reason": reason}, 1) for reason in sorted({problem.reason for problem in problems})],
        ),
        *_calls(servers),
        *_tpm(core, tpm),
        *_evidence(core),
        *_gpus(core),
        *_keys(core, leases),
        *_transfers(core),
        Family(
            "cgpu_agent_audit_trouble",
            "gauge",
            "1 while the audit log cannot be written, or is not kept.",
            [({}, core.audit_problem is not None)],
        ),
    ]


def _calls(servers: Sequence[Guarded]) -> list[Family]:
    gates = [(server.name, server.gate) for server in servers]
    doors = [({"socket": server.name}, server.door.stats()) for server in servers]
    return [
        Family(
            "cgpu_agent_calls_total",
            "counter",
            "Calls that ended, by gRPC code.",
            [
                ({"socket": name, "method": method, "code": code}, count)
                for name, gate in gates
                for (method, code), count in sorted(gate.calls.items())
                if method != SELF_CHECK
            ],
        ),
        Family(
            "cgpu_agent_call_seconds",
            "histogram",
            "How long calls took.",
            [
                ({"socket": name, "method": method}, seconds)
                for name, gate in gates
                for method, seconds in sorted(gate.seconds.items())
                if method != SELF_CHECK
            ],
        ),
        Family(
            "cgpu_agent_refusals_total",
            "counter",
            "Calls that ended in an error, by its reason (docs/errors.md).",
            [
                ({"socket": name, "reason": slug}, count)
                for name, gate in gates
                for slug, count in sorted(gate.refusals.items())
            ],
        ),
        Family(
            "cgpu_agent_connections",
            "gauge",
            "Connections now.",
            [(socket, door.open) for socket, door in doors],
        ),
        Family(
            "cgpu_agent_connections_total",
            "counter",
            "Connections by what became of them.",
            [
                ({**socket, "outcome": outcome}, getattr(door, outcome))
                for socket, door in doors
                for outcome in ("accepted", "refused_by_limit", "cut_dead", "unidentified", "out_of_resources")
            ],
        ),
    ]


def _tpm(core: Core, tpm: BusyTpm) -> list[Family]:
    waiting = tpm.waiting + (core.boot.waiting if core.established else 0)
    return [
        Family("cgpu_agent_tpm_command_seconds", "histogram", "Exchanges with the TPM.", [({}, tpm.seconds)]),
        Family("cgpu_agent_tpm_jobs_waiting", "gauge", "Jobs that wait for the TPM.", [({}, waiting)]),
    ]


def _evidence(core: Core) -> list[Family]:
    callers = core.evidence.callers if core.established else {}
    return [
        Family(
            "cgpu_agent_quote_callers",
            "histogram",
            "How many callers shared a quote of evidence.",
            [({"lane": lane}, found) for lane, found in callers.items()],
        )
    ]


def _gpus(core: Core) -> list[Family]:
    gpus = core.gpus
    if gpus is None:
        return []
    view = gpus.view()
    phases = [session.phase for session in view.sessions]
    age = gpus.age
    return [
        Family("cgpu_agent_gpus_ready", "gauge", "1 while GPUs are open for work.", [({}, view.state == "ready")]),
        Family(
            "cgpu_agent_gpus",
            "gauge",
            "GPUs by phase.",
            [({"phase": phase}, phases.count(phase)) for phase in get_args(Phase)],
        ),
        Family(
            "cgpu_agent_gpu_attestations_total",
            "counter",
            "Attestations of all GPUs.",
            [({"outcome": outcome}, gpus.attestations[outcome]) for outcome in ("trusted", "refused")],
        ),
        Family(
            "cgpu_agent_gpu_attestation_age_seconds",
            "gauge",
            "Since the last one that trusted all GPUs; absent before the first.",
            [] if age is None else [({}, age)],
        ),
    ]


def _keys(core: Core, leases: Leases) -> list[Family]:
    outcomes = {} if core.release is None else core.release.outcomes
    return [
        Family(
            "cgpu_agent_key_releases_total",
            "counter",
            "Keys that were asked for, by broker.",
            [({"broker": broker, "outcome": what}, count) for (broker, what), count in sorted(outcomes.items())],
        ),
        Family("cgpu_agent_leases", "gauge", "Pieces of memory on lease.", [({}, len(leases))]),
        Family("cgpu_agent_leased_bytes", "gauge", "Bytes on lease.", [({}, leases.total_bytes)]),
    ]


def _transfers(core: Core) -> list[Family]:
    channels = core.channels
    if channels is None:
        return []
    to_device, from_device = channels.moved
    return [
        Family("cgpu_agent_channels", "gauge", "Channels of callers to GPUs' memory.", [({}, len(channels))]),
        Family(
            "cgpu_agent_transferred_bytes_total",
            "counter",
            "Bytes that callers had moved.",
            [({"direction": "to_device"}, to_device), ({"direction": "from_device"}, from_device)],
        ),
    ]
