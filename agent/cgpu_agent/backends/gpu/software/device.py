"""The process that is the software GPUs: listens on a Unix socket, and hands each frame to the endpoint it is for."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cgpu_agent.backends.gpu.software.board import Board
from cgpu_agent.backends.gpu.software.commands import MISBEHAVIOURS
from cgpu_agent.backends.gpu.software.frames import DRIVER, Frame, Kind, read_frame
from cgpu_agent.backends.gpu.software.make import Maker
from cgpu_agent.backends.gpu.software.pki import SEED_SIZE, Seed
from cgpu_agent.backends.gpu.software.responder import Responder
from cgpu_agent.backends.gpu.software.transferdevice import door_of, listen
from cgpu_agent.errors import AgentError, HostileInput, Misuse
from cgpu_agent.wire import spdm12
from cgpu_agent.wire.spdm12 import Code, ErrorCode

_MAX_CONNECTIONS: Final = 64


class Device:
    """Serves a board to connections, each with its own SPDM state."""

    def __init__(self, board: Board) -> None:
        self._board: Final = board
        self._connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until its end or its first malformed frame."""
        self._connections += 1
        responders: dict[int, Responder] = {}
        try:
            while self._connections <= _MAX_CONNECTIONS and (frame := await read_frame(reader)) is not None:
                answer = self._answer(frame, responders)
                if answer is not None:
                    writer.write(answer.encode())
                    await writer.drain()
        except (HostileInput, OSError, asyncio.CancelledError):
            pass  # the peer left, broke the framing, or the process ends: in each case only this connection does
        finally:
            self._connections -= 1
            for responder in responders.values():
                responder.close()
            writer.close()

    def _answer(self, frame: Frame, responders: dict[int, Responder]) -> Frame | None:
        """``None``: the endpoint hangs."""
        if frame.endpoint == DRIVER:
            return self._driver_answer(frame)
        if not self._board.present(frame.endpoint):
            return Frame(frame.endpoint, Kind.UNREACHABLE, b"")
        if self._board.hangs(frame.endpoint):
            return None
        if frame.endpoint not in responders:
            responders[frame.endpoint] = self._board.responder(frame.endpoint)
        responder = responders[frame.endpoint]
        if self._board.stale(responder, frame.endpoint):
            raise ConnectionResetError  # the hardware that this connection talked to is no longer there
        if frame.kind is Kind.SECURED:
            sealed = responder.answer_record(frame.payload)
            if sealed is not None:
                return Frame(frame.endpoint, Kind.SECURED, sealed)
            return Frame(frame.endpoint, Kind.SPDM, spdm12.encode_error(ErrorCode.DECRYPT_ERROR))
        return Frame(frame.endpoint, Kind.SPDM, responder.answer(frame.payload))

    def _driver_answer(self, frame: Frame) -> Frame | None:
        """The driver is no SPDM device: it takes vendor-defined messages, without negotiation."""
        try:
            if frame.kind is not Kind.SPDM or spdm12.code_of(frame.payload) != Code.VENDOR_DEFINED_REQUEST:
                answer = spdm12.encode_error(ErrorCode.UNSUPPORTED_REQUEST)
            else:
                payload = self._board.command(spdm12.parse_vendor(frame.payload, response=False))
                if payload is None:
                    return None
                answer = spdm12.encode_vendor(payload, response=True)
        except HostileInput:
            answer = spdm12.encode_error(ErrorCode.INVALID_REQUEST)
        return Frame(DRIVER, Kind.SPDM, answer)


def load_seed(state: Path | None) -> Seed:
    """A seed kept in a directory of ours, made there at first; without one, a seed that dies with the process.

    Raises:
        Misuse: ``BAD_STATE``: others may read the seed, or it is no seed.
    """
    if state is None:
        return Seed(os.urandom(SEED_SIZE))
    path = state / "seed"
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(os.urandom(SEED_SIZE))
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            value = file.read(SEED_SIZE + 1)
    except OSError as error:
        raise Misuse("BAD_STATE", "the seed cannot be read or made") from error
    if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o077 or len(value) != SEED_SIZE:
        raise Misuse("BAD_STATE", "the seed is not a file of 32 bytes that only its owner may read")
    return Seed(value)


def export(board: Board, folder: Path) -> None:
    """Write what a relying party needs into a directory. Raises ``Misuse`` (``BAD_EXPORT``)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, make in board.files().items():
            (folder / name).write_bytes(make())
    except OSError as error:
        raise Misuse("BAD_EXPORT", "the files for relying parties cannot be written") from error


async def run(board: Board, socket: Path) -> None:
    """Serve until SIGTERM or SIGINT. Says ``ready`` on standard output once it listens."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    before = os.umask(0o177)
    try:
        server = await asyncio.start_unix_server(Device(board).serve, socket)
        listener = listen(door_of(socket))
    finally:
        os.umask(before)
    rings = loop.create_task(board.door.serve(listener))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await stop.wait()
    rings.cancel()
    listener.close()
    server.close()


def _misbehaviour(text: str) -> tuple[str, int | None]:
    name, _, number = text.partition(":")
    if name not in MISBEHAVIOURS or (number and not number.isdecimal()):
        raise argparse.ArgumentTypeError(f"not one of {', '.join(MISBEHAVIOURS)}, optionally with :GPU")
    return name, int(number) if number else None


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m cgpu_agent.backends.gpu.software",
        description="Software GPUs: real SPDM and signatures below a root of their own. They protect nothing.",
    )
    parser.add_argument("--socket", type=Path, required=True, help="Unix socket to listen on (mode 0600)")
    parser.add_argument("--count", type=int, default=1, help="how many GPUs (default: 1)")
    parser.add_argument("--seed", type=Path, metavar="DIR", help="keep the identities' seed in this directory")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write roots, RIMs and CRLs for relying parties")
    parser.add_argument(
        "--misbehave", type=_misbehaviour, action="append", default=[], metavar="NAME[:GPU]", help="begin badly"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the process; returns its exit status: 0 stopped by a signal, 2 bad usage."""
    arguments = build_parser().parse_args(argv)
    try:
        board = Board(Maker(load_seed(arguments.seed)), arguments.count)
        for name, number in arguments.misbehave:
            board.misbehave(name, number)
        if arguments.export is not None:
            export(board, arguments.export)
        try:
            asyncio.run(run(board, arguments.socket))
        finally:
            for path in (arguments.socket, door_of(arguments.socket)):
                path.unlink(missing_ok=True)
    except (AgentError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0
