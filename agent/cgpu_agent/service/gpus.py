"""What the service demands of GPUs. Imported only where the configuration does: it takes the packages for GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TypeVar

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.service.config import Gpu
from cgpu_agent.verifier.certificate import load_trusted
from cgpu_agent.verifier.collateral import Collateral
from cgpu_agent.verifier.collateralfolder import collateral_paths, read_bounded, read_collateral
from cgpu_agent.verifier.gpucase import GpuParty
from cgpu_agent.verifier.gpuchain import NVIDIA_DEVICE_ROOTS, NVIDIA_RIM_ROOTS, PinnedRoots
from cgpu_agent.verifier.gpufloor import Floors

T = TypeVar("T")


def load_party(config: Gpu) -> GpuParty:
    """Read roots and collateral; the moment is set for each bundle. Raises ``Misuse``, with the file at fault."""
    stored = read_collateral([] if config.collateral is None else collateral_paths(_folder(config.collateral)))
    return GpuParty(
        at=datetime.fromtimestamp(0, timezone.utc),
        device_roots=_roots(config.device_roots) or NVIDIA_DEVICE_ROOTS,
        rim_roots=_roots(config.rim_roots) or NVIDIA_RIM_ROOTS,
        collateral=_own(
            config.collateral,
            lambda: Collateral.load(
                rims=stored["rims"],
                crls=stored["crls"],
                ocsp=stored["ocsp"],
                max_age=timedelta(days=config.max_age) if config.max_age else None,
            ),
        ),
        floors=Floors(config.min_driver or None, config.min_vbios or None),
        allow_no_rim=config.allow_no_rim,
        require_revocation=config.require_revocation,
    )


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise Misuse("NO_FILE", f"{path} is not a directory")
    return path


def _roots(paths: Sequence[Path]) -> PinnedRoots | None:
    found = [each for path in paths for each in _own(path, lambda path=path: load_trusted(read_bounded(path)))]  # type: ignore[misc]
    return PinnedRoots.of(found) if found else None


def _own(path: Path | None, load: Callable[[], T]) -> T:
    """What is wrong with the operator's own files is a bad configuration."""
    try:
        return load()
    except HostileInput as error:
        raise Misuse(error.slug, f"{path}: {error.message}") from error
