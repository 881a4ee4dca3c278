"""A key is wrapped to one recipient and one context, and to nothing that is no key."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x25519
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cgpu_agent.client.unwrap import Receiver
from cgpu_agent.domain.wrap import load_recipient, wrap
from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.wire.delivery import hpke_info


def spki(
    key: ec.EllipticCurvePublicKey | x25519.X25519PublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey,
) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def test_what_is_wrapped_here_the_sdk_opens() -> None:
    receiver = Receiver()
    wrapped = wrap(b"secret", load_recipient(receiver.recipient), b"context")
    assert b"secret" not in wrapped
    assert receiver.open(wrapped, b"context") == b"secret"


def test_p256_works_too() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    wrapped = wrap(b"secret", load_recipient(spki(key.public_key())), b"context")
    suite = Suite(KEM.P256, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    assert suite.decrypt(wrapped, key, info=hpke_info(b"context")) == b"secret"


def test_another_receiver_another_context_or_an_altered_byte_opens_nothing() -> None:
    receiver = Receiver()
    wrapped = wrap(b"secret", load_recipient(receiver.recipient), b"context")
    attempts = [(Receiver(), wrapped, b"context"), (receiver, wrapped, b"other")]
    attempts += [
        (receiver, wrapped[:at] + bytes((wrapped[at] ^ 1,)) + wrapped[at + 1 :], b"context")
        for at in range(len(wrapped))
    ]
    attempts += [(receiver, wrapped[:size], b"context") for size in range(len(wrapped))]
    for who, data, context in attempts:
        with pytest.raises(HostileInput) as raised:
            who.open(data, context)
        assert raised.value.slug == "BAD_WRAP"


X25519 = spki(x25519.X25519PrivateKey.generate().public_key())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x30\x03abc",
        X25519[:-1],
        X25519 + b"\0",
        bytes(513),
        spki(ec.generate_private_key(ec.SECP384R1()).public_key()),
        spki(ed25519.Ed25519PrivateKey.generate().public_key()),
        spki(rsa.generate_private_key(65537, 2048).public_key()),
    ],
    ids=["nothing", "junk", "cut short", "with more", "too long", "P-384", "Ed25519", "RSA"],
)
def test_refuses_what_nothing_is_wrapped_to(data: bytes) -> None:
    with pytest.raises(Misuse) as raised:
        load_recipient(data)
    assert raised.value.slug == "BAD_RECIPIENT"


def test_refuses_a_point_of_low_order() -> None:
    """Everybody knows what is agreed with it."""
    low = X25519[:-32] + bytes(32)
    with pytest.raises(Misuse) as raised:
        load_recipient(low)
    assert raised.value.slug == "BAD_RECIPIENT"
