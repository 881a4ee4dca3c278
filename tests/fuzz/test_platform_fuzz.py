"""Hostile bytes in place of platform evidence: read or refused, never endorsed, never a crash.

The full sweep of every byte runs with HYPOTHESIS_PROFILE=campaign; a normal run takes samples.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.certificate import load_certificates
from cgpu_agent.verifier.maa import verify_maa_token
from cgpu_agent.verifier.platformcase import PlatformEvidence
from cgpu_agent.verifier.vcek import chip_certificate
from cgpu_agent.wire.hcl import parse_claims, parse_hcl
from cgpu_agent.wire.snp import parse_snp_report
from cgpu_agent.wire.snpcertificates import parse_certificate_table
from cgpu_agent.wire.tdx import MAX_QUOTE, parse_td_quote, parse_tdreport
from cgpu_agent.wire.thim import parse_certification, parse_quote_answer
from fixtures.imds import certification, quote_answer
from fixtures.maa import CLAIMS as TOKEN_CLAIMS
from fixtures.maa import TEE, jwks, numbers, party, token, x5c
from fixtures.platform import AMD, CLAIMS, INTEL, SNP, TD, TDX, TRUSTED_LAUNCH, chip_extensions, hcl_report, judge
from fixtures.snpcertificates import VCEK, certificate_table

pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number which wasn't positive")

CAMPAIGN = os.environ.get("HYPOTHESIS_PROFILE") == "campaign"
SAMPLES = 80

SNP_HCL = hcl_report(AMD.report(CLAIMS), CLAIMS)
TDX_HCL = hcl_report(TD.tdreport, CLAIMS, 4)
QUOTES = (INTEL.quote(TD), INTEL.quote(TD, 5))
SEEDS: dict[Callable[[bytes], object], tuple[bytes, ...]] = {
    parse_hcl: (SNP_HCL, TDX_HCL),
    parse_claims: (CLAIMS,),
    parse_snp_report: (AMD.report(CLAIMS),),
    parse_tdreport: (TD.tdreport,),
    parse_td_quote: QUOTES,
    parse_certification: (certification(),),
    partial(parse_quote_answer, limit=MAX_QUOTE): (quote_answer(QUOTES[0]),),
    parse_certificate_table: (
        certificate_table([(VCEK.bytes, each.public_bytes(Encoding.DER)) for each in AMD.certificates]),
    ),
}
TOKEN = token()


def mutated(seeds: tuple[bytes, ...]) -> st.SearchStrategy[bytes]:
    """Real structures with bytes replaced, cut out, doubled or appended."""

    @st.composite
    def mutate(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(st.sampled_from(seeds)))
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(data)))
            length = draw(st.integers(0, 4))
            data[at : at + length] = draw(st.binary(max_size=6))
        return bytes(data)

    return mutate()


def flips(data: bytes) -> Iterator[bytes]:
    """The data with one bit of one byte flipped: every byte in a campaign, some of them else."""
    for at in range(0, len(data), 1 if CAMPAIGN else max(1, len(data) // SAMPLES)):
        yield data[:at] + bytes((data[at] ^ (1 << at % 8),)) + data[at + 1 :]


def endorsed(evidence: PlatformEvidence) -> bool:
    """Whether somebody vouches; that no check failed in an unknown way is asserted on the way."""
    answer = judge(evidence)
    assert answer.refusal is None or answer.refusal.slug != "INTERNAL", answer.refusal
    return answer.endorsed_by != "none"


@pytest.mark.parametrize("parse", SEEDS, ids=lambda parse: getattr(parse, "func", parse).__name__)
def test_parsers_refuse_or_read(parse: Callable[[bytes], object]) -> None:
    @settings(max_examples=250, deadline=None)
    @given(mutated(SEEDS[parse]) | st.binary(max_size=200))
    def run(data: bytes) -> None:
        with contextlib.suppress(HostileInput):
            parse(data)

    run()


@settings(max_examples=100, deadline=None)
@given(mutated((SNP_HCL,)) | st.binary(max_size=64))
def test_no_altered_snp_report_is_endorsed(report: bytes) -> None:
    if endorsed(replace(SNP, report=report)):
        # What may differ: how many zeros follow, and which of two versions the unsigned header says.
        assert parse_hcl(report).hardware == parse_hcl(SNP_HCL).hardware
        assert parse_hcl(report).claims == CLAIMS


@settings(max_examples=100, deadline=None)
@given(mutated(QUOTES) | st.binary(max_size=64))
def test_no_altered_td_quote_is_endorsed(quote: bytes) -> None:
    if endorsed(replace(TDX, td_quote=quote)):
        found = parse_td_quote(quote)
        good = parse_td_quote(QUOTES[found.version - 4])
        assert found.signed == good.signed
        assert (found.attestation_key, found.qe.signed, found.auth_data) == (
            good.attestation_key,
            good.qe.signed,
            good.auth_data,
        )


@settings(max_examples=100, deadline=None)
@given(mutated((TRUSTED_LAUNCH.ak_certificate or b"",)) | st.binary(max_size=64))
def test_no_altered_ak_certificate_is_endorsed(certificate: bytes) -> None:
    if endorsed(replace(TRUSTED_LAUNCH, ak_certificate=certificate)):
        (found,) = load_certificates(certificate)
        (good,) = load_certificates(TRUSTED_LAUNCH.ak_certificate or b"")
        assert found.tbs_certificate_bytes == good.tbs_certificate_bytes


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["x2", "x3_1", "x3_8", "x4"]), st.binary(max_size=70))
def test_any_extension_of_a_chips_certificate_is_read_or_refused(name: str, value: bytes) -> None:
    certificate = AMD.leaf(extensions=chip_extensions(**{name: value})).vcek.certificate  # type: ignore[arg-type]
    with contextlib.suppress(HostileInput):
        found = chip_certificate(certificate, vlek=False)
        assert 0 <= found.tcb.microcode <= 255


def test_no_byte_of_an_snp_report_may_change() -> None:
    assert not any(endorsed(replace(SNP, report=report)) for report in flips(SNP_HCL))


def test_no_byte_of_a_tdreport_that_the_quote_repeats_may_change() -> None:
    good = parse_tdreport(TD.tdreport)
    for report in flips(TDX_HCL):
        if endorsed(replace(TDX, report=report)):
            # The MAC and the digests beside it are for the machine's own eyes.
            found = parse_tdreport(parse_hcl(report).hardware)
            assert replace(found, service_td=b"") == replace(good, service_td=b"")


@pytest.mark.parametrize("quote", QUOTES, ids=["v4", "v5"])
def test_no_byte_of_what_a_td_quote_signs_may_change(quote: bytes) -> None:
    good = parse_td_quote(quote)
    for flipped in flips(quote):
        if endorsed(replace(TDX, td_quote=flipped)):
            assert replace(parse_td_quote(flipped), certificates=b"") == replace(good, certificates=b"")


def test_no_byte_of_a_chips_certificate_may_change() -> None:
    good = AMD.vcek.certificate
    for der in flips(good.public_bytes(Encoding.DER)):
        with contextlib.suppress(ValueError, HostileInput):
            leaf: x509.Certificate = load_certificates(der)[0]
            if endorsed(replace(SNP, certificates=(leaf, *AMD.certificates[1:]))):
                assert leaf.tbs_certificate_bytes == good.tbs_certificate_bytes


def vouched(data: bytes, keys: bytes) -> bool:
    """Whether the token is good; that no check failed in an unknown way is asserted on the way."""
    answer = verify_maa_token(data, party(jwks=keys))
    assert answer.refusal is None or answer.refusal.slug != "INTERNAL", answer.refusal
    return answer.endorsed_by != "none"


@settings(max_examples=200, deadline=None)
@given(mutated((TOKEN,)) | st.binary(max_size=200))
def test_no_altered_token_is_believed(data: bytes) -> None:
    assert not vouched(data, jwks()) or data == TOKEN


@settings(max_examples=200, deadline=None)
@given(mutated((jwks(), jwks(numbers()))) | st.binary(max_size=200))
def test_an_altered_key_set_is_read_or_refused(keys: bytes) -> None:
    vouched(TOKEN, keys)


def _json() -> st.SearchStrategy[object]:
    scalars = st.none() | st.booleans() | st.integers(-(1 << 40), 1 << 40) | st.text(max_size=8)
    return st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    )


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(TOKEN_CLAIMS)), _json())
def test_whatever_the_service_signs_is_read_or_refused(name: str, value: object) -> None:
    vouched(token(claims={**TOKEN_CLAIMS, name: value}), jwks())


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(TEE)), _json())
def test_whatever_the_service_says_of_a_tee_is_read_or_refused(name: str, value: object) -> None:
    vouched(token(claims={**TOKEN_CLAIMS, "x-ms-isolation-tee": {**TEE, name: value}}), jwks())


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["kty", "kid", "n", "e", "x5c", "use", "alg"]), _json())
def test_whatever_a_key_is_is_read_or_refused(name: str, value: object) -> None:
    vouched(TOKEN, jwks({**numbers(), name: value}))
    vouched(TOKEN, jwks({**x5c(), name: value}))
