"""An AK is certified once the TPM of a known EK has shown that it holds it, and as nothing better than that EK."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from cgpu_agent.errors import AgentError, HostileInput, Misuse, Unavailable
from cgpu_agent.service import enrol, keygen
from cgpu_agent.service.enrol import Challenge, EkRoots, Enrolment, Request
from cgpu_agent.service.issuer import Issuer, Issuers, issue
from cgpu_agent.service.replica import ReplicaKeys
from cgpu_agent.verifier.certificate import AK, load_certificate
from cgpu_agent.verifier.chain import verify_chain
from cgpu_agent.verifier.ekclass import EkClass, ek_class_of
from cgpu_agent.verifier.endorsement import endorse
from cgpu_agent.verifier.keys import load_attestation_key
from cgpu_agent.wire.tpm import ObjectAttributes
from fixtures.activate import SoftEk
from fixtures.attest import AK_ATTRIBUTES, Signer, ecc_key, rsa_key
from fixtures.pki import EK_EKU, NOW, Authority, usage

KEYS = ReplicaKeys((b"k" * 32,))
AUDIENCE = "https://verifier.example"
AT = int(NOW.timestamp())
DAY = 86400

VENDOR, OPERATOR, SIMULATED = (Authority.root(name) for name in ("vendor", "operator", "software TPMs"))
TRUST = tuple(
    EkRoots(EkClass(name), (root.certificate,))
    for name, root in (("vendor:ACME", VENDOR), ("operator", OPERATOR), ("simulated", SIMULATED))
)
EK_EXTENSIONS = ((x509.ExtendedKeyUsage([EK_EKU]), False), (usage("key_encipherment"), True))
EK = SoftEk.make()
AK_SIGNER = Signer(rsa_key())


def ek_certificate(root: Authority = VENDOR, ek: SoftEk = EK, **changed: object) -> bytes:
    return root.issue(ek.key.public_key(), "EK", EK_EXTENSIONS, **changed).public_bytes(Encoding.DER)  # type: ignore[arg-type]


def request(root: Authority = VENDOR, **changed: object) -> Request:
    asked = Request(AK_SIGNER.public(), EK.public(), ek_certificate(root))
    return replace(asked, **changed)  # type: ignore[arg-type]


def challenge(asked: Request, *, now: int = AT, trust: tuple[EkRoots, ...] = TRUST) -> Challenge:
    return enrol.challenge(asked, trust, (), KEYS, AUDIENCE, now=now)


def answer(made: Challenge, ek: SoftEk = EK, ak: Signer = AK_SIGNER) -> bytes | None:
    return ek.activate(ak.public(), made.credential_blob, made.encrypted_secret)


def enrolled(root: Authority = VENDOR, *, now: int = AT) -> Enrolment:
    made = challenge(request(root))
    secret = answer(made)
    assert secret is not None
    return enrol.complete(made.ticket, secret, KEYS, AUDIENCE, now=now)


def slug(call: Callable[[], object], kind: type[AgentError] = HostileInput) -> str:
    with pytest.raises(kind) as caught:
        call()
    return caught.value.slug


@pytest.mark.parametrize(
    ("root", "ek_class"), [(VENDOR, "vendor:ACME"), (OPERATOR, "operator"), (SIMULATED, "simulated")]
)
def test_a_tpm_that_answers_is_enrolled_with_the_class_of_its_ek(root: Authority, ek_class: str) -> None:
    found = enrolled(root)
    assert found.ek_class.text == ek_class
    assert found.ak.spki == load_attestation_key(AK_SIGNER.public()).spki
    assert (found.issued_at, found.not_after) == (AT, AT + 365 * DAY)


def test_an_ecc_ak_is_enrolled_too() -> None:
    signer = Signer(ecc_key())
    made = challenge(request(ak_public=signer.public()))
    secret = answer(made, ak=signer)
    assert secret is not None
    assert (
        enrol.complete(made.ticket, secret, KEYS, AUDIENCE, now=AT).ak.name
        == load_attestation_key(signer.public()).name
    )


def test_another_ak_in_that_tpm_does_not_open_it() -> None:
    assert answer(challenge(request()), ak=Signer(ecc_key())) is None


@pytest.mark.parametrize(
    "attributes",
    [
        AK_ATTRIBUTES & ~ObjectAttributes.RESTRICTED,
        AK_ATTRIBUTES & ~ObjectAttributes.SIGN,
        AK_ATTRIBUTES & ~ObjectAttributes.FIXED_TPM,
        AK_ATTRIBUTES & ~ObjectAttributes.SENSITIVE_DATA_ORIGIN,
        AK_ATTRIBUTES | ObjectAttributes.DECRYPT,
    ],
)
def test_makes_no_credential_for_a_key_that_signs_what_others_made_up(attributes: int) -> None:
    ak = Signer(rsa_key(), attributes)
    assert slug(lambda: challenge(request(ak_public=ak.public()))) == "AK_NOT_RESTRICTED"


def test_makes_no_credential_for_a_bare_key() -> None:
    spki = load_attestation_key(AK_SIGNER.public()).spki
    assert slug(lambda: challenge(request(ak_public=spki))) == "AK_ATTRIBUTES_UNKNOWN"


def test_refuses_the_certificate_of_another_ek() -> None:
    other = ek_certificate(ek=SoftEk.make())
    assert slug(lambda: challenge(request(ek_certificate=other))) == "EK_CERTIFICATE_MISMATCH"


def test_refuses_an_ek_that_nobody_certified() -> None:
    assert slug(lambda: challenge(request(Authority.root("nobody")))) == "UNKNOWN_ISSUER"


def test_refuses_an_ek_certificate_that_expired() -> None:
    old = ek_certificate(not_after=NOW - timedelta(days=1))
    assert slug(lambda: challenge(request(ek_certificate=old))) == "CERTIFICATE_EXPIRED"


def test_refuses_a_certificate_for_another_purpose() -> None:
    ak_certificate = VENDOR.issue(EK.key.public_key(), "EK").public_bytes(Encoding.DER)
    assert slug(lambda: challenge(request(ek_certificate=ak_certificate))) == "WRONG_PURPOSE"


def test_refuses_everybody_without_roots() -> None:
    assert slug(lambda: challenge(request(), trust=())) == "NO_ROOTS"


def test_says_what_is_wrong_below_its_own_root_and_not_that_others_do_not_know_it() -> None:
    old = ek_certificate(SIMULATED, not_after=NOW - timedelta(days=1))
    assert slug(lambda: challenge(request(ek_certificate=old))) == "CERTIFICATE_EXPIRED"


def test_an_intermediate_may_come_along_or_be_known() -> None:
    middle = VENDOR.intermediate("middle")
    certificate, between = ek_certificate(middle), middle.certificate
    brought = request(ek_certificate=certificate, intermediates=(between.public_bytes(Encoding.DER),))
    assert challenge(brought).ticket
    asked = request(ek_certificate=certificate)
    assert enrol.challenge(asked, TRUST, (between,), KEYS, AUDIENCE, now=AT).ticket
    assert slug(lambda: challenge(asked)) == "UNKNOWN_ISSUER"


class TestAnswer:
    MADE = challenge(request())
    SECRET = answer(MADE) or b""

    def complete(self, ticket: bytes | None = None, secret: bytes | None = None, **changed: object) -> Enrolment:
        demands = {"now": AT, "keys": KEYS, "audience": AUDIENCE, **changed}
        ticket, secret = ticket or self.MADE.ticket, self.SECRET if secret is None else secret
        return enrol.complete(ticket, secret, demands["keys"], demands["audience"], now=demands["now"])  # type: ignore[arg-type]

    def test_is_taken_until_the_ticket_expires(self) -> None:
        assert self.MADE.expires == AT + enrol.TICKET_SECONDS
        assert self.complete(now=self.MADE.expires).issued_at == AT
        assert slug(lambda: self.complete(now=self.MADE.expires + 1)) == "TICKET_EXPIRED"

    @pytest.mark.parametrize("secret", [b"", bytes(32), SECRET[:-1], SECRET + b"\0"])
    def test_refuses_a_guess(self, secret: bytes) -> None:
        assert slug(lambda: self.complete(secret=secret)) == "NOT_ACTIVATED"

    def test_refuses_any_change_of_the_ticket(self) -> None:
        for position in range(len(self.MADE.ticket)):
            bent = bytearray(self.MADE.ticket)
            bent[position] ^= 1
            assert slug(lambda bent=bent: self.complete(ticket=bytes(bent))) == "NOT_ACTIVATED"  # type: ignore[misc]

    def test_refuses_a_class_that_was_written_over(self) -> None:
        made = challenge(request(SIMULATED))
        secret = answer(made)
        better = made.ticket.replace(b"\x09simulated", b"\x08operator")
        assert better != made.ticket
        assert slug(lambda: self.complete(ticket=better, secret=secret)) == "NOT_ACTIVATED"

    def test_refuses_the_secret_of_another_ticket(self) -> None:
        other = answer(challenge(request()))
        assert slug(lambda: self.complete(secret=other)) == "NOT_ACTIVATED"

    def test_refuses_a_ticket_of_another_service_or_key(self) -> None:
        assert slug(lambda: self.complete(audience="https://other.example")) == "NOT_ACTIVATED"
        assert slug(lambda: self.complete(keys=ReplicaKeys((b"x" * 32,)))) == "NOT_ACTIVATED"

    def test_a_nonce_is_no_answer(self) -> None:
        tag = KEYS.tag("cgpu/nonce/1", AUDIENCE.encode(), self.MADE.ticket)
        assert slug(lambda: self.complete(secret=tag)) == "NOT_ACTIVATED"


@pytest.fixture(scope="module")
def issuers(tmp_path_factory: pytest.TempPathFactory) -> Issuers:
    folder = tmp_path_factory.mktemp("ca")
    made = []
    for name in ("genuine", "simulated"):
        keygen.enrolment_ca(folder / f"{name}.key", folder / f"{name}.pem", name, now=NOW)
        key = load_pem_private_key((folder / f"{name}.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        made.append(Issuer(load_certificate((folder / f"{name}.pem").read_bytes()), key))
    return Issuers(*made)


def certificate_of(found: Enrolment, issuers: Issuers, days: int = 7) -> x509.Certificate:
    return issue(found, issuers.of(found), lifetime=timedelta(days=days))


class TestCertificate:
    def test_is_good_as_an_ak_certificate_and_names_the_class(self, issuers: Issuers) -> None:
        assert issuers.genuine is not None
        made = certificate_of(enrolled(), issuers)
        verify_chain(made, (), (issuers.genuine.certificate,), purpose=AK, at=NOW)
        assert ek_class_of(made) == EkClass("vendor:ACME")
        assert made.extensions.get_extension_for_oid(EkClass("operator").extension().oid).critical

    def test_lives_as_long_as_configured_from_the_challenge(self, issuers: Issuers) -> None:
        made = certificate_of(enrolled(now=AT + 200), issuers)
        assert made.not_valid_after_utc == NOW + timedelta(days=7)
        assert made.not_valid_before_utc < NOW

    def test_ends_with_the_ek_certificate_and_with_its_ca(self, issuers: Issuers) -> None:
        found = enrolled()
        soon = replace(found, not_after=AT + DAY)
        assert certificate_of(soon, issuers).not_valid_after_utc == NOW + timedelta(days=1)
        forever = replace(found, not_after=(1 << 63) - 1)
        ca = issuers.of(found).certificate
        assert certificate_of(forever, issuers, days=366 * 9).not_valid_after_utc == ca.not_valid_after_utc

    def test_an_answer_given_twice_gives_it_twice(self, issuers: Issuers) -> None:
        made = challenge(request())
        secret = answer(made) or b""
        twice = [
            certificate_of(enrol.complete(made.ticket, secret, KEYS, AUDIENCE, now=AT + late), issuers)
            for late in (0, 250)
        ]
        assert len({(each.serial_number, each.not_valid_after_utc, each.not_valid_before_utc) for each in twice}) == 1
        assert certificate_of(enrolled(), issuers).serial_number != twice[0].serial_number

    def test_no_certificate_by_a_ca_that_has_expired(self, issuers: Issuers) -> None:
        late = replace(enrolled(), issued_at=AT + 9 * 366 * DAY)
        assert slug(lambda: certificate_of(late, issuers), Unavailable) == "NOT_ENROLLING"

    def test_no_ca_no_certificate(self, issuers: Issuers) -> None:
        alone = Issuers(issuers.genuine, None)
        assert slug(lambda: alone.of(enrolled(SIMULATED)), Unavailable) == "NOT_ENROLLING"

    def test_an_issuer_needs_its_own_key_and_the_right_to_issue(self, issuers: Issuers) -> None:
        assert issuers.genuine is not None
        key = ec.generate_private_key(ec.SECP256R1())
        assert slug(lambda: Issuer(issuers.genuine.certificate, key), Misuse) == "BAD_ISSUER"  # type: ignore[union-attr]
        leaf = VENDOR.issue(key.public_key(), "leaf")
        assert slug(lambda: Issuer(leaf, key), Misuse) == "BAD_ISSUER"


class TestLaundering:
    """Attack 27: an AK beside any EK must not come out as one that a cloud certified."""

    def judged(self, root: Authority, issuers: Issuers, *, trusted: str = "both") -> tuple[str, bool, str | None]:
        found = enrolled(root)
        made = certificate_of(found, issuers).public_bytes(Encoding.DER)
        assert issuers.genuine is not None
        assert issuers.simulated is not None
        simulated = issuers.simulated.certificate
        result = endorse(
            load_attestation_key(AK_SIGNER.public()),
            certificate=made,
            intermediates=(),
            roots=(issuers.genuine.certificate, *((simulated,) if trusted == "careless" else ())),
            simulated_roots=(simulated,) if trusted == "both" else (),
            pinned_names=frozenset(),
            at=NOW,
        )
        return result.kind, result.simulated, result.ek_class

    def test_a_vendors_ek_is_all_that_is_known(self, issuers: Issuers) -> None:
        assert self.judged(VENDOR, issuers) == ("tpm-vendor-ek", False, "vendor:ACME")
        assert self.judged(OPERATOR, issuers) == ("operator-ek", False, "operator")

    def test_a_simulators_ek_makes_the_ak_simulated(self, issuers: Issuers) -> None:
        assert self.judged(SIMULATED, issuers) == ("simulated-ek", True, "simulated")

    def test_even_where_the_simulators_ca_was_put_among_the_good_roots(self, issuers: Issuers) -> None:
        assert self.judged(SIMULATED, issuers, trusted="careless") == ("simulated-ek", True, "simulated")

    def test_nobody_who_trusts_only_the_other_ca_accepts_it(self, issuers: Issuers) -> None:
        assert slug(lambda: self.judged(SIMULATED, issuers, trusted="genuine")) == "UNKNOWN_ISSUER"

    def test_a_class_that_does_not_exist_is_refused(self) -> None:
        for value in (b"", b"\x0c\x05cloud", b"\x0c\x08simulated", b"\x13\x09simulated", b"\x0c\x08operator\0"):
            wrong = x509.UnrecognizedExtension(EkClass("operator").extension().oid, value)
            leaf = VENDOR.issue(EK.key.public_key(), "AK", ((wrong, True),))
            assert slug(lambda leaf=leaf: ek_class_of(leaf)) == "BAD_EK_CLASS"  # type: ignore[misc]


def test_judging_at_another_moment_uses_that_moment() -> None:
    before = int(datetime(2020, 1, 1, tzinfo=timezone.utc).timestamp())
    assert slug(lambda: challenge(request(), now=before)) == "CERTIFICATE_NOT_YET_VALID"


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    keygen.replica_key(tmp_path / "key")
    content = (tmp_path / "key").read_bytes()
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert slug(lambda: keygen.signing_key(tmp_path / "key"), Misuse) == "FILE_EXISTS"
    assert (tmp_path / "key").read_bytes() == content
