"""A conversation recorded with another implementation of SPDM 1.2: our codec, key schedule and records agree with it.

The other side was the responder of DMTF's libspdm. Every signature, proof and record of it is checked here from the
bytes alone, with the secret that the key exchange agreed on.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from cryptography import x509

from cgpu_agent.backends.gpu.software.sealing import Lanes
from cgpu_agent.errors import HostileInput
from cgpu_agent.wire import spdm12, spdm12keys
from cgpu_agent.wire import spdm12session as session
from cgpu_agent.wire.spdm12keys import Transcript
from fixtures.spdmbyhand import verify

RECORD = json.loads((Path(__file__).parent / "spdm" / "libspdm-session.json").read_text())
FRAMES = [tuple(bytes.fromhex(each)[1:] for each in pair) for pair in RECORD["frames"]]
VCA = [message for pair in FRAMES[:3] for message in pair]
CHAIN = spdm12.CertificatePortion.parse(FRAMES[4][1]).portion
LEAF = x509.load_der_x509_certificate(spdm12.parse_chain(CHAIN)[-1])
REQUEST, RESPONSE = FRAMES[8]
SEALED = FRAMES[9:]


def transcript(*messages: bytes) -> Transcript:
    made = Transcript()
    made.add(*VCA, *messages)
    return made


class Recorded:
    """The recorded session, its keys derived once more."""

    def __init__(self) -> None:
        answer = session.KeyExchangeResponse.parse(RESPONSE)
        unsigned = answer.unsigned(answer.session, answer.random, answer.exchange)
        self.running = transcript(hashlib.sha384(CHAIN).digest(), REQUEST, unsigned)
        self.to_be_signed = spdm12keys.to_be_signed(spdm12keys.KEY_EXCHANGE_CONTEXT, self.running.digest())
        self.signature, self.proof = answer.signature, answer.verify
        self.running.add(answer.signature)
        self.secret = spdm12keys.handshake_secret(bytes.fromhex(RECORD["shared"]))
        self.th1 = self.running.digest()
        self.handshake = spdm12keys.handshake_keys(self.secret, self.th1)
        self.running.add(answer.verify)
        number = answer.session << 16 | session.KeyExchange.parse(REQUEST).session
        assert number == RECORD["session"]
        self.responder = Lanes(number, self.handshake, requester=False)
        self.requester = Lanes(number, self.handshake, requester=True)


def no_update(capabilities: bytes) -> bytes:
    """Without KEY_UPD_CAP, which the profile did not have yet."""
    assert capabilities[9] & 0x40
    return capabilities[:9] + bytes((capabilities[9] & ~0x40,)) + capabilities[10:]


def test_its_messages_are_those_of_the_profile() -> None:
    assert VCA[::2] == [spdm12.GET_VERSION, no_update(spdm12.GET_CAPABILITIES), spdm12.NEGOTIATE_ALGORITHMS]
    assert VCA[1::2] == [spdm12.VERSION_RESPONSE, no_update(spdm12.CAPABILITIES), spdm12.ALGORITHMS]
    assert spdm12.parse_digests(FRAMES[3][1]) == hashlib.sha384(CHAIN).digest()


def test_it_signed_its_measurements() -> None:
    request, response = FRAMES[5]
    found = spdm12.Measurements.parse(response, signed=True)
    assert found.encode() == response
    assert found.signature is not None
    digest = transcript(request, response[: -spdm12.SIGNATURE_SIZE]).digest()
    verify(LEAF, found.signature, spdm12keys.to_be_signed(spdm12keys.MEASUREMENTS_CONTEXT, digest))


def test_it_signed_and_proved_the_key_exchange() -> None:
    recorded = Recorded()
    verify(LEAF, recorded.signature, recorded.to_be_signed)
    assert spdm12keys.verify_data(recorded.handshake.responder.finished, recorded.th1) == recorded.proof


def test_its_records_open_and_hold_what_was_said() -> None:
    recorded = Recorded()
    finish = recorded.responder.receive.open(SEALED[0][0])
    recorded.running.add(session.FINISH_HEADER)
    proof = spdm12keys.verify_data(recorded.handshake.requester.finished, recorded.running.digest())
    assert session.parse_finish(finish) == proof
    assert recorded.requester.receive.open(SEALED[0][1]) == session.FINISH_RESPONSE
    recorded.running.add(proof, session.FINISH_RESPONSE)
    keys = spdm12keys.application_keys(recorded.secret, recorded.running.digest())
    assert keys.exporter.hex() == RECORD["exporter"]
    theirs, ours = (Lanes(RECORD["session"], keys, requester=side) for side in (False, True))
    for sealed_request, sealed_response in SEALED[1:-1]:
        asked = spdm12.parse_vendor(theirs.receive.open(sealed_request), response=False)
        told = spdm12.parse_vendor(ours.receive.open(sealed_response), response=True)
        assert told == asked[::-1] != b""
    assert theirs.receive.open(SEALED[-1][0]) == session.END_SESSION
    assert ours.receive.open(SEALED[-1][1]) == session.END_SESSION_ACK


def test_with_another_secret_nothing_opens() -> None:
    recorded = Recorded()
    keys = spdm12keys.handshake_keys(spdm12keys.handshake_secret(bytes(48)), recorded.th1)
    with pytest.raises(HostileInput):
        Lanes(RECORD["session"], keys, requester=True).receive.open(SEALED[0][1])
