"""TPM structures are read exactly as Part 2 lays them out, and refused where they deviate."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire import tpm
from fixtures.attest import (
    AK_ATTRIBUTES,
    Signer,
    attest,
    certify,
    digest_of,
    ecc_key,
    public_area,
    quote,
    rsa_key,
    selection,
    tpm2b,
    u16,
    u32,
    values,
)


def slug_of(parse: object, *arguments: object) -> str:
    with pytest.raises(HostileInput) as caught:
        parse(*arguments)  # type: ignore[operator]
    return caught.value.slug


class TestAttest:
    def test_reads_every_field_of_a_quote(self) -> None:
        pcrs = values((0, 7, 23))
        found = tpm.parse_attest(quote(pcrs, extra=b"abc", clock=9, resets=8, restarts=7, safe=0, firmware=6))
        assert found.extra_data == b"abc"
        assert found.clock_info == tpm.ClockInfo(clock=9, reset_count=8, restart_count=7, safe=False)
        assert found.firmware_version == 6
        assert found.qualified_signer == b"\0\x0b" + bytes(32)
        assert found.attested == tpm.Quoted((tpm.PcrSelection("sha256", (0, 7, 23)),), digest_of(pcrs))

    def test_reads_a_certify(self) -> None:
        name = b"\0\x0b" + b"n" * 32
        assert tpm.parse_attest(certify(name)).attested == tpm.Certified(name, name)

    def test_reads_the_recorded_quote(self, vectors: Path) -> None:
        found = tpm.parse_attest((vectors / "vm-boot" / "quote-sample" / "quote.msg").read_bytes())
        assert found.extra_data == bytes.fromhex("abc123")
        assert found.clock_info == tpm.ClockInfo(108529, 3, 0, safe=True)
        assert found.firmware_version == 0x2019102300163636
        assert isinstance(found.attested, tpm.Quoted)
        assert found.attested.selections == (tpm.PcrSelection("sha256", (0, 1, 2, 3, 4, 5, 6, 7, 9, 11)),)

    @pytest.mark.parametrize(
        ("data", "slug"),
        [
            (b"", "TRUNCATED"),
            (quote(values((0,)))[:-1], "TRUNCATED"),
            (quote(values((0,))) + b"\0", "TRAILING_BYTES"),
            (quote(values((0,)), magic=0xFF544348), "NOT_TPM_GENERATED"),
            (attest(b"", kind=0x8014), "WRONG_TYPE"),
            (quote(values((0,)), safe=2), "BAD_VALUE"),
            (quote(values((0,)), extra=bytes(65)), "TOO_LARGE"),
            (quote(values((0,)), signer=bytes(69)), "TOO_LARGE"),
            (attest(selection([("sha256", (0,)), ("sha256", (1,))]) + tpm2b(bytes(32))), "BAD_VALUE"),
            (attest(u32(17) + tpm2b(bytes(32))), "TOO_LARGE"),
            (attest(u32(0xFFFFFFFF) + tpm2b(bytes(32))), "TOO_LARGE"),
            (attest(u32(1) + b"\0\x12\3\0\0\0" + tpm2b(bytes(32))), "UNKNOWN_ALGORITHM"),
            (attest(u32(1) + b"\0\x0b\0" + tpm2b(bytes(32))), "BAD_VALUE"),
            (attest(u32(1) + b"\0\x0b\5\0\0\0\0\0" + tpm2b(bytes(32))), "BAD_VALUE"),
            (attest(u32(1) + b"\0\x0b\4\0\0\0\1" + tpm2b(bytes(32))), "BAD_VALUE"),
            (attest(selection([("sha256", (0,))]) + tpm2b(bytes(65))), "TOO_LARGE"),
        ],
    )
    def test_refuses_deviations(self, data: bytes, slug: str) -> None:
        assert slug_of(tpm.parse_attest, data) == slug


class TestSignature:
    @pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
    def test_turns_ecdsa_into_der_for_every_curve(self, curve: ec.EllipticCurve) -> None:
        for _ in range(20):
            raw = Signer(ecc_key(curve)).sign(b"data")
            found = tpm.parse_signature(raw)
            size = (curve.key_size + 7) // 8
            r, s = decode_dss_signature(found.signature)
            assert raw == b"\0\x18\0\x0b" + tpm2b(r.to_bytes(size, "big")) + tpm2b(s.to_bytes(size, "big"))

    def test_reads_rsa(self) -> None:
        found = tpm.parse_signature(b"\0\x16\0\x0c" + tpm2b(b"s" * 256))
        assert found == tpm.Signature(tpm.ALG_RSAPSS, "sha384", b"s" * 256)

    @pytest.mark.parametrize(
        ("data", "slug"),
        [
            (b"\0\x14", "TRUNCATED"),
            (b"\0\x14\0\x0b" + tpm2b(bytes(256)) + b"\0", "TRAILING_BYTES"),
            (b"\0\x14\0\x0b" + tpm2b(bytes(513)), "TOO_LARGE"),
            (b"\0\x14\0\x12" + tpm2b(bytes(256)), "UNKNOWN_ALGORITHM"),
            (b"\0\x1a\0\x0b" + tpm2b(bytes(32)) * 2, "UNKNOWN_ALGORITHM"),
            (b"\0\x18\0\x0b" + tpm2b(bytes(32)) + tpm2b(bytes(31)), "BAD_VALUE"),
            (b"\0\x18\0\x0b" + tpm2b(b"") * 2, "BAD_VALUE"),
            (b"\0\x18\0\x0b" + tpm2b(bytes(33)) * 2, "BAD_VALUE"),
            (b"\0\x18\0\x0b" + tpm2b(bytes(67)) * 2, "TOO_LARGE"),
        ],
    )
    def test_refuses_deviations(self, data: bytes, slug: str) -> None:
        assert slug_of(tpm.parse_signature, data) == slug


class TestPublic:
    def test_reads_an_rsa_ak(self) -> None:
        raw = Signer(rsa_key(), policy=b"p" * 32).public()
        found = tpm.parse_public(raw)
        numbers = rsa_key().public_key().public_numbers()
        assert found.key == tpm.RsaKey(numbers.n, 65537, 2048)
        assert (found.scheme, found.scheme_hash) == (tpm.ALG_RSASSA, "sha256")
        assert (found.symmetric, found.symmetric_bits, found.symmetric_mode) == (None, None, None)
        assert found.attributes == AK_ATTRIBUTES
        assert found.auth_policy == b"p" * 32
        assert found.raw == raw

    def test_reads_an_ecc_storage_key_with_its_cipher(self) -> None:
        key = ecc_key(ec.SECP384R1())
        raw = public_area(key.public_key(), symmetric=b"\0\6" + u16(256) + u16(0x43), name_alg="sha384")
        found = tpm.parse_public(raw)
        point = key.public_key().public_numbers()
        assert found.key == tpm.EccKey("secp384r1", point.x, point.y)
        assert (found.symmetric, found.symmetric_bits, found.symmetric_mode) == (tpm.ALG_AES, 256, tpm.ALG_CFB)
        assert found.scheme is None
        assert found.name == b"\0\x0c" + hashlib.sha384(raw).digest()

    def test_reads_both_wrappings(self) -> None:
        for raw in (Signer(rsa_key()).public(), Signer(ecc_key()).public()):
            assert tpm.parse_public_any(raw) == tpm.parse_public_any(tpm2b(raw)) == tpm.parse_public(raw)

    def test_an_ecc_key_whose_type_could_be_a_size_is_refused_not_confused(self) -> None:
        head = b"\0\x23\0\x0b" + u32(AK_ATTRIBUTES)
        raw = head + tpm2b(bytes(15)) + b"\0\x10\0\x10\0\3\0\x10" + tpm2b(b"") * 2
        assert len(raw) == 37
        assert slug_of(tpm.parse_public_any, raw) == "WRONG_TYPE"

    @pytest.mark.parametrize(
        ("data", "slug"),
        [
            (b"\0\x08", "WRONG_TYPE"),
            (Signer(ecc_key()).public() + b"\0", "TRAILING_BYTES"),
            (Signer(ecc_key()).public()[:-1], "TRUNCATED"),
            (public_area(ecc_key().public_key(), scheme=b"\0\x1a\0\x0b\0\1"), "UNKNOWN_ALGORITHM"),
            (public_area(ecc_key().public_key(), scheme=b"\0\x14\0\x0b"), "UNKNOWN_ALGORITHM"),
            (public_area(rsa_key().public_key(), scheme=b"\0\x18\0\x0b"), "UNKNOWN_ALGORITHM"),
            (public_area(rsa_key().public_key(), scheme=b"\0\x14\0\x12"), "UNKNOWN_ALGORITHM"),
            (public_area(rsa_key().public_key(), policy=bytes(65)), "TOO_LARGE"),
            (
                b"\0\1\0\x0b" + bytes(4) + tpm2b(b"") + b"\0\x10\0\x10" + u16(2048) + u32(0) + tpm2b(b"\1" * 255),
                "BAD_VALUE",
            ),
            (
                b"\0\1\0\x0b" + bytes(4) + tpm2b(b"") + b"\0\x10\0\x10" + u16(512) + u32(0) + tpm2b(b"\1" * 64),
                "BAD_VALUE",
            ),
            (
                b"\0\x23\0\x0b" + bytes(4) + tpm2b(b"") + b"\0\x10\0\x10\0\x10\0\x10" + tpm2b(b"") * 2,
                "UNKNOWN_ALGORITHM",
            ),
            (b"\0\x23\0\x0b" + bytes(4) + tpm2b(b"") + b"\0\x10\0\x10\0\3\0\x20\0\x0b" + tpm2b(b"") * 2, "BAD_VALUE"),
            (b"\0\x23\0\x0b" + bytes(4) + tpm2b(b"") + b"\0\x10\0\x10\0\3\0\x10" + tpm2b(bytes(33)) * 2, "TOO_LARGE"),
        ],
    )
    def test_refuses_deviations(self, data: bytes, slug: str) -> None:
        assert slug_of(tpm.parse_public, data) == slug


class TestPcrs:
    def test_selection_marshals_to_what_the_parser_reads(self) -> None:
        chosen = tpm.PcrSelection.of("sha384", (23, 0, 9, 0))
        assert chosen.pcrs == (0, 9, 23)
        assert chosen.marshal() == selection([("sha384", (0, 9, 23))])

    @pytest.mark.parametrize(("bank", "pcrs"), [("md5", (0,)), ("sha256", (24,)), ("sha256", (-1,))])
    def test_selection_refuses_what_no_tpm_has(self, bank: str, pcrs: tuple[int, ...]) -> None:
        with pytest.raises(ValueError):
            tpm.PcrSelection.of(bank, pcrs)

    def test_digest_takes_pcrs_in_ascending_order_with_the_given_hash(self) -> None:
        pcrs = values((9, 0, 2))
        assert tpm.pcr_digest(pcrs, (9, 0, 2), "sha384") == hashlib.sha384(pcrs[0] + pcrs[2] + pcrs[9]).digest()

    def test_digest_refuses_a_missing_value(self) -> None:
        assert slug_of(tpm.pcr_digest, values((0,)), (0, 1), "sha256") == "MISSING_PCR"

    @pytest.mark.parametrize("cut", [0, 1, 16, 31, 33, 64])
    def test_digest_refuses_bytes_moved_from_one_pcr_to_the_next(self, cut: int) -> None:
        both = b"".join(values((0, 1)).values())
        assert slug_of(tpm.pcr_digest, {0: both[:cut], 1: both[cut:]}, (0, 1), "sha256") == "BAD_VALUE"

    def test_digest_refuses_values_of_two_banks(self) -> None:
        mixed = values((0,)) | values((1,), "sha384")
        assert slug_of(tpm.pcr_digest, mixed, (0, 1), "sha256") == "BAD_VALUE"

    def test_digest_refuses_values_of_no_digest_size(self) -> None:
        assert slug_of(tpm.pcr_digest, {0: b"x"}, (0,), "sha256") == "BAD_VALUE"

    def test_extend_hashes_the_old_value_first(self) -> None:
        assert tpm.extend("sha256", bytes(32), b"d" * 32) == hashlib.sha256(bytes(32) + b"d" * 32).digest()
