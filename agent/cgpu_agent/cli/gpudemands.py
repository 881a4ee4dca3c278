"""What a command line demands of GPUs: the options that ``gpu verify`` and the judges of bundles have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

from cgpu_agent.cli.inputs import read_all, read_file
from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.verifier.certificate import load_trusted
from cgpu_agent.verifier.collateral import Collateral
from cgpu_agent.verifier.collateralfolder import collateral_paths, read_collateral
from cgpu_agent.verifier.gpucapability import Architecture
from cgpu_agent.verifier.gpucase import GpuParty
from cgpu_agent.verifier.gpuchain import NVIDIA_DEVICE_ROOTS, NVIDIA_RIM_ROOTS, PinnedRoots
from cgpu_agent.verifier.gpufloor import Floors

T = TypeVar("T")


def party_of(
    arguments: argparse.Namespace,
    *,
    at: datetime,
    nonce: bytes | None = None,
    architecture: Architecture | None = None,
) -> GpuParty:
    """Raises ``Misuse``: ``BAD_FLOOR``, ``BAD_NONCE``; a file cannot be read, or holds what it should not."""
    return GpuParty(
        at=at,
        nonce=nonce,
        device_roots=roots_of(arguments.device_root, NVIDIA_DEVICE_ROOTS),
        rim_roots=roots_of(arguments.rim_root, NVIDIA_RIM_ROOTS),
        collateral=own(lambda: _collateral(arguments)),
        floors=Floors(arguments.min_driver, arguments.min_vbios, arguments.min_switch_bios),
        architecture=architecture,
        allow_no_rim=arguments.allow_no_rim,
        allow_rim_hold=arguments.allow_rim_hold,
        require_revocation=arguments.require_revocation,
        require_fwid=arguments.require_fwid,
    )


def own(load: Callable[[], T]) -> T:
    """What the judge himself brings along is wrong: that is a bad argument, and says nothing of the evidence."""
    try:
        return load()
    except HostileInput as error:
        raise Misuse(error.slug, error.message) from error


def roots_of(path: Path | None, default: PinnedRoots) -> PinnedRoots:
    """The roots that an option names. Raises ``Misuse``."""
    if path is None:
        return default
    return own(lambda: PinnedRoots.of(load_trusted(read_file(path, 1 << 20))))


def _collateral(arguments: argparse.Namespace) -> Collateral:
    folder: Path | None = arguments.collateral
    if folder is not None and not folder.is_dir():
        raise Misuse("NO_FILE", f"{folder} is not a directory")
    stored = read_collateral([] if folder is None else collateral_paths(folder))
    return Collateral.load(
        rims=[*stored["rims"], *read_all(arguments.rim)],
        crls=[*stored["crls"], *read_all(arguments.crl)],
        ocsp=[*stored["ocsp"], *read_all(arguments.ocsp)],
        max_age=None if arguments.max_age is None else timedelta(days=arguments.max_age),
    )
