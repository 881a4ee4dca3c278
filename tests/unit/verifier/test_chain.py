"""A path is found where every rule holds, and each rule alone can refuse it."""

from __future__ import annotations

import base64
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store

from cgpu_agent.errors import AgentError, HostileInput, Misuse
from cgpu_agent.verifier.certificate import AK, EK, Purpose, load_certificate, load_certificates
from cgpu_agent.verifier.chain import MAX_CERTIFICATES, MAX_SIGNATURES, CertificatePath, verify_chain
from cgpu_agent.wire.der import MAX_PEM_BLOCKS
from fixtures.pki import (
    AK_EKU,
    AK_EXTENSIONS,
    CA_EXTENSIONS,
    EK_EKU,
    NOW,
    Authority,
    Extension,
    name,
    usage,
)

ROOT = Authority.root()
ISSUER = ROOT.intermediate("issuer")
KEY = ec.generate_private_key(ec.SECP256R1())
CONSTRAINED = (
    x509.NameConstraints(permitted_subtrees=[x509.DirectoryName(name("leaf"))], excluded_subtrees=None),
    True,
)
UNKNOWN = (x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\5\0"), True)


def ca(path_length: int | None = None) -> Extension:
    return x509.BasicConstraints(ca=True, path_length=path_length), True


def verify(
    leaf: x509.Certificate,
    *intermediates: Authority,
    roots: tuple[Authority, ...] = (ROOT,),
    purpose: Purpose = AK,
    at: datetime = NOW,
) -> CertificatePath:
    return verify_chain(
        leaf,
        [each.certificate for each in intermediates],
        [each.certificate for each in roots],
        purpose=purpose,
        at=at,
    )


def slug_of(*given: object, error: type[AgentError] = HostileInput, **changed: object) -> str:
    with pytest.raises(error) as caught:
        verify(*given, **changed)  # type: ignore[arg-type]
    return caught.value.slug


class TestPath:
    def test_names_the_path_from_the_leaf_to_the_root(self) -> None:
        leaf = ISSUER.issue(KEY.public_key())
        path = verify(leaf, ISSUER)
        assert [each.subject for each in path.certificates] == ["CN=leaf", "CN=issuer", "CN=root"]
        assert path.certificates[0].sha256 == leaf.fingerprint(hashes.SHA256()).hex()
        assert path.not_after == NOW + timedelta(days=365)
        assert path.to_json()[0]["subject"] == "CN=leaf"

    def test_a_root_may_issue_directly_and_unused_certificates_do_no_harm(self) -> None:
        leaf = ROOT.issue(KEY.public_key())
        others = (Authority.root("elsewhere"), ISSUER)
        assert len(verify(leaf, *others, roots=(others[0], ROOT)).certificates) == 2

    def test_a_pinned_intermediate_is_an_anchor(self) -> None:
        assert len(verify(ISSUER.issue(KEY.public_key()), roots=(ISSUER,)).certificates) == 2

    def test_finds_the_one_of_two_issuers_of_a_name_whose_key_signed(self) -> None:
        twin = ROOT.intermediate("issuer")
        leaf = ISSUER.issue(KEY.public_key())
        assert len(verify(leaf, twin, ISSUER).certificates) == 3
        assert len(verify(leaf, ISSUER, twin).certificates) == 3

    def test_finds_the_longer_path_where_the_shorter_one_expired(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        dead = ROOT.intermediate("issuer", key=key, not_after=NOW - timedelta(days=1))
        alive = ISSUER.intermediate("issuer", key=key)
        assert len(verify(dead.issue(KEY.public_key()), dead, alive, ISSUER).certificates) == 4

    def test_accepts_rsa_and_every_sound_hash(self) -> None:
        key = rsa.generate_private_key(65537, 2048)
        root = Authority.root(key=key, algorithm=hashes.SHA512())
        issuer = root.intermediate("issuer", algorithm=hashes.SHA384())
        assert len(verify(issuer.issue(key.public_key()), issuer, roots=(root,)).certificates) == 3

    def test_accepts_a_ca_for_any_purpose_or_for_this_one(self) -> None:
        for oid in (AK_EKU, x509.oid.ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE):
            issuer = ROOT.intermediate("issuer", (*CA_EXTENSIONS, (x509.ExtendedKeyUsage([EK_EKU, oid]), False)))
            assert verify(issuer.issue(KEY.public_key()), issuer)

    def test_accepts_up_to_five_certificates(self) -> None:
        chain = [ROOT]
        for index in range(4):
            chain.append(chain[-1].intermediate(f"ca {index}"))
        assert len(verify(chain[3].issue(KEY.public_key()), *chain[1:]).certificates) == 5
        assert slug_of(chain[4].issue(KEY.public_key()), *chain[1:]) == "PATH_TOO_LONG"

    def test_a_hostile_subject_cannot_steer_a_terminal(self) -> None:
        leaf = ROOT.issue(KEY.public_key(), "\x1b[2Jleaf\u202e")
        assert verify(leaf).certificates[0].subject.isprintable()


class TestRefusals:
    def test_no_roots(self) -> None:
        assert slug_of(ISSUER.issue(KEY.public_key()), ISSUER, roots=()) == "NO_ROOTS"

    def test_a_self_signed_leaf_and_a_leaf_that_is_its_own_root(self) -> None:
        maker = Authority(KEY, ROOT.certificate)
        own = maker.issue(KEY.public_key(), issuer=name("leaf"))
        assert slug_of(own) == "UNKNOWN_ISSUER"
        assert slug_of(own, roots=(Authority(KEY, own),)) == "UNKNOWN_ISSUER"

    def test_another_root_of_the_same_name(self) -> None:
        assert (
            slug_of(ISSUER.issue(KEY.public_key()), ISSUER, roots=(Authority.root(),)) == "BAD_CERTIFICATE_SIGNATURE"
        )

    def test_a_missing_intermediate(self) -> None:
        assert slug_of(ISSUER.issue(KEY.public_key())) == "UNKNOWN_ISSUER"

    def test_a_self_made_root_among_the_intermediates(self) -> None:
        fake = Authority.root("fake root")
        issuer = fake.intermediate("fake issuer")
        assert slug_of(issuer.issue(KEY.public_key()), issuer, fake) == "UNKNOWN_ISSUER"

    @pytest.mark.parametrize("position", ["leaf", "issuer", "root"])
    def test_anything_outside_of_its_validity(self, position: str) -> None:
        for changed, slug in (
            ({"not_after": NOW - timedelta(seconds=1)}, "CERTIFICATE_EXPIRED"),
            ({"not_before": NOW + timedelta(seconds=1)}, "CERTIFICATE_NOT_YET_VALID"),
        ):
            mine = {each: changed if each == position else {} for each in ("root", "issuer", "leaf")}
            root = Authority.root(**mine["root"])
            issuer = root.intermediate("issuer", **mine["issuer"])
            assert slug_of(issuer.issue(KEY.public_key(), **mine["leaf"]), issuer, roots=(root,)) == slug

    def test_validity_is_inclusive_at_both_ends(self) -> None:
        leaf = ROOT.issue(KEY.public_key(), not_before=NOW, not_after=NOW)
        assert verify(leaf)

    @pytest.mark.parametrize(
        "extensions",
        [
            (),
            (CA_EXTENSIONS[0],),
            (CA_EXTENSIONS[1],),
            (CA_EXTENSIONS[0], (usage("digital_signature", "crl_sign"), True)),
            ((x509.BasicConstraints(ca=False, path_length=None), True), CA_EXTENSIONS[1]),
        ],
    )
    def test_an_issuer_that_is_no_ca(self, extensions: tuple[Extension, ...]) -> None:
        issuer = ROOT.intermediate("issuer", extensions)
        assert slug_of(issuer.issue(KEY.public_key()), issuer) == "NOT_A_CA"

    def test_a_leaf_that_plays_ca(self) -> None:
        false_ca = ROOT.intermediate("ak", AK_EXTENSIONS)
        assert slug_of(false_ca.issue(KEY.public_key()), false_ca) == "NOT_A_CA"

    def test_a_ca_below_a_ca_that_may_have_none(self) -> None:
        top = ROOT.intermediate("top", (ca(0), CA_EXTENSIONS[1]))
        below = top.intermediate("below")
        assert verify(top.issue(KEY.public_key()), top)
        assert slug_of(below.issue(KEY.public_key()), below, top) == "PATH_TOO_LONG"

    def test_a_leaf_for_another_purpose(self) -> None:
        for extensions in (
            (),
            ((x509.ExtendedKeyUsage([EK_EKU]), False),),
            ((x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]), False),),
            (AK_EXTENSIONS[0], (usage("key_encipherment"), True)),
            (*AK_EXTENSIONS, ca()),
        ):
            assert slug_of(ROOT.issue(KEY.public_key(), extensions=extensions)) == "WRONG_PURPOSE"
        assert slug_of(ROOT.issue(KEY.public_key()), purpose=EK) == "WRONG_PURPOSE"

    def test_a_ca_limited_to_another_purpose(self) -> None:
        issuer = ROOT.intermediate("issuer", (*CA_EXTENSIONS, (x509.ExtendedKeyUsage([EK_EKU]), False)))
        assert slug_of(issuer.issue(KEY.public_key()), issuer) == "WRONG_PURPOSE"

    def test_critical_extensions_that_are_not_understood(self) -> None:
        assert (
            slug_of(ROOT.issue(KEY.public_key(), extensions=(*AK_EXTENSIONS, UNKNOWN)))
            == "UNKNOWN_CRITICAL_EXTENSION"
        )
        for extension in (UNKNOWN, CONSTRAINED, (CONSTRAINED[0], False)):
            issuer = ROOT.intermediate("issuer", (*CA_EXTENSIONS, extension))
            assert slug_of(issuer.issue(KEY.public_key()), issuer) == "UNKNOWN_CRITICAL_EXTENSION"

    def test_weak_keys_anywhere(self) -> None:
        small = rsa.generate_private_key(65537, 1024)
        issuer = ROOT.intermediate("issuer", key=small)
        root = Authority.root(key=small)
        p224 = ec.generate_private_key(ec.SECP224R1())
        assert slug_of(ROOT.issue(small.public_key())) == "WEAK_KEY"
        assert slug_of(ROOT.issue(p224.public_key())) == "WEAK_KEY"
        assert slug_of(issuer.issue(KEY.public_key()), issuer) == "WEAK_KEY"
        assert slug_of(root.issue(KEY.public_key()), roots=(root,)) == "WEAK_KEY"

    def test_weak_hashes(self) -> None:
        """SHA-224 stands for SHA-1, with which the library no longer signs."""
        assert slug_of(ROOT.issue(KEY.public_key(), algorithm=hashes.SHA224())) == "WEAK_HASH"
        issuer = ROOT.intermediate("issuer", algorithm=hashes.SHA224())
        assert slug_of(issuer.issue(KEY.public_key()), issuer) == "WEAK_HASH"

    def test_altered_certificates(self) -> None:
        der = bytearray(ISSUER.issue(KEY.public_key()).public_bytes(Encoding.DER))
        der[-1] ^= 1
        assert slug_of(load_certificate(bytes(der)), ISSUER) == "BAD_CERTIFICATE_SIGNATURE"

    def test_a_certificate_of_version_1_with_extensions(self) -> None:
        """Version 1 has no version field: take it out and mend the lengths around it."""

        def sequence(content: bytes) -> bytes:
            size = len(content)
            return b"\x30" + (b"\x81" + bytes([size]) if size < 256 else b"\x82" + size.to_bytes(2, "big")) + content

        honest = ROOT.issue(KEY.public_key(), "a subject that makes all lengths need a byte of their own")
        version_3 = b"\xa0\x03\x02\x01\x02"
        signed = honest.tbs_certificate_bytes
        before, after = honest.public_bytes(Encoding.DER).split(signed)
        assert len(before) == 4
        bent = load_certificate(sequence(sequence(signed.split(version_3, 1)[1]) + after))
        assert bent.version is x509.Version.v1
        assert slug_of(bent) == "BAD_CERTIFICATE"

    def test_too_many_certificates(self) -> None:
        leaf = ISSUER.issue(KEY.public_key())
        many = (ISSUER,) * (MAX_CERTIFICATES + 1)
        assert slug_of(leaf, *many) == "TOO_MANY_CERTIFICATES"
        assert slug_of(leaf, roots=many) == "TOO_MANY_CERTIFICATES"

    def test_a_tangle_of_cross_signed_cas_ends_at_the_budget(self) -> None:
        keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(4)]
        makers = [Authority(key, ROOT.certificate) for key in keys]
        tangle = [
            Authority(child, maker.issue(child.public_key(), "ca", CA_EXTENSIONS, issuer=name("ca")))
            for maker in makers
            for child in keys
        ]
        assert len(tangle) ** 4 > MAX_SIGNATURES
        leaf = makers[0].issue(KEY.public_key(), issuer=name("ca"))
        assert slug_of(leaf, *tangle) == "TOO_MANY_CERTIFICATES"

    def test_a_loop_of_two_cas(self) -> None:
        first, second = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        by_second = Authority(second, ROOT.certificate).issue(
            first.public_key(), "a", CA_EXTENSIONS, issuer=name("b")
        )
        by_first = Authority(first, ROOT.certificate).issue(second.public_key(), "b", CA_EXTENSIONS, issuer=name("a"))
        loop = (Authority(first, by_second), Authority(second, by_first))
        assert slug_of(loop[0].issue(KEY.public_key()), *loop) == "UNKNOWN_ISSUER"

    def test_a_moment_without_a_time_zone_is_the_callers_mistake(self) -> None:
        assert slug_of(ROOT.issue(KEY.public_key()), at=NOW.replace(tzinfo=None), error=Misuse) == "NAIVE_TIME"


class TestRecordedEkChain:
    @pytest.mark.parametrize("file", ["ek-rsa.crt", "ek-ecc.crt"])
    def test_verifies_as_ek_and_not_as_ak_nor_by_another_root(self, vectors: Path, file: str) -> None:
        folder = vectors / "vm-boot" / "quote-sample"
        leaf = load_certificate((folder / file).read_bytes())
        issuers = load_certificates((folder / "issuercert.pem").read_bytes())
        roots = load_certificates((folder / "swtpm-localca-rootca-cert.pem").read_bytes())
        at = datetime(2030, 1, 1, tzinfo=timezone.utc)
        path = verify_chain(leaf, issuers, roots, purpose=EK, at=at)
        assert [each.subject for each in path.certificates] == [
            "CN=unknown",
            "CN=swtpm-localca",
            "CN=swtpm-localca-rootca",
        ]
        for given, purpose, slug in (
            (roots, AK, "WRONG_PURPOSE"),
            ((ROOT.certificate,), EK, "UNKNOWN_ISSUER"),
        ):
            with pytest.raises(HostileInput) as caught:
                verify_chain(leaf, issuers, given, purpose=purpose, at=at)
            assert caught.value.slug == slug
        with pytest.raises(HostileInput) as caught:
            verify_chain(leaf, issuers, roots, purpose=EK, at=datetime(2026, 1, 1, tzinfo=timezone.utc))
        assert caught.value.slug == "CERTIFICATE_NOT_YET_VALID"


def test_agrees_with_the_general_verifier_of_the_library() -> None:
    """An independent opinion on what we accept: the library's own path building, its web rules taken out."""
    anything = ExtensionPolicy.permit_all()
    leaf_policy = anything.require_present(x509.ExtendedKeyUsage, Criticality.AGNOSTIC, None)
    ca_policy = anything.require_present(x509.BasicConstraints, Criticality.AGNOSTIC, None)
    leaf = ISSUER.issue(KEY.public_key())
    builder = PolicyBuilder().store(Store([ROOT.certificate])).time(NOW)
    oracle = builder.extension_policies(ca_policy=ca_policy, ee_policy=leaf_policy).build_client_verifier()
    theirs = oracle.verify(leaf, [ISSUER.certificate]).chain
    ours = verify(leaf, ISSUER).certificates
    assert [each.fingerprint(hashes.SHA256()).hex() for each in theirs] == [each.sha256 for each in ours]


class TestLoad:
    DER = ISSUER.certificate.public_bytes(Encoding.DER)
    PEM = ISSUER.certificate.public_bytes(Encoding.PEM)

    def test_loads_padded_content_bare_and_inside_pem(self) -> None:
        padded = self.DER + bytes(4096 - len(self.DER))
        pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(padded) + b"-----END CERTIFICATE-----\n"
        for form in (self.DER, padded, self.PEM, pem, self.PEM.replace(b"\n", b"\r\n")):
            assert load_certificate(form) == ISSUER.certificate

    def test_loads_a_bundle_in_its_order(self) -> None:
        root = ROOT.certificate.public_bytes(Encoding.PEM)
        assert load_certificates(self.PEM + b"\n\n" + root) == (ISSUER.certificate, ROOT.certificate)

    @pytest.mark.parametrize(
        ("data", "slug"),
        [
            (b"", "TRUNCATED"),
            (DER[:-1], "TRUNCATED"),
            (DER + b"\0\0\1", "TRAILING_BYTES"),
            (DER + b"\xff" * 8, "TRAILING_BYTES"),
            (b"\x30\x80" + DER[4:], "BAD_DER"),
            (b"\x30\x01\x00", "BAD_CERTIFICATE"),
            (PEM * 2, "BAD_CERTIFICATE"),
            (PEM.replace(b"CERTIFICATE", b"PUBLIC KEY"), "BAD_CERTIFICATE"),
            (b"text\n" + PEM, "BAD_DER"),
            (PEM + b"text", "BAD_PEM"),
            (PEM.replace(b"M", b"M=", 1), "BAD_PEM"),
            (PEM.replace(b"END CERTIFICATE", b"END PUBLIC KEY"), "BAD_PEM"),
            (PEM * (MAX_PEM_BLOCKS + 1), "TOO_LARGE"),
        ],
    )
    def test_refuses_malformed_data(self, data: bytes, slug: str) -> None:
        with pytest.raises(HostileInput) as caught:
            load_certificate(data)
        assert caught.value.slug == slug


def test_comments_around_the_blocks_of_ones_own_roots_are_no_matter() -> None:
    from cgpu_agent.verifier.certificate import load_certificates, load_trusted

    root = Authority.root("a root").certificate
    pem = root.public_bytes(Encoding.PEM)
    commented = b"# bundle of 2026\nSubject: CN=a root\n" + pem + b"\n# the same again\n" + pem + b"trailing words"
    assert load_trusted(commented) == (root, root)
    assert load_trusted(root.public_bytes(Encoding.DER)) == (root,)
    with pytest.raises(HostileInput):
        load_certificates(commented)
    with pytest.raises(HostileInput):
        load_trusted(b"no certificate at all")
