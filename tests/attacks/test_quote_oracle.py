"""Attack 3: a workload has the platform AK sign what another protocol takes for this VM's own words."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
from collections.abc import Iterator

import pytest

from cgpu_agent.client import Agent
from cgpu_agent.domain.policy import Action, Facts, Policy
from cgpu_agent.errors import Denied, Misuse
from cgpu_agent.wire.bundle import parse_bundle
from cgpu_agent.wire.extradata import caller_quote_extra_data, manifest_extra_data
from cgpu_agent.wire.tpm import parse_attest
from fixtures.daemon import Daemon, booted_daemon
from fixtures.machine import AUDIENCE, WORKLOAD, judge, request
from fixtures.machine import Machine as Vm

pytestmark = pytest.mark.swtpm

# What Trustee's verifiers look for in extraData: SHA-384 over nonce and key, whole or its first 32 bytes.
KBS_CHALLENGE = hashlib.sha384(b'{"nonce":"kbs","tee-pubkey":"the workload\'s own"}').digest()


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with booted_daemon() as agent:
        agent.start()
        yield agent


@pytest.fixture
def workload(daemon: Daemon) -> Iterator[Agent]:
    with daemon.client() as agent:
        yield agent


@pytest.mark.parametrize("challenge", [KBS_CHALLENGE, KBS_CHALLENGE[:32], b"x", hashlib.sha256(b"maa").digest()])
def test_workload_cannot_have_another_protocols_challenge_quoted(workload: Agent, challenge: bytes) -> None:
    with pytest.raises(Denied) as caught:
        workload.get_raw_quote(challenge)
    assert caught.value.slug == "NOT_ALLOWED"


def test_not_even_root_may_without_a_grant() -> None:
    root = dataclasses.replace(WORKLOAD, uid=0, unit=None)
    assert not Policy.default().decide(root, Action.RAW_QUOTE, Facts()).allowed


@pytest.mark.parametrize("challenge", [KBS_CHALLENGE, KBS_CHALLENGE[:32]])
def test_default_quote_never_holds_the_challenge_itself(workload: Agent, challenge: bytes) -> None:
    extra_data = parse_attest(workload.get_quote(challenge).attest).extra_data
    assert len(extra_data) == 34
    assert extra_data[:2] == b"\xc6\x02"
    assert challenge not in extra_data


def test_default_quote_speaks_in_its_callers_name_only(workload: Agent) -> None:
    nonce = os.urandom(32)
    quote = workload.get_quote(nonce)
    signed = parse_attest(quote.attest).extra_data
    assert signed == caller_quote_extra_data(quote.caller_claims, nonce)
    other = dataclasses.replace(WORKLOAD, uid=0).claims_bytes()
    assert signed != caller_quote_extra_data(other, nonce)


def test_default_quote_is_no_manifests_signature(workload: Agent) -> None:
    """A caller chooses the nonce, not the domain: no nonce makes the AK sign the form of a manifest."""
    manifest = parse_bundle(workload.get_evidence(bytes(16), AUDIENCE)).manifest
    for nonce in (manifest_extra_data(manifest), hashlib.sha256(manifest).digest()):
        assert parse_attest(workload.get_quote(nonce).attest).extra_data != manifest_extra_data(manifest)


@pytest.mark.parametrize("version", [0, 1, 2, 3, 127, 255])
def test_granted_raw_quote_signs_no_form_of_the_agents_of_any_version(machine: Vm, version: int) -> None:
    async def scenario() -> None:
        async with machine.serving() as core:
            with pytest.raises(Misuse) as caught:
                await core.boot.raw_quote(WORKLOAD, bytes([0xC6, version]) + os.urandom(32), ())
            assert caught.value.slug == "BAD_NONCE"
            with pytest.raises(Misuse):
                await core.boot.raw_quote(WORKLOAD, b"", ())  # MAA's PcrQuote has no qualifying data

    asyncio.run(scenario())


def test_bundle_signed_by_the_platform_ak_is_refused(machine: Vm) -> None:
    """Attack 7: whoever may use the platform AK still cannot make a manifest that a verifier takes."""

    async def scenario() -> tuple[bytes, bytes]:
        async with machine.serving() as core:
            asked = request()
            bundle = parse_bundle(await core.evidence.get(WORKLOAD, asked))
            stranger = await core.tpm.run(
                lambda tpm: tpm.quote(
                    core.boot.keys.platform_ak_handle,
                    manifest_extra_data(bundle.manifest),
                    core.evidence._selection,
                ),
                timeout=30,
            )
            quote = dataclasses.replace(bundle.quote, attest=stranger.attest, signature=stranger.signature)
            forged = dataclasses.replace(bundle, quote=quote)
            by_name = dataclasses.replace(forged, agent_ak=bundle.platform_ak)
            for each in (forged, by_name):
                assert judge(each.encode(), asked.nonce).refusal is not None
            return forged.encode(), asked.nonce

    forged, nonce = asyncio.run(scenario())
    refusal = judge(forged, nonce).refusal
    assert refusal is not None
    assert refusal.id == "manifest.quote"
