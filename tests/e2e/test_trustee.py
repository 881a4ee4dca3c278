"""Whole processes behind the evidence: a TPM's and the GPUs'; the broker is a stand-in for Trustee."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from cgpu_agent.backends.base import GpuEvidence, GpuInfo, ReleasedKey
from cgpu_agent.backends.gpu.software.client import SoftwareGpus
from cgpu_agent.backends.keys.trustee import TrusteeKbs
from cgpu_agent.backends.tpm.owner import TpmOwner
from fixtures.attester import VmAttester
from fixtures.azure_tpm import PLATFORM_AK
from fixtures.kbs import ORIGIN, Kbs
from fixtures.kbsvm import KEY, bare_vm
from fixtures.softwaregpu import PATIENCE, party_of, running_gpus
from fixtures.swtpm import running_swtpm


@dataclass
class WithProcess(VmAttester):
    """Whose GPUs are in a process of their own."""

    process: SoftwareGpus | None = None

    async def gpu_reports(self, nonce: bytes) -> tuple[tuple[GpuInfo, GpuEvidence], ...]:
        assert self.process is not None
        infos = await self.process.list(timeout=PATIENCE)
        return tuple([(info, await self.process.evidence(info.uuid, nonce, timeout=PATIENCE)) for info in infos])


@pytest.mark.swtpm
def test_a_key_for_a_vm_with_software_gpus(tmp_path: Path) -> None:
    async def go() -> tuple[ReleasedKey, Kbs]:
        vm = bare_vm(tpm, tmp_path)
        owner, gpus = TpmOwner(vm.open_tpm), SoftwareGpus(process.socket)
        try:
            files = await gpus.collateral(timeout=PATIENCE)
            kbs = Kbs(need_gpus=2, gpus=lambda nonce: party_of(files, nonce=nonce))
            below = (await vm.attester(owner)).platform_below
            shows = WithProcess(owner, PLATFORM_AK, below, process=gpus)
            return await TrusteeKbs(ORIGIN, kbs).release(KEY, shows, timeout=60.0), kbs
        finally:
            gpus.close()
            owner.close()

    with running_swtpm() as tpm, running_gpus("--count", "2") as process:
        released, kbs = asyncio.run(go())
    assert released.secret == b"secret " * 4
    assert json.loads(kbs.log[0][3])["tee"] == "tpm"
