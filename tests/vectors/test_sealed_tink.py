"""Sealed objects and Google's Tink: objects that it made, always; and, where it is installed, both ways live."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cgpu_agent.objects.cipher import SegmentCipher
from cgpu_agent.wire.sealed import HEADER_SIZE, Header, Layout, ObjectName
from fixtures.sealed import KEY, NAME, seal, unseal

HERE = Path(__file__).parent
RECORD = json.loads((HERE / "sealed" / "tink.json").read_text())
OBJECTS = RECORD["objects"]
PEER = HERE.parent / "fixtures" / "tink_peer.py"
MIB = 1 << 20


def pattern(size: int) -> bytes:
    return bytes(i * i % 251 for i in range(size))


def name_of(found: dict[str, Any]) -> ObjectName:
    return ObjectName(RECORD["key_id"], found["object_id"], found["version"])


@pytest.mark.parametrize("found", OBJECTS, ids=lambda found: found["object_id"])
def test_an_object_is_sealed_as_tink_did_it(found: dict[str, Any]) -> None:
    """By its header; a header is never chosen outside tests."""
    header = bytes.fromhex(found.get("sealed", found.get("header")))[:HEADER_SIZE]
    cipher = SegmentCipher(bytes.fromhex(RECORD["key"]), name_of(found), Header.parse(header))
    layout, plain = Layout(found["segment_size"], found["plain_size"]), memoryview(pattern(found["plain_size"]))
    sealed = bytearray(header)
    for index in range(layout.segments):
        segment = layout.segment(index)
        out = bytearray(segment.size)
        part = plain[segment.plain_offset : segment.plain_offset + segment.plain_size]
        cipher.seal(index, last=segment.last, plain=part, out=memoryview(out))
        sealed += out
    assert name_of(found).associated_data().hex() == found["associated_data"]
    assert len(sealed) == found["sealed_size"]
    assert hashlib.sha256(sealed).hexdigest() == found["sha256"]


@pytest.mark.parametrize(
    "found", [found for found in OBJECTS if "sealed" in found], ids=lambda found: found["object_id"]
)
def test_an_object_of_tink_opens(found: dict[str, Any]) -> None:
    sealed, key = bytes.fromhex(found["sealed"]), bytes.fromhex(RECORD["key"])
    opened = unseal(sealed, name_of(found), key=key, segment_size=found["segment_size"])
    assert opened == pattern(found["plain_size"])


class Tink:
    """Tink itself, in a process of its own."""

    def __init__(self, python: str) -> None:
        self._process = subprocess.Popen([python, PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, do: str, data: bytes, name: ObjectName, segment_size: int) -> bytes | None:
        task = {
            "do": do,
            "key": KEY.hex(),
            "associated_data": name.associated_data().hex(),
            "segment_size": segment_size,
            "data": data.hex(),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(task), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())["data"]
        return None if answer is None else bytes.fromhex(answer)

    def stop(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def tink() -> Iterator[Tink]:
    python = sys.executable if importlib.util.find_spec("tink") else os.environ.get("TINK_PYTHON")
    if python is None:
        pytest.skip("Tink is not installed: pip install tink, or name a Python that has it in TINK_PYTHON")
    found = Tink(python)
    yield found
    found.stop()


SIZES = [(64, n) for n in (0, 1, 7, 8, 9, 55, 56, 57, 104, 105, 1000)]
SIZES += [(4096, n) for n in (0, 4039, 4040, 4041, 8120, 8121, 100_000)]
SIZES += [(MIB, n) for n in (0, 5, MIB - 56, MIB - 55, 2 * MIB - 72, 2 * MIB - 71, 3 * MIB)]


@pytest.mark.parametrize(("segment_size", "size"), SIZES)
def test_both_open_what_the_other_sealed(tink: Tink, segment_size: int, size: int) -> None:
    plain = os.urandom(size)
    theirs = tink.ask("seal", plain, NAME, segment_size)
    assert theirs is not None
    assert len(theirs) == Layout(segment_size, size).sealed_size
    assert unseal(theirs, segment_size=segment_size) == plain
    assert tink.ask("open", seal(plain, segment_size=segment_size), NAME, segment_size) == plain


def test_tink_refuses_our_object_under_another_name_or_cut_short(tink: Tink) -> None:
    sealed = seal(bytes(200), segment_size=80)
    assert tink.ask("open", sealed, NAME, 80) == bytes(200)
    assert tink.ask("open", sealed, ObjectName(NAME.key_id, NAME.object_id, NAME.version - 1), 80) is None
    assert tink.ask("open", sealed[:160], NAME, 80) is None
