"""The cipher of one sealed object: its key, derived for it alone, and its segments one by one."""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.wire.sealed import KEY_SIZE, Header, ObjectName


class SegmentCipher:
    """Seals and opens the segments of the object that has this key, name and header.

    No buffer may be visible to anybody else during a call: whoever writes to the input while it runs can have altered
    bytes accepted, and the output holds plaintext before it is verified.

    Raises ``Misuse`` (``BAD_KEY``) unless the key has ``KEY_SIZE`` bytes.
    """

    def __init__(self, key: bytes | bytearray, name: ObjectName, header: Header) -> None:
        if len(key) != KEY_SIZE:
            raise Misuse("BAD_KEY", f"the key of a sealed object has {KEY_SIZE} bytes")
        self._header = header
        derived = bytearray(KEY_SIZE)
        HKDF(SHA256(), KEY_SIZE, salt=header.salt, info=name.associated_data()).derive_into(key, derived)
        self._aead = AESGCM(derived)
        derived[:] = bytes(KEY_SIZE)

    def seal(self, index: int, *, last: bool, plain: memoryview, out: memoryview) -> None:
        """``out`` has exactly ``TAG_SIZE`` bytes more than ``plain``."""
        self._aead.encrypt_into(self._header.nonce(index, last=last), plain, None, out)

    def open(self, index: int, *, last: bool, sealed: memoryview, out: memoryview) -> None:
        """``out`` has exactly ``TAG_SIZE`` bytes less than ``sealed``, and is all zeros when this fails.

        Raises ``HostileInput`` (``NOT_AUTHENTIC``).
        """
        try:
            self._aead.decrypt_into(self._header.nonce(index, last=last), sealed, None, out)
        except InvalidTag as error:
            out[:] = bytes(len(out))
            raise HostileInput(
                "NOT_AUTHENTIC",
                f"sealed object: segment {index} is altered or out of place, the object was cut or prolonged there, "
                "or its key, key id, object id, version or segment size is another",
            ) from error
