"""The backend against processes that are not what it expects: each ends in a fault of the right name, in time."""

from __future__ import annotations

import asyncio
import struct
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from cgpu_agent.backends.gpu.software.board import Board
from cgpu_agent.backends.gpu.software.client import SoftwareGpus, changes
from cgpu_agent.backends.gpu.software.commands import Inventory
from cgpu_agent.backends.gpu.software.link import Link
from cgpu_agent.backends.gpu.software.make import Maker
from cgpu_agent.backends.gpu.software.pki import Seed
from cgpu_agent.backends.gpu.software.requester import Requester
from cgpu_agent.errors import AgentError, Misuse
from fixtures.spdmbyhand import ByHandResponder, Direction, prefixed, verify

T = TypeVar("T")
Answer = Callable[[bytes, int], bytes | None]

MAKER = Maker(Seed(bytes(32)))
DEVICE = MAKER.device(1)
PATIENCE = 10.0
RECORDS_PER_KEY = "cgpu_agent.backends.gpu.software.requester.RECORDS_PER_KEY"


def frame(payload: bytes, kind: int = 5, endpoint: int = 0) -> bytes:
    return struct.pack(">IBB", len(payload), endpoint, kind) + payload


def vendor(payload: bytes) -> bytes:
    return bytes.fromhex("127e0000 0400 04 d97e0000") + struct.pack("<H", len(payload)) + payload


def against(answer: Answer, work: Callable[[Path], Awaitable[T]]) -> T:
    """Run ``work`` while a server answers each frame with the bytes that ``answer(payload, kind)`` makes of it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                size, _, kind = struct.unpack(">IBB", await reader.readexactly(6))
                made = answer(await reader.readexactly(size), kind)
                if made is not None:
                    writer.write(made)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()

    async def run() -> T:
        with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
            path = Path(folder) / "s"
            server = await asyncio.start_unix_server(serve, path)
            try:
                return await work(path)
            finally:
                server.close()

    return asyncio.run(run())


async def listed(path: Path) -> str:
    gpus = SoftwareGpus(path)
    try:
        await gpus.list(timeout=0.3)
    except AgentError as error:
        return error.slug
    finally:
        gpus.close()
    return "no error"


UUIDS = '{"endpoint":1,"uuid":"u","bdf":"b","model":"m","architecture":"hopper","driver":"1","vbios":"1","cc":true,'
UUIDS += (
    '"cc_environment":null,"dev_tools":null,"multi_gpu":"none","protected_memory":1,"key_rotation_threshold":null}'
)


def inventory(gpus: str = UUIDS, **changed: str) -> bytes:
    parts = {"generation": "0", "gpus": f"[{gpus}]", "instance": '"0011223344556677"', "pci": '["b"]'} | changed
    return ('{"result":{' + ",".join(f'"{name}":{value}' for name, value in parts.items()) + "}}").encode()


def test_reads_an_inventory_written_by_hand() -> None:
    assert against(lambda *_: frame(vendor(inventory())), listed) == "no error"


@pytest.mark.parametrize(
    ("answer", "slug"),
    [
        (None, "GPU_TIMEOUT"),
        (b"\0\0\0", "GPU_TIMEOUT"),
        (struct.pack(">IBB", 0xFFFFFFFF, 0, 5), "GPU_ERROR"),
        (frame(b"", kind=9), "GPU_ERROR"),
        (frame(vendor(inventory()), endpoint=1), "GPU_ERROR"),
        (frame(b"", endpoint=200), "GPU_ERROR"),
        (frame(b"", kind=0), "GPU_LOST"),
        (frame(b"", kind=6), "GPU_ERROR"),
        (frame(b""), "GPU_ERROR"),
        (frame(bytes.fromhex("127f0500")), "GPU_ERROR"),
        (frame(vendor(b"")), "GPU_ERROR"),
        (frame(vendor(b"[]")), "GPU_ERROR"),
        (frame(vendor(b'{"fault":"unsupported"}')), "GPU_UNSUPPORTED"),
        (frame(vendor(b'{"fault":"other"}')), "GPU_ERROR"),
        (frame(vendor(b'{"result":{}}')), "GPU_ERROR"),
        (frame(vendor(b'{"result":{},"fault":"unsupported"}')), "GPU_ERROR"),
        (frame(vendor(inventory(f"{UUIDS},{UUIDS}"))), "GPU_ERROR"),
        (frame(vendor(inventory(UUIDS + "," + UUIDS.replace('"endpoint":1', '"endpoint":2')))), "GPU_ERROR"),
        (frame(vendor(inventory(UUIDS.replace("hopper", "pascal")))), "GPU_ERROR"),
        (frame(vendor(inventory(UUIDS.replace('"cc":true', '"cc":1')))), "GPU_ERROR"),
        (frame(vendor(inventory(pci="[1]"))), "GPU_ERROR"),
        (frame(vendor(inventory(instance='""'))), "GPU_ERROR"),
        (frame(vendor(inventory(more="1"))), "GPU_ERROR"),
    ],
)
def test_an_answer_that_is_none_is_a_fault(answer: bytes | None, slug: str) -> None:
    assert against(lambda *_: answer, listed) == slug


def test_nobody_listening_is_a_fault(tmp_path: Path) -> None:
    assert asyncio.run(listed(tmp_path / "none")) == "GPU_DRIVER"


def test_a_path_that_no_socket_can_have_is_a_fault(tmp_path: Path) -> None:
    assert asyncio.run(listed(tmp_path / ("x" * 200))) == "GPU_DRIVER"


def test_closed_gpus_say_so(tmp_path: Path) -> None:
    async def run() -> None:
        gpus = SoftwareGpus(tmp_path / "none")
        gpus.close()
        gpus.close()
        with pytest.raises(AgentError) as caught:
            await gpus.ready(timeout=1)
        assert caught.value.slug == "GPU_DRIVER"
        assert [event async for event in gpus.events()] == []

    asyncio.run(run())


@pytest.mark.parametrize("size", [0, 31, 33])
def test_refuses_a_nonce_of_another_size(tmp_path: Path, size: int) -> None:
    with pytest.raises(Misuse):
        asyncio.run(_evidence(tmp_path / "none", bytes(size)))


async def _evidence(path: Path, nonce: bytes) -> None:
    await SoftwareGpus(path).evidence("GPU-0", nonce, timeout=1)


def test_a_gpu_that_hangs_is_seen_in_the_heartbeat() -> None:
    async def work(path: Path) -> float:
        gpus = SoftwareGpus(path)
        call = asyncio.ensure_future(gpus.list(timeout=0.2))
        await asyncio.sleep(0.05)
        age = gpus.heartbeat_age(time.monotonic() + 100)
        await asyncio.gather(call, return_exceptions=True)
        assert gpus.heartbeat_age(time.monotonic() + 100) == 0
        gpus.close()
        return age

    assert against(lambda *_: None, work) > 99


# --- SPDM, with a responder written by hand ---


def conversation(work: Callable[[Requester, ByHandResponder], Awaitable[T]], made: ByHandResponder) -> T:
    async def run(path: Path) -> T:
        link = Link(path, 1)
        try:
            return await work(await Requester.connect(link, time.monotonic() + PATIENCE), made)
        finally:
            link.close()

    def answer(payload: bytes, kind: int) -> bytes:
        return frame(made.sealed(payload) if kind == 6 else made.clear(payload), kind, 1)

    return against(answer, run)


def by_hand() -> ByHandResponder:
    return ByHandResponder(DEVICE.leaf.key, DEVICE.chain)


async def _session(requester: Requester, made: ByHandResponder) -> None:
    deadline = time.monotonic() + PATIENCE
    session = await requester.session(deadline)
    assert made.keys is not None
    assert session.exporter == made.keys.exporter
    assert session.number.to_bytes(4, "little") == made.session
    for payload in (b"", b"x" * 3000):
        assert await session.vendor(payload, deadline) == payload
    await session.end(deadline)


def test_the_whole_conversation_with_a_responder_by_hand() -> None:
    conversation(_session, by_hand())


def bending(code: int, bend: Callable[[bytes], bytes]) -> ByHandResponder:
    made = by_hand()
    made.bend = lambda answer: bend(answer) if answer[1] == code else answer
    return made


def flip(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :] if at >= 0 else flip(len(data) + at)(data)


BENT: dict[str, ByHandResponder] = {
    "another version": bending(0x04, flip(7)),
    "no encryption": bending(0x61, flip(12)),
    "another algorithm": bending(0x63, flip(12)),
    "an error": bending(0x63, lambda _: bytes.fromhex("127f0500")),
    "another digest": bending(0x01, flip(10)),
    "another chain": bending(0x02, flip(100)),
    "more than a chain holds": bending(0x02, lambda _: bytes.fromhex("12020000 bc02 ffff") + bytes(700)),
    "more than was asked for": bending(0x02, lambda _: bytes.fromhex("12020000 0080 0070") + bytes(0x8000)),
    "a chain that stands still": bending(0x02, lambda data: data[:4] + b"\0\0\1\0"),
    "an altered exchange": bending(0x64, flip(20)),
    "a point off the curve": bending(0x64, flip(60)),
    "another signature": bending(0x64, flip(-60)),
    "another proof": bending(0x64, flip(-1)),
    "another device's key": ByHandResponder(ec.generate_private_key(ec.SECP384R1()), DEVICE.chain),
}


@pytest.mark.parametrize("name", BENT)
def test_there_is_no_session_with_a_responder_that_breaks_the_protocol(name: str) -> None:
    with pytest.raises(AgentError) as caught:
        conversation(_session, BENT[name])
    assert caught.value.slug == "GPU_ERROR"


@pytest.mark.parametrize("at", [0, 4, 6, 8, 24, -1])
def test_an_altered_answer_ends_the_session(at: int) -> None:
    async def work(requester: Requester, made: ByHandResponder) -> list[str]:
        deadline = time.monotonic() + PATIENCE
        session = await requester.session(deadline)
        honest = made.sealed
        made.sealed = lambda record: flip(at)(honest(record))  # type: ignore[method-assign]
        slugs = []
        for _ in range(2):
            with pytest.raises(AgentError) as caught:
                await session.vendor(b"abc", deadline)
            slugs.append(caught.value.slug)
        return slugs

    assert conversation(work, by_hand()) == ["GPU_ERROR", "GPU_DRIVER"]


async def _updates(requester: Requester, made: ByHandResponder) -> int:
    deadline = time.monotonic() + PATIENCE
    session = await requester.session(deadline)
    before = session.exporter
    for _ in range(7):
        assert await session.vendor(b"abc", deadline) == b"abc"
    assert session.exporter == before
    return made.updates


def test_keys_of_a_session_are_updated_before_they_sealed_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    assert conversation(_updates, by_hand()) == 0
    monkeypatch.setattr(RECORDS_PER_KEY, 3)
    assert conversation(_updates, by_hand()) == 2  # after 3, and then after 2 and the one that verifies


@pytest.mark.parametrize(
    "bend", [flip(3), flip(2), flip(1), lambda data: data + b"\0", lambda _: bytes.fromhex("127f0700")]
)
def test_an_update_that_is_not_acknowledged_ends_the_session(
    bend: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RECORDS_PER_KEY, 3)
    with pytest.raises(AgentError) as caught:
        conversation(_updates, bending(0x69, bend))
    assert caught.value.slug == "GPU_ERROR"


def test_a_responder_that_keeps_its_old_key_ends_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RECORDS_PER_KEY, 3)
    monkeypatch.setattr(Direction, "update", lambda _: None)
    with pytest.raises(AgentError) as caught:
        conversation(_updates, by_hand())
    assert caught.value.slug == "GPU_ERROR"


def test_measurements_come_with_what_their_signature_covers() -> None:
    """Against the board itself: the report's leaf signed exactly the transcript of this conversation."""
    board = Board(MAKER, 1)
    responder = board.responder(1)

    async def run(path: Path) -> None:
        deadline = time.monotonic() + PATIENCE
        requester = await Requester.connect(Link(path, 1), deadline)
        found = await requester.measurements(bytes(32), deadline)
        assert len(found.measurements.blocks) == 64
        assert found.measurements.signature is not None
        assert found.signed[:100] == prefixed("responder-measurements signing", b"")
        verify(DEVICE.leaf.certificate, found.measurements.signature, found.signed)
        requester.link.close()

    against(lambda payload, _: frame(responder.answer(payload), 5, 1), run)


# --- events ---


def looks() -> tuple[Inventory, Inventory]:
    board = Board(MAKER, 2)
    before = board.inventory()
    board.misbehave("other-device", 2)
    return before, board.inventory()


def told(before: Inventory | None, after: Inventory) -> list[tuple[str, str | None]]:
    return [(event.kind, event.bdf) for event in changes(before, after)]


def test_no_change_is_no_event() -> None:
    before, _ = looks()
    assert told(before, before) == told(None, before) == []


def test_another_gpu_in_a_place_is_one_gone_and_one_there() -> None:
    assert told(*looks()) == [("vanished", "0000:02:00.0"), ("appeared", "0000:02:00.0")]


def test_a_driver_that_started_anew_is_told_of_even_with_the_same_gpus() -> None:
    before, _ = looks()
    assert told(before, replace(before, instance="0" * 16)) == [("driver-reloaded", None)]


def test_a_change_that_cannot_be_seen_any_more_is_told_of() -> None:
    before, _ = looks()
    assert told(before, replace(before, generation=9)) == [("watch-lost", None)]
