"""Quotes signed by real keys of every kind are judged as their parts deserve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cgpu_agent.errors import AgentError, HostileInput, Misuse
from cgpu_agent.verifier.keys import AttestationKey, load_attestation_key, require_restricted, same_key
from cgpu_agent.verifier.quote import verify_quote
from cgpu_agent.verifier.signature import verify_signature
from cgpu_agent.verifier.verdict import Outcome
from cgpu_agent.wire.tpm import ALG_RSAPSS, HASH_SIZES, ObjectAttributes
from fixtures.attest import AK_ATTRIBUTES, Signer, ecc_key, public_area, quote, rsa_key, tpm2b, values

PCRS = values((0, 4, 7))
SIGNERS = {
    "rsassa": Signer(rsa_key()),
    "rsassa-sha512": Signer(rsa_key(), hash_name="sha512"),
    "rsapss": Signer(rsa_key(), scheme=ALG_RSAPSS),
    "p256": Signer(ecc_key()),
    "p384": Signer(ecc_key(ec.SECP384R1()), hash_name="sha384", name_alg="sha384"),
    "p521": Signer(ecc_key(ec.SECP521R1()), hash_name="sha512"),
}


@pytest.fixture(params=sorted(SIGNERS))
def signer(request: pytest.FixtureRequest) -> Signer:
    return SIGNERS[request.param]


def slug_of(error: type[AgentError] = HostileInput, /, *, call: object) -> str:
    with pytest.raises(error) as caught:
        call()  # type: ignore[operator]
    return caught.value.slug


class TestLoad:
    def test_every_form_gives_the_same_key(self, signer: Signer) -> None:
        public = signer.public()
        forms = [signer.pem(), b"\n" + signer.pem() + b"\n", signer.der(), public, tpm2b(public)]
        loaded = [load_attestation_key(form) for form in forms]
        assert all(same_key(each.key, signer.key.public_key()) for each in loaded)
        assert [each.attributes for each in loaded] == ["unknown"] * 3 + ["restricted"] * 2
        assert {each.spki for each in loaded} == {signer.der()}

    def test_the_name_is_that_of_the_public_area(self, signer: Signer) -> None:
        loaded = load_attestation_key(signer.public())
        assert loaded.name is not None
        assert len(loaded.name) == 2 + HASH_SIZES[signer.name_alg]
        assert load_attestation_key(signer.pem()).name is None

    def test_a_certificate_gives_its_key(self, vectors: Path) -> None:
        der = (vectors / "vm-boot" / "quote-sample" / "ek-rsa.crt").read_bytes()
        certificate = x509.load_der_x509_certificate(der)
        for form in (der, der + bytes(999), certificate.public_bytes(Encoding.PEM)):
            loaded = load_attestation_key(form)
            assert loaded.key == certificate.public_key()
            assert loaded.attributes == "unknown"

    @pytest.mark.parametrize(
        ("data", "slug"),
        [
            (b"", "TRUNCATED"),
            (b"\x30\x03\x02\x01\x01", "BAD_CERTIFICATE"),
            (SIGNERS["p256"].der() + b"\0", "BAD_CERTIFICATE"),
            (SIGNERS["p256"].pem() * 2, "BAD_KEY"),
            (SIGNERS["p256"].pem() + b"and more", "BAD_PEM"),
            (SIGNERS["p256"].pem().replace(b"PUBLIC", b"PRIVATE"), "BAD_KEY"),
            (SIGNERS["p256"].public() + b"\0", "TRAILING_BYTES"),
            (Signer(ecc_key(), name_alg="sha1").public(), "WEAK_HASH"),
        ],
    )
    def test_refuses_malformed_keys(self, data: bytes, slug: str) -> None:
        assert slug_of(call=lambda: load_attestation_key(data)) == slug

    def test_refuses_weak_and_foreign_keys(self) -> None:
        small = rsa.generate_private_key(65537, 1024)
        cube = rsa.generate_private_key(3, 2048)
        weak = [Signer(key).public() for key in (small, cube)] + [Signer(key).der() for key in (small, cube)]
        weak.append(Signer(ec.generate_private_key(ec.SECP224R1())).der())
        assert [slug_of(call=lambda data=data: load_attestation_key(data)) for data in weak] == ["WEAK_KEY"] * 5
        edwards = ed25519.Ed25519PrivateKey.generate().public_key()
        spki = edwards.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        assert slug_of(call=lambda: load_attestation_key(spki)) == "UNKNOWN_ALGORITHM"

    def test_refuses_an_even_exponent(self) -> None:
        spki = SIGNERS["rsassa"].der()
        assert spki.endswith(b"\x02\x03\x01\x00\x01")
        slug_of(call=lambda: load_attestation_key(spki[:-1] + b"\x02"))

    def test_a_weak_key_cannot_be_slipped_in_by_construction(self) -> None:
        small = rsa.generate_private_key(65537, 1024).public_key()
        assert slug_of(call=lambda: AttestationKey(small, None)) == "WEAK_KEY"

    def test_refuses_a_point_off_the_curve(self) -> None:
        public = bytearray(SIGNERS["p256"].public())
        public[-1] ^= 1
        assert slug_of(call=lambda: load_attestation_key(bytes(public))) == "BAD_KEY"

    def test_refuses_a_modulus_that_is_shorter_than_announced(self) -> None:
        public = SIGNERS["rsassa"].public()
        start = len(public) - 256
        assert slug_of(call=lambda: load_attestation_key(public[:start] + b"\0" + public[start + 1 :])) == "BAD_KEY"


class TestRestricted:
    def test_accepts_an_ak(self, signer: Signer) -> None:
        require_restricted(load_attestation_key(signer.public()))

    @pytest.mark.parametrize(
        "attributes",
        [
            AK_ATTRIBUTES & ~ObjectAttributes.RESTRICTED,
            AK_ATTRIBUTES & ~ObjectAttributes.SIGN,
            AK_ATTRIBUTES & ~ObjectAttributes.FIXED_TPM,
            AK_ATTRIBUTES & ~ObjectAttributes.SENSITIVE_DATA_ORIGIN,
            AK_ATTRIBUTES | ObjectAttributes.DECRYPT,
            0,
        ],
    )
    def test_refuses_a_key_that_signs_or_may_be_elsewhere(self, attributes: int) -> None:
        ak = load_attestation_key(Signer(ecc_key(), attributes=attributes).public())
        assert ak.attributes == "unrestricted"
        assert slug_of(call=lambda: require_restricted(ak)) == "AK_NOT_RESTRICTED"

    def test_a_bare_key_is_refused_as_unknown(self) -> None:
        ak = load_attestation_key(SIGNERS["p256"].pem())
        assert slug_of(call=lambda: require_restricted(ak)) == "AK_ATTRIBUTES_UNKNOWN"


class TestSignature:
    def test_accepts_every_scheme(self, signer: Signer) -> None:
        for form in (signer.public(), signer.public(pinned=False), signer.pem()):
            found = verify_signature(load_attestation_key(form), b"data", signer.sign(b"data"))
            assert (found.algorithm, found.hash) == (signer.algorithm, signer.hash_name)

    def test_accepts_the_longest_pss_salt(self) -> None:
        pss = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.MAX_LENGTH)
        raw = rsa_key().sign(b"data", pss, hashes.SHA256())
        verify_signature(load_attestation_key(SIGNERS["rsapss"].public()), b"data", b"\0\x16\0\x0b" + tpm2b(raw))

    @pytest.mark.parametrize("hash_name", ["sha256", "sha384"])
    def test_accepts_a_bare_pkcs1_signature_with_the_hash_of_the_key(self, hash_name: str) -> None:
        signer = Signer(rsa_key(), hash_name=hash_name)
        bare = signer.sign(b"data")[6:]
        assert verify_signature(load_attestation_key(signer.public()), b"data", bare).hash == hash_name
        bare_key = load_attestation_key(signer.pem())
        if hash_name == "sha256":
            verify_signature(bare_key, b"data", bare)
        else:
            assert slug_of(call=lambda: verify_signature(bare_key, b"data", bare)) == "BAD_SIGNATURE"

    def test_refuses_other_data_another_key_and_every_bit_flip(self, signer: Signer) -> None:
        ak, good = load_attestation_key(signer.public()), signer.sign(b"data")
        assert slug_of(call=lambda: verify_signature(ak, b"datA", good)) == "BAD_SIGNATURE"
        other = (
            ecc_key() if isinstance(signer.key, ec.EllipticCurvePrivateKey) else rsa.generate_private_key(65537, 2048)
        )
        stranger = load_attestation_key(Signer(other).pem())
        assert slug_of(call=lambda: verify_signature(stranger, b"data", good)) == "BAD_SIGNATURE"
        for position in range(len(good)):
            bad = good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :]
            slug_of(call=lambda bad=bad: verify_signature(ak, b"data", bad))

    def test_refuses_sha1_whoever_asks_for_it(self) -> None:
        for signer in (Signer(rsa_key(), hash_name="sha1"), Signer(ecc_key(), hash_name="sha1")):
            for form in (signer.public(), signer.public(pinned=False), signer.pem()):
                ak = load_attestation_key(form)
                assert slug_of(call=lambda ak=ak, s=signer: verify_signature(ak, b"d", s.sign(b"d"))) == "WEAK_HASH"

    def test_refuses_a_bare_signature_of_a_key_limited_to_sha1(self) -> None:
        signer = Signer(rsa_key(), hash_name="sha1")
        ak = load_attestation_key(signer.public())
        assert slug_of(call=lambda: verify_signature(ak, b"data", signer.sign(b"data")[6:])) == "WEAK_HASH"

    def test_refuses_a_scheme_or_hash_that_the_key_is_not_limited_to(self) -> None:
        pinned = load_attestation_key(SIGNERS["rsassa"].public())
        for other in (Signer(rsa_key(), hash_name="sha384"), Signer(rsa_key(), scheme=ALG_RSAPSS)):
            assert slug_of(call=lambda o=other: verify_signature(pinned, b"d", o.sign(b"d"))) == "BAD_SIGNATURE"
        pss_only = load_attestation_key(SIGNERS["rsapss"].public())
        bare = SIGNERS["rsassa"].sign(b"d")[6:]
        assert slug_of(call=lambda: verify_signature(pss_only, b"d", bare)) == "BAD_SIGNATURE"

    def test_refuses_a_scheme_of_the_other_kind_of_key(self) -> None:
        elliptic, rsa_ak = (load_attestation_key(SIGNERS[name].pem()) for name in ("p256", "rsassa"))
        for ak, signer in ((elliptic, SIGNERS["rsassa"]), (rsa_ak, SIGNERS["p256"])):
            with pytest.raises(HostileInput, match="does not fit the kind of key") as caught:
                verify_signature(ak, b"d", signer.sign(b"d"))
            assert caught.value.slug == "BAD_SIGNATURE"


class TestQuote:
    def test_accepts_a_quote_by_every_kind_of_key(self, signer: Signer) -> None:
        attest = quote(PCRS, hash_name=signer.hash_name)
        ak = load_attestation_key(signer.public())
        result = verify_quote(attest, signer.sign(attest), ak, nonce=b"nonce", pcrs=PCRS, expected_pcrs={0, 4, 7})
        assert result.accepted
        assert {step.outcome for step in result.steps} == {Outcome.PASS}
        assert result.pcrs == PCRS
        assert result.selection is not None
        assert result.selection.pcrs == (0, 4, 7)

    def test_the_digest_is_made_with_the_hash_of_the_signature_not_of_the_bank(self) -> None:
        signer, pcrs = SIGNERS["p256"], values((0, 1), "sha384")
        ak = load_attestation_key(signer.public())

        def judge(hash_name: str) -> bool:
            attest = quote(pcrs, bank="sha384", hash_name=hash_name)
            signature = signer.sign(attest)
            return verify_quote(
                attest, signature, ak, nonce=None, pcrs=pcrs, bank="sha384", expected_pcrs=None
            ).accepted

        assert judge("sha256")
        assert not judge("sha384")

    def test_what_was_not_asked_is_on_record_as_skipped(self) -> None:
        signer = SIGNERS["p256"]
        attest = quote(PCRS)
        ak = load_attestation_key(signer.pem())
        result = verify_quote(attest, signer.sign(attest), ak, nonce=None, pcrs=None, expected_pcrs=None)
        assert result.accepted
        assert {step.id: step.slug for step in result.steps if step.outcome is Outcome.SKIP} == {
            "quote.key": "AK_ATTRIBUTES_UNKNOWN",
            "quote.nonce": "NO_NONCE",
            "quote.pcr-set": "NO_PCR_SET",
            "quote.values": "NO_PCR_VALUES",
            "quote.digest": "NO_PCR_VALUES",
        }
        assert result.attributes == "unknown"
        assert result.pcrs == {}
        assert not result.passed("quote.nonce")

    def test_reports_the_clock_and_whether_it_is_safe(self) -> None:
        signer = SIGNERS["p256"]
        for safe in (0, 1):
            attest = quote(PCRS, safe=safe, clock=12, resets=5, restarts=6)
            ak = load_attestation_key(signer.public())
            result = verify_quote(attest, signer.sign(attest), ak, nonce=None, pcrs=None, expected_pcrs=None)
            assert result.clock_info is not None
            assert result.clock_info.safe is bool(safe)
            shown = json.loads(json.dumps(result.to_json()))["quote"]
            assert (shown["clock_ms"], shown["reset_count"], shown["restart_count"]) == (12, 5, 6)
            assert shown["clock_safe"] is bool(safe)

    def test_a_refused_quote_yields_no_facts(self) -> None:
        signer = SIGNERS["p256"]
        attest = quote(PCRS)
        ak = load_attestation_key(signer.public())
        result = verify_quote(attest, signer.sign(attest), ak, nonce=b"other", pcrs=PCRS, expected_pcrs=None)
        assert not result.accepted
        assert (result.attest, result.selection, result.clock_info, result.pcrs) == (None, None, None, {})
        assert result.to_json()["quote"] is None

    def test_an_unknown_bank_is_the_callers_mistake(self) -> None:
        ak = load_attestation_key(SIGNERS["p256"].pem())

        def call() -> None:
            verify_quote(b"", b"", ak, nonce=None, pcrs=None, bank="md5", expected_pcrs=None)

        assert slug_of(Misuse, call=call) == "UNKNOWN_BANK"

    def test_accepts_the_recorded_quote_with_the_values_of_its_boot(self, vectors: Path) -> None:
        folder = vectors / "vm-boot" / "quote-sample"
        bank = (vectors / "vm-boot" / "uki-secboot-crb" / "pcrs.sha256.bin").read_bytes()
        chosen = (0, 1, 2, 3, 4, 5, 6, 7, 9, 11)
        result = verify_quote(
            (folder / "quote.msg").read_bytes(),
            (folder / "quote.sig").read_bytes(),
            load_attestation_key((folder / "ak.pub.pem").read_bytes()),
            nonce=bytes.fromhex("abc123"),
            pcrs={index: bank[32 * index : 32 * index + 32] for index in chosen},
            expected_pcrs=set(chosen),
        )
        assert result.accepted
        assert result.attributes == "unknown"

    def test_a_public_area_with_a_short_coordinate_is_the_same_point(self) -> None:
        key = next(key for key in iter(ecc_key, None) if key.public_key().public_numbers().x < 1 << 248)
        full = public_area(key.public_key())
        x = key.public_key().public_numbers().x.to_bytes(32, "big")
        short = full.replace(tpm2b(x), tpm2b(x[1:]))
        assert len(short) == len(full) - 1
        assert same_key(load_attestation_key(short).key, key.public_key())
