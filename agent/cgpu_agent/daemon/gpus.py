"""What the agent trusts about GPUs, from the files that the configuration names; and what it offers of theirs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from cgpu_agent.backends.devicememory import TransferGpus
from cgpu_agent.daemon.config import GpuConfig, Limits
from cgpu_agent.domain.channels import ChannelLimits, Channels
from cgpu_agent.domain.core import Core
from cgpu_agent.domain.gpujudge import GpuJudge
from cgpu_agent.domain.gpurules import GpuRules
from cgpu_agent.domain.leases import Leases
from cgpu_agent.domain.loading import Loading
from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.verifier.certificate import load_trusted
from cgpu_agent.verifier.collateral import Collateral
from cgpu_agent.verifier.collateralfolder import collateral_paths, read_bounded, read_collateral
from cgpu_agent.verifier.gpuchain import NVIDIA_DEVICE_ROOTS, NVIDIA_RIM_ROOTS, PinnedRoots, spki_digest
from cgpu_agent.verifier.gpufloor import Floors

T = TypeVar("T")


def load_rules(config: GpuConfig) -> GpuRules:
    """The rules of the sessions."""
    return GpuRules(config.allow_simulated, config.count, config.reattest_seconds, config.report_seconds)


def offer_transfers(
    core: Core, limits: Limits, devices: TransferGpus | None, leases: Leases, epoch: Callable[[], object]
) -> None:
    """Have the core offer channels to GPUs' memory, where a driver gives any through the agent."""
    if core.gpus is None or devices is None:
        return
    most = ChannelLimits(
        limits.channels, limits.channels_per_uid, limits.transfers_per_uid, limits.gpu_mib_per_uid << 20
    )
    core.channels = Channels(devices, core.gpus, leases, epoch, core.audit, core.clock, most, core.vm_generation)
    if core.release is not None:
        core.loading = Loading(core.release, leases, core.channels)


def load_judge(config: GpuConfig) -> GpuJudge:
    """Read roots and collateral.

    Raises:
        Misuse: ``BAD_CONFIG``: a file is named that cannot be read, or one holds something else than it should.
    """
    seen = hashlib.sha256(repr(config).encode())
    roots = [_roots(names, seen) for names in (config.device_roots, config.rim_roots)]
    files = _own(lambda: read_collateral(collateral_paths(Path(config.collateral))))
    for data in (data for kind in files.values() for data in kind):
        seen.update(hashlib.sha256(data).digest())
    floors = [None if version == "none" else version for version in (config.min_driver, config.min_vbios)]
    return _own(
        lambda: GpuJudge(
            device_roots=roots[0] or NVIDIA_DEVICE_ROOTS,
            rim_roots=roots[1] or NVIDIA_RIM_ROOTS,
            collateral=Collateral.load(rims=files["rims"], crls=files["crls"], ocsp=files["ocsp"]),
            floors=Floors(*floors),
            allow_no_rim=config.allow_no_rim,
            require_revocation=config.require_revocation,
            digest=seen.hexdigest(),
        )
    )


def _own(load: Callable[[], T]) -> T:
    """What is wrong with the operator's own files is a bad configuration."""
    try:
        return load()
    except (HostileInput, Misuse) as error:
        raise Misuse("BAD_CONFIG", f"gpu: {error.message}") from error


def _roots(names: Sequence[str], seen: hashlib._Hash) -> PinnedRoots | None:
    keys: set[bytes] = set()
    for name in names:
        if name.startswith("/"):
            data = _own(lambda name=name: read_bounded(Path(name)))  # type: ignore[misc]
            seen.update(data)
            keys |= {spki_digest(each) for each in _own(lambda data=data: load_trusted(data))}  # type: ignore[misc]
        else:
            keys.add(bytes.fromhex(name))
    return PinnedRoots(frozenset(keys)) if keys else None
