"""Collateral as the files of one directory, which agent, cgpuctl and operator share: a name's end says what it is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal

from cgpu_agent.errors import Misuse

Kind = Literal["rims", "crls", "ocsp"]

KINDS: Final[dict[str, Kind]] = {".xml": "rims", ".swidtag": "rims", ".crl": "crls", ".ocsp": "ocsp"}
"""Everything else in the directory is left alone."""
MAX_FILE: Final = 8 << 20
MAX_FILES: Final = 512


def collateral_paths(folder: Path) -> list[Path]:
    """The files that count, by name; none where there is no such directory.

    Raises ``Misuse``: ``NO_FILE`` (it cannot be read), ``TOO_MANY_FILES``.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in KINDS)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Misuse("NO_FILE", f"{folder} cannot be read: {error.strerror}") from error
    if len(paths) > MAX_FILES:
        raise Misuse("TOO_MANY_FILES", f"{folder}: more than {MAX_FILES} files")
    return paths


def read_bounded(path: Path) -> bytes:
    """Content of a file. Raises ``Misuse``: ``NO_FILE``, ``FILE_TOO_LARGE``."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise Misuse("NO_FILE", f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_FILE:
        raise Misuse("FILE_TOO_LARGE", f"{path} is larger than {MAX_FILE} bytes")
    return data


def read_collateral(paths: Iterable[Path]) -> dict[Kind, list[bytes]]:
    """Content of ``collateral_paths``, as ``Collateral.load`` takes it. Raises as ``read_bounded``."""
    found: dict[Kind, list[bytes]] = {"rims": [], "crls": [], "ocsp": []}
    for path in paths:
        found[KINDS[path.suffix]].append(read_bounded(path))
    return found
