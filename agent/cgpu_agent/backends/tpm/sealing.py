"""``SealingCommands`` composed of single TPM commands: for an approved boot, behind the latch.

Every policy session is salted, since on a TPM without a resource manager others can use a session whose handle they
guess. It lives within one method, so that no session that satisfied a condition outlives it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final, TypeVar

from cgpu_agent.backends.base import BootApproval
from cgpu_agent.backends.tpm import answers, keys
from cgpu_agent.backends.tpm.esapi import Esapi, Handle
from cgpu_agent.backends.tpm.faults import (
    ABSENT_HANDLE,
    RC_INTEGRITY,
    RC_NV_UNINITIALIZED,
    RC_PCR_CHANGED,
    RC_POLICY,
    RC_SIGNATURE,
    RC_VALUE,
    TpmFault,
    plain,
)
from cgpu_agent.errors import DeviceFault, HostileInput, Misuse, Unavailable
from cgpu_agent.wire import tpmpolicy
from cgpu_agent.wire.tpm import KeyBlob
from cgpu_agent.wire.tpmpolicy import NvIndex

R = TypeVar("R")

MAX_SEALED: Final = 128
"""What every TPM takes (MAX_SYM_DATA of the PC Client profile)."""
_ATTEMPTS: Final = 5
_POINT: Final = 2 * (2 + 32)
"""Bytes of ``unique`` at the end of an ECC P-256 key's TPMT_PUBLIC."""

_WORDS: Final = {
    "KEY_APPROVAL_OLD": "the owner's approval of this boot is of an epoch that is over",
    "KEY_INDEX_LOST": "what the agent keeps in the TPM is gone, or somebody else's",
    "KEY_LATCH_CLOSED": "the latch is closed: the TPM opens no key",
    "KEY_LOST": "this TPM cannot open the key any more: it was cleared, or the key is another TPM's",
    "KEY_NOT_APPROVED": "no approval of the owner fits what booted here",
}


class Sealing:
    """``SealingCommands`` on one context."""

    def __init__(self, esapi: Esapi) -> None:
        self._esapi: Final = esapi
        self._handles: Final[dict[int, Handle]] = {}

    def storage_key(self, owner_auth: bytes = b"") -> bytes:
        template = keys.storage_parent()
        found = self._storage_public()
        if found is not None:
            # Somebody could have put a key there that they know. The TPM gives no such key these attributes.
            if found[:-_POINT] != template[:-_POINT]:
                raise _refusal("KEY_INDEX_LOST")
            return found
        with self._owner(owner_auth):
            handle, public = self._esapi.create_primary(template, "owner")
            with self._flushed(handle):
                self._esapi.evict_control(handle, keys.STORAGE_HANDLE)
        return public

    def holds(self, parent: bytes) -> bool:
        # Made again where somebody evicted it: that is the same key, unless the TPM was cleared.
        return tpmpolicy.name_of(self.storage_key()) == parent

    def nv_define(self, index: NvIndex, owner_auth: bytes = b"") -> None:
        self.nv_undefine(index.index, owner_auth)
        with self._owner(owner_auth):
            self._esapi.nv_define(index.public())

    def nv_undefine(self, index: int, owner_auth: bytes = b"") -> None:
        found = self._found(index)
        if found is None:
            return
        with self._owner(owner_auth):
            self._esapi.nv_undefine(found[0])
        del self._handles[index]

    def nv_public(self, index: int) -> NvIndex | None:
        found = self._found(index)
        return None if found is None else found[1]

    def nv_content(self, index: NvIndex) -> bytes | None:
        found = self._found(index.index)
        if found is None:
            return None
        handle, defined, written = found
        if defined != index:
            raise _refusal("KEY_INDEX_LOST")
        if not written:
            return None
        data = self._esapi.nv_read(handle, index.size, 0, owner=False)
        if len(data) != index.size:
            raise DeviceFault("TPM_ERROR", "the TPM returned another amount of NV data than asked for")
        return data

    def nv_increment(self, index: NvIndex) -> None:
        self._esapi.nv_increment(self._present(index)[0])

    def nv_write(
        self, index: NvIndex, data: bytes, *, parent: bytes, setter: KeyBlob, approval: BootApproval
    ) -> None:
        def write() -> None:
            # ESYS keeps the Name it saw last, and a stale one is refused like a wrong password.
            handle, written = self._present(index)
            cp_hash = tpmpolicy.nv_write_hash(index.name(written=written), data)
            with (
                self._approved(storage, approval) as approved,
                self._session(storage) as session,
                self._loaded(storage, setter) as key,
            ):
                # With the session's nonce and for this very command: the signature is no licence for later.
                nonce = self._esapi.session_nonce(session)
                signature = self._esapi.sign(key, tpmpolicy.signed_hash(nonce, cp_hash), approved)
                self._esapi.policy_signed(session, key, nonce, cp_hash, signature)
                self._esapi.nv_write(handle, data, session)

        storage = self._storage(parent)
        _repeated(write)

    def create_setter(self, parent: bytes, policy: bytes) -> KeyBlob:
        return KeyBlob(*self._esapi.create(self._storage(parent), keys.setter_key(policy), b""))

    def seal(self, parent: bytes, policy: bytes, data: bytes) -> KeyBlob:
        if not 1 <= len(data) <= MAX_SEALED:
            raise Misuse("TPM_ARGUMENT", f"a TPM seals 1 to {MAX_SEALED} bytes")
        storage = self._storage(parent)
        with self._flushed(self._esapi.start_salted_session(storage, policy=False)) as session:
            return KeyBlob(*self._esapi.seal(storage, keys.sealed_data(policy), data, session))

    def unseal(self, parent: bytes, blob: KeyBlob, approval: BootApproval, latch: NvIndex, operand: bytes) -> bytes:
        def unseal() -> bytes:
            with self._approved(storage, approval) as session, self._loaded(storage, blob) as item:
                with _refused_as({RC_POLICY: "KEY_LATCH_CLOSED", RC_NV_UNINITIALIZED: "KEY_LATCH_CLOSED"}):
                    self._esapi.policy_nv(session, self._present(latch)[0], operand, tpmpolicy.EQUAL)
                return self._esapi.unseal(item, session)

        storage = self._storage(parent)
        if self.nv_content(latch) != operand:
            raise _refusal("KEY_LATCH_CLOSED")
        secret = _repeated(unseal)
        # The TPM looked at the latch before it opened the object; it may have been closed since.
        if self.nv_content(latch) != operand:
            raise _refusal("KEY_LATCH_CLOSED")
        return secret

    @contextmanager
    def _approved(self, storage: Handle, approval: BootApproval) -> Iterator[Handle]:
        """A session whose policy is the authority's approval of the present boot."""
        esapi = self._esapi
        name = tpmpolicy.name_of(approval.authority)
        digest = hashlib.sha256(tpmpolicy.to_authorize(approval.approved, approval.ref)).digest()
        with (
            self._flushed(esapi.load_external(approval.authority)) as key,
            _refused_as({RC_SIGNATURE: "KEY_NOT_APPROVED"}),
        ):
            ticket = esapi.verify_signature(key, digest, approval.signature)
        with self._session(storage) as session:
            esapi.policy_pcr(session, approval.selection.marshal())
            epoch = self._present(approval.epoch_index)[0]
            with _refused_as({RC_POLICY: "KEY_APPROVAL_OLD", RC_NV_UNINITIALIZED: "KEY_INDEX_LOST"}):
                operand = approval.epoch.to_bytes(8, "big")
                esapi.policy_nv(session, epoch, operand, tpmpolicy.AT_MOST)
            with _refused_as({RC_VALUE: "KEY_NOT_APPROVED"}):
                esapi.policy_authorize(session, approval.approved, approval.ref, name, ticket)
            yield session

    def _session(self, storage: Handle) -> AbstractContextManager[Handle]:
        return self._flushed(self._esapi.start_salted_session(storage, policy=True))

    @contextmanager
    def _loaded(self, storage: Handle, blob: KeyBlob) -> Iterator[Handle]:
        with _refused_as({RC_INTEGRITY: "KEY_LOST"}):
            handle = self._esapi.load(storage, blob.public, blob.private)
        with self._flushed(handle):
            yield handle

    def _storage(self, parent: bytes) -> Handle:
        """The storage key, if it is the one that is meant: sessions are salted to it, so it must not be another's."""
        if not self.holds(parent):
            raise _refusal("KEY_LOST")
        return self._at(keys.STORAGE_HANDLE)

    def _storage_public(self) -> bytes | None:
        # ESYS salts to the public key that it saw when it was asked for the handle. Asked again, it compares.
        self._handles.pop(keys.STORAGE_HANDLE, None)
        return self._if_there(keys.STORAGE_HANDLE, self._esapi.read_public)

    def _present(self, index: NvIndex) -> tuple[Handle, bool]:
        """Refer to an index, and whether it was written."""
        found = self._found(index.index)
        if found is None or found[1] != index:
            raise _refusal("KEY_INDEX_LOST")
        return found[0], found[2]

    def _found(self, index: int) -> tuple[Handle, NvIndex, bool] | None:
        """What has this handle, and whether it was written. Also has ESYS learn its present Name."""
        data = self._if_there(index, self._esapi.nv_read_public)
        if data is None:
            return None
        try:
            found = answers.parse_nv_public(data)
        except HostileInput as error:
            raise DeviceFault("TPM_ERROR", "an answer of the TPM breaks its format") from error
        defined = NvIndex(found.index, found.attributes & ~tpmpolicy.WRITTEN, found.policy, found.size)
        return self._at(index), defined, bool(found.attributes & tpmpolicy.WRITTEN)

    def _if_there(self, handle: int, read: Callable[[Handle], bytes]) -> bytes | None:
        """What lives at a handle now, whoever put it there since it was asked for last."""
        try:
            return read(self._at(handle))
        except TpmFault as fault:
            self._handles.pop(handle, None)
            if fault.code in ABSENT_HANDLE:
                return None
            raise

    def _at(self, handle: int) -> Handle:
        if handle not in self._handles:
            self._handles[handle] = self._esapi.object_at(handle)
        return self._handles[handle]

    @contextmanager
    def _flushed(self, handle: Handle) -> Iterator[Handle]:
        try:
            yield handle
        finally:
            self._esapi.flush(handle)

    @contextmanager
    def _owner(self, auth: bytes) -> Iterator[None]:
        self._esapi.set_owner_auth(auth)
        try:
            yield
        finally:
            if not self._esapi.broken:
                self._esapi.set_owner_auth(b"")


def _repeated(work: Callable[[], R]) -> R:
    """Run again, from a new session on, when any PCR was extended in between: that ends a policy on PCRs."""
    for _ in range(_ATTEMPTS):
        try:
            return work()
        except TpmFault as fault:
            if plain(fault.code) != RC_PCR_CHANGED:
                raise
    raise DeviceFault("TPM_BUSY", "PCRs kept changing while a key was being opened", retry_after=1.0)


@contextmanager
def _refused_as(slugs: dict[int, str]) -> Iterator[None]:
    """Say what a refusal of the TPM means here."""
    try:
        yield
    except TpmFault as fault:
        slug = slugs.get(plain(fault.code))
        if slug is None:
            raise
        raise _refusal(slug) from fault


def _refusal(slug: str) -> Unavailable:
    return Unavailable(slug, _WORDS[slug])
