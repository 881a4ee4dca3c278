"""``cgpuctl quote verify``: exit status, JSON, and what a user may hand over."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from fixtures.attest import AK_ATTRIBUTES, Signer, ecc_key, quote, rsa_key, tpm2b
from fixtures.bundles import (
    AGENT_AK,
    GENUINE,
    NONCE,
    ROOT,
)
from fixtures.ctl import PASS, REFUSED, USAGE, Ctl, Ran


class TestQuoteVerify:
    PCRS = GENUINE.pcrs

    def quote(self, ctl: Ctl, *more: str, signer: Signer = AGENT_AK, ak: bytes | None = None, **fields: Any) -> Ran:
        attest = quote(self.PCRS, extra=fields.pop("extra", NONCE), **fields)
        return ctl(
            "quote",
            "verify",
            "--attest",
            ctl.write("attest", attest),
            "--signature",
            ctl.write("signature", signer.sign(attest)),
            "--ak",
            ctl.write("ak", signer.public() if ak is None else ak),
            *more,
        )

    def pcr_file(self, ctl: Ctl, value: object | None = None) -> str:
        values = {str(index): pcr.hex() for index, pcr in self.PCRS.items()}
        return ctl.write("pcrs.json", json.dumps(values if value is None else value).encode())

    def test_accepts_a_quote_over_these_values(self, ctl: Ctl) -> None:
        ran = self.quote(ctl, "--nonce", NONCE.hex(), "--pcrs", self.pcr_file(ctl))
        assert (ran.code, ran.err) == (PASS, "")
        assert "ACCEPTED (AK attributes: restricted)" in ran.out

    def test_json_says_what_was_compared(self, ctl: Ctl) -> None:
        found = self.quote(ctl, "--nonce", NONCE.hex(), "--pcrs", self.pcr_file(ctl), "--json").json
        assert (found["result"], found["reason"], found["accepted"]) == ("pass", None, True)
        assert found["pcrs"] == {str(index): value.hex() for index, value in self.PCRS.items()}
        assert found["quote"]["extra_data"] == NONCE.hex()

    def test_what_is_not_given_is_not_compared_and_it_says_so(self, ctl: Ctl) -> None:
        found = self.quote(ctl, "--json").json
        slugs = {step["id"]: step["slug"] for step in found["steps"]}
        assert slugs["quote.nonce"] == "NO_NONCE"
        assert slugs["quote.digest"] == "NO_PCR_VALUES"
        assert found["pcrs"] == {}

    def test_refuses_another_nonce(self, ctl: Ctl) -> None:
        ran = self.quote(ctl, "--nonce", "00" * 32)
        assert ran.code == REFUSED
        assert "REFUSED: the quote is not an answer to this nonce [NONCE_MISMATCH]" in ran.out
        found = self.quote(ctl, "--nonce", "00" * 32, "--json").json
        assert (found["result"], found["reason"]["step"]) == ("refused", "quote.nonce")

    def test_refuses_an_empty_nonce(self, ctl: Ctl) -> None:
        ran = self.quote(ctl, "--nonce", "", extra=b"")
        assert ran.code == REFUSED
        assert "[EMPTY_NONCE]" in ran.out

    def test_refuses_other_values(self, ctl: Ctl) -> None:
        other = {str(index): "00" * 32 for index in self.PCRS}
        assert "[PCR_DIGEST_MISMATCH]" in self.quote(ctl, "--pcrs", self.pcr_file(ctl, other)).out

    def test_takes_values_one_level_down_and_with_a_prefix(self, ctl: Ctl) -> None:
        nested = {"sha256": {str(index): "0x" + value.hex().upper() for index, value in self.PCRS.items()}}
        assert self.quote(ctl, "--pcrs", self.pcr_file(ctl, nested)).code == PASS

    @pytest.mark.parametrize(
        "value", [[], {}, {"sha256": {}}, {"24": "00"}, {"-1": "00"}, {"00": "00"}, {"0": 0}, {"0": None}]
    )
    def test_a_pcr_file_of_another_shape_is_a_usage_error(self, ctl: Ctl, value: object) -> None:
        ran = self.quote(ctl, "--pcrs", self.pcr_file(ctl, value))
        assert (ran.code, ran.out) == (USAGE, "")
        assert "[BAD_PCRS]" in ran.err

    @pytest.mark.parametrize("content", [b"", b"\xff", b'{"0":"00","0":"01"}'])
    def test_a_pcr_file_that_is_no_json_is_a_usage_error(self, ctl: Ctl, content: bytes) -> None:
        ran = self.quote(ctl, "--pcrs", ctl.write("pcrs.json", content))
        assert (ran.code, ran.out) == (USAGE, "")
        assert "[BAD_PCRS]" in ran.err

    def test_pcr_values_that_are_no_hex_are_a_usage_error(self, ctl: Ctl) -> None:
        assert "[BAD_HEX]" in self.quote(ctl, "--pcrs", self.pcr_file(ctl, {"0": "zz"})).err

    @pytest.mark.parametrize("signer", [AGENT_AK, Signer(rsa_key())], ids=["ecc", "rsa"])
    def test_takes_the_ak_in_all_its_forms(self, ctl: Ctl, signer: Signer) -> None:
        certificate = ROOT.issue(signer.key.public_key())
        forms = [signer.public(), tpm2b(signer.public()), signer.pem(), signer.der()]
        forms += [certificate.public_bytes(Encoding.PEM), certificate.public_bytes(Encoding.DER)]
        for form in forms:
            assert self.quote(ctl, signer=signer, ak=form).code == PASS

    def test_says_of_a_bare_key_that_its_attributes_are_unknown(self, ctl: Ctl) -> None:
        assert "AK attributes: unknown" in self.quote(ctl, ak=AGENT_AK.pem()).out

    def test_refuses_an_ak_that_signs_anything(self, ctl: Ctl) -> None:
        ran = self.quote(ctl, signer=Signer(ecc_key(), attributes=AK_ATTRIBUTES & ~0x10000))
        assert ran.code == REFUSED
        assert "[AK_NOT_RESTRICTED]" in ran.out

    def test_refuses_a_file_that_is_no_key(self, ctl: Ctl) -> None:
        for content in (b"", b"no key", AGENT_AK.public()[:-1]):
            ran = self.quote(ctl, ak=content)
            assert (ran.code, ran.out) == (REFUSED, "")
            assert ran.err.startswith("cgpuctl: ")
        found = self.quote(ctl, "--json", ak=b"no key")
        assert found.code == REFUSED
        assert found.json["result"] == "refused"

    def test_the_sha1_bank_must_be_asked_for(self, ctl: Ctl) -> None:
        assert self.quote(ctl, "--bank", "sha1", bank="sha1").code == REFUSED
        assert self.quote(ctl, "--bank", "sha1", "--allow-sha1-bank", bank="sha1").code == PASS

    def test_a_file_that_is_missing_is_a_usage_error(self, ctl: Ctl) -> None:
        assert "[NO_FILE]" in self.quote(ctl, "--pcrs", str(ctl.folder / "none")).err
