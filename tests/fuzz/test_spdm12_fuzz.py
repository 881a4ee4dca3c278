"""Hostile bytes in place of SPDM 1.2 messages, records, frames and commands: refused or read, never anything else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgpu_agent.backends.gpu.software import commands
from cgpu_agent.backends.gpu.software.board import Board
from cgpu_agent.backends.gpu.software.commands import Inventory
from cgpu_agent.backends.gpu.software.frames import Frame, Kind, read_frame
from cgpu_agent.backends.gpu.software.make import Maker
from cgpu_agent.backends.gpu.software.pki import Seed
from cgpu_agent.backends.gpu.software.sealing import Lane
from cgpu_agent.errors import HostileInput
from cgpu_agent.wire import spdm12, spdm12keys
from cgpu_agent.wire import spdm12session as session
from cgpu_agent.wire.spdm import Measurement
from cgpu_agent.wire.spdm12keys import DirectionKeys
from cgpu_agent.wire.strictjson import Fields
from fixtures.spdmbyhand import NEGOTIATION

BOARD = Board(Maker(Seed(bytes(32))), 2)
DEVICE = BOARD.maker.device(1)
N = bytes(32)
KEYS = DirectionKeys.of(bytes(48))
KEY_EXCHANGE = session.KeyExchange(1, N, bytes(96)).encode()
MESSAGES = (
    *(request for request, _ in NEGOTIATION),
    spdm12.GET_DIGESTS,
    spdm12.GetCertificate(0, 100).encode(),
    spdm12.GetMeasurements(1, None).encode(),
    spdm12.GetMeasurements(255, N).encode(),
    KEY_EXCHANGE,
    session.encode_finish(bytes(48)),
    spdm12.encode_vendor(commands.encode_request("report", nonce=N.hex()), response=False),
)


def parse_command_answer(data: bytes) -> None:
    found = commands.parse_answer(data)
    if isinstance(found, Fields):
        Inventory.parse(found)


def parse_frames(data: bytes) -> None:
    async def run() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        while await read_frame(reader) is not None:
            pass

    asyncio.run(run())


INVENTORY = commands.encode_result(BOARD.inventory().to_json())
SEEDS: dict[Callable[[bytes], object], tuple[bytes, ...]] = {
    spdm12.require_version: (spdm12.VERSION_RESPONSE,),
    spdm12.GetCertificate.parse: (spdm12.GetCertificate(0, 9).encode(),),
    spdm12.CertificatePortion.parse: (spdm12.CertificatePortion(bytes(30), 9).encode(),),
    spdm12.parse_digests: (spdm12.encode_digests(b""),),
    spdm12.parse_chain: (DEVICE.chain,),
    spdm12.GetMeasurements.parse: (spdm12.GetMeasurements(1, N).encode(), spdm12.GetMeasurements(0, None).encode()),
    session.KeyExchange.parse: (KEY_EXCHANGE,),
    session.KeyExchangeResponse.parse: (session.KeyExchangeResponse(1, N, bytes(96), bytes(96), bytes(48)).encode(),),
    session.parse_finish: (session.encode_finish(bytes(48)),),
    session.KeyUpdate.parse: (session.KeyUpdate(session.KeyOperation.VERIFY_NEW_KEY, 7).encode(),),
    spdm12.parse_error: (spdm12.encode_error(spdm12.ErrorCode.UNSPECIFIED),),
    spdm12keys.parse_plain: (spdm12keys.encode_plain(b"abc"),),
    parse_command_answer: (INVENTORY, commands.encode_fault("unsupported")),
    parse_frames: (Frame(1, Kind.SPDM, b"abc").encode() * 2,),
}


@st.composite
def mutated(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """Real structures with bytes replaced, cut out, doubled or appended."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=6))
    return bytes(data)


@pytest.mark.parametrize("parse", SEEDS, ids=lambda parse: parse.__qualname__)
def test_parsers_refuse_or_read(parse: Callable[[bytes], object]) -> None:
    @settings(max_examples=150, deadline=None)
    @given(mutated(SEEDS[parse]) | st.binary(max_size=120))
    def run(data: bytes) -> None:
        with contextlib.suppress(HostileInput):
            parse(data)

    run()


@settings(max_examples=200, deadline=None)
@given(mutated((spdm12.Measurements(3, (Measurement(1, 1, bytes(48)),), N, bytes(96)).encode(),)), st.booleans())
def test_what_is_read_of_measurements_is_all_that_is_there(data: bytes, signed: bool) -> None:
    with contextlib.suppress(HostileInput):
        assert spdm12.Measurements.parse(data, signed=signed).encode() == data


@settings(max_examples=150, deadline=None)
@given(st.lists(mutated(MESSAGES) | st.binary(max_size=40), max_size=12))
def test_a_responder_answers_whatever_it_is_sent(messages: list[bytes]) -> None:
    responder = BOARD.responder(1)
    for each in messages:
        answer = responder.answer(each)
        assert answer[1] == spdm12.Code.ERROR or answer[1] == each[1] & 0x7F
        assert responder.answer_record(each) is None


@settings(max_examples=150, deadline=None)
@given(mutated((commands.encode_request("inventory"), commands.encode_request("set-ready", ready=True))))
def test_the_driver_answers_or_refuses(payload: bytes) -> None:
    with contextlib.suppress(HostileInput):
        assert BOARD.command(payload)


@settings(max_examples=200, deadline=None)
@given(mutated((Lane(7, KEYS).seal(b"message"),)))
def test_no_altered_record_opens(record: bytes) -> None:
    honest = Lane(7, KEYS).seal(b"message")
    try:
        opened = Lane(7, KEYS).open(record)
    except HostileInput:
        assert record != honest
    else:
        assert (record, opened) == (honest, b"message")
