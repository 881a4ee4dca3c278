"""Verifies what a TPM signed (quote or certify): the one place that knows signature schemes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS, PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.keys import AttestationKey
from cgpu_agent.wire.tpm import ALG_RSAPSS, ALG_RSASSA, Signature, parse_signature

_HASHES: Final[Mapping[str, HashAlgorithm]] = {"sha256": SHA256(), "sha384": SHA384(), "sha512": SHA512()}


def _read_signature(ak: AttestationKey, data: bytes) -> Signature:
    if isinstance(ak.key, RSAPublicKey) and len(data) == (ak.key.key_size + 7) // 8:
        # A bare PKCS#1 signature names no scheme and no hash: those of the key, or what every platform AK uses.
        pinned = None if ak.public is None else ak.public.scheme_hash
        return Signature(ALG_RSASSA, pinned or "sha256", bytes(data))
    return parse_signature(data)


def _require_fit(ak: AttestationKey, signature: Signature) -> None:
    if signature.hash not in _HASHES:
        raise HostileInput("WEAK_HASH", f"a signature over {signature.hash}, which no longer binds what was signed")
    wants_rsa = signature.algorithm in (ALG_RSASSA, ALG_RSAPSS)
    if wants_rsa != isinstance(ak.key, RSAPublicKey):
        raise HostileInput("BAD_SIGNATURE", "the signature scheme does not fit the kind of key")
    if ak.public is None:
        return
    if ak.public.scheme not in (None, signature.algorithm):
        raise HostileInput("BAD_SIGNATURE", "the signature scheme is not the one that the key is limited to")
    if ak.public.scheme_hash not in (None, signature.hash):
        raise HostileInput("BAD_SIGNATURE", "the signature hash is not the one that the key is limited to")


def verify_signature(ak: AttestationKey, attest: bytes, signature: bytes) -> Signature:
    """Verify that the AK signed exactly these bytes.

    Args:
        ak: the key.
        attest: the signed bytes (TPMS_ATTEST; not parsed here).
        signature: TPMT_SIGNATURE (RSASSA, RSAPSS, ECDSA), or a bare PKCS#1 v1.5 signature as long as the modulus.

    Returns:
        The parsed signature: its ``hash`` is also that of the pcrDigest.

    Raises:
        HostileInput: ``BAD_SIGNATURE``; ``WEAK_HASH`` for SHA-1; what ``parse_signature`` raises.
    """
    parsed = _read_signature(ak, signature)
    _require_fit(ak, parsed)
    digest = _HASHES[parsed.hash]
    key = ak.key
    try:
        if isinstance(key, EllipticCurvePublicKey):
            key.verify(parsed.signature, attest, ECDSA(digest))
        elif parsed.algorithm == ALG_RSASSA:
            key.verify(parsed.signature, attest, PKCS1v15(), digest)
        else:
            # Part 1, B.7: a TPM takes the longest salt that fits, or one as long as the digest: both are sound.
            key.verify(parsed.signature, attest, PSS(MGF1(digest), PSS.AUTO), digest)
    except (InvalidSignature, ValueError, UnsupportedAlgorithm) as error:
        raise HostileInput("BAD_SIGNATURE", "the signature is not by this key over these bytes") from error
    return parsed
