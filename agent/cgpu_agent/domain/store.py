"""Small files that must never be half-written: the agent's state of this boot, on a tmpfs only it can read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from cgpu_agent.errors import Unavailable


class Store:
    """A directory of mode 0700, owned by this process's uid.

    Args:
        folder: created if missing; its parent must exist.

    Raises:
        Unavailable: ``STATE_DIRECTORY`` when the directory is not ours alone. Every method raises it, too, when a
            file cannot be read or written, and then trying again later makes sense: the file system may be full.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            info = folder.lstat()
        except OSError as error:
            raise Unavailable("STATE_DIRECTORY", "the state directory cannot be made") from error
        if not folder.is_dir() or folder.is_symlink() or info.st_uid != os.geteuid() or info.st_mode & 0o077:
            raise Unavailable("STATE_DIRECTORY", "the state directory must be ours and of mode 0700")

    def read(self, name: str) -> bytes | None:
        """Content of a file, or ``None`` when there is none."""
        with _named():
            try:
                return (self._folder / name).read_bytes()
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Replace a file as a whole, durably: after a crash it holds the old content or the new, nothing else."""
        temporary = self._folder / f".{name}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        with _named():
            with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._folder / name)
            sync_folder(self._folder)

    def append(self, name: str, data: bytes, *, at: int) -> None:
        """Write ``data`` at offset ``at`` and cut the file after it, durably: a torn append is overwritten."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        with _named():
            descriptor = os.open(self._folder / name, flags, 0o600)
            try:
                written = 0
                while written < len(data):
                    written += os.pwrite(descriptor, data[written:], at + written)
                os.ftruncate(descriptor, at + len(data))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def remove(self, name: str) -> None:
        """Remove a file, durably; one that is not there is removed already."""
        with _named():
            (self._folder / name).unlink(missing_ok=True)
            sync_folder(self._folder)


def sync_folder(folder: Path) -> None:
    """Have the names in a directory survive a power cut. Raises ``OSError``."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Name what the operating system refused."""
    try:
        yield
    except OSError as error:
        raise Unavailable(
            "STATE_DIRECTORY", "the agent's state cannot be read or written", retry_after=5.0
        ) from error
