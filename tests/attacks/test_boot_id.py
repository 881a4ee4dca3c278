"""Attack 34: the boot id is a random string that a kernel made up. What is one boot, the TPM's counters say."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from cgpu_agent.domain.evidence import Request
from cgpu_agent.errors import Unavailable
from cgpu_agent.verifier.evidence import EvidenceResult
from cgpu_agent.wire.bundle import parse_bundle
from cgpu_agent.wire.manifest import Manifest, parse_manifest
from cgpu_agent.wire.tpm import parse_attest
from fixtures.machine import BOOT_ID, WORKLOAD, Machine, judge, replay_boot, request

pytestmark = pytest.mark.swtpm

OTHER = "ffffffff-ffff-4fff-8fff-ffffffffffff"


async def collect(machine: Machine, boot_id: str = BOOT_ID) -> tuple[bytes, Request]:
    async with machine.serving(boot_id=boot_id) as core:
        asked = request()
        return await core.evidence.get(WORKLOAD, asked), asked


def evidence(machine: Machine, boot_id: str = BOOT_ID) -> EvidenceResult:
    bundle, asked = asyncio.run(collect(machine, boot_id))
    return judge(bundle, asked.nonce)


def continuity(manifest: Manifest | None) -> tuple[bytes, int, int]:
    """What a relying party keeps to know the same boot again."""
    assert manifest is not None
    return manifest.agent_ak_name, manifest.reset_count, manifest.restart_count


def test_one_boot_has_one_name_and_one_count_over_restarts_of_the_agent(machine: Machine) -> None:
    first, second = evidence(machine), evidence(machine)
    assert first.accepted
    assert second.accepted
    assert continuity(first.manifest) == continuity(second.manifest)


def test_next_boot_has_another_name_and_another_count(machine: Machine) -> None:
    first = evidence(machine)
    machine.tpm.restart()
    replay_boot(machine.tpm)
    second = evidence(machine, OTHER)
    assert second.accepted, second.refusal
    assert continuity(first.manifest)[0] != continuity(second.manifest)[0]
    assert continuity(first.manifest)[1] < continuity(second.manifest)[1]


def test_kept_boot_id_does_not_make_two_boots_one(machine: Machine) -> None:
    """A host that resets the TPM and has the same boot id told again."""
    evidence(machine)
    machine.tpm.restart()
    replay_boot(machine.tpm)
    with pytest.raises(Unavailable) as caught:
        evidence(machine)
    assert caught.value.slug == "TPM_RESET_DETECTED"
    shutil.rmtree(machine.runtime)  # and with its state gone, it is another agent to everybody
    again = evidence(machine)
    assert again.accepted
    assert again.manifest is not None
    assert again.manifest.reset_count == 2


def test_new_boot_id_does_not_make_one_boot_two(machine: Machine) -> None:
    """A kernel started by kexec, or a lie: the TPM did not begin anew, so nobody gets to be first again."""
    evidence(machine)
    with pytest.raises(Unavailable) as caught:
        evidence(machine, OTHER)
    assert caught.value.slug == "REGISTER_IN_USE"


def test_counts_of_manifest_quote_and_certification_are_one(machine: Machine) -> None:
    for _ in range(2):
        machine.tpm.restart()
    bundle = parse_bundle(asyncio.run(collect(machine))[0])
    manifest = parse_manifest(bundle.manifest)
    for attest in (bundle.quote.attest, bundle.agent_ak_certify.attest):
        signed = parse_attest(attest).clock_info
        assert (signed.reset_count, signed.restart_count) == (manifest.reset_count, manifest.restart_count) == (3, 0)
