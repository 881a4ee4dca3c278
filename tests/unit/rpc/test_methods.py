"""Each method of each service is an action that policy knows; whatever is not is denied."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cgpu_agent.api.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    evidence_pb2,
    evidence_pb2_grpc,
    gpus_pb2,
    gpus_pb2_grpc,
    keys_pb2,
    keys_pb2_grpc,
    measured_boot_pb2,
    measured_boot_pb2_grpc,
    transfer_buffers_pb2,
    transfer_buffers_pb2_grpc,
)
from cgpu_agent.domain.policy import OF_KEYS, OPEN, Action, Facts, Policy
from cgpu_agent.rpc.admin import AdminService
from cgpu_agent.rpc.evidence import EvidenceService
from cgpu_agent.rpc.gpus import GpusService
from cgpu_agent.rpc.keys import KeysService
from cgpu_agent.rpc.measured_boot import MeasuredBootService
from cgpu_agent.rpc.methods import ACTIONS, BY_KEY, WITHIN_CHANNEL, admin_authorizer, public_authorizer
from cgpu_agent.rpc.transfer_buffers import TransferBuffersService
from fixtures.machine import WORKLOAD
from fixtures.policies import granting, permit

PUBLIC = (measured_boot_pb2, evidence_pb2, gpus_pb2, keys_pb2, transfer_buffers_pb2)
SERVICES: list[tuple[Any, type, type]] = [
    (measured_boot_pb2, measured_boot_pb2_grpc.MeasuredBootServicer, MeasuredBootService),
    (evidence_pb2, evidence_pb2_grpc.EvidenceServicer, EvidenceService),
    (gpus_pb2, gpus_pb2_grpc.GpusServicer, GpusService),
    (keys_pb2, keys_pb2_grpc.KeysServicer, KeysService),
    (transfer_buffers_pb2, transfer_buffers_pb2_grpc.TransferBuffersServicer, TransferBuffersService),
    (admin_pb2, admin_pb2_grpc.AdminServicer, AdminService),
]
ROOT = dataclasses.replace(WORKLOAD, uid=0, gid=0, unit=None)


def methods(*modules: Any) -> list[str]:
    return [
        f"/{service.full_name}/{method.name}"
        for module in modules
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]


def test_every_public_method_is_an_action_and_every_action_a_method() -> None:
    assert sorted(methods(*PUBLIC)) == sorted(ACTIONS.keys() | BY_KEY)
    assert set(ACTIONS.values()) == set(Action) - OF_KEYS
    alone = [action for method, action in ACTIONS.items() if method not in WITHIN_CHANNEL | BY_KEY]
    assert sorted(alone) == sorted(set(Action) - OF_KEYS)


@pytest.mark.parametrize(("module", "base", "service"), SERVICES)
def test_every_method_is_implemented(module: Any, base: type, service: type) -> None:
    for name in (method.rsplit("/", 1)[1] for method in methods(module)):
        assert getattr(service, name) is not getattr(base, name), name


@pytest.mark.parametrize("method", sorted(ACTIONS))
def test_without_grants_a_method_is_allowed_only_if_its_action_is_open(method: str) -> None:
    decision = public_authorizer(Policy.default, Facts)(WORKLOAD, method)
    assert decision.allowed is (ACTIONS[method] in OPEN)


@pytest.mark.parametrize("method", [m for m in sorted(ACTIONS) if ACTIONS[m] not in OPEN])
def test_grant_opens_its_method(method: str) -> None:
    policy = granting(permit(ACTIONS[method].value, f"principal.uid == {WORKLOAD.uid}"))
    authorize = public_authorizer(lambda: policy, Facts)
    assert authorize(WORKLOAD, method).allowed
    assert not authorize(ROOT, method).allowed  # not even root, unless granted
    others = [m for m in sorted(ACTIONS) if ACTIONS[m] is not ACTIONS[method] and ACTIONS[m] not in OPEN]
    assert not any(authorize(WORKLOAD, other).allowed for other in others)


@pytest.mark.parametrize(
    "method",
    [
        "/cgpu.agent.v1.MeasuredBoot/GetNewThing",
        "/cgpu.agent.v1.Evidence/GetEvidence2",
        "/cgpu.agent.v1.Keys/Release",
        "/cgpu.agent.v1.Admin/GetStatus",
        "/cgpu.agent.v2.Evidence/GetEvidence",
        "/cgpu.agent.v1.evidence/getevidence",
        "cgpu.agent.v1.Evidence/GetEvidence",
        "/grpc.health.v1.HealthX/Check",
        "/grpc.channelz.v1.Channelz/GetServers",
        "",
        "/",
    ],
)
def test_method_that_nobody_listed_is_denied_to_everybody(method: str) -> None:
    everything = Policy.load('@id("all") permit(principal, action, resource);', "test")
    authorize = public_authorizer(lambda: everything, Facts)
    assert not authorize(WORKLOAD, method).allowed
    assert not authorize(ROOT, method).allowed


@pytest.mark.parametrize(
    "method", ["/grpc.health.v1.Health/Check", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"]
)
def test_everybody_may_ask_how_the_server_is(method: str) -> None:
    decision = public_authorizer(Policy.default, Facts)(WORKLOAD, method)
    assert decision.allowed


def test_reloaded_policy_counts_at_once() -> None:
    policies = [Policy.default(), granting(permit("boot.measure", f"principal.uid == {WORKLOAD.uid}"))]
    authorize = public_authorizer(lambda: policies[0], Facts)
    method = "/cgpu.agent.v1.MeasuredBoot/MeasureEvent"
    assert not authorize(WORKLOAD, method).allowed
    policies.pop(0)
    assert authorize(WORKLOAD, method).allowed


@pytest.mark.parametrize("method", methods(admin_pb2))
def test_admin_socket_serves_operators_only(method: str) -> None:
    authorize = admin_authorizer(own_uid=990)
    agent = dataclasses.replace(WORKLOAD, uid=990)
    container_root = dataclasses.replace(ROOT, container="ab" * 32)
    assert authorize(ROOT, method).allowed
    assert authorize(agent, method).allowed
    assert not authorize(WORKLOAD, method).allowed
    assert not authorize(container_root, method).allowed  # attack 16: its uid 0 is the host's uid 0


@pytest.mark.parametrize("method", [*methods(*PUBLIC), "/cgpu.agent.v1.Administration/X", ""])
def test_admin_socket_serves_nothing_but_its_own(method: str) -> None:
    assert not admin_authorizer(own_uid=990)(ROOT, method).allowed
