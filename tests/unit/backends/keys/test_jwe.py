"""Secrets closed by a JOSE library are opened by the key that they were closed for, and by nothing else."""

from __future__ import annotations

import base64
import json

import pytest

from cgpu_agent.backends.keys.jwe import AnswerKey
from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.kbs import parse_response
from fixtures.kbs import encrypted

SECRET = bytes(range(256)) * 4


def refused(key: AnswerKey, message: bytes) -> str:
    with pytest.raises(HostileInput) as caught:
        key.open(parse_response(message))
    return caught.value.slug


def test_opens_what_a_jose_library_closed() -> None:
    for _ in range(20):
        key = AnswerKey()
        assert key.open(parse_response(encrypted(key.jwk, SECRET))) == SECRET


def test_every_key_is_another() -> None:
    assert AnswerKey().jwk["x"] != AnswerKey().jwk["x"]


def test_refuses_what_was_closed_for_another_key() -> None:
    assert refused(AnswerKey(), encrypted(AnswerKey().jwk, SECRET)) == "JWE_REFUSED"


@pytest.mark.parametrize("part", ["encrypted_key", "iv", "ciphertext", "tag"])
def test_refuses_a_flipped_bit(part: str) -> None:
    key = AnswerKey()
    message = json.loads(encrypted(key.jwk, SECRET))
    flipped = bytearray(base64.urlsafe_b64decode(message[part] + "=="))
    flipped[0] ^= 1
    message[part] = base64.urlsafe_b64encode(flipped).rstrip(b"=").decode()
    assert refused(key, json.dumps(message).encode()) == "JWE_REFUSED"


def test_the_tag_covers_the_header_as_it_was_sent() -> None:
    key = AnswerKey()
    message = json.loads(encrypted(key.jwk, SECRET))
    header = json.loads(base64.urlsafe_b64decode(message["protected"] + "=="))
    spaced = json.dumps(header, indent=1).encode()
    message["protected"] = base64.urlsafe_b64encode(spaced).rstrip(b"=").decode()
    assert refused(key, json.dumps(message).encode()) == "JWE_REFUSED"


@pytest.mark.parametrize("point", [(b"\0" * 32, b"\0" * 32), (b"\1" * 32, b"\2" * 32), (b"\xff" * 32, b"\xff" * 32)])
def test_refuses_a_point_that_is_not_on_the_curve(point: tuple[bytes, bytes]) -> None:
    """Such points would give a server one private key, a few bits at a time."""
    key = AnswerKey()
    message = json.loads(encrypted(key.jwk, SECRET))
    header = json.loads(base64.urlsafe_b64decode(message["protected"] + "=="))
    for name, value in zip("xy", point, strict=True):
        header["epk"][name] = base64.urlsafe_b64encode(value).rstrip(b"=").decode()
    message["protected"] = base64.urlsafe_b64encode(json.dumps(header).encode()).rstrip(b"=").decode()
    assert refused(key, json.dumps(message).encode()) == "JWE_REFUSED"


@pytest.mark.parametrize(
    ("header", "slug"),
    [({"alg": "ECDH-ES+A128KW"}, "BAD_FIELD"), ({"enc": "A128GCM"}, "BAD_FIELD"), ({"zip": "DEF"}, "UNKNOWN_KEY")],
)
def test_refuses_soundly_made_messages_of_another_algorithm(header: dict[str, object], slug: str) -> None:
    key = AnswerKey()
    assert refused(key, encrypted(key.jwk, SECRET, **header)) == slug
