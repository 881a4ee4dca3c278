"""Quotes and certificates recorded on real platforms give the results that were computed for them independently."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.certificate import AK, EK, load_certificate, load_certificates
from cgpu_agent.verifier.chain import verify_chain
from cgpu_agent.verifier.endorsement import endorse
from cgpu_agent.verifier.keys import AttestationKey, certificate_from_der, load_attestation_key
from cgpu_agent.verifier.quote import QuoteResult, verify_quote
from cgpu_agent.wire.tpm import PcrSelection, Quoted, parse_attest

AZURE = {
    "generic-tpm-trustee": set(range(24)),
    "snp-milan-kinvolk-quote": set(range(24)),
    "snp-milan-trustee-v0": set(range(24)),
    "snp-milan-trustee-v1": set(range(24)),
    "tdx-flashbots-20251202-globalCA03": set(range(24)),
    "tdx-trustee-v1": set(range(24)),
    "tvm-cmcp-20260727": set(range(8)),
}
"""Folders with quote and PCR values, and the PCRs that the quote covers."""
FIRST_DAY = datetime(2026, 7, 28, tzinfo=timezone.utc)


class Recording:
    """A folder with a quote, read as its index describes it."""

    def __init__(self, folder: Path, suffix: str = "") -> None:
        self.folder = folder
        self.attest = (folder / f"quote{suffix}.msg").read_bytes()
        signature = folder / f"quote{suffix}.sig"
        self.signature = (signature if signature.exists() else folder / f"quote{suffix}.sig_tpmt").read_bytes()
        self.ak = self._ak()

    def _ak(self) -> AttestationKey:
        for name in ("akpub.pem", "akpub.der", "ak.pub", "ak_pub.tpmt_public"):
            if (self.folder / name).exists():
                return load_attestation_key((self.folder / name).read_bytes())
        report = (self.folder / "hcl_report.bin").read_bytes()
        size = int.from_bytes(report[0x4D0:0x4D4], "little")
        keys = json.loads(report[0x4D4 : 0x4D4 + size])["keys"]
        jwk = next(key for key in keys if key["kid"] == "HCLAkPub")
        e, n = (int.from_bytes(base64.urlsafe_b64decode(jwk[field] + "=="), "big") for field in ("e", "n"))
        return AttestationKey(RSAPublicNumbers(e, n).public_key(), None)

    def pcrs(self, bank: str = "sha256") -> dict[int, bytes]:
        loaded = json.loads((self.folder / f"pcrs_{bank}.json").read_text())
        return {int(index): bytes.fromhex(value) for index, value in loaded.items()}

    def nonce(self) -> bytes | None:
        file = self.folder / "nonce.hex"
        return bytes.fromhex(file.read_text().strip()) if file.exists() else None

    def judge(self, **changed: object) -> QuoteResult:
        given = {
            "attest": self.attest,
            "signature": self.signature,
            "ak": self.ak,
            "nonce": self.nonce(),
            "pcrs": None,
            "expected_pcrs": None,
        }
        return verify_quote(**(given | changed))  # type: ignore[arg-type]


def refused(result: QuoteResult) -> tuple[str, str | None] | None:
    return None if result.refusal is None else (result.refusal.id, result.refusal.slug)


@pytest.fixture(params=sorted(AZURE))
def azure(request: pytest.FixtureRequest, shared_data: Path) -> Recording:
    return Recording(shared_data / "azure" / request.param)


@pytest.fixture
def gce(shared_data: Path) -> Path:
    return shared_data / "eventlogs" / "quotes" / "gce-cos-85-no-nonce"


@pytest.fixture
def azure_roots(shared_data: Path) -> Path:
    return shared_data / "azure" / "roots"


def test_accepts_every_recorded_quote_with_its_values_and_nonce(azure: Recording) -> None:
    covered = AZURE[azure.folder.name]
    result = azure.judge(pcrs=azure.pcrs(), expected_pcrs=covered)
    assert refused(result) is None
    assert result.accepted
    assert result.pcrs.keys() == covered
    assert result.passed("quote.digest")
    assert result.passed("quote.nonce") is (azure.nonce() is not None)
    assert result.attributes == "unknown"


def test_refuses_another_nonce(azure: Recording) -> None:
    nonce = parse_attest(azure.attest).extra_data
    for wrong in (nonce + b"\0", nonce[:-1], nonce[::-1] + b"x", b"x"):
        assert refused(azure.judge(nonce=wrong)) == ("quote.nonce", "NONCE_MISMATCH")


@pytest.mark.parametrize("field", ["attest", "signature"])
def test_refuses_any_flipped_byte(azure: Recording, field: str) -> None:
    good: bytes = getattr(azure, field)
    for position in range(0, len(good), 7):
        bad = good[:position] + bytes([good[position] ^ 0x40]) + good[position + 1 :]
        result = azure.judge(**{field: bad})
        assert result.refusal is not None
        assert result.refusal.id == "quote.signature"


def test_refuses_the_values_of_another_machine(azure: Recording, shared_data: Path) -> None:
    for other in AZURE:
        values = Recording(shared_data / "azure" / other).pcrs()
        values = {index: values[index] for index in AZURE[azure.folder.name] if index in values}
        if values == azure.pcrs():
            continue
        assert refused(azure.judge(pcrs=values)) in [
            ("quote.digest", "PCR_DIGEST_MISMATCH"),
            ("quote.values", "MISSING_PCR"),
        ]


def test_refuses_the_key_of_another_machine(azure: Recording, shared_data: Path) -> None:
    for other in AZURE:
        ak = Recording(shared_data / "azure" / other).ak
        if ak.spki != azure.ak.spki:
            assert refused(azure.judge(ak=ak)) == ("quote.signature", "BAD_SIGNATURE")


def test_accepts_a_nonce_that_was_hashed_first(shared_data: Path) -> None:
    recording = Recording(shared_data / "azure" / "snp-cmcp-20260720")
    raw = bytes.fromhex((recording.folder / "cmcp_nonce.hex").read_text().strip())
    result = recording.judge(nonce=hashlib.sha256(raw).digest(), expected_pcrs={16})
    assert result.accepted
    assert refused(recording.judge(nonce=raw)) == ("quote.nonce", "NONCE_MISMATCH")
    assert refused(recording.judge(expected_pcrs={0, 16})) == ("quote.pcr-set", "PCRS_MISSING")


@pytest.mark.parametrize("bank", ["sha256", "sha384"])
def test_accepts_google_quotes_of_each_bank(gce: Path, bank: str) -> None:
    recording = Recording(gce, f"_{bank}")
    result = recording.judge(pcrs=recording.pcrs(bank), bank=bank, expected_pcrs=set(range(24)))
    assert result.accepted
    assert result.attributes == "restricted"
    assert result.attest is not None
    assert result.attest.extra_data == b""
    attested = result.attest.attested
    assert isinstance(attested, Quoted)
    assert len(attested.pcr_digest) == 32


def test_refuses_the_sha1_bank_unless_it_is_asked_for_twice(gce: Path) -> None:
    recording = Recording(gce, "_sha1")
    values = recording.pcrs("sha1")
    assert refused(recording.judge(pcrs=values)) == ("quote.bank", "WRONG_BANK")
    assert refused(recording.judge(pcrs=values, bank="sha1")) == ("quote.bank", "WEAK_BANK")
    assert recording.judge(pcrs=values, bank="sha1", allow_sha1_bank=True).accepted


def test_refuses_a_quote_of_one_bank_with_the_values_of_another(gce: Path) -> None:
    recording = Recording(gce, "_sha384")
    other = recording.pcrs("sha256")
    assert refused(recording.judge(pcrs=other, bank="sha384")) == ("quote.values", "BAD_VALUE")
    assert refused(recording.judge(pcrs=other, bank="sha256")) == ("quote.bank", "WRONG_BANK")


def test_refuses_a_sha1_signature_and_the_key_of_the_other_folder(shared_data: Path, gce: Path) -> None:
    windows = Recording(shared_data / "eventlogs" / "quotes" / "gce-windows-shielded")
    linux = Recording(gce, "_sha256")
    assert windows.ak.attributes == "restricted"
    everything = windows.judge(pcrs=windows.pcrs("sha1"), bank="sha1", allow_sha1_bank=True)
    assert refused(everything) == ("quote.signature", "WEAK_HASH")
    assert refused(linux.judge(ak=windows.ak)) == ("quote.signature", "BAD_SIGNATURE")
    assert refused(windows.judge(ak=linux.ak)) == ("quote.signature", "WEAK_HASH")


def test_reads_a_bare_quote_of_another_maker(shared_data: Path) -> None:
    attest = parse_attest((shared_data / "eventlogs" / "dstack" / "tpm_quote_sample.bin").read_bytes())
    assert attest.extra_data == bytes.fromhex("12345678")
    assert attest.firmware_version == 0x2016051100162800
    assert isinstance(attest.attested, Quoted)
    assert attest.attested.selections == (PcrSelection("sha256", (0, 1, 2)),)


class TestAzureAkCertificates:
    """The chain of a Trusted Launch VM, and that of a TDX VM with a zero-padded certificate."""

    def test_accepts_the_chain_while_it_is_valid(self, shared_data: Path, azure_roots: Path) -> None:
        leaf = load_certificate((shared_data / "azure/tvm-cmcp-20260727/akcert_0x01C101D0.der").read_bytes())
        issuer = load_certificates((azure_roots / "global-virtual-tpm-ca-03.pem").read_bytes())
        roots = load_certificates((azure_roots / "azure-virtual-tpm-root-2023.pem").read_bytes())
        for day in (datetime(2026, 7, 27, tzinfo=timezone.utc), datetime(2027, 4, 21, tzinfo=timezone.utc)):
            path = verify_chain(leaf, issuer, roots, purpose=AK, at=day)
            assert [each.subject for each in path.certificates] == [
                "CN=f859864a6a31.TrustedVM.Azure.windows.net",
                "CN=Global Virtual TPM CA - 03",
                "CN=Azure Virtual TPM Root Certificate Authority 2023,O=Microsoft Corporation,C=US",
            ]
            assert path.not_after == datetime(2027, 4, 21, tzinfo=timezone.utc)

    @pytest.mark.parametrize(
        ("at", "slug"),
        [
            (datetime(2026, 7, 26, 23, 59, 59, tzinfo=timezone.utc), "CERTIFICATE_NOT_YET_VALID"),
            (datetime(2027, 4, 21, 0, 0, 1, tzinfo=timezone.utc), "CERTIFICATE_EXPIRED"),
        ],
    )
    def test_refuses_the_chain_outside_of_its_validity(
        self, shared_data: Path, azure_roots: Path, at: datetime, slug: str
    ) -> None:
        leaf = load_certificate((shared_data / "azure/tvm-cmcp-20260727/akcert_0x01C101D0.der").read_bytes())
        issuer = load_certificates((azure_roots / "global-virtual-tpm-ca-03.pem").read_bytes())
        roots = load_certificates((azure_roots / "azure-virtual-tpm-root-2023.pem").read_bytes())
        with pytest.raises(HostileInput) as caught:
            verify_chain(leaf, issuer, roots, purpose=AK, at=at)
        assert caught.value.slug == slug

    def test_refuses_other_roots_a_missing_issuer_and_another_purpose(
        self, shared_data: Path, azure_roots: Path
    ) -> None:
        leaf = load_certificate((shared_data / "azure/tvm-cmcp-20260727/akcert_0x01C101D0.der").read_bytes())
        issuer = load_certificates((azure_roots / "global-virtual-tpm-ca-03.pem").read_bytes())
        roots = load_certificates((azure_roots / "azure-virtual-tpm-root-2023.pem").read_bytes())
        others = load_certificates((azure_roots / "microsoft-rsa-devices-root-ca-2021.pem").read_bytes())
        for given in ((issuer, others, AK), ((), roots, AK), ((), others, AK)):
            with pytest.raises(HostileInput) as caught:
                verify_chain(leaf, given[0], given[1], purpose=given[2], at=FIRST_DAY)
            assert caught.value.slug == "UNKNOWN_ISSUER"
        with pytest.raises(HostileInput) as caught:
            verify_chain(leaf, issuer, roots, purpose=EK, at=FIRST_DAY)
        assert caught.value.slug == "WRONG_PURPOSE"

    def test_the_certificate_of_the_platform_ak_fails_for_a_quote_by_another_key(
        self, shared_data: Path, azure_roots: Path
    ) -> None:
        recording = Recording(shared_data / "azure" / "tvm-cmcp-20260727")
        certificate = (recording.folder / "akcert_0x01C101D0.der").read_bytes()
        certified = load_attestation_key(certificate)
        assert refused(recording.judge(ak=certified)) == ("quote.signature", "BAD_SIGNATURE")
        with pytest.raises(HostileInput) as caught:
            endorse(
                recording.ak,
                certificate=certificate,
                intermediates=load_certificates((azure_roots / "global-virtual-tpm-ca-03.pem").read_bytes()),
                roots=load_certificates((azure_roots / "azure-virtual-tpm-root-2023.pem").read_bytes()),
                pinned_names=frozenset(),
                at=FIRST_DAY,
            )
        assert caught.value.slug == "AK_CERTIFICATE_MISMATCH"

    def test_a_padded_certificate_endorses_the_quote_signer_until_it_expires(
        self, shared_data: Path, azure_roots: Path
    ) -> None:
        recording = Recording(shared_data / "azure" / "tdx-flashbots-20251202-globalCA03")
        padded = (recording.folder / "ak_cert_nv_padded.pem").read_bytes()
        day = datetime(2025, 12, 2, 12, tzinfo=timezone.utc)

        def endorsed(at: datetime) -> str:
            return endorse(
                recording.ak,
                certificate=padded,
                intermediates=load_certificates((azure_roots / "global-virtual-tpm-ca-03.pem").read_bytes()),
                roots=load_certificates((azure_roots / "azure-virtual-tpm-root-2023.pem").read_bytes()),
                pinned_names=frozenset(),
                at=at,
            ).kind

        assert endorsed(day) == "ak-certificate"
        assert recording.judge(ak=load_attestation_key(padded)).accepted
        with pytest.raises(HostileInput) as caught:
            endorsed(day + timedelta(days=365))
        assert caught.value.slug == "CERTIFICATE_EXPIRED"

    def test_a_padded_certificate_is_no_certificate_before_it_is_trimmed(self, shared_data: Path) -> None:
        folder = shared_data / "azure" / "tdx-flashbots-20251202-globalCA03"
        lines = (folder / "ak_cert_nv_padded.pem").read_text().split("\n")
        content = base64.b64decode("".join(line for line in lines if not line.startswith("-")))
        assert len(content) == 4096
        with pytest.raises(HostileInput) as caught:
            certificate_from_der(content)
        assert caught.value.slug == "BAD_CERTIFICATE"
        subject = load_certificate(content).subject.rfc4514_string()
        assert subject.endswith(".ConfidentialVM.Azure.windows.net")
