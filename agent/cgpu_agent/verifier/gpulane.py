"""The GPUs of a bundle: those that were asked for, all of them, and each proves itself to this very batch.

Needs the packages for GPU evidence (``cgpu-agent[gpu]``) only where there are GPUs to judge.
"""

from __future__ import annotations

import hmac
from collections import Counter
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.verdict import Skip
from cgpu_agent.wire.bundle import Bundle
from cgpu_agent.wire.gpuinventory import GpuInventory, GpuRecord, GpuWords
from cgpu_agent.wire.gpunonce import gpu_batch_nonce
from cgpu_agent.wire.manifest import Manifest
from cgpu_agent.wire.statement import Statement

if TYPE_CHECKING:
    from cgpu_agent.verifier.gpucase import DeviceEvidence, GpuParty
    from cgpu_agent.verifier.gpuset import SetResult

NOT_ASKED = Skip("NOT_ASKED", "the evidence was asked of the boot alone: it says nothing of any GPU")


def judge_lane(bundle: Bundle, statement: Statement, manifest: Manifest, count: int | None) -> str | Skip:
    """Whether statement, manifest and bundle agree on whether there are GPUs; ``count`` = as many are expected."""
    asked = statement.lane == "gpus"
    if (manifest.gpus is not None) is not asked or (bundle.gpus is not None) is not asked:
        raise HostileInput("LANE_MISMATCH", "the evidence does not hold what was asked for, or more than that")
    if asked:
        return "the GPUs were asked for, and are there"
    if count is not None:
        raise HostileInput("GPUS_NOT_ASKED", "GPUs are expected, and the evidence was asked of the boot alone")
    return NOT_ASKED


def judge_inventory(bundle: Bundle, manifest: Manifest) -> str | Skip:
    """Whether everybody saw the same devices, and each device's words are those that the manifest signs."""
    inventory = manifest.gpus
    if inventory is None:
        return NOT_ASKED
    words = bundle.gpus or ()
    counts = {"kernel": inventory.kernel, "driver": len(inventory.devices), "reports": len(words)}
    if len(set(counts.values())) != 1:
        told = ", ".join(f"{who} {number}" for who, number in counts.items())
        raise HostileInput("INVENTORY_MISMATCH", f"not everybody saw the same number of devices: {told}")
    for values in ([each.uuid for each in inventory.devices], [each.bdf for each in inventory.devices]):
        if any(times > 1 for times in Counter(values).values()):
            raise HostileInput("DUPLICATE_DEVICE", "two devices of the inventory have one name")
    for record, each in zip(inventory.devices, words, strict=True):
        if not hmac.compare_digest(record.words, each.digest()):
            raise HostileInput("GPU_WORDS_MISMATCH", f"the report of {record.bdf} is not what the manifest signs")
    return f"kernel and driver saw {len(words)} devices, and each has its report"


def judge_devices(
    bundle: Bundle, manifest: Manifest, party: GpuParty | None, at: datetime, count: int | None
) -> SetResult | None:
    """Every device's own proof, over the nonce of this batch; ``None`` where there are no GPUs.

    Args:
        party: what is demanded of devices; its ``nonce`` and ``at`` do not matter. ``None``: all that NVIDIA signs,
            and so refused without reference values.
        at: the moment of judgement.
        count: as many GPUs are expected.

    Raises:
        HostileInput: ``GPU_PACKAGES_MISSING``, and what the first device or the set is refused for.
    """
    inventory, words = manifest.gpus, bundle.gpus
    if inventory is None or words is None:
        return None
    try:
        from cgpu_agent.verifier.gpucase import GpuParty  # noqa: PLC0415
        from cgpu_agent.verifier.gpuset import verify_devices  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise HostileInput(
            "GPU_PACKAGES_MISSING", "this verifier cannot judge GPUs: pip install 'cgpu-agent[gpu]'"
        ) from error
    nonce = gpu_batch_nonce(manifest.agent_ak_name, manifest.root)
    demands = GpuParty(at, nonce) if party is None else replace(party, at=at, nonce=nonce)
    evidence = [_evidence(record, each) for record, each in zip(inventory.devices, words, strict=True)]
    result = verify_devices(evidence, demands, expected_gpus=_expected(inventory, count))
    if result.refusal is not None or not result.accepted:
        slug, detail = ("INTERNAL", "") if result.refusal is None else (result.refusal.slug, result.refusal.detail)
        raise HostileInput(slug or "INTERNAL", detail)
    return result


def _expected(inventory: GpuInventory, count: int | None) -> int | None:
    """The relying party's number, else the agent's own."""
    return count if count is not None else inventory.expected or None


def _evidence(record: GpuRecord, words: GpuWords) -> DeviceEvidence:
    # The driver's words go in as claims: where the signed report says otherwise, they were lies.
    from cgpu_agent.verifier.gpucapability import Architecture  # noqa: PLC0415
    from cgpu_agent.verifier.gpucase import DeviceEvidence  # noqa: PLC0415

    architecture = None if record.architecture == "other" else Architecture(record.architecture)
    return DeviceEvidence(words.report, words.chain, architecture, {"driver": record.driver, "vbios": record.vbios})
