"""What cgpuctl is given: files of bounded size, hex, times. A bad argument is ``Misuse``: exit status 2."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from cgpu_agent.errors import Misuse

MAX_FILE = 32 << 20

_TIME = re.compile(
    r"(?P<date>[0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ](?P<time>[0-9]{2}:[0-9]{2}:[0-9]{2})(\.[0-9]+)?"
    r"(?P<zone>[Zz]|[+-][0-9]{2}:[0-9]{2})"
)
"""RFC 3339, 5.6."""
_SIZE = re.compile(r"(?P<number>[0-9]{1,12})(?P<unit>|KiB|MiB|GiB)")
_UNITS = {"": 0, "KiB": 10, "MiB": 20, "GiB": 30}


def read_file(path: Path, limit: int = MAX_FILE) -> bytes:
    """Content of a file; ``-`` is standard input. Reads to the end: files of securityfs state a size of 0.

    Raises ``Misuse``: ``NO_FILE``, ``FILE_TOO_LARGE``.
    """
    try:
        if str(path) == "-":
            data = sys.stdin.buffer.read(limit + 1)
        else:
            with path.open("rb") as file:
                data = file.read(limit + 1)
    except OSError as error:
        raise Misuse("NO_FILE", f"{path}: {error.strerror}") from error
    if len(data) > limit:
        raise Misuse("FILE_TOO_LARGE", f"{path}: larger than {limit} bytes")
    return data


def read_secret(path: Path, limit: int) -> bytes:
    """A secret of at most ``limit`` bytes, from a file of which others have nothing.

    Raises ``Misuse``: ``NO_FILE``, ``KEY_EXPOSED``, ``FILE_TOO_LARGE``.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise Misuse("KEY_EXPOSED", f"{path} is a secret that others may use: chmod 600 it")
            secret = file.read(limit + 1)
    except OSError as error:
        raise Misuse("NO_FILE", f"{path}: {error.strerror}") from error
    if len(secret) > limit:
        raise Misuse("FILE_TOO_LARGE", f"{path}: larger than {limit} bytes")
    return secret


def read_key(path: Path, size: int) -> bytes:
    """A secret key of ``size`` raw bytes. Raises ``Misuse``: as ``read_secret``, or ``BAD_KEY``."""
    key = read_secret(path, size + 1)
    if len(key) != size:
        raise Misuse("BAD_KEY", f"{path} does not hold a key of {size} bytes")
    return key


def parse_hex(text: str, what: str) -> bytes:
    """Hex of any case. Raises ``Misuse`` (``BAD_HEX``)."""
    try:
        return bytes.fromhex(text.strip())
    except ValueError:
        raise Misuse("BAD_HEX", f"{what} is not hex") from None


def parse_size(text: str, what: str) -> int:
    """Bytes: a number of them, or of KiB, MiB or GiB. Raises ``Misuse`` (``BAD_ARGUMENT``)."""
    found = _SIZE.fullmatch(text)
    size = 0 if found is None else int(found["number"]) << _UNITS[found["unit"]]
    if not size:
        raise Misuse("BAD_ARGUMENT", f"{what} must be a size such as 4096, 64KiB, 16MiB or 1GiB")
    return size


def parse_time(text: str | None) -> datetime:
    """RFC 3339 with a time zone; ``None`` = now.

    Raises ``Misuse`` (``BAD_TIME``).
    """
    if text is None:
        return datetime.now(timezone.utc)
    found = _TIME.fullmatch(text)
    if found is None:
        raise _bad_time()
    # Certificates are valid to the second, and Python 3.10 reads few forms of fractions.
    zone = "+00:00" if found["zone"] in "Zz" else found["zone"]
    try:
        return datetime.fromisoformat(f"{found['date']}T{found['time']}{zone}")
    except ValueError:
        raise _bad_time() from None


def _bad_time() -> Misuse:
    return Misuse("BAD_TIME", "--at needs RFC 3339 with a time zone, e.g. 2026-01-31T12:00:00Z")


def read_all(paths: Sequence[Path]) -> list[bytes]:
    """Content of several files."""
    return [read_file(path) for path in paths]
