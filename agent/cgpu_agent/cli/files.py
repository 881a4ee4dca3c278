"""What cgpuctl writes: files that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from cgpu_agent.errors import Misuse


def write_whole(path: Path, data: bytes) -> None:
    """Write a file as a whole or not at all. Raises ``Misuse`` (``CANNOT_WRITE``)."""
    with whole_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def whole_file(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A file that gets its name, and ``mode`` less the umask, when the block ends; an exception removes it.

    Raises ``Misuse`` (``CANNOT_WRITE``), for any ``OSError`` of the block too.
    """
    if path.exists() and not path.is_file():  # a device would be replaced by a file
        raise Misuse("CANNOT_WRITE", f"{path}: not a regular file")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            try:
                yield cast("BinaryIO", file)
                file.flush()
                os.fsync(file.fileno())
                temporary.chmod(mode & ~_umask())
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise Misuse("CANNOT_WRITE", f"{path}: {error.strerror}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
