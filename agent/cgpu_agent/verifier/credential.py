"""MakeCredential: a secret that only the TPM with that EK can open, and only while it holds the key of that Name.

Source: TCG "Trusted Platform Module Library", Part 1, rev 1.59: 24 (credential protection), 11.4.10 (KDFa, KDFe),
B.10.4 (RSA), C.6.4 (ECC).
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable, Mapping
from typing import Final

from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives.asymmetric.ec import ECDH, EllipticCurvePublicKey, generate_private_key
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.verifier.keys import key_of
from cgpu_agent.wire.tpm import ALG_AES, ALG_CFB, HASH_ALGS, HASH_SIZES, ObjectAttributes, Public

_HASHES: Final[Mapping[str, Callable[[], HashAlgorithm]]] = {"sha256": SHA256, "sha384": SHA384, "sha512": SHA512}
_EK_MUST: Final = ObjectAttributes.RESTRICTED | ObjectAttributes.DECRYPT | ObjectAttributes.FIXED_TPM
_IDENTITY: Final = b"IDENTITY\0"


def make_credential(
    ek: Public, ak_name: bytes, secret: bytes, *, random: Callable[[int], bytes] = os.urandom
) -> tuple[bytes, bytes]:
    """Encrypt a secret so that TPM2_ActivateCredential opens it for that EK and that AK.

    It proves only that EK and AK are in one place: trust in the EK comes from its certificate, and the attributes of
    the AK are to be checked (``require_restricted``) before its Name is used here.

    Args:
        ek: an RSA or ECC storage key: restricted, decrypt, fixedTPM, AES-CFB, nameAlg SHA-256 or better.
        ak_name: Name of the AK: algorithm and digest.
        secret: 1 byte up to the size of the EK's nameAlg digest.
        random: source of the seed.

    Returns:
        ``(id_object, encrypted_secret)``: contents of TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET, no size prefix.

    Raises:
        HostileInput: ``EK_NOT_SUITABLE``, ``BAD_NAME``, ``BAD_KEY``, ``WEAK_KEY``.
        Misuse: ``BAD_SECRET`` for a secret of a wrong size.
    """
    symmetric_bits = _require_ek(ek)
    _require_name(ak_name)
    size = HASH_SIZES[ek.name_alg]
    if not 1 <= len(secret) <= size:
        raise Misuse("BAD_SECRET", f"the secret must have 1 to {size} bytes")
    seed, encrypted_secret = _share_seed(ek, random)
    # C.6.4 and B.10.4 end in the same seed; from here on 24.4 and 24.5 are one for both kinds of EK.
    cipher_key = _kdfa(ek.name_alg, seed, b"STORAGE", ak_name, symmetric_bits)
    encryptor = Cipher(AES(cipher_key), CFB(bytes(16))).encryptor()
    identity = encryptor.update(_sized(secret)) + encryptor.finalize()
    mac_key = _kdfa(ek.name_alg, seed, b"INTEGRITY", b"", 8 * size)
    integrity = hmac.digest(mac_key, identity + ak_name, ek.name_alg)
    return _sized(integrity) + identity, encrypted_secret


def _kdfa(hash_name: str, key: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    """KDFa (Part 1, 11.4.10.2): SP 800-108 counter mode over HMAC; ``context`` is contextU || contextV."""
    fixed = label + b"\0" + context + bits.to_bytes(4, "big")
    return _blocks(bits, lambda counter: hmac.digest(key, counter + fixed, hash_name))


def _kdfe(hash_name: str, z: bytes, label: bytes, parties: bytes, bits: int) -> bytes:
    """KDFe (Part 1, 11.4.10.3): SP 800-56A; ``label`` ends in its NUL, ``parties`` is partyUInfo || partyVInfo."""
    return _blocks(bits, lambda counter: hashlib.new(hash_name, counter + z + label + parties).digest())


def _blocks(bits: int, block: Callable[[bytes], bytes]) -> bytes:
    out = b""
    counter = 1
    while len(out) * 8 < bits:
        out += block(counter.to_bytes(4, "big"))
        counter += 1
    return out[: bits // 8]


def _require_ek(ek: Public) -> int:
    fits = ek.attributes & _EK_MUST == _EK_MUST and not ek.attributes & ObjectAttributes.SIGN
    if not fits:
        raise HostileInput("EK_NOT_SUITABLE", "the EK is not a restricted decryption key fixed to one TPM")
    if ek.name_alg not in _HASHES:
        raise HostileInput("EK_NOT_SUITABLE", f"the EK's Name is by {ek.name_alg}")
    if ek.symmetric != ALG_AES or ek.symmetric_mode != ALG_CFB or ek.symmetric_bits not in (128, 192, 256):
        raise HostileInput("EK_NOT_SUITABLE", "the EK does not protect by AES in CFB mode")
    return ek.symmetric_bits


def _require_name(name: bytes) -> None:
    algorithm = int.from_bytes(name[:2], "big")
    known = (HASH_ALGS[each] == algorithm and len(name) == 2 + HASH_SIZES[each] for each in _HASHES)
    if not any(known):
        raise HostileInput("BAD_NAME", "the AK's Name is not an algorithm and its digest, SHA-256 or better")


def _share_seed(ek: Public, random: Callable[[int], bytes]) -> tuple[bytes, bytes]:
    key = key_of(ek)
    size = HASH_SIZES[ek.name_alg]
    if isinstance(key, EllipticCurvePublicKey):
        ephemeral = generate_private_key(key.curve)
        width = (key.curve.key_size + 7) // 8
        point = ephemeral.public_key().public_numbers()
        x, y = point.x.to_bytes(width, "big"), point.y.to_bytes(width, "big")
        own_x = key.public_numbers().x.to_bytes(width, "big")
        seed = _kdfe(ek.name_alg, ephemeral.exchange(ECDH(), key), _IDENTITY, x + own_x, 8 * size)
        return seed, _sized(x) + _sized(y)
    seed = random(size)
    make_hash = _HASHES[ek.name_alg]
    return seed, key.encrypt(seed, OAEP(MGF1(make_hash()), make_hash(), _IDENTITY))


def _sized(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data
