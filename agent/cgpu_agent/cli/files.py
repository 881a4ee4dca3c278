"""Files that commands write for a person or a script, where half a file would be worse than none."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from cgpu_agent.cli.inputs import read_file
from cgpu_agent.errors import Misuse


def write_whole(path: Path, data: bytes, *, secret: bool = False) -> None:
    """Write a file as a whole or not at all; a secret for its owner alone. Raises ``Misuse`` (``CANNOT_WRITE``)."""
    with whole_file(path, 0o600 if secret else 0o666) as file:
        file.write(data)


def write_new(path: Path, data: bytes) -> bool:
    """Write a file unless it is there with this very content; whether it was written.

    Raises ``Misuse`` (``CANNOT_WRITE``), also where the file is there with another content.
    """

    def link(temporary: Path) -> None:
        path.hardlink_to(temporary)  # in one step, and never over another file
        temporary.unlink()

    try:
        with _placed(path, 0o666, link) as file:
            file.write(data)
    except Misuse as error:
        if not isinstance(error.__cause__, FileExistsError):
            raise
        if read_file(path) != data:
            raise Misuse("CANNOT_WRITE", f"{path} is there with another content") from error
        return False
    return True


@contextlib.contextmanager
def whole_file(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A file that gets its name, and ``mode`` less the umask, when the block ends; an exception removes it.

    Raises ``Misuse`` (``CANNOT_WRITE``), for any ``OSError`` of the block too.
    """
    if path.exists() and not path.is_file():  # a device would be replaced by a file
        raise Misuse("CANNOT_WRITE", f"{path}: not a regular file")
    with _placed(path, mode, lambda temporary: temporary.replace(path)) as file:
        yield file


@contextlib.contextmanager
def _placed(path: Path, mode: int, place: Callable[[Path], object]) -> Iterator[BinaryIO]:
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            try:
                yield cast("BinaryIO", file)
                file.flush()
                os.fsync(file.fileno())
                temporary.chmod(mode & ~_umask())
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
