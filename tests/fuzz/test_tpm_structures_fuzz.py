"""Hostile bytes in place of TPM structures, keys and certificates: refused with our own error, or read exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.certificate import AK, EK, load_certificate, load_certificates
from cgpu_agent.verifier.chain import verify_chain
from cgpu_agent.verifier.keys import load_attestation_key
from cgpu_agent.verifier.quote import verify_quote
from cgpu_agent.wire import tpm
from cgpu_agent.wire.der import is_pem, pem_blocks, trim_der
from fixtures.attest import Signer, attest, certify, ecc_key, public_area, quote, rsa_key, selection, tpm2b, values
from fixtures.pki import NOW, Authority

SAMPLE = Path(__file__).resolve().parent.parent / "vectors" / "vm-boot" / "quote-sample"
MESSAGE, SIGNATURE = (SAMPLE / "quote.msg").read_bytes(), (SAMPLE / "quote.sig").read_bytes()
SAMPLE_AK = load_attestation_key((SAMPLE / "ak.pub.pem").read_bytes())
EK_CERTIFICATE = (SAMPLE / "ek-rsa.crt").read_bytes()

ROOT = Authority.root()
AK_CERTIFICATE = ROOT.issue(ecc_key().public_key()).public_bytes(Encoding.DER)
ECC, RSA = Signer(ecc_key()), Signer(rsa_key())

SEEDS: dict[Callable[[bytes], object], tuple[bytes, ...]] = {
    tpm.parse_attest: (MESSAGE, quote(values((0, 7))), certify(b"\0\x0b" + bytes(32))),
    tpm.parse_signature: (SIGNATURE, RSA.sign(b"x")),
    tpm.parse_public: (
        ECC.public(),
        RSA.public(),
        public_area(ecc_key().public_key(), symmetric=b"\0\6\0\x80\0\x43"),
    ),
    tpm.parse_public_any: (tpm2b(ECC.public()), RSA.public()),
    trim_der: (EK_CERTIFICATE + bytes(64),),
    pem_blocks: (ECC.pem(), (SAMPLE / "issuercert.pem").read_bytes()),
    load_attestation_key: (ECC.public(), RSA.public(), ECC.pem(), ECC.der(), RSA.der(), AK_CERTIFICATE),
    load_certificates: (AK_CERTIFICATE, EK_CERTIFICATE + bytes(99), (SAMPLE / "issuercert.pem").read_bytes()),
}
PARSERS = pytest.mark.parametrize("parse", SEEDS, ids=lambda parse: parse.__name__)


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


def refused_or_read(parse: Callable[[bytes], object], data: bytes) -> object | None:
    try:
        return parse(data)
    except HostileInput as error:
        assert error.slug.isupper()  # noqa: PT017 - most inputs raise, some do not; both are fine
        assert error.message  # noqa: PT017
        return None


@PARSERS
def test_random_bytes_never_escape_the_error_tree(parse: Callable[[bytes], object]) -> None:
    @settings(deadline=None, max_examples=150)
    @given(st.binary(max_size=400))
    def run(data: bytes) -> None:
        refused_or_read(parse, data)

    run()


@PARSERS
def test_mutated_structures_never_escape_the_error_tree(parse: Callable[[bytes], object]) -> None:
    @settings(deadline=None, max_examples=300)
    @given(mutated(SEEDS[parse]))
    def run(data: bytes) -> None:
        refused_or_read(parse, data)

    run()


@PARSERS
def test_every_prefix_is_refused(parse: Callable[[bytes], object]) -> None:
    for seed in SEEDS[parse]:
        whole = trim_der(seed) if seed[:1] == b"\x30" else seed.rstrip(b"\n") if is_pem(seed) else seed
        assert refused_or_read(parse, whole) is not None
        for size in range(len(whole)):
            assert refused_or_read(parse, whole[:size]) is None


@settings(deadline=None)
@given(
    st.binary(max_size=64),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.sets(st.integers(0, 23)),
    st.sampled_from(sorted(tpm.HASH_SIZES)),
    st.binary(max_size=64),
)
def test_a_quote_is_read_as_it_was_written(
    extra: bytes, clock: int, resets: int, safe: bool, pcrs: set[int], bank: str, digest: bytes
) -> None:
    body = selection([(bank, pcrs)]) + tpm2b(digest)
    found = tpm.parse_attest(attest(body, extra=extra, clock=clock, resets=resets, safe=int(safe)))
    assert found.extra_data == extra
    assert (found.clock_info.clock, found.clock_info.reset_count, found.clock_info.safe) == (clock, resets, safe)
    assert found.attested == tpm.Quoted((tpm.PcrSelection(bank, tuple(sorted(pcrs))),), digest)


@pytest.mark.parametrize("part", ["message", "signature"])
def test_every_flip_of_a_byte_of_a_recorded_quote_is_refused(part: str) -> None:
    good = MESSAGE if part == "message" else SIGNATURE
    for position in range(len(good)):
        for mask in (0x01, 0x80, 0xFF):
            bad = good[:position] + bytes([good[position] ^ mask]) + good[position + 1 :]
            message, signature = (bad, SIGNATURE) if part == "message" else (MESSAGE, bad)
            result = verify_quote(message, signature, SAMPLE_AK, nonce=None, pcrs=None, expected_pcrs=None)
            assert not result.accepted
            assert result.refusal is not None
            assert result.refusal.id == "quote.signature"


@settings(deadline=None, max_examples=150)
@given(mutated((MESSAGE,)), mutated((SIGNATURE,)), st.dictionaries(st.integers(-1, 40), st.binary(max_size=64)))
def test_a_quote_of_hostile_parts_is_judged_without_an_accident(
    message: bytes, signature: bytes, pcrs: dict[int, bytes]
) -> None:
    result = verify_quote(message, signature, SAMPLE_AK, nonce=b"n", pcrs=pcrs, expected_pcrs={0})
    assert not result.accepted
    assert all(step.slug != "INTERNAL" for step in result.steps)


@settings(deadline=None, max_examples=150)
@given(mutated((quote(values((0, 7))), attest(b"")[:-8], certify(b"\0\x0b" + bytes(32)))), st.integers(0, 23))
def test_whatever_a_lying_ak_signs_is_judged_without_an_accident(message: bytes, index: int) -> None:
    ak = load_attestation_key(ECC.public())
    signature = ECC.sign(message)
    result = verify_quote(message, signature, ak, nonce=b"nonce", pcrs=values((0, index)), expected_pcrs={0, index})
    assert all(step.slug != "INTERNAL" for step in result.steps)
    if result.accepted:
        found = tpm.parse_attest(message)
        assert found.extra_data == b"nonce"
        assert isinstance(found.attested, tpm.Quoted)
        assert found.attested.pcr_digest == tpm.pcr_digest(values((0, index)), {0, index}, "sha256")


@settings(deadline=None, max_examples=200)
@given(mutated((AK_CERTIFICATE, EK_CERTIFICATE)))
def test_a_mutated_certificate_is_never_accepted(data: bytes) -> None:
    try:
        leaf = load_certificate(data)
        for purpose in (AK, EK):
            verify_chain(leaf, [leaf], [ROOT.certificate], purpose=purpose, at=NOW)
    except HostileInput:
        return
    assert trim_der(data) == AK_CERTIFICATE


@settings(deadline=None, max_examples=200)
@given(mutated((ROOT.certificate.public_bytes(Encoding.DER),)))
def test_a_mutated_issuer_does_no_harm(data: bytes) -> None:
    leaf = load_certificate(AK_CERTIFICATE)
    try:
        issuer = load_certificate(data)
        path = verify_chain(leaf, [issuer], [ROOT.certificate], purpose=AK, at=NOW)
    except HostileInput:
        return
    assert len(path.certificates) == 2


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 300), st.integers(0, 40), st.binary(max_size=8))
def test_trimming_gives_back_exactly_the_value(size: int, padding: int, tail: bytes) -> None:
    length = (
        bytes([size]) if size < 0x80 else bytes([0x81, size]) if size < 0x100 else b"\x82" + size.to_bytes(2, "big")
    )
    value = b"\x30" + length + b"v" * size
    if tail.strip(b"\0"):
        with pytest.raises(HostileInput) as caught:
            trim_der(value + bytes(padding) + tail)
        assert caught.value.slug == "TRAILING_BYTES"
    else:
        assert trim_der(value + bytes(padding) + tail) == value
