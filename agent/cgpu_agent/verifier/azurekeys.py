"""Judges the two answers that a key comes with: the attestation service's token, and the vault's signed release.

The token must be made for this request and name this TPM's key: it is sent on together with the caller's right to use
the vault, so a token that names another's key would hand the secret to that one. The release is signed by a
certificate that must be the vault's own by name; TLS alone would let whoever ends it replay an older one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.verification import PolicyBuilder, ServerVerifier, Store, VerificationError

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.verifier.keys import certificate_from_der, certificate_key, require_strong
from cgpu_agent.verifier.maa import MAX_TOKEN, MaaParty, verify_maa_token
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.keyrelease import MAX_ANSWER, KeyPath, WrappedKey, parse_payload
from cgpu_agent.wire.strictjson import Fields, unb64url
from cgpu_agent.wire.tpm import RsaKey, parse_public

_KEY_NAME: Final = "TpmEphemeralEncryptionKey"
_MAX_CHAIN: Final = 8


@dataclass(frozen=True, slots=True)
class AzureJudge:
    """Who is believed.

    Attributes:
        issuer: the attestation service, ``https://HOST``.
        vault: the vault or Managed HSM, ``https://HOST``.
        roots: CAs that may certify the vault's name.
        now: the moment of judgement, with a time zone.

    Raises:
        Misuse: ``BAD_ARGUMENT``: no roots, or a vault that no certificate can name.
    """

    issuer: str
    vault: str
    roots: Sequence[x509.Certificate]
    now: Callable[[], datetime]

    def __post_init__(self) -> None:
        try:
            self._verifier()
        except ValueError:
            raise Misuse("BAD_ARGUMENT", "there are no roots, or no certificate can name this vault") from None

    def _verifier(self) -> ServerVerifier:
        name = x509.DNSName(self.vault.removeprefix("https://"))
        return PolicyBuilder().store(Store(list(self.roots))).time(self.now()).build_server_verifier(name)

    def token(self, token: bytes, jwks: bytes, *, nonce: str, key: bytes) -> bool:
        """Whether the service vouches for the VM.

        Args:
            token: in compact form.
            jwks: its key set.
            nonce: the client payload.
            key: TPMT_PUBLIC of the key that the token must name.

        Raises:
            HostileInput: with the slug of the step that refused, or ``WRONG_KEY``.
        """
        answer = verify_maa_token(token, MaaParty(self.now(), (self.issuer,), jwks, nonce.encode("ascii")))
        if answer.refusal is not None:
            raise HostileInput(answer.refusal.slug or "BAD_TOKEN", answer.refusal.detail)
        public = parse_public(key).key
        claims = strictjson.loads(unb64url(token.split(b".")[1].decode("ascii")), "token", MAX_TOKEN)
        if not isinstance(public, RsaKey) or _named_modulus(claims) != public.modulus:
            raise HostileInput("WRONG_KEY", "the token names another encryption key than this TPM's")
        return answer.endorsed_by != "none"

    def release(self, jws: bytes, path: KeyPath, *, nonce: str, mechanism: str) -> WrappedKey:
        """The wrapped key that the vault signed for this request.

        Raises:
            HostileInput: ``BAD_TOKEN``, ``CRITICAL_HEADER``, ``WRONG_ALGORITHM``, ``BAD_CHAIN``, ``BAD_SIGNATURE``,
                and what ``parse_payload`` and ``verifier.keys`` raise.
        """
        try:
            header_text, payload_text, signature_text = jws.decode("ascii").split(".")
            header, payload, signature = (unb64url(each) for each in (header_text, payload_text, signature_text))
        except ValueError:
            raise HostileInput("BAD_TOKEN", "not base64url in three parts") from None
        signer = self._signer(header)
        try:
            signer.verify(signature, jws.rpartition(b".")[0], PKCS1v15(), SHA256())
        except InvalidSignature:
            raise HostileInput("BAD_SIGNATURE", "the vault did not sign this") from None
        return parse_payload(payload, self.vault, path, nonce=nonce, mechanism=mechanism)

    def _signer(self, data: bytes) -> RSAPublicKey:
        header = Fields(strictjson.loads(data, "release header", MAX_ANSWER), "release header")
        if "crit" in header.keys():  # noqa: SIM118 - Fields is no mapping
            raise HostileInput("CRITICAL_HEADER", "the answer demands extensions that are not known here")
        if header.raw("alg") != "RS256":
            raise HostileInput("WRONG_ALGORITHM", "the answer is not signed by RS256")
        ders = [_der(each) for each in header.items("x5c", _MAX_CHAIN)]
        if not ders:
            raise header.fail("x5c is empty")
        if "x5t#S256" in header.keys():  # noqa: SIM118
            thumbprint = base64.urlsafe_b64encode(hashlib.sha256(ders[0]).digest()).rstrip(b"=").decode("ascii")
            if not hmac.compare_digest(header.text("x5t#S256", 64).encode(), thumbprint.encode()):
                raise HostileInput("BAD_CHAIN", "the thumbprint is not that of the first certificate")
        leaf, *others = (certificate_from_der(der) for der in ders)
        try:
            self._verifier().verify(leaf, others)
        except VerificationError as error:
            raise HostileInput("BAD_CHAIN", "no trusted CA certifies the signer as this vault") from error
        key = require_strong(certificate_key(leaf))
        if not isinstance(key, RSAPublicKey):
            raise HostileInput("WRONG_ALGORITHM", "the vault's key is not an RSA key")
        return key


def _der(text: object) -> bytes:
    """RFC 7515, 4.1.6."""
    try:
        return base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except binascii.Error:
        raise HostileInput("BAD_TOKEN", "a certificate is not base64") from None


def _named_modulus(claims: object) -> int | None:
    """Modulus of the one key that the service says it encrypted to."""
    runtime = claims.get("x-ms-runtime") if isinstance(claims, dict) else None
    keys = runtime.get("keys") if isinstance(runtime, dict) else None
    if not isinstance(keys, list):
        return None
    named = [key for key in keys if isinstance(key, dict) and key.get("kid") == _KEY_NAME]
    if len(named) != 1 or not isinstance(named[0].get("n"), str):
        return None
    try:
        return int.from_bytes(unb64url(named[0]["n"]), "big")
    except ValueError:
        return None
