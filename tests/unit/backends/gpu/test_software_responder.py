"""The responder against a requester written by hand from the specification, and against one that does not keep it."""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from cgpu_agent.backends.gpu.software.make import Maker, blocks
from cgpu_agent.backends.gpu.software.pki import Seed
from cgpu_agent.backends.gpu.software.responder import Responder
from fixtures.spdmbyhand import (
    CHOICE,
    NEGOTIATION,
    OFFER,
    VCA,
    Direction,
    Keys,
    point,
    prefixed,
    sha384,
    shared,
    verify,
)

DEVICE = Maker(Seed(bytes(32))).device(1)
LEAF: x509.Certificate = DEVICE.leaf.certificate
UNEXPECTED, INVALID, UNSUPPORTED, LIMIT = (bytes.fromhex(f"127f{code}00") for code in ("04", "01", "07", "0a"))


def responder() -> Responder:
    return Responder(DEVICE, blocks, lambda payload: payload[::-1])


def negotiated() -> Responder:
    made = responder()
    for request, response in NEGOTIATION:
        assert made.answer(request) == response
    return made


def exchange(made: Responder) -> tuple[Keys, bytes, bytes]:
    """KEY_EXCHANGE by hand: keys, session id, transcript."""
    key = ec.generate_private_key(ec.SECP384R1())
    request = bytes.fromhex("12e40000 7788 0000") + os.urandom(32) + point(key) + OFFER
    answer = made.answer(request)
    assert answer[:4] == bytes.fromhex("12640000")
    unsigned, signature, proof = answer[:-144], answer[-144:-48], answer[-48:]
    assert unsigned[136:] == CHOICE
    transcript = VCA + sha384(DEVICE.chain) + request + unsigned
    verify(LEAF, signature, prefixed("responder-key_exchange_rsp signing", sha384(transcript)))
    transcript += signature
    keys = Keys(shared(key, unsigned[40:136]), sha384(transcript))
    assert proof == hmac.digest(keys.responder.finished, sha384(transcript), "sha384")
    return keys, request[4:6] + unsigned[4:6], transcript + proof


def opened(made: Responder) -> tuple[Keys, bytes]:
    keys, session, transcript = exchange(made)
    transcript += bytes.fromhex("12e50000")
    proof = hmac.digest(keys.requester.finished, sha384(transcript), "sha384")
    answer = made.answer_record(keys.requester.seal(session, bytes.fromhex("12e50000") + proof))
    assert answer is not None
    assert keys.responder.open(session, answer) == bytes.fromhex("12650000")
    keys.finish(sha384(transcript, proof, bytes.fromhex("12650000")))
    return keys, session


def vendor(payload: bytes) -> bytes:
    return bytes.fromhex("12fe0000 0400 04 d97e0000") + struct.pack("<H", len(payload)) + payload


def test_the_whole_conversation_with_a_requester_by_hand() -> None:
    made = negotiated()
    keys, session = opened(made)
    for payload in (b"", b"abc", b"x" * 4000):
        answer = made.answer_record(keys.requester.seal(session, vendor(payload)))
        assert answer is not None
        assert keys.responder.open(session, answer)[13:] == payload[::-1]
    answer = made.answer_record(keys.requester.seal(session, bytes.fromhex("12ec0000")))
    assert answer is not None
    assert keys.responder.open(session, answer) == bytes.fromhex("126c0000")
    assert made.answer_record(keys.requester.seal(session, vendor(b""))) is None


def test_the_chain_comes_in_portions_and_fits_its_digest() -> None:
    made = negotiated()
    digest = made.answer(bytes.fromhex("12810000"))[4:]
    chain, left = b"", 1
    while left:
        answer = made.answer(bytes.fromhex("12820000") + struct.pack("<HH", len(chain), 0xFFFF))
        size, left = struct.unpack_from("<HH", answer, 4)
        assert 0 < size < 4096
        chain += answer[8:]
    assert hashlib.sha384(chain).digest() == digest
    assert made.answer(bytes.fromhex("12820000") + struct.pack("<HH", len(chain), 1)) == INVALID


def test_a_signature_over_measurements_covers_everything_since_the_first_message() -> None:
    made = negotiated()
    count = bytes.fromhex("12e00000")
    first = made.answer(count)
    assert first[2] == 64
    request = bytes.fromhex("12e001ff") + bytes(32) + b"\0"
    answer = made.answer(request)
    transcript = sha384(VCA, count, first, request, answer[:-96])
    verify(LEAF, answer[-96:], prefixed("responder-measurements signing", transcript))


def test_another_message_between_begins_measuring_anew() -> None:
    made = negotiated()
    made.answer(bytes.fromhex("12e00000"))
    made.answer(bytes.fromhex("12810000"))
    request = bytes.fromhex("12e00101") + bytes(32) + b"\0"
    answer = made.answer(request)
    assert answer[4] == 1
    verify(LEAF, answer[-96:], prefixed("responder-measurements signing", sha384(VCA, request, answer[:-96])))


def test_an_unknown_block_is_refused() -> None:
    assert negotiated().answer(bytes.fromhex("12e00041")) == INVALID


@pytest.mark.parametrize(
    "message", ["12e10000 00000000 c2420000 00400100 00400100", "12810000", "12820000 0000 ffff", "12e00000"]
)
def test_nothing_is_answered_before_its_time(message: str) -> None:
    assert responder().answer(bytes.fromhex(message)) == UNEXPECTED


def test_the_same_step_twice_is_refused_and_changes_nothing() -> None:
    made = negotiated()
    assert made.answer(NEGOTIATION[2][0]) == UNEXPECTED
    exchange(made)


@pytest.mark.parametrize("message", ["12e50000" + "00" * 48, "12e90207", "12ec0000"])
def test_what_belongs_into_a_session_is_refused_outside(message: str) -> None:
    assert negotiated().answer(bytes.fromhex(message)) == UNEXPECTED


@pytest.mark.parametrize("message", ["12830000", "12e60000", "12600000", "12000000"])
def test_what_is_not_spoken_is_said_to_be_so(message: str) -> None:
    assert negotiated().answer(bytes.fromhex(message)) == UNSUPPORTED


@pytest.mark.parametrize("message", ["11810000", "13810000", "12840000"])
def test_another_version_is_said_to_be_so(message: str) -> None:
    assert negotiated().answer(bytes.fromhex(message)) == bytes.fromhex("127f4100")


def test_refuses_a_point_that_is_not_on_the_curve() -> None:
    request = bytes.fromhex("12e40000 7788 0000") + bytes(32) + b"\1" * 96 + OFFER
    made = negotiated()
    assert made.answer(request) == INVALID
    exchange(made)


def test_refuses_a_second_session() -> None:
    made = negotiated()
    exchange(made)
    key = ec.generate_private_key(ec.SECP384R1())
    assert made.answer(bytes.fromhex("12e40000 7788 0000") + bytes(32) + point(key) + OFFER) == LIMIT


def test_beginning_again_ends_the_session() -> None:
    made = negotiated()
    keys, session = opened(made)
    made.answer(NEGOTIATION[0][0])
    assert made.answer_record(keys.requester.seal(session, vendor(b""))) is None


def flip(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :]


@pytest.mark.parametrize(
    "bend",
    [flip(0), flip(4), flip(6), flip(8), flip(28), lambda data: data[:-1], lambda data: data + b"\0"],
    ids=["session", "sequence", "length", "first byte", "later byte", "cut", "longer"],
)
def test_an_altered_record_ends_the_session(bend: Callable[[bytes], bytes]) -> None:
    made = negotiated()
    keys, session = opened(made)
    honest = keys.requester.seal(session, vendor(b"abc"))
    assert made.answer_record(bend(honest)) is None
    assert made.answer_record(honest) is None


def test_a_replayed_record_ends_the_session() -> None:
    made = negotiated()
    keys, session = opened(made)
    record = keys.requester.seal(session, vendor(b"abc"))
    assert made.answer_record(record) is not None
    assert made.answer_record(record) is None


def test_a_dropped_record_ends_the_session() -> None:
    made = negotiated()
    keys, session = opened(made)
    keys.requester.seal(session, vendor(b"lost"))
    assert made.answer_record(keys.requester.seal(session, vendor(b"abc"))) is None


def test_a_record_of_something_else_than_spdm_ends_the_session() -> None:
    made = negotiated()
    keys, session = opened(made)
    assert made.answer_record(keys.requester.seal(session, vendor(b"abc"), b"\6")) is None


def test_its_own_answer_reflected_ends_the_session() -> None:
    made = negotiated()
    keys, session = opened(made)
    answer = made.answer_record(keys.requester.seal(session, vendor(b"abc")))
    assert answer is not None
    assert made.answer_record(answer) is None


def test_a_wrong_finish_ends_the_session() -> None:
    made = negotiated()
    keys, session, _ = exchange(made)
    assert made.answer_record(keys.requester.seal(session, bytes.fromhex("12e50000") + bytes(48))) is None


def test_nothing_but_finish_is_heard_before_it() -> None:
    made = negotiated()
    keys, session, _ = exchange(made)
    assert made.answer_record(keys.requester.seal(session, vendor(b"abc"))) is None


def said(made: Responder, keys: Keys, session: bytes, message: bytes) -> bytes | None:
    """What is answered to a sealed message, opened; ``None``: the session is over."""
    answer = made.answer_record(keys.requester.seal(session, message))
    return None if answer is None else keys.responder.open(session, answer)


def updated(made: Responder, keys: Keys, session: bytes) -> None:
    """KEY_UPDATE of all keys by hand, not verified yet."""
    record = keys.requester.seal(session, bytes.fromhex("12e90271"))
    answer = made.answer_record(record)
    keys.requester.update()
    keys.responder.update()
    assert answer is not None
    assert keys.responder.open(session, answer) == bytes.fromhex("12690271")


def test_keys_are_updated_as_often_as_asked() -> None:
    made = negotiated()
    keys, session = opened(made)
    for _ in range(3):
        assert (said(made, keys, session, vendor(b"abc")) or b"")[13:] == b"cba"
        before = keys.requester.secret, keys.responder.secret
        updated(made, keys, session)
        assert said(made, keys, session, bytes.fromhex("12e9034a")) == bytes.fromhex("1269034a")
        assert not {*before} & {keys.requester.secret, keys.responder.secret}
    assert (said(made, keys, session, vendor(b"abc")) or b"")[13:] == b"cba"


def test_old_keys_are_good_for_nothing() -> None:
    made = negotiated()
    keys, session = opened(made)
    old = Direction(keys.requester.secret)
    updated(made, keys, session)
    assert made.answer_record(old.seal(session, bytes.fromhex("12e9034a"))) is None
    assert said(made, keys, session, bytes.fromhex("12e9034a")) is None


@pytest.mark.parametrize("message", ["12e9034a", "12e90171", "12e90071", "12e90471", "12e9027100"])
def test_another_update_than_of_all_keys_ends_the_session(message: str) -> None:
    """Verification without an update, among others."""
    made = negotiated()
    keys, session = opened(made)
    assert said(made, keys, session, bytes.fromhex(message)) is None
    assert said(made, keys, session, vendor(b"abc")) is None


@pytest.mark.parametrize("message", [vendor(b"abc"), bytes.fromhex("12e90271"), bytes.fromhex("12ec0000")])
def test_nothing_but_verification_is_heard_after_an_update(message: bytes) -> None:
    made = negotiated()
    keys, session = opened(made)
    updated(made, keys, session)
    assert said(made, keys, session, message) is None
