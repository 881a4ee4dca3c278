"""``cgpuctl object``: seal and open objects with keys from files, and look at how one is cut."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import stat
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import BinaryIO, NoReturn

from cgpu_agent.cli import output
from cgpu_agent.cli.files import whole_file
from cgpu_agent.cli.inputs import read_key
from cgpu_agent.cli.progress import Progress
from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.objects.stream import Opener, Sealer
from cgpu_agent.wire.sealed import HEADER_SIZE, KEY_SIZE, SEGMENT_SIZES, Header, Layout, ObjectName

_CHUNK = 8 << 20
"""Bytes read at a time, at most: whole segments of it are sealed and opened where they lie."""

_DONE = {"seal": "sealed", "open": "opened, all verified"}


def run(arguments: argparse.Namespace) -> int:
    try:
        found = _inspect(arguments) if arguments.verb == "inspect" else _convert(arguments)
    except HostileInput as error:
        if arguments.json:
            output.emit_json({"result": "refused", "reason": {"slug": error.slug, "detail": error.message}})
        output.complain(error)
        return output.EXIT_REFUSED
    if arguments.json:
        output.emit_json({"result": "pass", **found})
    elif arguments.verb == "inspect":
        output.pairs((key.replace("_", " "), str(value)) for key, value in found.items())
        output.say("nothing of this is verified")
    elif not _is_standard(arguments.target):
        output.say(f"{output.printable(str(arguments.target))}: {found['plain_bytes']} bytes {_DONE[arguments.verb]}")
    return output.EXIT_PASS


def _convert(arguments: argparse.Namespace) -> dict[str, object]:
    """Seal or open. Nobody is left with a part under the name of the whole."""
    if arguments.json and _is_standard(arguments.target):
        raise Misuse("STDOUT_TAKEN", "with - for OUT, standard output holds the data and cannot hold JSON")
    name = ObjectName(arguments.key_id, arguments.object_id, arguments.object_version)
    key = read_key(arguments.key_file, KEY_SIZE)
    segment_size = SEGMENT_SIZES[arguments.segment_size]
    kind = Sealer if arguments.verb == "seal" else Opener
    with _source(arguments.source) as source, _ended_by_signals(), _target(arguments) as target:
        stream = kind(target, key, name, segment_size)
        taken = _pump(source, stream, arguments)
        stream.finish()
    layout = Layout(segment_size, taken) if kind is Sealer else Layout.of_sealed(segment_size, taken)
    return {
        "key_id": name.key_id,
        "object_id": name.object_id,
        "object_version": name.version,
        **_sizes(layout),
    }


def _pump(source: FileIO, stream: Sealer | Opener, arguments: argparse.Namespace) -> int:
    """Everything from the source into the stream; how many bytes that was."""
    info = os.fstat(source.fileno())
    progress = Progress(arguments.verb, info.st_size if stat.S_ISREG(info.st_mode) else None)
    buffer, taken = memoryview(bytearray(_CHUNK)), 0
    try:
        while count := _read(source, buffer, arguments.source):
            stream.write(buffer[:count])
            taken += count
            progress.add(count)
    finally:
        progress.end()
    return taken


def _read(source: FileIO, buffer: memoryview, path: Path) -> int:
    """Read some bytes; 0 only at the end. Raises ``Misuse`` (``NO_FILE``)."""
    try:
        count: int | None = source.readinto(buffer)
        if count is None:  # no end: a pipe that does not wait has nothing at the moment
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    except OSError as error:
        raise Misuse("NO_FILE", f"{path}: {error.strerror}") from error
    return count


def _is_standard(path: Path) -> bool:
    return str(path) == "-"


@contextlib.contextmanager
def _source(path: Path) -> Iterator[FileIO]:
    """Unbuffered, so that a signal ends a read that waits. Raises ``Misuse`` (``NO_FILE``)."""
    try:
        standard = _is_standard(path)
        file = FileIO(sys.stdin.fileno() if standard else path, closefd=not standard)
    except OSError as error:
        raise Misuse("NO_FILE", f"{path}: {error.strerror}") from error
    with file:
        yield file


@contextlib.contextmanager
def _target(arguments: argparse.Namespace) -> Iterator[BinaryIO]:
    """Raises ``Misuse`` (``CANNOT_WRITE``), of a pipe that nobody reads any more too: what it took is a part."""
    if not _is_standard(arguments.target):
        # What is opened was secret.
        with whole_file(arguments.target, 0o600 if arguments.verb == "open" else 0o666) as file:
            yield file
        return
    try:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
    except OSError as error:
        # Or the interpreter tries the rest again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Misuse("CANNOT_WRITE", f"standard output: {error.strerror}") from error


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """The signals that end a program as one exception, so that what is half written is removed."""

    def end(number: int, _frame: object) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    before = {
        each: signal.signal(each, end)
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(each) != signal.SIG_IGN  # nohup
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _inspect(arguments: argparse.Namespace) -> dict[str, object]:
    with _source(arguments.source) as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise Misuse("NOT_A_FILE", f"{arguments.source}: only a regular file has a size to tell")
        header = Header.parse(file.read(HEADER_SIZE))
    layout = Layout.of_sealed(SEGMENT_SIZES[arguments.segment_size], info.st_size)
    return {"salt": header.salt.hex(), "nonce_prefix": header.prefix.hex(), **_sizes(layout)}


def _sizes(layout: Layout) -> dict[str, object]:
    return {
        "plain_bytes": layout.plain_size,
        "sealed_bytes": layout.sealed_size,
        "segment_bytes": layout.segment_size,
        "segments": layout.segments,
        "last_segment_bytes": layout.segment(layout.segments - 1).size,
    }
