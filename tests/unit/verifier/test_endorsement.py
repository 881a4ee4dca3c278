"""An AK is vouched for by its certificate or by enrolment, or the answer says that nobody does."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.endorsement import Endorsement, endorse
from cgpu_agent.verifier.keys import AttestationKey, load_attestation_key
from fixtures.attest import Signer, ecc_key, rsa_key
from fixtures.pki import NOW, Authority

ROOT = Authority.root()
ISSUER = ROOT.intermediate("issuer")
SIGNERS = {"ecc": Signer(ecc_key()), "rsa": Signer(rsa_key())}


@pytest.fixture(params=sorted(SIGNERS))
def signer(request: pytest.FixtureRequest) -> Signer:
    return SIGNERS[request.param]


def certified(signer: Signer, **changed: object) -> bytes:
    return ISSUER.issue(signer.key.public_key(), **changed).public_bytes(Encoding.DER)  # type: ignore[arg-type]


def ask(ak: AttestationKey, certificate: bytes | None = None, **changed: object) -> Endorsement:
    given: dict[str, object] = {
        "certificate": certificate,
        "intermediates": [ISSUER.certificate],
        "roots": [ROOT.certificate],
        "pinned_names": frozenset(),
        "at": NOW,
    }
    return endorse(ak, **(given | changed))  # type: ignore[arg-type]


def slug_of(ak: AttestationKey, certificate: bytes, **changed: object) -> str:
    with pytest.raises(HostileInput) as caught:
        ask(ak, certificate, **changed)
    return caught.value.slug


def test_a_certificate_of_this_key_below_a_pinned_root_endorses(signer: Signer) -> None:
    for form in (signer.public(), signer.pem()):
        found = ask(load_attestation_key(form), certified(signer) + bytes(99))
        assert found.kind == "ak-certificate"
        assert found.path is not None
        assert [each.subject for each in found.path.certificates] == ["CN=leaf", "CN=issuer", "CN=root"]
        assert json.loads(json.dumps(found.to_json()))["path"][2]["subject"] == "CN=root"


def test_a_pinned_name_endorses_and_is_reported_beside_a_certificate(signer: Signer) -> None:
    ak = load_attestation_key(signer.public())
    assert ak.name is not None
    names = frozenset({b"\0\x0b" + bytes(32), ak.name})
    assert ask(ak, pinned_names=names).kind == "pinned"
    assert ask(ak, certified(signer), roots=[], pinned_names=names).kind == "pinned"
    both = ask(ak, certified(signer), pinned_names=names)
    assert (both.kind, both.pinned) == ("ak-certificate", True)
    assert not ask(ak, certified(signer)).pinned


def test_a_bare_key_has_no_name_and_cannot_be_pinned(signer: Signer) -> None:
    name = load_attestation_key(signer.public()).name
    assert name is not None
    assert ask(load_attestation_key(signer.pem()), pinned_names=frozenset({name})).kind == "none"


@pytest.mark.parametrize("case", ["nothing", "no-certificate", "no-roots"])
def test_without_anyone_to_vouch_the_answer_is_none(signer: Signer, case: str) -> None:
    ak = load_attestation_key(signer.public())
    found = {
        "nothing": lambda: ask(ak, roots=[]),
        "no-certificate": lambda: ask(ak, pinned_names=frozenset({b"\0\x0b" + bytes(32)})),
        "no-roots": lambda: ask(ak, certified(signer), roots=[]),
    }[case]()
    assert (found.kind, found.reason, found.path, found.pinned) == ("none", "unendorsed", None, False)


def test_refuses_a_certificate_of_another_key_even_without_roots_or_when_pinned(signer: Signer) -> None:
    ak = load_attestation_key(signer.public())
    assert ak.name is not None
    for other in (Signer(ecc_key()), *(each for each in SIGNERS.values() if each is not signer)):
        for changed in ({}, {"roots": []}, {"pinned_names": frozenset({ak.name})}):
            assert slug_of(ak, certified(other), **changed) == "AK_CERTIFICATE_MISMATCH"


def test_refuses_rather_than_falls_back_where_the_certificate_fails(signer: Signer) -> None:
    ak = load_attestation_key(signer.public())
    assert ak.name is not None
    pinned = frozenset({ak.name})
    assert slug_of(ak, certified(signer), intermediates=[], pinned_names=pinned) == "UNKNOWN_ISSUER"
    assert slug_of(ak, certified(signer), roots=[Authority.root("x").certificate]) == "UNKNOWN_ISSUER"
    assert slug_of(ak, certified(signer), at=NOW + timedelta(days=366)) == "CERTIFICATE_EXPIRED"
    assert slug_of(ak, b"no certificate", pinned_names=pinned) == "BAD_DER"
    assert slug_of(ak, b"", roots=[]) == "TRUNCATED"


def test_refuses_a_certificate_for_another_purpose(signer: Signer) -> None:
    tls = (x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]), False)
    assert slug_of(load_attestation_key(signer.public()), certified(signer, extensions=[tls])) == "WRONG_PURPOSE"
