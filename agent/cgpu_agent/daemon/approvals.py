"""Reads the owner's approvals of boots, as the operator installed them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cgpu_agent.daemon.brokerconfig import SealedConfig
from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.wire.approval import MAX_APPROVAL, Approval, parse_approval

MAX_APPROVALS: Final = 64


def load_approvals(config: SealedConfig) -> tuple[Approval, ...]:
    """The approvals, by file name; none where there is no such directory.

    Raises:
        Misuse: ``BAD_CONFIG``, with the file at fault.
    """
    folder = Path(config.approvals)
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".json")
        if len(paths) > MAX_APPROVALS:
            raise Misuse("BAD_CONFIG", f"{folder}: more than {MAX_APPROVALS} approvals")
        return tuple(map(_read, paths))
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise Misuse("BAD_CONFIG", f"{error.filename or folder} cannot be read: {error.strerror}") from error


def _read(path: Path) -> Approval:
    with path.open("rb") as file:
        data = file.read(MAX_APPROVAL + 1)
    try:
        return parse_approval(data)
    except HostileInput as error:
        raise Misuse("BAD_CONFIG", f"{path}: {error.message}") from error
