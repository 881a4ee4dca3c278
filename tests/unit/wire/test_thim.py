"""Answers of Azure's metadata service, as it gives them and as a host could."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.thim import MAX_ANSWER, parse_certification, parse_quote_answer
from fixtures.imds import certification
from fixtures.platform import AMD

DERS = tuple(each.public_bytes(Encoding.DER) for each in AMD.certificates)


def refusal(**changed: object) -> str:
    with pytest.raises(HostileInput) as caught:
        parse_certification(certification(**changed))
    return caught.value.slug


def test_certificates_and_the_firmware_they_are_for() -> None:
    found = parse_certification(certification())
    assert found.certificates == DERS
    assert found.tcb == bytes.fromhex("db18000000000004")


def test_the_recorded_answer(shared_data: Path) -> None:
    data = (shared_data / "azure/aci-snp-sidecar/uvm_host_amd_certificate.json").read_bytes()
    found = parse_certification(data)
    assert len(found.certificates) == 3
    assert found.tcb.hex() == "7308000000000003"


@pytest.mark.parametrize(
    ("changed", "slug"),
    [
        ({"vcekCert": None}, "BAD_FIELD"),
        ({"vcekCert": ""}, "BAD_PEM"),
        ({"vcekCert": "text -----BEGIN CERTIFICATE-----"}, "BAD_PEM"),
        ({"vcekCert": "-----BEGIN RSA KEY-----\nMAA=\n-----END RSA KEY-----"}, "BAD_CERTIFICATE"),
        ({"vcekCert": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"}, "BAD_DER"),
        ({"vcekCert": json.loads(certification())["certificateChain"]}, "BAD_FIELD"),
        ({"certificateChain": 7}, "BAD_FIELD"),
        ({"certificateChain": "x" * 40_000}, "BAD_FIELD"),
        ({"tcbm": "DB"}, "BAD_FIELD"),
        ({"tcbm": "zz18000000000004"}, "BAD_FIELD"),
        ({"padding": "x" * MAX_ANSWER}, "TOO_LARGE"),
    ],
)
def test_refuses_what_is_no_such_answer(changed: dict[str, object], slug: str) -> None:
    assert refusal(**changed) == slug


def test_refuses_an_answer_with_two_meanings() -> None:
    data = certification()[:-1] + b',"tcbm":"0000000000000000"}'
    with pytest.raises(HostileInput) as caught:
        parse_certification(data)
    assert caught.value.slug == "DUPLICATE_KEY"


@pytest.mark.parametrize("quote", [b"\xfb\xff" * 5, b"\xfb\xff" * 6, b"\xfb"])
def test_a_quote_with_or_without_padding(quote: bytes) -> None:
    text = base64.urlsafe_b64encode(quote).decode()
    for form in (text, text.rstrip("=")):
        assert parse_quote_answer(json.dumps({"quote": form}).encode(), 100) == quote


@pytest.mark.parametrize("quote", [None, 7, "+/+/", "A", "AB", "AAAA\n", "é", "A" * 136, "A" * 200])
def test_refuses_a_quote_that_is_none(quote: object) -> None:
    with pytest.raises(HostileInput):
        parse_quote_answer(json.dumps({"quote": quote}).encode(), 100)
