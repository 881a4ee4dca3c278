"""Receives keys that come wrapped: a fresh key pair for each, of which nobody else ever has the private half.

The one part of the SDK that needs ``cryptography`` (``pip install 'cgpu-agent[keys]'``); loaded only when it is used.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.delivery import hpke_info


class Receiver:
    """Receives one key."""

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()

    @property
    def recipient(self) -> bytes:
        """The public half, DER SubjectPublicKeyInfo."""
        return self._private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def open(self, wrapped: bytes, context: bytes) -> bytes:
        """The key. Raises ``HostileInput`` (``BAD_WRAP``): made for somebody else, or another key's context."""
        suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
        try:
            return suite.decrypt(wrapped, self._private, info=hpke_info(context))
        except (InvalidTag, ValueError) as error:
            raise HostileInput("BAD_WRAP", "the wrapped key was not made for this receiver") from error
