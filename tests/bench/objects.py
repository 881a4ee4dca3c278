"""What sealed objects cost beside the bare cipher inside them."""

from __future__ import annotations

import io
import os

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from online import in_turns
from ratios import Pair, per_second

from cgpu_agent.objects.file import SealedFile
from cgpu_agent.objects.stream import Opener, Sealer
from cgpu_agent.wire.sealed import SEGMENT_SIZES, TAG_SIZE, ObjectName

SIZE = 64 << 20
KEY = bytes(32)
NAME = ObjectName("bench", "bench", 1)


class Nowhere(io.BytesIO):
    """A sink that costs nothing: what a disk or a pipe takes is not ours."""

    def write(self, data: object) -> int:
        return len(data)  # type: ignore[arg-type]


def objects(*, rounds: int, seconds: float) -> list[Pair]:
    """GB/s on one core, everything warm. Ratios below 1: how much of the cipher's speed is left."""
    return [
        *_cut(SEGMENT_SIZES["1MiB"], "1 MiB", ">= 0.8", rounds, seconds),
        *_cut(SEGMENT_SIZES["4KiB"], "4 KiB", "", rounds, seconds),
    ]


def _cut(segment_size: int, label: str, goal: str, rounds: int, seconds: float) -> list[Pair]:
    plain = os.urandom(1 << 20) * (SIZE >> 20)
    with os.fdopen(os.memfd_create("bench"), "w+b") as file:
        _seal(file, plain, segment_size)
        file.seek(0)
        sealed = file.read()
        reader, out = SealedFile(file.fileno(), KEY, NAME, segment_size), bytearray(SIZE)

        def bare() -> None:
            cipher, view = AESGCM(KEY), memoryview(plain)
            staging, step = memoryview(bytearray(segment_size)), segment_size - TAG_SIZE
            for start in range(0, SIZE, step):
                piece = view[start : start + step]
                cipher.encrypt_into(bytes(12), piece, None, staging[: len(piece) + TAG_SIZE])

        work = {
            "bare": bare,
            "seal": lambda: _seal(Nowhere(), plain, segment_size),
            "open": lambda: _open(sealed, segment_size),
            "read a file": lambda: reader.read_into(0, out),
        }
        found = in_turns(
            rounds, {name: lambda do=do: per_second(do, seconds) * SIZE / 1e9 for name, do in work.items()}
        )
    against = "AESGCM alone, the same cut"
    # Reading a file copies twice more than the cipher does: no goal.
    return [
        Pair.of(f"{name}: object of 64 MiB, cut at {label}", against, "GB/s", found[name], found["bare"], goal_of)
        for name, goal_of in (("seal", goal), ("open", goal), ("read a file", ""))
    ]


def _seal(sink: io.BufferedIOBase, plain: bytes, segment_size: int) -> None:
    sealer = Sealer(sink, KEY, NAME, segment_size)
    sealer.write(plain)
    sealer.finish()
    sink.flush()


def _open(sealed: bytes, segment_size: int) -> None:
    opener = Opener(Nowhere(), KEY, NAME, segment_size)
    opener.write(sealed)
    opener.finish()
