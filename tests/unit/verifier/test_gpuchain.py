"""Complete chains with a pinned root key, and what they say of a device."""

from __future__ import annotations

from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.fwid import certified_fwid
from cgpu_agent.verifier.gpuchain import PinnedRoots, device_identity, spki_digest, verify_pinned_chain
from fixtures.gpu import FWID, composite_device_id, fwid_der, tcb_info, tlv
from fixtures.gpujudge import GPU, VENDOR, chain
from fixtures.gpupki import CA_EXTENSIONS, SIGNER_EXTENSIONS, Signer
from fixtures.pki import NOW, usage

ROOT = VENDOR.root
LENGTH = range(2, 6)


def refused(*certificates: x509.Certificate, roots: PinnedRoots | None = None) -> str:
    with pytest.raises(HostileInput) as caught:
        verify_pinned_chain(certificates, roots=roots or VENDOR.device_roots, length=LENGTH, at=NOW)
    return caught.value.slug


def test_accepts_every_root_certificate_of_the_pinned_key() -> None:
    """NVIDIA has issued several."""
    other = _root_certificate(ROOT.key)
    assert other != ROOT.certificate
    path = verify_pinned_chain([*GPU.certificates[:4], other], roots=VENDOR.device_roots, length=range(5, 6), at=NOW)
    assert path.root == spki_digest(ROOT.certificate)
    assert path.path.certificates[0].subject.startswith("CN=GH100")


def _root_certificate(
    key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey | None = None
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .issuer_name(ROOT.certificate.subject)
        .subject_name(ROOT.certificate.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=1))
    )
    for extension, critical in CA_EXTENSIONS:
        builder = builder.add_extension(extension, critical)
    return builder.sign(signer or key, SHA384())


def test_the_pinned_key_in_a_certificate_that_it_did_not_sign_is_no_root() -> None:
    forged = _root_certificate(ROOT.key, signer=ec.generate_private_key(ec.SECP384R1()))
    result = chain(*GPU.certificates[:4], forged).judge()
    assert result.refusal is not None
    assert (result.refusal.id, result.refusal.slug) == ("gpu.chain", "BAD_CERTIFICATE_SIGNATURE")


def test_refuses_a_path_that_a_ca_may_not_have() -> None:
    short = ROOT.issue(
        "short", ((x509.BasicConstraints(ca=True, path_length=0), True), (usage("key_cert_sign"), True))
    )
    below = short.issue("below")
    leaf = below.issue("leaf", SIGNER_EXTENSIONS)
    assert refused(*(each.certificate for each in (leaf, below, short, ROOT))) == "PATH_TOO_LONG"


def test_refuses_a_ca_without_the_right_to_sign_certificates() -> None:
    weak = ROOT.issue("weak", ((x509.BasicConstraints(ca=True, path_length=None), True), (usage("crl_sign"), True)))
    leaf = weak.issue("leaf", SIGNER_EXTENSIONS)
    assert refused(leaf.certificate, weak.certificate, ROOT.certificate) == "NOT_A_CA"


def test_refuses_a_leaf_that_may_not_sign() -> None:
    leaf = ROOT.issue("leaf", ((usage("key_agreement"), True),))
    assert refused(leaf.certificate, ROOT.certificate) == "WRONG_PURPOSE"
    assert refused(ROOT.issue("bare", ()).certificate, ROOT.certificate) == "WRONG_PURPOSE"


def test_refuses_a_key_on_another_curve() -> None:
    leaf = ROOT.issue("leaf", SIGNER_EXTENSIONS, key=ec.generate_private_key(ec.SECP256R1()))
    assert refused(leaf.certificate, ROOT.certificate) == "WEAK_KEY"


def test_refuses_name_constraints() -> None:
    name = x509.NameConstraints([x509.DNSName("example.org")], None)
    ca = ROOT.issue("ca", (*CA_EXTENSIONS, (name, False)))
    leaf = ca.issue("leaf", SIGNER_EXTENSIONS)
    assert refused(leaf.certificate, ca.certificate, ROOT.certificate) == "UNKNOWN_CRITICAL_EXTENSION"


def test_refuses_nothing_and_too_much() -> None:
    assert refused() == "CHAIN_LENGTH"
    assert refused(ROOT.certificate) == "CHAIN_LENGTH"
    assert refused(*[ROOT.certificate] * 6) == "CHAIN_LENGTH"


def test_two_devices_differ_in_every_part_of_their_identity() -> None:
    first, second = (
        device_identity(verify_pinned_chain(each.certificates, roots=VENDOR.device_roots, length=LENGTH, at=NOW))
        for each in (GPU, VENDOR.device())
    )
    assert first.ueid != second.ueid
    assert first.device_id != second.device_id
    assert not set(first.keys) & set(second.keys)
    assert first.pdi != second.pdi


@pytest.mark.parametrize(
    "name",
    [
        "",
        "NVIDIA:GH100",
        "NVIDIA:GH100:48B02D92494BADF",
        "nvidia:GH100:48B02D92494BADF4",
        "NVIDIA:gh100:48B02D92494BADF4",
    ],
)
def test_refuses_a_device_without_a_proper_name(name: str) -> None:
    device = VENDOR.device(name=name)
    path = verify_pinned_chain(device.certificates, roots=VENDOR.device_roots, length=LENGTH, at=NOW)
    with pytest.raises(HostileInput) as caught:
        device_identity(path)
    assert caught.value.slug == "BAD_DEVICE_NAME"


def test_a_serial_number_of_another_length_is_no_fabric_identifier() -> None:
    provisioner, identity = VENDOR.family("GH100")
    boot_rom = provisioner.issue("GH100 A01 BROM", serial=77)
    leaf = boot_rom.issue("leaf", [(each.value, each.critical) for each in GPU.leaf.certificate.extensions])
    certificates = [each.certificate for each in (leaf, boot_rom, provisioner, identity, VENDOR.root)]
    path = verify_pinned_chain(certificates, roots=VENDOR.device_roots, length=LENGTH, at=NOW)
    assert device_identity(path).pdi is None


# --- the firmware identifier ---

KEY = Signer.root("any").key.public_key()


def leaf_with(*extensions: x509.UnrecognizedExtension) -> x509.Certificate:
    return ROOT.issue("leaf", [*SIGNER_EXTENSIONS, *((each, False) for each in extensions)]).certificate


def bad_fwid(extension: x509.UnrecognizedExtension) -> str:
    with pytest.raises(HostileInput) as caught:
        certified_fwid(leaf_with(extension))
    return caught.value.slug


def test_reads_the_fwid_of_either_shape() -> None:
    assert certified_fwid(leaf_with(composite_device_id(FWID, KEY))) == FWID
    assert certified_fwid(leaf_with(tcb_info(FWID))) == FWID
    assert certified_fwid(leaf_with()) is None


def test_refuses_two_shapes_at_once() -> None:
    with pytest.raises(HostileInput) as caught:
        certified_fwid(leaf_with(composite_device_id(FWID, KEY), tcb_info(FWID)))
    assert caught.value.slug == "BAD_FWID"


@pytest.mark.parametrize("make", [lambda value: composite_device_id(value, KEY), tcb_info], ids=["composite", "tcb"])
def test_refuses_a_fwid_of_another_length_or_a_cut_extension(make: object) -> None:
    assert callable(make)
    assert bad_fwid(make(FWID[:47])) == "BAD_FWID"
    good = make(FWID)
    for cut in (
        good.value[:-1],
        good.value + b"\0",
        b"",
        b"\x30\x80\0\0",
        good.value.replace(b"\x65\x03\x04", b"\x65\x03\x05"),
    ):
        assert bad_fwid(x509.UnrecognizedExtension(good.oid, cut)) == "BAD_FWID"


@pytest.mark.parametrize(
    "content",
    [
        tlv(0x84, b"\0") + tlv(0x83, b"\0") + tlv(0xA6, fwid_der(FWID)),
        tlv(0xA6, fwid_der(FWID)) + tlv(0xA6, fwid_der(bytes(48))),
        tlv(0xA6, b""),
        tlv(0x86, fwid_der(FWID)),
        tlv(0x80, b"NVIDIA"),
        tlv(0xA6, fwid_der(FWID) + b"\0"),
        tlv(0x8A, b""),
    ],
)
def test_refuses_tcb_info_that_could_be_read_in_two_ways(content: bytes) -> None:
    assert bad_fwid(x509.UnrecognizedExtension(tcb_info(FWID).oid, tlv(0x30, content))) == "BAD_FWID"


def test_a_signature_that_was_seen_once_is_good_for_the_same_bytes_alone() -> None:
    """And for no other time: what is kept is who signed whom."""
    given = [*GPU.certificates]
    verify_pinned_chain(given, roots=VENDOR.device_roots, length=LENGTH, at=NOW)
    leaf = bytearray(given[0].public_bytes(Encoding.DER))
    leaf[-1] ^= 1
    with pytest.raises(HostileInput) as caught:
        verify_pinned_chain(
            [x509.load_der_x509_certificate(bytes(leaf)), *given[1:]],
            roots=VENDOR.device_roots,
            length=LENGTH,
            at=NOW,
        )
    assert caught.value.slug in ("BAD_CERTIFICATE_SIGNATURE", "BAD_CERTIFICATE")
    late = given[0].not_valid_after_utc + timedelta(days=1)
    with pytest.raises(HostileInput) as caught:
        verify_pinned_chain(given, roots=VENDOR.device_roots, length=LENGTH, at=late)
    assert caught.value.slug == "CERTIFICATE_EXPIRED"
