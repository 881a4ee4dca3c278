"""Keys sealed to this TPM: it opens them only in a boot that their owner approved, and only while the latch is open.

One file holds all of them. Its digest lies in an NV index that only the setter can write, so a file restored from an
old disk, with a key in it that was rotated or removed since, is refused. A change writes the new file beside the old
one, then the digest, then replaces the old file: after a crash at any point the TPM says which of the two is meant.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

from cgpu_agent.backends.base import BootApproval, TpmCommands
from cgpu_agent.errors import AgentError, DeviceFault, HostileInput, Misuse, Unavailable
from cgpu_agent.wire import approval, tpmpolicy
from cgpu_agent.wire.approval import EPOCH, LATCH_GROUP, Approval
from cgpu_agent.wire.keyring import (
    CLOSED,
    HEAD_HANDLE,
    LATCH_ATTRIBUTES,
    LATCH_HANDLE,
    MAX_KEYS,
    OPEN,
    KeyInfo,
    KeyRing,
    approved_policy,
)
from cgpu_agent.wire.tpm import ALG_ECDSA, ALG_SHA256, KeyBlob, PcrSelection
from cgpu_agent.wire.tpmpolicy import NvIndex

KEY_SIZE: Final = 32
"""Bytes of a key that is made here."""

_RING, _NEXT = "keys", "keys-next"
_MAX_RAISE: Final = 1 << 10
"""Steps of the epoch counter at once: a counter goes up one by one, and each takes the TPM some milliseconds."""


class Files(Protocol):
    """Files that are there as a whole or not at all (``domain.store.Store``)."""

    def read(self, name: str) -> bytes | None: ...

    def write(self, name: str, data: bytes) -> None: ...

    def remove(self, name: str) -> None: ...


class SealedKeys:
    """The keys of one directory and one TPM. Every method must run inside one TPM job.

    What changes keys must run in a job that is *not* idempotent: after a lost answer the TPM may hold the new digest,
    and only a fresh look at the files, as every method takes first, tells.

    Args:
        files: a directory of our own that lives over boots.

    Methods that need the keys raise ``Unavailable``: ``NO_KEYS`` (never created), ``KEYS_MISMATCH`` (the file is not
    the one that this TPM remembers: an old disk, or somebody undefined the index), ``KEY_LOST``; those that take
    approvals, too, what ``SealingCommands`` says. ``DeviceFault`` comes from the TPM.
    """

    def __init__(self, files: Files) -> None:
        self._files: Final = files

    def create(
        self,
        tpm: TpmCommands,
        *,
        authority: bytes,
        fleet: str,
        approvals: Sequence[Approval],
        owner_auth: bytes = b"",
        replace_lost: bool = False,
    ) -> None:
        """Make everything that keys need, and no key yet.

        Args:
            authority: DER SubjectPublicKeyInfo of the P-256 key that approves boots, for the life of these keys.
            fleet: the name of the VMs whose approvals count here.
            approvals: one of the present boot must be among them.
            owner_auth: of the owner hierarchy; nothing later needs it, except to mend an undefined index.
            replace_lost: give up the keys that this TPM remembers and whose file is not there.

        Raises:
            Misuse: ``KEYS_EXIST``, ``KEY_NAME``.
        """
        _check_name(fleet)
        if self._files.read(_RING) is not None:
            raise Misuse("KEYS_EXIST", "there are sealed keys already")
        head = tpm.sealing.nv_public(HEAD_HANDLE)
        if head is not None and tpm.sealing.nv_content(head) is not None and not replace_lost:
            raise Misuse("KEYS_EXIST", "this TPM remembers sealed keys, whose file is not there")
        parent = tpmpolicy.name_of(tpm.sealing.storage_key(owner_auth))
        self._ensure_epoch(tpm, owner_auth)
        setter = tpm.sealing.create_setter(parent, approved_policy(authority, fleet, LATCH_GROUP))
        ring = KeyRing(1, fleet, authority, parent, setter, ())
        for index in (ring.latch, ring.head):
            tpm.sealing.nv_define(index, owner_auth)
        self._commit(tpm, ring, approvals)

    def adopt(
        self, tpm: TpmCommands, *, authority: bytes, approvals: Sequence[Approval], owner_auth: bytes = b""
    ) -> int:
        """Take the file on disk for the right one, and define anew what somebody undefined in the TPM.

        For an operator who knows that the disk is not an old one: nothing else tells. Returns the file's generation.

        Args:
            authority: as the operator knows it: the file is anybody's word here.

        Raises ``Unavailable``: ``NO_KEYS``, ``KEYS_MISMATCH`` for another authority, ``KEY_LOST``.
        """
        ring = self._parse(_RING)
        if ring is None:
            raise Unavailable("NO_KEYS", "there are no sealed keys, or their file is damaged")
        if ring.authority != authority:
            raise Unavailable("KEYS_MISMATCH", "the sealed keys on disk are another owner's")
        if not tpm.sealing.holds(ring.parent):
            raise _lost()
        self._ensure_epoch(tpm, owner_auth)
        for index in (ring.latch, ring.head):
            # Also one that looks right: an auth value of somebody's, which does not show, would keep us from reading.
            tpm.sealing.nv_define(index, owner_auth)
        self._write(tpm, ring, ring.head, ring.digest, approvals)
        self._files.remove(_NEXT)
        return ring.generation

    def owner(self, tpm: TpmCommands) -> tuple[str, bytes]:
        """The fleet, and who approves boots (DER SubjectPublicKeyInfo)."""
        ring = self._load(tpm)
        return ring.fleet, ring.authority

    def list(self, tpm: TpmCommands) -> tuple[KeyInfo, ...]:
        """All generations of all keys."""
        return tuple(info for info, _ in self._load(tpm).keys)

    def epoch(self, tpm: TpmCommands) -> int:
        """Value of the epoch counter. Raises ``Unavailable``: ``KEY_INDEX_LOST``."""
        value = tpm.sealing.nv_content(EPOCH)
        if value is None:
            raise Unavailable("KEY_INDEX_LOST", "the epoch counter is gone")
        return int.from_bytes(value, "big")

    def _ensure_epoch(self, tpm: TpmCommands, owner_auth: bytes) -> None:
        """Define the epoch counter where none can be read, and count once: no policy takes what was never written."""
        try:
            self.epoch(tpm)
        except AgentError:
            tpm.sealing.nv_define(EPOCH, owner_auth)
            tpm.sealing.nv_increment(EPOCH)

    def raise_epoch(self, tpm: TpmCommands, minimum: int) -> int:
        """Count the epoch up to at least ``minimum``: approvals of earlier epochs are over. Returns its value.

        Raises ``Misuse``: ``EPOCH_TOO_FAR`` for more than 1024 steps at once.
        """
        now = self.epoch(tpm)
        if minimum - now > _MAX_RAISE:
            raise Misuse("EPOCH_TOO_FAR", f"the epoch is {now}; it is raised by at most {_MAX_RAISE} at once")
        while now < minimum:
            tpm.sealing.nv_increment(EPOCH)
            now = self.epoch(tpm)
        return now

    def add(
        self,
        tpm: TpmCommands,
        key_id: str,
        group: str,
        approvals: Sequence[Approval],
        *,
        created: int,
        secret: bytes | None = None,
    ) -> KeyInfo:
        """Seal a new key: ``secret`` (1-128 bytes), or 32 random ones.

        Raises:
            Misuse: ``KEY_EXISTS``, ``KEY_NAME``, ``TPM_ARGUMENT`` for an unfit secret.
            Unavailable: ``KEYS_FULL``.
        """
        _check_name(key_id)
        _check_name(group)
        if group == LATCH_GROUP:
            raise Misuse("KEY_NAME", f"the group {LATCH_GROUP!r} is the agent's own")
        ring = self._load(tpm)
        if any(info.id == key_id for info, _ in ring.keys):
            raise Misuse("KEY_EXISTS", "there is a key of this name; rotate it instead")
        return self._add(tpm, ring, KeyInfo(key_id, ring.generation + 1, group, created), approvals, secret)

    def rotate(
        self,
        tpm: TpmCommands,
        key_id: str,
        approvals: Sequence[Approval],
        *,
        created: int,
        secret: bytes | None = None,
    ) -> KeyInfo:
        """Seal the next generation of a key; earlier ones stay until they are removed. Raises as ``add``."""
        ring = self._load(tpm)
        last, _ = _newest(ring, key_id, None)
        info = replace(last, generation=ring.generation + 1, created=created)
        return self._add(tpm, ring, info, approvals, secret)

    def remove(
        self, tpm: TpmCommands, key_id: str, approvals: Sequence[Approval], *, generation: int | None = None
    ) -> None:
        """Remove one generation of a key, or all. Raises ``Misuse``: ``KEY_UNKNOWN``."""
        ring = self._load(tpm)
        _newest(ring, key_id, generation)
        kept = (each for each in ring.keys if not _matches(each[0], key_id, generation))
        self._commit(tpm, replace(ring, generation=ring.generation + 1, keys=tuple(kept)), approvals)

    def unseal(
        self, tpm: TpmCommands, key_id: str, approvals: Sequence[Approval], *, generation: int | None = None
    ) -> tuple[KeyInfo, bytes]:
        """Open a key, by default its newest generation. Raises ``Misuse``: ``KEY_UNKNOWN``."""
        ring = self._load(tpm)
        info, blob = _newest(ring, key_id, generation)

        def work(approved: BootApproval) -> bytes:
            return tpm.sealing.unseal(ring.parent, blob, approved, ring.latch, OPEN)

        return info, self._approved(tpm, ring, approvals, info.group, work)

    def latch_is_open(self, tpm: TpmCommands) -> bool:
        """Whether the TPM would open keys."""
        return tpm.sealing.nv_content(self._load(tpm).latch) == OPEN

    def open_latch(self, tpm: TpmCommands, approvals: Sequence[Approval], *, owner_auth: bytes = b"") -> None:
        """Let the TPM open keys, until its next reset. Defines a latch that somebody undefined."""
        ring = self._load(tpm)
        if tpm.sealing.nv_public(LATCH_HANDLE) is None:
            tpm.sealing.nv_define(ring.latch, owner_auth)
        self._write(tpm, ring, ring.latch, OPEN, approvals)

    def close_latch(self, tpm: TpmCommands, approvals: Sequence[Approval]) -> bool:
        """Let the TPM open no key any more, whatever state the files are in. True when it had been open.

        Where the latch cannot be read, or written (no approval of this boot), it is undefined, which closes it, too.

        Raises:
            DeviceFault: ``KEY_LATCH_STUCK`` when it can be neither written nor undefined.
        """
        found = tpm.sealing.nv_public(LATCH_HANDLE)
        if found is None or replace(found, policy=b"") != NvIndex(LATCH_HANDLE, LATCH_ATTRIBUTES, b"", len(OPEN)):
            return False  # nothing that a key of ours could name
        try:
            if tpm.sealing.nv_content(found) in (None, CLOSED):
                return False
            ring = self._parse(_RING)
            if ring is None:
                raise Unavailable("NO_KEYS", "there are no sealed keys")
            self._write(tpm, ring, ring.latch, CLOSED, approvals)
        except AgentError:
            try:
                tpm.sealing.nv_undefine(LATCH_HANDLE)
            except AgentError as error:
                raise DeviceFault("KEY_LATCH_STUCK", "the latch may be open, and cannot be closed") from error
        return True

    def _add(
        self, tpm: TpmCommands, ring: KeyRing, info: KeyInfo, approvals: Sequence[Approval], secret: bytes | None
    ) -> KeyInfo:
        if len(ring.keys) >= MAX_KEYS:
            raise Unavailable("KEYS_FULL", f"{MAX_KEYS} generations of keys are the most; remove old ones")
        if secret is None:
            # Of both, so that neither a poor TPM nor a poor kernel decides alone.
            secret = hashlib.sha256(tpm.random(KEY_SIZE) + secrets.token_bytes(KEY_SIZE)).digest()
        blob = tpm.sealing.seal(ring.parent, ring.policy(info.group), secret)
        changed = replace(ring, generation=ring.generation + 1, keys=(*ring.keys, (info, blob)))
        self._commit(tpm, changed, approvals)
        return info

    def _load(self, tpm: TpmCommands) -> KeyRing:
        """The keys that the TPM remembers; settles a change that a crash cut short."""
        found = {name: self._parse(name) for name in (_RING, _NEXT)}
        for name, ring in found.items():
            if ring is None:
                continue
            if not tpm.sealing.holds(ring.parent):
                raise _lost()
            digest = tpm.sealing.nv_content(ring.head)
            if digest is not None and hmac.compare_digest(digest, ring.digest):
                if found[_NEXT] is not None:
                    self._settle(ring, replaced=name == _NEXT)
                return ring
        if found[_RING] is None and self._files.read(_RING) is None:
            raise Unavailable("NO_KEYS", "there are no sealed keys")
        raise Unavailable("KEYS_MISMATCH", "the sealed keys on disk are not those that the TPM remembers")

    def _settle(self, ring: KeyRing, *, replaced: bool) -> None:
        if replaced:
            self._files.write(_RING, ring.encode())
        self._files.remove(_NEXT)

    def _parse(self, name: str) -> KeyRing | None:
        data = self._files.read(name)
        try:
            return None if data is None else KeyRing.parse(data)
        except HostileInput:
            return None

    def _commit(self, tpm: TpmCommands, ring: KeyRing, approvals: Sequence[Approval]) -> None:
        self._files.write(_NEXT, ring.encode())
        self._write(tpm, ring, ring.head, ring.digest, approvals)
        self._settle(ring, replaced=True)

    def _write(
        self, tpm: TpmCommands, ring: KeyRing, index: NvIndex, data: bytes, approvals: Sequence[Approval]
    ) -> None:
        def work(approved: BootApproval) -> None:
            tpm.sealing.nv_write(index, data, parent=ring.parent, setter=ring.setter, approval=approved)

        self._approved(tpm, ring, approvals, LATCH_GROUP, work)

    def _approved(
        self,
        tpm: TpmCommands,
        ring: KeyRing,
        approvals: Sequence[Approval],
        group: str,
        work: Callable[[BootApproval], Any],
    ) -> Any:
        """Do it by the first approval that the TPM takes."""
        refusal = Unavailable("KEY_NOT_APPROVED", "no approval of the owner fits what booted here")
        fitting = [each for each in approvals if _is_for(each, ring, group)]
        wanted = {pcr for each in fitting for pcr in each.pcrs}
        values = tpm.pcr_read(PcrSelection.of("sha256", wanted)) if wanted else {}
        for each in fitting:
            if any(values[pcr] != value for pcr, value in each.pcrs.items()):
                continue
            try:
                return work(_for_the_tpm(each, group))
            except Unavailable as error:
                if error.slug not in ("KEY_NOT_APPROVED", "KEY_APPROVAL_OLD"):
                    raise
                refusal = error
        raise refusal


def _lost() -> Unavailable:
    return Unavailable("KEY_LOST", "this TPM cannot open the keys any more: it was cleared, or is another one")


def _is_for(each: Approval, ring: KeyRing, group: str) -> bool:
    return each.authority == ring.authority and each.fleet == ring.fleet and group in each.signatures


def _for_the_tpm(each: Approval, group: str) -> BootApproval:
    r, s = each.signatures[group][:32], each.signatures[group][32:]
    head = ALG_ECDSA.to_bytes(2, "big") + ALG_SHA256.to_bytes(2, "big")
    return BootApproval(
        authority=tpmpolicy.authority_public(each.authority),
        selection=PcrSelection.of("sha256", each.pcrs),
        epoch_index=EPOCH,
        epoch=each.epoch,
        approved=approval.approved_policy(each.pcrs, each.epoch),
        ref=approval.policy_ref(each.fleet, group),
        signature=head + b"\0\x20" + r + b"\0\x20" + s,
    )


def _newest(ring: KeyRing, key_id: str, generation: int | None) -> tuple[KeyInfo, KeyBlob]:
    found = [each for each in ring.keys if _matches(each[0], key_id, generation)]
    if not found:
        raise Misuse("KEY_UNKNOWN", "there is no such key, or no such generation of it")
    return max(found, key=lambda each: each[0].generation)


def _matches(info: KeyInfo, key_id: str, generation: int | None) -> bool:
    return info.id == key_id and generation in (None, info.generation)


def _check_name(text: str) -> None:
    if not approval.is_name(text):
        raise Misuse(
            "KEY_NAME", "a name has 1 to 64 of a-z, 0-9, dot, dash, underscore, and ends in a letter or digit"
        )
