"""What ``cgpuctl transfer copy`` does: a file to a GPU's memory and back, through memory on lease, in pieces."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from io import BufferedReader

from cgpu_agent.cli.progress import Progress
from cgpu_agent.client.channels import Channel
from cgpu_agent.errors import Misuse

_PIECE = 16 << 20
_STALE = b"\xa5"
"""Lies where bytes are to come back, so that those on their way out are not taken for them."""


@dataclass(frozen=True, slots=True)
class Copied:
    """How it went: bytes, seconds each way, and SHA-256 of what was sent and of what came back."""

    size: int
    to_seconds: float
    from_seconds: float
    sent: str
    back: str


def there_and_back(channel: Channel, file: BufferedReader) -> Copied:
    """Each byte of the file is read once. Raises ``Misuse``: ``NO_FILE``, ``EMPTY_FILE``; and as ``Channel`` does."""
    total = os.fstat(file.fileno()).st_size
    if not total:
        raise Misuse("EMPTY_FILE", f"{file.name}: there is nothing in it to copy")
    memory, handle = channel.buffer(min(total, _PIECE)).view, channel.allocate(total)
    began = time.monotonic()
    size, sent = _send(channel, handle, memory, file, total)
    there = time.monotonic()
    back = _receive(channel, handle, memory, size)
    return Copied(size, there - began, time.monotonic() - there, sent, back)


def _send(channel: Channel, handle: int, memory: memoryview, file: BufferedReader, total: int) -> tuple[int, str]:
    digest, done, progress = hashlib.sha256(), 0, Progress("to device", total)
    try:
        while done < total and (count := _read(file, memory[: total - done])):
            digest.update(memory[:count])
            channel.put(memory[:count], handle=handle, offset=done)
            done += count
            progress.add(count)
    finally:
        progress.end()
    return done, digest.hexdigest()


def _receive(channel: Channel, handle: int, memory: memoryview, size: int) -> str:
    digest, progress = hashlib.sha256(), Progress("from device", size)
    try:
        for offset in range(0, size, len(memory)):
            piece = memory[: size - offset]
            piece[:] = _STALE * len(piece)
            channel.get(handle, piece, offset=offset)
            digest.update(piece)
            progress.add(len(piece))
    finally:
        progress.end()
    return digest.hexdigest()


def _read(file: BufferedReader, memory: memoryview) -> int:
    try:
        return file.readinto(memory)
    except OSError as error:
        raise Misuse("NO_FILE", f"{file.name}: {error.strerror}") from error
