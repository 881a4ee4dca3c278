"""SPDM 1.2 messages against bytes written down from DSP0274 and DSP0277, field by field."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire import spdm12, spdm12keys
from cgpu_agent.wire import spdm12session as session
from cgpu_agent.wire.spdm import Measurement

N = bytes(range(32))
POINT = bytes(range(96))
SIGNATURE = bytes(96)
VERIFY = bytes(48)
CERTIFICATE = b"\x30\x82\x01\x00" + bytes(256)
CHAIN = spdm12.encode_chain([CERTIFICATE, CERTIFICATE])
BLOCK = Measurement(1, 1, bytes(48))

# Every message of the profile as hex, from the tables of the specification: nothing here comes from the code.
WRITTEN_DOWN = {
    "GET_VERSION": (spdm12.GET_VERSION, "10840000"),
    "VERSION": (spdm12.VERSION_RESPONSE, "10040000 00 01 0012"),
    "GET_CAPABILITIES": (spdm12.GET_CAPABILITIES, "12e10000 00 00 0000 c2420000 00400100 00400100"),
    "CAPABILITIES": (spdm12.CAPABILITIES, "12610000 00 14 0000 f2420000 00400100 00400100"),
    "NEGOTIATE_ALGORITHMS": (
        spdm12.NEGOTIATE_ALGORITHMS,
        "12e30300 2c00 01 02 80000000 02000000" + "00" * 12 + "00 00 0000 02201000 03200200 05200100",
    ),
    "ALGORITHMS": (
        spdm12.ALGORITHMS,
        "12630300 3000 01 02 04000000 80000000 02000000" + "00" * 12 + "00 00 0000 02201000 03200200 05200100",
    ),
    "GET_DIGESTS": (spdm12.GET_DIGESTS, "12810000"),
    "DIGESTS": (spdm12.encode_digests(b"chain"), "12010001" + hashlib.sha384(b"chain").hexdigest()),
    "GET_CERTIFICATE": (spdm12.GetCertificate(1, 0x400).encode(), "12820000 0100 0004"),
    "CERTIFICATE": (spdm12.CertificatePortion(b"ab", 3).encode(), "12020000 0200 0300 6162"),
    "GET_MEASUREMENTS": (spdm12.GetMeasurements(0xFF, N).encode(), "12e001ff" + N.hex() + "00"),
    "GET_MEASUREMENTS, unsigned": (spdm12.GetMeasurements(0, None).encode(), "12e00000"),
    "MEASUREMENTS": (
        spdm12.Measurements(0, (BLOCK,), N, SIGNATURE).encode(),
        "12600000 01 370000 01 01 3300 01 3000" + "00" * 48 + N.hex() + "0000" + "00" * 96,
    ),
    "KEY_EXCHANGE": (
        session.KeyExchange(0x1234, N, POINT).encode(),
        "12e40000 3412 00 00" + N.hex() + POINT.hex() + "1000 01000000 0000 0500 01 01 01 0011 000000",
    ),
    "KEY_EXCHANGE_RSP": (
        session.KeyExchangeResponse(0x1234, N, POINT, SIGNATURE, VERIFY).encode(),
        "12640000 3412 00 00" + N.hex() + POINT.hex() + "0c00 01000000 0000 0400 01 00 0011" + "00" * 144,
    ),
    "FINISH": (session.encode_finish(VERIFY), "12e50000" + "00" * 48),
    "FINISH_RSP": (session.FINISH_RESPONSE, "12650000"),
    "KEY_UPDATE": (session.KeyUpdate(session.KeyOperation.UPDATE_ALL_KEYS, 0x71).encode(), "12e90271"),
    "KEY_UPDATE, verify": (session.KeyUpdate(session.KeyOperation.VERIFY_NEW_KEY, 0x4A).encode(), "12e9034a"),
    "KEY_UPDATE_ACK": (session.KeyUpdate(session.KeyOperation.VERIFY_NEW_KEY, 0x4A).acknowledgement(), "1269034a"),
    "END_SESSION": (session.END_SESSION, "12ec0000"),
    "END_SESSION_ACK": (session.END_SESSION_ACK, "126c0000"),
    "ERROR": (spdm12.encode_error(spdm12.ErrorCode.DECRYPT_ERROR), "127f0600"),
    "VENDOR_DEFINED_REQUEST": (spdm12.encode_vendor(b"ab", response=False), "12fe0000 0400 04 d97e0000 0200 6162"),
    "VENDOR_DEFINED_RESPONSE": (spdm12.encode_vendor(b"", response=True), "127e0000 0400 04 d97e0000 0000"),
}


@pytest.mark.parametrize("name", WRITTEN_DOWN)
def test_messages_are_as_the_specification_has_them(name: str) -> None:
    made, written = WRITTEN_DOWN[name]
    assert made.hex() == written.replace(" ", "")


Parse = Callable[[bytes], object]

PARSERS: dict[str, Parse] = {
    "GET_VERSION": lambda data: spdm12.require_exactly(data, spdm12.GET_VERSION),
    "VERSION": spdm12.require_version,
    "GET_CAPABILITIES": lambda data: spdm12.require_exactly(data, spdm12.GET_CAPABILITIES),
    "CAPABILITIES": lambda data: spdm12.require_exactly(data, spdm12.CAPABILITIES),
    "NEGOTIATE_ALGORITHMS": lambda data: spdm12.require_exactly(data, spdm12.NEGOTIATE_ALGORITHMS),
    "ALGORITHMS": lambda data: spdm12.require_exactly(data, spdm12.ALGORITHMS),
    "GET_DIGESTS": lambda data: spdm12.require_exactly(data, spdm12.GET_DIGESTS),
    "DIGESTS": spdm12.parse_digests,
    "GET_CERTIFICATE": spdm12.GetCertificate.parse,
    "CERTIFICATE": spdm12.CertificatePortion.parse,
    "GET_MEASUREMENTS": spdm12.GetMeasurements.parse,
    "MEASUREMENTS": lambda data: spdm12.Measurements.parse(data, signed=True),
    "KEY_EXCHANGE": session.KeyExchange.parse,
    "KEY_EXCHANGE_RSP": session.KeyExchangeResponse.parse,
    "FINISH": session.parse_finish,
    "KEY_UPDATE": session.KeyUpdate.parse,
    "FINISH_RSP": lambda data: spdm12.require_exactly(data, session.FINISH_RESPONSE),
    "END_SESSION": lambda data: spdm12.require_exactly(data, session.END_SESSION),
    "ERROR": spdm12.parse_error,
    "VENDOR_DEFINED_REQUEST": lambda data: spdm12.parse_vendor(data, response=False),
    "VENDOR_DEFINED_RESPONSE": lambda data: spdm12.parse_vendor(data, response=True),
}


@pytest.mark.parametrize("name", PARSERS)
def test_every_message_is_read_back(name: str) -> None:
    PARSERS[name](WRITTEN_DOWN[name][0])


@pytest.mark.parametrize("name", PARSERS)
def test_refuses_every_other_length(name: str) -> None:
    whole = WRITTEN_DOWN[name][0]
    for size in range(len(whole)):
        with pytest.raises(HostileInput) as caught:
            PARSERS[name](whole[:size])
        assert caught.value.slug == "TRUNCATED"
    with pytest.raises(HostileInput) as caught:
        PARSERS[name](whole + b"\0")
    assert caught.value.slug == "TRAILING_BYTES"


@pytest.mark.parametrize("name", [name for name in PARSERS if name != "ERROR"])
def test_refuses_another_code_and_another_version(name: str) -> None:
    whole = bytearray(WRITTEN_DOWN[name][0])
    whole[1] ^= 0x10
    with pytest.raises(HostileInput) as caught:
        PARSERS[name](bytes(whole))
    assert caught.value.slug == "BAD_SPDM"
    whole[0:2] = bytes((0x13, WRITTEN_DOWN[name][0][1]))
    with pytest.raises(HostileInput) as caught:
        PARSERS[name](bytes(whole))
    assert caught.value.slug == "SPDM_VERSION"


def slug(parse: Parse, data: bytes) -> str:
    with pytest.raises(HostileInput) as caught:
        parse(data)
    return caught.value.slug


@pytest.mark.parametrize("at", range(4, len(spdm12.ALGORITHMS)))
def test_refuses_any_other_algorithm(at: int) -> None:
    bent = bytearray(spdm12.ALGORITHMS)
    bent[at] ^= 1
    assert slug(PARSERS["ALGORITHMS"], bytes(bent)) == "SPDM_PROFILE"


def test_an_error_in_place_of_an_answer_says_so() -> None:
    error = spdm12.encode_error(spdm12.ErrorCode.UNEXPECTED_REQUEST)
    assert slug(spdm12.parse_digests, error) == "SPDM_ERROR"
    assert spdm12.parse_error(error) == 4


def test_finds_version_1_2_among_others() -> None:
    spdm12.require_version(bytes.fromhex("10040000 00 03 0010 0011 0012"))


@pytest.mark.parametrize("body", ["00 00", "00 02 0010 0011", "00 01 0013"])
def test_refuses_a_device_without_version_1_2(body: str) -> None:
    assert slug(spdm12.require_version, bytes.fromhex("10040000" + body)) in {"BAD_SPDM", "SPDM_VERSION"}


def test_a_chain_is_read_back_root_first() -> None:
    assert spdm12.parse_chain(CHAIN) == (CERTIFICATE, CERTIFICATE)


@pytest.mark.parametrize(
    "bent",
    [
        CHAIN[:-1],
        CHAIN + b"\0",
        CHAIN[:2] + b"\1\0" + CHAIN[4:],
        CHAIN[:4] + bytes(48) + CHAIN[52:],
        spdm12.encode_chain([CERTIFICATE, b"\x31" + CERTIFICATE[1:]]),
        spdm12.encode_chain([CERTIFICATE] * 9),
        spdm12.encode_chain([b""]),
        spdm12.encode_chain([CERTIFICATE, CERTIFICATE[:-1]]),
    ],
    ids=["short", "long", "reserved", "other root", "no certificate", "nine", "none", "cut certificate"],
)
def test_refuses_a_malformed_chain(bent: bytes) -> None:
    assert slug(spdm12.parse_chain, bent) in {"BAD_CHAIN", "TRUNCATED", "TRAILING_BYTES"}


@pytest.mark.parametrize("index", [0, 0xFF])
def test_refuses_an_index_that_is_no_block(index: int) -> None:
    bent = spdm12.Measurements(0, (Measurement(index, 1, b""),), N, None).encode()
    assert slug(lambda data: spdm12.Measurements.parse(data, signed=False), bent) == "BAD_MEASUREMENT"


def test_refuses_a_block_twice() -> None:
    bent = spdm12.Measurements(0, (BLOCK, BLOCK), N, None).encode()
    assert slug(lambda data: spdm12.Measurements.parse(data, signed=False), bent) == "DUPLICATE_MEASUREMENT"


def test_refuses_a_message_larger_than_was_negotiated() -> None:
    assert slug(spdm12.code_of, bytes(spdm12.MAX_MESSAGE + 1)) == "TOO_LARGE"


# --- keys ---


def test_what_is_signed_has_the_prefix_of_its_context() -> None:
    signed = spdm12keys.to_be_signed(spdm12keys.KEY_EXCHANGE_CONTEXT, bytes(48))
    assert signed == b"dmtf-spdm-v1.2.*" * 4 + b"\0\0responder-key_exchange_rsp signing" + bytes(48)
    signed = spdm12keys.to_be_signed(spdm12keys.MEASUREMENTS_CONTEXT, bytes(48))
    assert signed[64:100] == b"\0" * 6 + b"responder-measurements signing"


@pytest.mark.parametrize("length", [12, 32, 48])
def test_expanding_is_hkdf_over_length_version_label_context(length: int) -> None:
    info = length.to_bytes(2, "little") + b"spdm1.2 req hs data" + N
    expected = HKDFExpand(SHA384(), length, info).derive(bytes(48))
    assert spdm12keys.expand(bytes(48), length, b"req hs data", N) == expected


def test_every_key_of_a_session_is_another() -> None:
    secret = spdm12keys.handshake_secret(bytes(48))
    phases = [spdm12keys.handshake_keys(secret, bytes(48)), spdm12keys.application_keys(secret, bytes(48))]
    keys = [lane for phase in phases for lane in (phase.requester, phase.responder)]
    assert len({lane.key for lane in keys} | {lane.iv for lane in keys} | {lane.finished for lane in keys}) == 12


def test_a_nonce_is_the_iv_with_the_sequence_number_in_its_first_bytes() -> None:
    keys = spdm12keys.DirectionKeys(bytes(32), b"\xff" * 12, bytes(48), bytes(48))
    assert keys.nonce(0) == b"\xff" * 12
    assert keys.nonce(0x0102) == b"\xfd\xfe" + b"\xff" * 10


def test_keys_are_not_shown() -> None:
    assert "\\x" not in repr(spdm12keys.DirectionKeys.of(bytes(48)))


def test_a_record_is_of_its_session_and_the_next() -> None:
    record = spdm12keys.record_header(7, 3, 18) + bytes(18)
    assert spdm12keys.parse_record(record, 7, 3) == bytes(18)
    assert slug(lambda data: spdm12keys.parse_record(data, 8, 3), record) == "WRONG_SESSION"
    assert slug(lambda data: spdm12keys.parse_record(data, 7, 4), record) == "WRONG_SEQUENCE"
    assert slug(lambda data: spdm12keys.parse_record(data, 7, 3), record[:-1]) == "TRUNCATED"
    assert slug(lambda data: spdm12keys.parse_record(data, 7, 3), record + b"\0") == "TRAILING_BYTES"


def test_a_key_is_not_used_for_ever() -> None:
    with pytest.raises(HostileInput) as caught:
        spdm12keys.record_header(0, 1 << 32, 18)
    assert caught.value.slug == "SEQUENCE_EXHAUSTED"


def test_a_copied_transcript_goes_its_own_way() -> None:
    first = spdm12keys.Transcript(b"a")
    second = first.copy()
    second.add(b"b")
    assert first.digest() == hashlib.sha384(b"a").digest()
    assert second.digest() == hashlib.sha384(b"ab").digest()
