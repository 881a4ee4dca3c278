"""Trustee's protocol: what is bound, byte for byte, and answers read strictly."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire import kbs

NONCE = base64.b64encode(bytes(range(32))).decode()
KEY = {
    "kty": "EC",
    "crv": "P-256",
    "alg": "ECDH-ES+A256KW",
    "x": "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4",
    "y": "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM",
}
DEVICE = (
    '{"sampledevice":{"report_data":"kN8tkobKJMiohstH5cp+tfgSULK/PK4q21HRl4tJaQq51O/hwXOFAo+R+D0/7wGT","svn":"2"}}'
)


def test_the_hash_of_canonical_json_is_trustees() -> None:
    """The one vector that Trustee publishes: its members are out of order on purpose."""
    found = hashlib.sha384(kbs.canonical({"b": 1, "a": "test", "c": {"d": "e"}})).hexdigest()
    assert found == (
        "e71ce8e70d814ba6639c3612ebee0ff1f76f650f8dbb5e47157e0f3f525cd22c4597480a186427c813ca941da78870c3"
    )


@pytest.mark.parametrize(
    ("additional", "expected"),
    [
        (None, "90df2d9286ca24c8a886cb47e5ca7eb5f81250b2bf3cae2adb51d1978b49690ab9d4efe1c17385028f91f83d3fef0193"),
        ("", "8a6244441b1b1171b3a1d56a693d4ce116c1f9ca1ae558bc5f59d46dada54cf49e92a361ab2472c434652fed5887f16d"),
        (DEVICE, "45489d7a02eaf5e76b8dba118409f0c02766d0e0c6a7e6db5eeba19ff7b8faa33ca760c486a232cc4b66185e7b699b3f"),
    ],
)
def test_binding_by_the_same_rule(additional: str | None, expected: str) -> None:
    """Computed apart from this code; absent and empty additional evidence are two things."""
    assert kbs.binding(NONCE, KEY, additional).hex() == expected


def test_canonical_form_of_awkward_text() -> None:
    """RFC 8785, 3.2.2.2: short escapes where there are some, lower-case hex for other controls, all else as it is."""
    assert kbs.canonical({"b": '"\\/\b\f\n\r\t\x0f\x7f€', "a": {}}) == (
        b'{"a":{},"b":"\\"\\\\/\\b\\f\\n\\r\\t\\u000f\x7f\xe2\x82\xac"}'
    )


@pytest.mark.parametrize("value", [1.0, True, None, [], {"é": "a"}, {"a": [1]}, {1: "a"}, 1 << 53, "\ud800", b"a"])
def test_what_has_no_canonical_form_here_is_refused(value: object) -> None:
    with pytest.raises(HostileInput) as caught:
        kbs.canonical(value)
    assert caught.value.slug == "NOT_CANONICAL"


def test_messages_of_ours_are_spelled_as_the_protocol_has_them() -> None:
    assert json.loads(kbs.encode_request("az-snp-vtpm")) == {
        "version": "0.4.0",
        "tee": "az-snp-vtpm",
        "extra-params": {"supported-hash-algorithms": ["sha384"]},
    }
    assert json.loads(kbs.encode_attestation(NONCE, KEY, {"svn": "1"}, DEVICE)) == {
        "runtime-data": {"nonce": NONCE, "tee-pubkey": KEY},
        "tee-evidence": {"primary_evidence": {"svn": "1"}, "additional_evidence": DEVICE},
    }


def challenge(**changed: Any) -> bytes:
    return json.dumps({"nonce": NONCE, "extra-params": "", **changed}).encode()


@pytest.mark.parametrize("extra", ["", {}, {"selected-hash-algorithm": "sha384"}])
def test_a_challenge(extra: object) -> None:
    assert kbs.parse_challenge(challenge(**{"extra-params": extra})) == NONCE


@pytest.mark.parametrize(
    ("changed", "slug"),
    [
        ({"nonce": base64.b64encode(bytes(31)).decode()}, "BAD_FIELD"),
        ({"nonce": base64.b64encode(bytes(33)).decode()}, "BAD_FIELD"),
        ({"nonce": NONCE.rstrip("=")}, "BAD_FIELD"),
        ({"nonce": NONCE.replace("8=", "9=")}, "BAD_FIELD"),
        ({"nonce": 7}, "BAD_FIELD"),
        ({"nonce": ""}, "BAD_FIELD"),
        ({"extra-params": {"selected-hash-algorithm": "sha256"}}, "BAD_FIELD"),
        ({"extra-params": None}, "BAD_FIELD"),
        ({"version": "0.4.0"}, "UNKNOWN_KEY"),
        ({"nonce": "A" * 5000}, "TOO_LARGE"),
    ],
)
def test_refuses_a_challenge(changed: dict[str, object], slug: str) -> None:
    with pytest.raises(HostileInput) as caught:
        kbs.parse_challenge(challenge(**changed))
    assert caught.value.slug == slug


def test_a_token() -> None:
    assert kbs.parse_token(b'{"token":"eyJh.eyJi.c2ln"}') == "eyJh.eyJi.c2ln"


@pytest.mark.parametrize("token", ["", "a.b", "a.b.c.d", "a.b.", "a.b.c\n", "a.ö.c", 7, None])
def test_refuses_a_token(token: object) -> None:
    with pytest.raises(HostileInput) as caught:
        kbs.parse_token(json.dumps({"token": token}).encode())
    assert caught.value.slug == "BAD_FIELD"


def error(kind: object, detail: object = "in words") -> bytes:
    return json.dumps({"type": kind, "detail": detail}).encode()


PREFIX = "https://github.com/confidential-containers/kbs/errors/"


def test_an_error() -> None:
    assert kbs.parse_error(error(PREFIX + "PolicyDeny")) == "PolicyDeny"


@pytest.mark.parametrize(
    "kind", ["PolicyDeny", PREFIX, PREFIX + "a/PolicyDeny", "http" + PREFIX[5:] + "PolicyDeny", PREFIX + "A" * 65, 4]
)
def test_refuses_an_error(kind: object) -> None:
    with pytest.raises(HostileInput) as caught:
        kbs.parse_error(error(kind))
    assert caught.value.slug == "BAD_FIELD"


def b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


HEADER: dict[str, Any] = {
    "alg": "ECDH-ES+A256KW",
    "enc": "A256GCM",
    "epk": {"kty": "EC", "crv": "P-256", "x": KEY["x"], "y": KEY["y"]},
}
RESPONSE: dict[str, Any] = {
    "protected": b64url(json.dumps(HEADER).encode()),
    "encrypted_key": b64url(b"k" * 40),
    "iv": b64url(b"i" * 12),
    "ciphertext": b64url(b"c"),
    "tag": b64url(b"t" * 16),
}


def test_a_response() -> None:
    found = kbs.parse_response(json.dumps(RESPONSE).encode())
    assert (found.encrypted_key, found.iv, found.ciphertext, found.tag) == (b"k" * 40, b"i" * 12, b"c", b"t" * 16)
    assert found.protected.decode() == RESPONSE["protected"]
    assert b64url(found.x) == KEY["x"]


@pytest.mark.parametrize(
    ("changed", "slug"),
    [
        ({"alg": "ECDH-ES"}, "BAD_FIELD"),
        ({"alg": "dir"}, "BAD_FIELD"),
        ({"alg": "RSA1_5"}, "BAD_FIELD"),
        ({"enc": "A128GCM"}, "BAD_FIELD"),
        ({"enc": ["A256GCM"]}, "BAD_FIELD"),
        ({"zip": "DEF"}, "UNKNOWN_KEY"),
        ({"crit": ["zip"], "zip": "DEF"}, "UNKNOWN_KEY"),
        ({"apu": "QQ"}, "UNKNOWN_KEY"),
        ({"kid": "another"}, "UNKNOWN_KEY"),
        ({"epk": None}, "BAD_JSON"),
        ({"epk": {**HEADER["epk"], "crv": "P-521"}}, "BAD_FIELD"),
        ({"epk": {**HEADER["epk"], "kty": "OKP"}}, "BAD_FIELD"),
        ({"epk": {**HEADER["epk"], "x": "AAAA"}}, "BAD_FIELD"),
        ({"epk": {**HEADER["epk"], "x": KEY["x"] + "="}}, "BAD_FIELD"),
        ({"epk": {**HEADER["epk"], "d": KEY["x"]}}, "UNKNOWN_KEY"),
    ],
)
def test_refuses_a_header(changed: dict[str, object], slug: str) -> None:
    protected = b64url(json.dumps({**HEADER, **changed}).encode())
    with pytest.raises(HostileInput) as caught:
        kbs.parse_response(json.dumps({**RESPONSE, "protected": protected}).encode())
    assert caught.value.slug == slug


@pytest.mark.parametrize(
    ("changed", "slug"),
    [
        ({"iv": b64url(b"i" * 16)}, "BAD_FIELD"),
        ({"tag": b64url(b"t" * 12)}, "BAD_FIELD"),
        ({"tag": ""}, "BAD_FIELD"),
        ({"encrypted_key": b64url(b"k" * 32)}, "BAD_FIELD"),
        ({"encrypted_key": ["k"]}, "BAD_FIELD"),
        ({"ciphertext": ""}, "BAD_FIELD"),
        ({"ciphertext": "Y+"}, "BAD_FIELD"),
        ({"ciphertext": None}, "BAD_FIELD"),
        ({"protected": "é"}, "BAD_FIELD"),
        ({"protected": b64url(b"{}")}, "BAD_FIELD"),
        ({"protected": b64url(b'{"alg":"dir","alg":"ECDH-ES+A256KW"}')}, "DUPLICATE_KEY"),
        ({"aad": "YQ"}, "UNKNOWN_KEY"),
        ({"header": {"epk": HEADER["epk"]}}, "UNKNOWN_KEY"),
        ({"unprotected": {}}, "UNKNOWN_KEY"),
        ({"recipients": []}, "UNKNOWN_KEY"),
        ({"ciphertext": "A" * kbs.MAX_RESPONSE}, "TOO_LARGE"),
    ],
)
def test_refuses_a_response(changed: dict[str, object], slug: str) -> None:
    with pytest.raises(HostileInput) as caught:
        kbs.parse_response(json.dumps({**RESPONSE, **changed}).encode())
    assert caught.value.slug == slug


@pytest.mark.parametrize("key", list(RESPONSE))
def test_refuses_a_response_with_a_part_missing(key: str) -> None:
    with pytest.raises(HostileInput) as caught:
        kbs.parse_response(json.dumps({name: value for name, value in RESPONSE.items() if name != key}).encode())
    assert caught.value.slug == "BAD_FIELD"
