"""The request byte for byte, as Microsoft's public clients make it; the answers that are read."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.wire.hcl import parse_hcl
from cgpu_agent.wire.maarequest import GuestOs, GuestTpm, Isolation, encode_request, parse_answer
from fixtures.platform import AMD, CLAIMS, TD, hcl_report

NONCE = "0123456789abcdef-_"
OS = GuestOs("Ubuntu", 24, 4)
PUBLIC = bytes.fromhex("0001000b0002043200000010001008000000000001") + b"\0" + b"\xc1" * 256
SNP = Isolation(parse_hcl(hcl_report(AMD.report(CLAIMS), CLAIMS)), b"-----BEGIN CERTIFICATE-----\n")
TDX = Isolation(parse_hcl(hcl_report(TD.tdreport, CLAIMS, 4)), b"a quote \xff\xfe")


def attest(kind: int, tail: bytes) -> bytes:
    head = b"\xffTCG" + kind.to_bytes(2, "big") + b"\0\x22\0\x0b" + bytes(32) + b"\0\0" + bytes(8 + 4 + 4) + b"\1"
    return head + bytes(8) + tail


QUOTE = attest(0x8018, b"\0\0\0\1\0\x0b\3\xff\0\0" + b"\0\x20" + bytes(32))
CERTIFY = attest(0x8017, b"\0\0\0\0")


def signature(byte: bytes, head: str = "0014000b0100") -> bytes:
    return bytes.fromhex(head) + byte * 256


def tpm(**changed: Any) -> GuestTpm:
    values = {index: bytes([index]) * 32 for index in reversed(range(8))}
    public = PUBLIC[:20] + b"\x01\x00" + b"\xc1" * 256
    good = GuestTpm(public, b"0\0", QUOTE, signature(b"q"), values, public, CERTIFY, signature(b"c"))
    return replace(good, **changed)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def told(isolation: Isolation | None = None, **changed: Any) -> dict[str, Any]:
    body = json.loads(encode_request(OS, tpm(**changed), isolation, boot_log=b"log\xff", nonce=NONCE))
    assert list(body) == ["AttestationInfo"]
    text = body["AttestationInfo"]
    assert not set(text) & set("+/=")
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    return found


def test_every_member_and_its_encoding() -> None:
    public = tpm().ak
    assert told() == {
        "AttestationProtocolVersion": "2.0",
        "ClientPayload": {"nonce": b64(NONCE.encode())},
        "IsolationInfo": {"Type": "TrustedLaunch"},
        "OSBuild": b64(b"NotApplication"),
        "OSDistro": b64(b"Ubuntu"),
        "OSType": b64(b"Linux"),
        "OSVersionMajor": 24,
        "OSVersionMinor": 4,
        "TcgLogs": b64(b"log\xff"),
        "TpmInfo": {
            "AikCert": b64(b"0\0"),
            "AikPub": b64(len(public).to_bytes(2, "big") + public),
            "EncKeyCertifyInfo": b64(CERTIFY),
            "EncKeyCertifyInfoSignature": b64(b"c" * 256),
            "EncKeyPub": b64(len(public).to_bytes(2, "big") + public),
            "PCRs": [{"Digest": b64(bytes([index]) * 32), "Index": index} for index in range(8)],
            "PcrQuote": b64(QUOTE),
            "PcrSet": list(range(8)),
            "PcrSignature": b64(b"q" * 256),
        },
    }


def test_snp_takes_the_url_alphabet_and_tdx_the_standard_one() -> None:
    proof = json.dumps(
        {"SnpReport": b64url(SNP.report.hardware), "VcekCertChain": b64url(SNP.proof)}, separators=(",", ":")
    )
    snp = {"Evidence": {"Proof": b64url(proof.encode()), "RunTimeData": b64url(CLAIMS)}, "Type": "SevSnp"}
    assert told(SNP)["IsolationInfo"] == snp
    tdx = {"Evidence": {"Proof": b64(TDX.proof), "RunTimeData": b64(CLAIMS)}, "Type": "Tdx"}
    assert told(TDX)["IsolationInfo"] == tdx


def test_the_claims_travel_as_they_were_hashed(shared_data: Path) -> None:
    """The real report binds the digest of its claims' very bytes; an order of keys of our own would break it."""
    real = parse_hcl((shared_data / "azure" / "snp-milan-kinvolk-hcl" / "hcl_report.bin").read_bytes())
    sent = told(Isolation(real, b"PEM"))["IsolationInfo"]["Evidence"]["RunTimeData"]
    claims = base64.urlsafe_b64decode(sent + "=" * (-len(sent) % 4))
    assert real.hardware[0x50:0x70] == hashlib.sha256(claims).digest()


def test_the_same_bytes_for_the_same_facts() -> None:
    both = [encode_request(OS, tpm(), SNP, boot_log=b"", nonce=NONCE) for _ in range(2)]
    assert both[0] == both[1]


@pytest.mark.parametrize("nonce", ["", "short", "0" * 129, "0" * 16 + '"', "0" * 16 + "ä", "0" * 16 + "\n"])
def test_refuses_a_nonce_that_a_client_payload_cannot_carry(nonce: str) -> None:
    with pytest.raises(Misuse):
        encode_request(OS, tpm(), None, boot_log=b"", nonce=nonce)


@pytest.mark.parametrize(
    "changed",
    [
        {"ak": b""},
        {"key": tpm().key + b"\0"},
        {"quote": QUOTE + b"\0"},
        {"certify": b""},
        {"quote_signature": b"q" * 256},
        {"quote_signature": signature(b"q", "0016000b0100")},
        {"certify_signature": signature(b"c", "0014000c0100")},
    ],
)
def test_refuses_what_the_service_could_not_read(changed: dict[str, bytes]) -> None:
    with pytest.raises(HostileInput):
        encode_request(OS, tpm(**changed), None, boot_log=b"", nonce=NONCE)


def test_refuses_a_log_without_end() -> None:
    with pytest.raises(HostileInput) as caught:
        encode_request(OS, tpm(), None, boot_log=bytes((4 << 20) + 1), nonce=NONCE)
    assert caught.value.slug == "TOO_LARGE"


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ({"NAME": "Ubuntu", "VERSION_ID": "24.04"}, GuestOs("Ubuntu", 24, 4)),
        ({"NAME": "Debian GNU/Linux", "VERSION_ID": "13"}, GuestOs("Debian GNU/Linux", 13, 0)),
        ({"NAME": "Arch", "VERSION_ID": "rolling.9.9"}, GuestOs("Arch", 0, 9)),
        ({}, GuestOs("Linux", 0, 0)),
    ],
)
def test_what_the_guest_says_of_itself(release: dict[str, str], expected: GuestOs) -> None:
    assert GuestOs.of(release) == expected


def answer(**changed: Any) -> bytes:
    inner = {
        "EncryptedInnerKey": b64(b"k" * 256),
        "EncryptionParams": {"Iv": b64(b"i" * 12), "Cipher": "AES"},
        "AuthenticationData": b64(b"t" * 16),
        "Jwt": b64(b"e30\0\0"),
        **changed,
    }
    return json.dumps({"token": b64url(json.dumps(inner).encode())}).encode()


def test_an_answer_is_read_to_the_last_zero() -> None:
    sealed = parse_answer(answer())
    assert (sealed.wrapped_key, sealed.iv, sealed.ciphertext) == (b"k" * 256, b"i" * 12, b"e30\0\0" + b"t" * 16)
    assert parse_answer(answer(EncryptedInnerKey=b64(b"\0" + b"k" * 256))).wrapped_key == b"k" * 256
    assert parse_answer(answer(EncryptedInnerKey=b64(b"\0" + b"k" * 255))).wrapped_key == b"\0" + b"k" * 255


@pytest.mark.parametrize(
    "body",
    [
        b'{"token":"e30="}',
        b'{"token":"+/"}',
        b'{"token":"e30","token":"e30"}',
        answer(EncryptedInnerKey=b64(b"\1" + b"k" * 256)),
        answer(EncryptedInnerKey=b64(b"\0\0" + b"k" * 256)),
        answer(EncryptedInnerKey=b64url(b"\xff" * 256)),
        answer(EncryptionParams={"Iv": b64(b"i" * 16)}),
        answer(AuthenticationData=b64(b"t" * 12)),
        answer(Jwt=b64(bytes(65537))),
    ],
)
def test_refuses_an_answer_that_is_none(body: bytes) -> None:
    with pytest.raises(HostileInput):
        parse_answer(body)
