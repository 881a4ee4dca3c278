"""Attack 17: without SO_PEERPIDFD a recycled pid would lend its unit to a stranger, so there is no unit."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Iterator

import pytest

from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.policy import Action, Facts
from cgpu_agent.rpc import peer
from cgpu_agent.rpc.environment import self_check_environment
from cgpu_agent.rpc.identify import Identifier
from cgpu_agent.rpc.methods import public_authorizer
from fixtures.machine import WORKLOAD
from fixtures.policies import granting, permit

MEASURE = "/cgpu.agent.v1.MeasuredBoot/MeasureEvent"


@pytest.fixture
def connection() -> Iterator[socket.socket]:
    """A real connection, of this process with itself."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours


def identified(connection: socket.socket, *, peer_pidfd: bool) -> Caller:
    capabilities = dataclasses.replace(self_check_environment(), peer_pidfd=peer_pidfd)
    found = Identifier(capabilities).identify(connection, peer.credentials(connection))
    try:
        return found.caller
    finally:
        found.close()


def test_without_a_pidfd_only_the_credentials_are_known(connection: socket.socket) -> None:
    caller = identified(connection, peer_pidfd=False)
    assert caller.identity_strength == "pid"
    assert (caller.unit, caller.container, caller.cgroup, caller.exe_at_identify) == (None, None, None, None)
    assert (caller.uid, caller.gid, caller.pid) == (os.geteuid(), os.getegid(), os.getpid())


def test_grant_to_a_unit_does_not_hold_without_a_pidfd(connection: socket.socket) -> None:
    caller = identified(connection, peer_pidfd=False)
    policy = granting(
        permit("boot.measure", 'principal.unit == "inference.service"'),
        permit("boot.raw_quote", f"principal.uid == {caller.uid}"),
    )
    authorize = public_authorizer(lambda: policy, Facts)
    assert not authorize(caller, MEASURE).allowed
    assert authorize(dataclasses.replace(WORKLOAD, unit="inference.service"), MEASURE).allowed
    assert authorize(caller, "/cgpu.agent.v1.MeasuredBoot/GetRawQuote").allowed  # the uid is the kernel's word still


def test_grant_to_unit_and_uid_does_not_fall_back_to_the_uid(connection: socket.socket) -> None:
    caller = identified(connection, peer_pidfd=False)
    policy = granting(
        permit("boot.measure", f'principal.uid == {caller.uid} && principal.unit == "inference.service"')
    )
    assert policy.decide(caller, Action.MEASURE, Facts()).reason == "no policy allows this"


def test_strength_is_part_of_what_evidence_states(connection: socket.socket) -> None:
    weak = identified(connection, peer_pidfd=False)
    assert json.loads(weak.claims_bytes())["identity_strength"] == "pid"
    assert weak.digest() != dataclasses.replace(weak, identity_strength="pidfd").digest()


@pytest.mark.skipif(not self_check_environment().peer_pidfd, reason="this kernel has no SO_PEERPIDFD")
def test_with_a_pidfd_the_strength_says_so(connection: socket.socket) -> None:
    assert identified(connection, peer_pidfd=True).identity_strength == "pidfd"
