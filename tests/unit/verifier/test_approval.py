"""Approving a boot: what the owner signs is what a TPM checks, and a boot that measures too little is refused."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey as EcPublic
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
)

from cgpu_agent.errors import Misuse
from cgpu_agent.verifier.approval import pcrs_to_approve, sign_approval
from cgpu_agent.verifier.reference import Reference
from cgpu_agent.wire.approval import MAX_EPOCH, signed_bytes
from fixtures.owner import Owner

OWNER = Owner()
PCRS = {4: bytes(32), 11: b"\1" * 32}
VERITY = "root=/dev/mapper/root roothash=" + "ab" * 32


def reference(**changes: Any) -> Reference:
    fields: dict[str, Any] = {
        "pcrs": {index: frozenset({value}) for index, value in PCRS.items()},
        "command_lines": frozenset({VERITY}),
    }
    return Reference(**{**fields, **changes})


def refused(action: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(Misuse) as caught:
        action(*args, **kwargs)
    return caught.value.slug


def signed(**changes: Any) -> Any:
    fields: dict[str, Any] = {"fleet": "a", "groups": ["prod"], "pcrs": PCRS, "epoch": 1}
    return sign_approval(changes.pop("key", OWNER.pem), **{**fields, **changes})


def test_signatures_are_the_owners_over_policy_and_ref() -> None:
    approval = signed(groups=["prod", "dev"], epoch=9)
    key = load_der_public_key(approval.authority)
    assert isinstance(key, EcPublic)
    for group, raw in approval.signatures.items():
        der = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
        key.verify(der, signed_bytes(PCRS, 9, "a", group), ECDSA(SHA256()))
        with pytest.raises(InvalidSignature):
            key.verify(der, signed_bytes(PCRS, 8, "a", group), ECDSA(SHA256()))


@pytest.mark.parametrize(
    "changes",
    [
        {"fleet": ""},
        {"fleet": "A"},
        {"groups": ["Prod"]},
        {"groups": [f"g{i}" for i in range(64)]},
        {"pcrs": {}},
        {"pcrs": {24: bytes(32)}},
        {"pcrs": {-1: bytes(32)}},
        {"pcrs": {7: bytes(20)}},
        {"epoch": 0},
        {"epoch": MAX_EPOCH + 1},
    ],
)
def test_what_no_approval_could_hold_is_not_signed(changes: dict[str, Any]) -> None:
    assert refused(signed, **changes) == "BAD_APPROVAL"


def test_keys_that_no_tpm_policy_takes_are_refused() -> None:
    other = generate_private_key(SECP384R1())
    for key in (
        b"",
        b"no key",
        other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")),
        other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    ):
        assert refused(signed, key=key) == "BAD_APPROVAL_KEY"


def test_pcrs_of_a_reference_that_covers_the_root() -> None:
    assert pcrs_to_approve(reference()) == PCRS
    assert pcrs_to_approve(reference(), [11]) == {11: b"\1" * 32}


def test_reference_must_name_one_boot() -> None:
    two = {11: frozenset({bytes(32), b"\1" * 32})}
    assert refused(pcrs_to_approve, reference(pcrs=two)) == "AMBIGUOUS_REFERENCE"
    assert refused(pcrs_to_approve, reference(), [7]) == "PCR_NOT_IN_REFERENCE"
    assert refused(pcrs_to_approve, reference(), []) == "NO_PCRS"
    assert refused(pcrs_to_approve, reference(pcrs={})) == "NO_PCRS"


@pytest.mark.parametrize(
    ("changes", "pcrs"),
    [
        ({"command_lines": None}, None),
        ({"command_lines": frozenset({"root=/dev/vda1"})}, None),
        ({"command_lines": frozenset({VERITY, "root=/dev/vda1"})}, None),
        ({"command_lines": frozenset({VERITY.replace("root", "usr")})}, None),
        ({"command_lines": frozenset({f"{VERITY} systemd.verity=off"})}, None),
        ({}, [4]),
    ],
)
def test_boot_that_does_not_measure_the_root_is_refused(changes: dict[str, Any], pcrs: list[int] | None) -> None:
    assert refused(pcrs_to_approve, reference(**changes), pcrs) == "ROOT_NOT_COVERED"
    assert pcrs_to_approve(reference(**changes), pcrs, uncovered_root=True)
