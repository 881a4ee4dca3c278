"""Azure Key Vault's and Managed HSM's ``release``: what is asked, and what the signed answer holds.

Source: the REST reference of Key Vault 7.4, and the answer as Microsoft's public clients read it. ``key_hsm`` is
base64url of JSON whose ``ciphertext`` is base64url again: an AES key under RSA-OAEP, then the key under that one
(RFC 5649).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.strictjson import Fields, unb64url

API_VERSION: Final = "7.4"
MAX_ANSWER: Final = 256 << 10

MECHANISMS: Final[Mapping[str, str]] = {
    "CKM_RSA_AES_KEY_WRAP": "sha1",
    "RSA_AES_KEY_WRAP_256": "sha256",
    "RSA_AES_KEY_WRAP_384": "sha384",
}
"""How a key is wrapped -> hash of OAEP and of its MGF1."""

_PATH = re.compile(r"(?P<name>[0-9A-Za-z-]{1,127})(/(?P<version>[0-9a-f]{32}))?")
_WRAPPED_KEK: Final = 256
_MAX_KEY: Final = 8192
"""As much as a released key may have."""
_RAW: Final = frozenset({"oct", "oct-HSM"})
_PKCS8: Final = frozenset({"RSA", "RSA-HSM", "EC", "EC-HSM"})


@dataclass(frozen=True, slots=True)
class KeyPath:
    """A key in a vault; ``version`` ``None``: the one that the vault calls current."""

    name: str
    version: str | None

    @classmethod
    def parse(cls, text: str) -> KeyPath:
        """``NAME`` or ``NAME/VERSION``. Nothing in it needs an escape in a URL. Raises ``HostileInput``."""
        found = _PATH.fullmatch(text)
        if found is None:
            raise HostileInput("BAD_FIELD", "a key is NAME or NAME/VERSION, the version 32 hex digits")
        return cls(found["name"], found["version"])

    @property
    def url(self) -> str:
        """Path of its URL."""
        return f"/keys/{self.name}" + (f"/{self.version}" if self.version else "")


@dataclass(frozen=True, slots=True)
class WrappedKey:
    """A released key. ``kek`` opens with the TPM's key, ``key`` with what that yields; ``der``: it is a PKCS #8."""

    version: str
    der: bool
    kek: bytes
    key: bytes


def encode_release(token: str, nonce: str, mechanism: str) -> bytes:
    """Body of the POST."""
    return strictjson.dumps({"enc": mechanism, "nonce": nonce, "target": token})


def parse_release(body: bytes) -> bytes:
    """The signed answer (JWS, compact) in the body of the reply. Raises ``HostileInput``."""
    fields = Fields(strictjson.loads(body, "release answer", MAX_ANSWER), "release answer")
    value = fields.text("value", MAX_ANSWER)
    if not value.isascii():
        raise fields.fail("value is not ASCII")
    return value.encode("ascii")


def parse_payload(data: bytes, vault: str, path: KeyPath, *, nonce: str, mechanism: str) -> WrappedKey:
    """Read what the vault signed, and require it to be the answer to this request.

    Args:
        vault: ``https://HOST``.

    Raises:
        HostileInput: ``NONCE_MISMATCH``, ``WRONG_ALGORITHM``, ``WRONG_KEY``, ``TOO_LARGE``, ``BAD_JSON``,
            ``DUPLICATE_KEY``, ``BAD_FIELD``.
    """
    outer = Fields(strictjson.loads(data, "release", MAX_ANSWER), "release")
    request = outer.fields("request")
    if request.text("nonce", 256) != nonce:
        raise HostileInput("NONCE_MISMATCH", "the vault answers another request")
    if request.text("enc", 64) != mechanism:
        raise HostileInput("WRONG_ALGORITHM", "the vault wrapped the key in another way than was asked for")
    key = outer.fields("response").fields("key").fields("key")
    kid = key.text("kid", 512)
    version = kid.rpartition("/")[2]
    named = KeyPath(path.name, path.version or version)
    if kid != vault + named.url or re.fullmatch(r"[0-9a-f]{32}", version) is None:
        raise HostileInput("WRONG_KEY", "the vault released another key than was asked for")
    kind = key.choice("kty", _RAW | _PKCS8)
    text = key.text("key_hsm", MAX_ANSWER)
    try:
        hsm = Fields(strictjson.loads(unb64url(text), "key_hsm", MAX_ANSWER), "key_hsm")
        ciphertext = unb64url(hsm.text("ciphertext", MAX_ANSWER))
    except ValueError:
        raise key.fail("key_hsm is not base64url") from None
    # RFC 5649 pads to 8 bytes, and puts 8 in front.
    if not 16 <= len(ciphertext) - _WRAPPED_KEK <= _MAX_KEY + 8 or len(ciphertext) % 8:
        raise key.fail("the ciphertext has an impossible size")
    return WrappedKey(version, kind in _PKCS8, ciphertext[:_WRAPPED_KEK], ciphertext[_WRAPPED_KEK:])
