"""The protocol of Trustee's key broker (KBS), version 0.4.0: its messages, and what evidence is bound to.

Source: Trustee's protocol document and its server at v0.21. The server takes that version and no other, so what it
answers is read as strictly: a key that nobody knows is a protocol that nobody knows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.strictjson import Fields, unb64url

VERSION: Final = "0.4.0"
MAX_CHALLENGE: Final = 4096
MAX_TOKEN: Final = 1 << 20
MAX_RESPONSE: Final = 16 << 10
MAX_ERROR: Final = 16 << 10

KEY_ALGORITHM: Final = "ECDH-ES+A256KW"
CONTENT_ALGORITHM: Final = "A256GCM"
CURVE: Final = "P-256"

Tee = Literal["az-snp-vtpm", "az-tdx-vtpm", "tdx", "tpm"]
"""The kinds of evidence that are made here, as the protocol names them."""

_HASH: Final = "sha384"
_ERRORS: Final = "https://github.com/confidential-containers/kbs/errors/"
_VARIANT = re.compile(r"[A-Za-z]{1,64}")
_TOKEN = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+", re.ASCII)
_NONCE_SIZE: Final = 32
_MAX_HEADER: Final = 1024
_MAX_SAFE_INTEGER: Final = (1 << 53) - 1


@dataclass(frozen=True, slots=True)
class Jwe:
    """A secret in flight (RFC 7516, 7.2.2), of the one form that is taken here.

    Attributes:
        protected: the header as sent, which is what the tag covers.
        x, y: 32 bytes each, of the sender's key; nobody looked whether they are a point.
        encrypted_key: 40 bytes.
        iv: 12 bytes.
        ciphertext: as long as the secret.
        tag: 16 bytes.
    """

    protected: bytes
    x: bytes
    y: bytes
    encrypted_key: bytes
    iv: bytes
    ciphertext: bytes
    tag: bytes


def canonical(value: object) -> bytes:
    """JSON as RFC 8785 has it, of what a binding is made of: objects with ASCII keys, text and small whole numbers.

    For these Python's own order and spelling are that canonical form. Raises ``HostileInput`` (``NOT_CANONICAL``).
    """
    try:
        if _has_one_form(value):
            return strictjson.dumps(value)
    except UnicodeEncodeError:  # a lone surrogate
        pass
    raise HostileInput("NOT_CANONICAL", "a value that has no canonical form here")


def _has_one_form(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and key.isascii() and _has_one_form(value[key]) for key in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= _MAX_SAFE_INTEGER
    return isinstance(value, str)


def binding(nonce: str, tee_pubkey: Mapping[str, str], additional_evidence: str | None = None) -> bytes:
    """The 48 bytes that evidence is made over.

    Args:
        nonce: the challenge's text.
        tee_pubkey: the JWK to which the secret shall be encrypted.
        additional_evidence: what devices said, exactly as sent (empty: there are none), for the primary evidence;
            ``None`` for the devices' own.
    """
    value: dict[str, object] = {"nonce": nonce, "tee-pubkey": dict(tee_pubkey)}
    if additional_evidence is not None:
        value["additional-evidence"] = additional_evidence
    return hashlib.new(_HASH, canonical(value)).digest()


def encode_request(tee: Tee) -> bytes:
    """Request: the first message."""
    return strictjson.dumps({"extra-params": {"supported-hash-algorithms": [_HASH]}, "tee": tee, "version": VERSION})


def parse_challenge(data: bytes) -> str:
    """Challenge: the nonce, as the text that is bound; base64 of 32 bytes.

    Raises ``HostileInput``: as ``strictjson.loads``, ``BAD_FIELD`` (another hash algorithm, too), ``UNKNOWN_KEY``.
    """
    fields = Fields(strictjson.loads(data, "challenge", MAX_CHALLENGE), "challenge")
    nonce = fields.base64("nonce", _NONCE_SIZE)
    extra = fields.raw("extra-params")
    fields.end()
    if len(nonce) != _NONCE_SIZE:
        raise fields.fail(f"nonce is not {_NONCE_SIZE} bytes")
    if extra not in ("", {}, {"selected-hash-algorithm": _HASH}):
        raise fields.fail("extra-params ask for something that is not known here")
    return strictjson.b64(nonce)


def encode_attestation(
    nonce: str, tee_pubkey: Mapping[str, str], primary: Mapping[str, object], additional_evidence: str
) -> bytes:
    """Attestation: the evidence. Of its keys only these two are spelled with an underscore."""
    return strictjson.dumps(
        {
            "runtime-data": {"nonce": nonce, "tee-pubkey": dict(tee_pubkey)},
            "tee-evidence": {"additional_evidence": additional_evidence, "primary_evidence": dict(primary)},
        }
    )


def parse_token(data: bytes) -> str:
    """The attestation token, a signed JWT of which nothing but its form is looked at. Raises ``HostileInput``."""
    fields = Fields(strictjson.loads(data, "token", MAX_TOKEN), "token")
    token = fields.text("token", MAX_TOKEN)
    fields.end()
    if _TOKEN.fullmatch(token) is None:
        raise fields.fail("token is no JWT")
    return token


def parse_response(data: bytes) -> Jwe:
    """Response: the secret, still closed.

    Raises ``HostileInput``: as ``strictjson.loads``, ``BAD_FIELD`` (another algorithm or curve, too), ``UNKNOWN_KEY``
    (whatever else a header may hold: ``crit``, ``zip``, ``apu``, unprotected ones).
    """
    fields = Fields(strictjson.loads(data, "response", MAX_RESPONSE), "response")
    protected = fields.text("protected", _MAX_HEADER)
    said = _base64url(fields, "protected", protected, 0, _MAX_HEADER)
    header = Fields(strictjson.loads(said, "header", _MAX_HEADER), "header")
    header.choice("alg", frozenset({KEY_ALGORITHM}))
    header.choice("enc", frozenset({CONTENT_ALGORITHM}))
    key = header.fields("epk")
    header.end()
    key.choice("kty", frozenset({"EC"}))
    key.choice("crv", frozenset({CURVE}))
    x, y = (_base64url(key, name, key.raw(name), 32, 32) for name in ("x", "y"))
    key.end()
    found = Jwe(
        protected.encode("ascii"),
        x,
        y,
        encrypted_key=_base64url(fields, "encrypted_key", fields.raw("encrypted_key"), 40, 40),
        iv=_base64url(fields, "iv", fields.raw("iv"), 12, 12),
        ciphertext=_base64url(fields, "ciphertext", fields.raw("ciphertext"), 1, MAX_RESPONSE),
        tag=_base64url(fields, "tag", fields.raw("tag"), 16, 16),
    )
    fields.end()
    return found


def parse_error(data: bytes) -> str:
    """ErrorInformation: which of the server's errors, by the last part of its ``type``. Raises ``HostileInput``.

    The detail is for people and dropped: it is the server's text, and nobody here shows it.
    """
    fields = Fields(strictjson.loads(data, "error", MAX_ERROR), "error")
    kind = fields.text("type", 256)
    fields.text("detail", MAX_ERROR)
    fields.end()
    variant = kind.removeprefix(_ERRORS)
    if variant == kind or _VARIANT.fullmatch(variant) is None:
        raise fields.fail("type is none of this protocol's")
    return variant


def _base64url(fields: Fields, name: str, value: Any, low: int, high: int) -> bytes:
    try:
        decoded = unb64url(value)
    except (TypeError, ValueError):
        raise fields.fail(f"{name} is not base64url") from None
    if not low <= len(decoded) <= high:
        raise fields.fail(f"{name} is not {low}-{high} bytes")
    return decoded
