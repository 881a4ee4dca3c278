"""What cgpuctl writes: files that are there as a whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from cgpu_agent.cli.inputs import read_file
from cgpu_agent.errors import Misuse


def write_whole(path: Path, data: bytes, *, secret: bool = False) -> None:
    """Write a file as a whole or not at all; a secret for its owner alone. Raises ``Misuse`` (``CANNOT_WRITE``)."""
    _write(path, data, lambda temporary: temporary.replace(path), secret=secret)


def write_new(path: Path, data: bytes) -> bool:
    """Write a file unless it is there with this very content; whether it was written.

    Raises ``Misuse`` (``CANNOT_WRITE``), also where the file is there with another content.
    """

    def link(temporary: Path) -> None:
        path.hardlink_to(temporary)  # in one step, and never over another file
        temporary.unlink()

    try:
        _write(path, data, link)
    except Misuse as error:
        if not isinstance(error.__cause__, FileExistsError):
            raise
        if read_file(path) != data:
            raise Misuse("CANNOT_WRITE", f"{path} is there with another content") from error
        return False
    return True


def _write(path: Path, data: bytes, place: Callable[[Path], object], *, secret: bool = False) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(data)
                file.flush()
                if not secret:  # it was made with mode 0600
                    temporary.chmod(0o666 & ~_umask())
                place(temporary)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise Misuse("CANNOT_WRITE", f"{path}: {error.strerror}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
