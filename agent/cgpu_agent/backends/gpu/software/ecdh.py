"""Ephemeral Diffie-Hellman on P-384 with points as SPDM sends them: x || y (DSP0274 1.2.1, 10.16)."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import ec

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.spdm12 import EXCHANGE_SIZE


def encode_point(key: ec.EllipticCurvePublicKey) -> bytes:
    """The point of a P-384 key, 96 bytes."""
    numbers = key.public_numbers()
    half = EXCHANGE_SIZE // 2
    return numbers.x.to_bytes(half, "big") + numbers.y.to_bytes(half, "big")


def agree(key: ec.EllipticCurvePrivateKey, point: bytes) -> bytes:
    """The shared x coordinate, 48 bytes. Raises ``HostileInput`` (``BAD_POINT``) for a point off the curve."""
    half = EXCHANGE_SIZE // 2
    x, y = (int.from_bytes(part, "big") for part in (point[:half], point[half:]))
    try:
        other = ec.EllipticCurvePublicNumbers(x, y, ec.SECP384R1()).public_key()
        return key.exchange(ec.ECDH(), other)
    except ValueError as error:
        raise HostileInput("BAD_POINT", "SPDM key exchange: the point is not on P-384") from error
