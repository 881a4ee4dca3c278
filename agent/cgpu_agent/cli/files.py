"""What cgpuctl writes: files that are there as a whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from cgpu_agent.errors import Misuse


def write_whole(path: Path, data: bytes) -> None:
    """Write a file as a whole or not at all. Raises ``Misuse`` (``CANNOT_WRITE``)."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(data)
                file.flush()
                temporary.chmod(0o666 & ~_umask())
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
