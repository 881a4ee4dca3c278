"""A key made for one answer, and that answer opened by it: JWE with ECDH-ES+A256KW on P-256 and A256GCM.

Source: RFC 7516, RFC 7518 (4.6, 5.3). By hand rather than by a JOSE library: with one algorithm of each kind, nothing
in the message chooses what is done with it.
"""

from __future__ import annotations

import base64
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.kbs import CURVE, KEY_ALGORITHM, Jwe

_KEY_BYTES: Final = 32
_NOBODY: Final = bytes(4)
"""Lengths of no PartyUInfo and no PartyVInfo."""
_OTHER_INFO: Final = (
    len(KEY_ALGORITHM).to_bytes(4, "big")
    + KEY_ALGORITHM.encode("ascii")
    + _NOBODY
    + _NOBODY
    + (8 * _KEY_BYTES).to_bytes(4, "big")
)


class AnswerKey:
    """A fresh P-256 key; ``jwk`` is its public half with its algorithm, in text members only."""

    def __init__(self) -> None:
        self._key: Final = ec.generate_private_key(ec.SECP256R1())
        point = self._key.public_key().public_numbers()
        self.jwk: Final = {
            "alg": KEY_ALGORITHM,
            "crv": CURVE,
            "kty": "EC",
            "x": _coordinate(point.x),
            "y": _coordinate(point.y),
        }

    def open(self, jwe: Jwe) -> bytes:
        """The secret. Raises ``HostileInput`` (``JWE_REFUSED``): made for another key, altered, or a bad point."""
        x, y = (int.from_bytes(each, "big") for each in (jwe.x, jwe.y))
        try:
            theirs = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
            shared = self._key.exchange(ec.ECDH(), theirs)
            wrapping = ConcatKDFHash(SHA256(), _KEY_BYTES, _OTHER_INFO).derive(shared)
            content = AESGCM(aes_key_unwrap(wrapping, jwe.encrypted_key))
            return content.decrypt(jwe.iv, jwe.ciphertext + jwe.tag, jwe.protected)
        except (ValueError, InvalidUnwrap, InvalidTag) as error:
            raise HostileInput("JWE_REFUSED", "the secret was not encrypted to this request's key") from error


def _coordinate(value: int) -> str:
    return base64.urlsafe_b64encode(value.to_bytes(_KEY_BYTES, "big")).rstrip(b"=").decode("ascii")
