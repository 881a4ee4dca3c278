"""An appraisal as an EAT Attestation Result (EAR), the token that brokers and brokers' policies already read.

Source: draft-fv-rats-ear and its profile ``tag:github.com,2023:veraison/ear``; RFC 9711 (``eat_nonce``, ``submods``),
RFC 7800 (``cnf``), RFC 7638 (thumbprint). Claims of our own begin with ``cgpu.``. An EAR outlives the moment of its
making and travels, so it says for whom it is, until when, what was asked, and which key its bearer must still prove.
"""

from __future__ import annotations

import base64
import hashlib
import json
import warnings
from collections.abc import Mapping
from typing import Any, Final, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
)

from cgpu_agent.errors import Misuse
from cgpu_agent.verifier.appraisal import Appraisal, PartAppraisal
from cgpu_agent.verifier.claims import claims_of

PROFILE: Final = "tag:github.com,2023:veraison/ear"

SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey

_CURVES: Final = {"secp256r1": ("P-256", 32, "ES256"), "secp384r1": ("P-384", 48, "ES384")}
_KEY_TYPES: Final[Mapping[str, Literal["EC", "RSA", "OKP"]]] = {
    "ES256": "EC",
    "ES384": "EC",
    "EdDSA": "OKP",
    "RS256": "RSA",
}
_MIN_RSA_BITS: Final = 2048


def ear_claims(
    appraisal: Appraisal,
    *,
    verifier_id: Mapping[str, str],
    audience: str,
    issued_at: int,
    expires_at: int,
    jti: str,
) -> dict[str, Any]:
    """The claims set of an EAR, ready for ``json.dumps`` and ``sign_ear``.

    Args:
        appraisal: to be handed on, whatever its status.
        verifier_id: ``build`` and ``developer`` of who judged.
        audience: who may rely on it.
        issued_at, expires_at: seconds since the epoch, by the relying party's clock.
        jti: identifier of the token; the same evidence judged again should have the same one.

    Raises:
        Misuse: ``BAD_EAR``.
    """
    if set(verifier_id) != {"build", "developer"}:
        raise Misuse("BAD_EAR", "a verifier id has the members build and developer")
    if not audience or not jti or expires_at <= issued_at:
        raise Misuse("BAD_EAR", "an EAR needs an audience, an id, and an end after its beginning")
    claims: dict[str, Any] = {
        "aud": audience,
        "cgpu.reason": appraisal.reason,
        "cgpu.simulated": appraisal.result.simulated,
        "cgpu.status": appraisal.status,
        "ear.verifier-id": dict(verifier_id),
        "eat_profile": PROFILE,
        "exp": expires_at,
        "iat": issued_at,
        "jti": jti,
        "submods": {each.part: _submod(each, appraisal) for each in appraisal.parts},
    }
    statement = appraisal.result.statement
    if statement is not None:
        claims["cgpu.purpose"] = statement.purpose
        claims["eat_nonce"] = _b64url(statement.nonce)
        if statement.release is not None:
            claims |= {
                "cgpu.broker": statement.release.broker,
                "cgpu.key_id": statement.release.key,
                "cgpu.recipient": None if statement.release.recipient is None else statement.release.recipient.hex(),
            }
        if statement.public_key is not None:
            claims["cnf"] = _confirmation(statement.public_key)
    return claims


def sign_ear(claims: Mapping[str, Any], key: SigningKey) -> str:
    """The claims as a JWT in compact form: ES256, ES384, RS256 or EdDSA, as the key's type says.

    Args:
        claims: from ``ear_claims``.
        key: the verifier's own; its RFC 7638 thumbprint becomes ``kid``.

    Raises:
        Misuse: ``BAD_EAR_KEY``.
    """
    # Only whoever signs needs a JOSE library.
    from joserfc import jwk, jwt  # noqa: PLC0415

    algorithm = _algorithm(key)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    signer = jwk.JWKRegistry.import_key(pem, _KEY_TYPES[algorithm])
    with warnings.catch_warnings():
        # RFC 9864 renames EdDSA; those who read EARs today know it by this name.
        warnings.simplefilter("ignore")
        header = {"alg": algorithm, "kid": signer.thumbprint(), "typ": "JWT"}
        return jwt.encode(header, dict(claims), signer, algorithms=[algorithm])


def key_thumbprint(spki: bytes) -> str | None:
    """RFC 7638 SHA-256 thumbprint of a DER SubjectPublicKeyInfo; ``None`` for a key that has no such JWK here."""
    try:
        key = load_der_public_key(spki)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        name, size, _ = _CURVES[key.curve.name]
        point = key.public_numbers()
        members = {"crv": name, "kty": "EC", "x": _number(point.x, size), "y": _number(point.y, size)}
    elif isinstance(key, rsa.RSAPublicKey):
        numbers = key.public_numbers()
        members = {"e": _number(numbers.e), "kty": "RSA", "n": _number(numbers.n)}
    elif isinstance(key, ed25519.Ed25519PublicKey):
        members = {"crv": "Ed25519", "kty": "OKP", "x": _b64url(key.public_bytes(Encoding.Raw, PublicFormat.Raw))}
    else:
        return None
    canonical = json.dumps(members, sort_keys=True, separators=(",", ":")).encode()
    return _b64url(hashlib.sha256(canonical).digest())


def _submod(part: PartAppraisal, appraisal: Appraisal) -> dict[str, Any]:
    claims = claims_of(part.part, appraisal.result, appraisal.facts, appraisal.coverage)
    return {
        "cgpu.reason": part.reason,
        "cgpu.reported": dict(claims.reported),
        "cgpu.required": part.required,
        "cgpu.rules": list(part.rules),
        "cgpu.signed": dict(claims.signed),
        "ear.appraisal-policy-id": f"sha256:{appraisal.policy_digest}",
        "ear.status": part.status,
        "ear.trustworthiness-vector": dict(part.vector),
    }


def _confirmation(spki: bytes) -> dict[str, str]:
    """The key that the caller named. Nobody saw it used: that is for whoever gets the token to ask for."""
    named = {"cgpu.possession": "claimed", "cgpu.spki-sha256": _b64url(hashlib.sha256(spki).digest())}
    thumbprint = key_thumbprint(spki)
    return named if thumbprint is None else {**named, "jkt": thumbprint}


def _algorithm(key: SigningKey) -> str:
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES:
        return _CURVES[key.curve.name][2]
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= _MIN_RSA_BITS:
        return "RS256"
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "EdDSA"
    raise Misuse("BAD_EAR_KEY", "an EAR is signed by a key on P-256 or P-384, by Ed25519, or by RSA of 2048 bits")


def _number(value: int, size: int | None = None) -> str:
    return _b64url(value.to_bytes(size or (value.bit_length() + 7) // 8, "big"))


def _b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
