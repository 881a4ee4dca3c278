"""``TpmCommands`` composed of single TPM commands: whatever a method loads is flushed before it returns."""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar

from cgpu_agent.backends.base import AkAlgorithm, LoadedKey, Signed, TpmInfo
from cgpu_agent.backends.tpm import answers, keys
from cgpu_agent.backends.tpm.esapi import Esapi, Handle
from cgpu_agent.backends.tpm.faults import (
    ABSENT_HANDLE,
    RC_INITIALIZE,
    RC_INTEGRITY_P1,
    RC_NV_UNINITIALIZED,
    SLOT_CODES,
    TpmFault,
)
from cgpu_agent.backends.tpm.sealing import Sealing
from cgpu_agent.backends.tpm.transport import Transport
from cgpu_agent.errors import DeviceFault, HostileInput, Misuse
from cgpu_agent.wire.tpm import (
    ALG_ECC,
    ALG_OAEP,
    ALG_RSA,
    ALG_RSAES,
    ALG_SHA256,
    HASH_ALGS,
    HASH_SIZES,
    ClockInfo,
    KeyBlob,
    ObjectAttributes,
    PcrSelection,
    parse_public,
)
from cgpu_agent.wire.tpmpolicy import NvIndex

if TYPE_CHECKING:
    from typing import Concatenate, ParamSpec

    P = ParamSpec("P")

R = TypeVar("R")

MAX_QUALIFYING_DATA: Final = 48
"""A vTPM whose largest hash is SHA-384 refuses more than 50 bytes; swtpm would take 64."""
MAX_NV_READ: Final = 16 << 10
RSA_2048: Final = 256
"""Bytes of its modulus."""
_NV_CHUNK: Final = 1024
_PCRS_PER_READ: Final = 8
_PCR_READ_ATTEMPTS: Final = 8
_LEFTOVER_KINDS: Final = (0x80000000, 0x02000000, 0x03000000)
"""First handles of transient objects, loaded sessions and saved sessions."""


def _with_free_slots(method: Callable[Concatenate[Commands, P], R]) -> Callable[Concatenate[Commands, P], R]:
    """Where the TPM is ours alone and had no free slot: flush what others left, run once more."""

    @functools.wraps(method)
    def run(self: Commands, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except TpmFault as fault:
            if fault.code not in SLOT_CODES or not self.exclusive:
                raise
        self.flush_leftovers()
        return method(self, *args, **kwargs)

    return run


class Commands:
    """``TpmCommands`` on one context; see ``backends.base`` for what the methods do. For one thread.

    Args:
        transport: carries the frames; closed by ``close``, also when this constructor fails.
        command_timeout: seconds for one TPM command.
        deadline: no command runs past this (``time.monotonic`` scale).
    """

    def __init__(self, transport: Transport, *, command_timeout: float = 30.0, deadline: float = math.inf) -> None:
        self._esapi: Final = Esapi(transport, command_timeout=command_timeout, deadline=deadline)
        self.sealing: Final = Sealing(self._esapi)
        self._persistent: Final[dict[int, Handle]] = {}
        self._nv_chunk = 0
        if self.exclusive:
            try:
                self._start_up()
                self.flush_leftovers()
            except BaseException:
                self.close()
                raise

    @property
    def exclusive(self) -> bool:
        return self._esapi.exclusive

    @property
    def broken(self) -> bool:
        """A command failed below the TPM: only ``close`` works now."""
        return self._esapi.broken

    @property
    def stale(self) -> bool:
        """Broken, or objects were lost on the way: close, and make a new one before the next job."""
        return self._esapi.stale

    def set_deadline(self, deadline: float) -> None:
        """No later command runs past ``deadline`` (``time.monotonic`` scale)."""
        self._esapi.deadline = deadline

    def close(self) -> None:
        """Free the context and close the transport. Idempotent."""
        self._esapi.close()

    def flush_leftovers(self) -> None:
        """Flush every transient object and session in the TPM, whoever made it: for a TPM that is ours alone."""
        for kind in _LEFTOVER_KINDS:
            for handle in _read(answers.parse_handles, self._esapi.capability(answers.CAP_HANDLES, kind, 64)):
                self._esapi.flush(self._esapi.object_at(handle))

    def info(self) -> TpmInfo:
        found = self._properties(answers.PT_MANUFACTURER, 8)
        vendor = [found.get(name, 0) for name in answers.PT_VENDOR_STRINGS]
        high, low = (found.get(p, 0) for p in (answers.PT_FIRMWARE_VERSION_1, answers.PT_FIRMWARE_VERSION_2))
        return TpmInfo(
            manufacturer=answers.text_of(found.get(answers.PT_MANUFACTURER, 0)),
            firmware_version=high << 32 | low,
            vendor=answers.text_of(*vendor),
        )

    def clock(self) -> ClockInfo:
        return _read(answers.parse_time_info, self._esapi.read_clock())

    def random(self, count: int) -> bytes:
        if not 1 <= count <= 32:
            raise Misuse("TPM_ARGUMENT", "a TPM is asked for 1 to 32 random bytes")
        data = self._esapi.get_random(count)
        if len(data) != count:
            raise DeviceFault("TPM_ERROR", "the TPM returned another number of random bytes than asked for")
        return data

    def pcr_read(self, selection: PcrSelection) -> dict[int, bytes]:
        if not selection.pcrs:
            raise Misuse("TPM_ARGUMENT", "no PCR is selected")
        for _ in range(_PCR_READ_ATTEMPTS):
            values: dict[int, bytes] = {}
            counters = set()
            for first in range(0, len(selection.pcrs), _PCRS_PER_READ):
                part = PcrSelection(selection.bank, selection.pcrs[first : first + _PCRS_PER_READ])
                counter, digests = self._pcr_read_once(part)
                counters.add(counter)
                values.update(zip(part.pcrs, digests, strict=True))
            if len(counters) == 1:
                return values
        raise DeviceFault("TPM_BUSY", "the PCRs kept changing while they were read", retry_after=1.0)

    def _pcr_read_once(self, selection: PcrSelection) -> tuple[int, tuple[bytes, ...]]:
        wanted = selection.marshal()
        counter, chosen, values = self._esapi.pcr_read(wanted)
        if chosen != wanted:
            raise DeviceFault("TPM_ERROR", f"the TPM does not keep these PCRs in a {selection.bank} bank")
        digests = _read(answers.parse_digests, values)
        if [len(digest) for digest in digests] != [HASH_SIZES[selection.bank]] * len(selection.pcrs):
            raise DeviceFault("TPM_ERROR", "the TPM returned PCR values of another number or size")
        return counter, digests

    def pcr_extend(self, index: int, digest: bytes) -> None:
        if not 0 <= index <= 23 or len(digest) != 32:
            raise Misuse("TPM_ARGUMENT", "a PCR of 0 to 23 is extended with 32 bytes")
        self._esapi.pcr_extend(index, b"\0\0\0\1" + HASH_ALGS["sha256"].to_bytes(2, "big") + digest)

    def persistent_public(self, handle: int) -> bytes | None:
        _check_persistent(handle)
        # Another key may have taken the place of the one this context knew.
        self._persistent.pop(handle, None)
        try:
            return self._esapi.read_public(self._persistent_key(handle))
        except TpmFault as fault:
            if fault.code in ABSENT_HANDLE:
                return None
            raise

    @_with_free_slots
    def create_platform_ak(self, handle: int, algorithm: AkAlgorithm) -> bytes:
        _check_persistent(handle)
        with self._primary(keys.signing_key(algorithm)) as (key, public):
            _read(parse_public, public)
            self._esapi.evict_control(key, handle)
        return public

    @_with_free_slots
    def create_agent_ak(self, auth: bytes) -> KeyBlob:
        _check_auth(auth)
        # A child: two primaries of one template share a Name, so the auth of a primary would bind nobody.
        with self._primary(keys.storage_parent()) as (parent, _):
            public, private = self._esapi.create(parent, keys.signing_key("ecc"), auth)
        _read(parse_public, public)
        return KeyBlob(public, private)

    @_with_free_slots
    def load_agent_ak(self, blob: KeyBlob, auth: bytes) -> LoadedKey:
        _check_auth(auth)
        _check_public(blob.public)
        with (
            self._primary(keys.storage_parent()) as (parent, _),
            self._flushed(self._esapi.load(parent, blob.public, blob.private)) as key,
        ):
            return LoadedKey(self._esapi.context_save(key), blob.public, auth)

    @_with_free_slots
    def quote(self, key: int | LoadedKey, qualifying_data: bytes, selection: PcrSelection) -> Signed:
        _check_qualifying_data(qualifying_data)
        with self._key(key) as handle:
            return self._esapi.quote(handle, qualifying_data, selection.marshal())

    @_with_free_slots
    def certify(self, key: LoadedKey, by: int, qualifying_data: bytes) -> Signed:
        _check_qualifying_data(qualifying_data)
        signer = self._persistent_key(by)
        with self._key(key) as handle:
            return self._esapi.certify(handle, signer, qualifying_data)

    @_with_free_slots
    def create_decryption_key(self, policy: bytes) -> LoadedKey:
        if len(policy) != HASH_SIZES["sha256"]:
            raise Misuse("TPM_ARGUMENT", "the policy of a decryption key is a SHA-256 digest")
        template = keys.decryption_key(policy, secrets.token_bytes(256))
        handle, public = self._esapi.create_primary(template, "null")
        with self._flushed(handle):
            _read(parse_public, public)
            return LoadedKey(self._esapi.context_save(handle), public, b"")

    @_with_free_slots
    def rsa_decrypt(self, key: LoadedKey, selection: PcrSelection, ciphertext: bytes, oaep: str | None) -> bytes:
        if len(ciphertext) != RSA_2048:
            raise Misuse("TPM_ARGUMENT", f"a ciphertext of this key has {RSA_2048} bytes")
        scheme = (ALG_RSAES,) if oaep is None else (ALG_OAEP, HASH_ALGS[oaep])
        with self._key(key) as handle, self._flushed(self._esapi.start_policy_session(ALG_SHA256)) as session:
            self._esapi.policy_pcr(session, selection.marshal())
            return self._esapi.rsa_decrypt(handle, ciphertext, keys.u16(*scheme), session)

    def nv_read(self, index: int) -> bytes | None:
        _check_nv_index(index)
        try:
            return self._nv_read(index)
        except TpmFault as fault:
            if fault.code in ABSENT_HANDLE or fault.code == RC_NV_UNINITIALIZED:
                return None
            raise

    def _nv_read(self, index: int) -> bytes:
        handle = self._esapi.object_at(index)
        public = _read(answers.parse_nv_public, self._esapi.nv_read_public(handle))
        size, owner = public.size, ~public.attributes & keys.ANYBODYS_INDEX != 0
        if size > MAX_NV_READ:
            raise DeviceFault("TPM_ERROR", f"NV index 0x{index:08x} holds more than {MAX_NV_READ} bytes")
        if not self._nv_chunk:
            most = self._properties(answers.PT_NV_BUFFER_MAX, 1).get(answers.PT_NV_BUFFER_MAX, 0)
            self._nv_chunk = min(_NV_CHUNK, most) or _NV_CHUNK
        data = bytearray()
        while len(data) < size:
            count = min(self._nv_chunk, size - len(data))
            part = self._esapi.nv_read(handle, count, len(data), owner=owner)
            if len(part) != count:
                raise DeviceFault("TPM_ERROR", "the TPM returned another amount of NV data than asked for")
            data += part
        return bytes(data)

    def nv_write(self, index: int, data: bytes) -> None:
        _check_nv_index(index)
        if not 1 <= len(data) <= _NV_CHUNK:
            raise Misuse("TPM_ARGUMENT", f"an NV index is written with 1 to {_NV_CHUNK} bytes")
        try:
            handle = self._esapi.object_at(index)
        except TpmFault as fault:
            if fault.code not in ABSENT_HANDLE:
                raise
            self._esapi.nv_define(NvIndex(index, keys.OWNER_INDEX, b"", len(data)).public())
            handle = self._esapi.object_at(index)
        if _read(answers.parse_nv_public, self._esapi.nv_read_public(handle)).size != len(data):
            raise DeviceFault("TPM_ERROR", f"NV index 0x{index:08x} has another size than what is to be written")
        self._esapi.nv_write(handle, data)

    @_with_free_slots
    def ek_public(self, algorithm: AkAlgorithm) -> bytes:
        with self._endorsement_key(algorithm) as (_, public):
            return public

    @_with_free_slots
    def activate_credential(
        self, ak: int, ek_algorithm: AkAlgorithm, id_object: bytes, encrypted_secret: bytes
    ) -> bytes:
        key = self._persistent_key(ak)
        with self._endorsement_key(ek_algorithm) as (ek, public), self._ek_session(public) as session:
            return self._esapi.activate_credential(key, ek, id_object, encrypted_secret, session)

    @contextmanager
    def _endorsement_key(self, algorithm: AkAlgorithm) -> Iterator[tuple[Handle, bytes]]:
        persistent = keys.EK_HANDLES[algorithm]
        public = self.persistent_public(persistent)
        if public is not None and _is_ek(public, algorithm):
            yield self._persistent_key(persistent), public
            return
        template = self.nv_read(keys.EK_TEMPLATE_INDICES[algorithm])
        if template is None:
            nonce = self.nv_read(keys.EK_NONCE_INDICES[algorithm]) or b""
            template = keys.endorsement_key(algorithm, nonce)
        _read(parse_public, template)
        with self._primary(template) as made:
            yield made

    @contextmanager
    def _ek_session(self, public: bytes) -> Iterator[Handle | None]:
        """A session that satisfies the EK's policy, or ``None`` for an EK that takes its empty password."""
        ek = _read(parse_public, public)
        if ObjectAttributes.USER_WITH_AUTH in ek.attributes:
            yield None
            return
        with self._flushed(self._esapi.start_policy_session(HASH_ALGS[ek.name_alg])) as session:
            self._esapi.policy_secret_endorsement(session)
            yield session

    @contextmanager
    def _primary(self, template: bytes) -> Iterator[tuple[Handle, bytes]]:
        """A primary of the endorsement hierarchy: below it resetCount and firmwareVersion are not obfuscated."""
        handle, public = self._esapi.create_primary(template)
        with self._flushed(handle):
            yield handle, public

    @contextmanager
    def _key(self, key: int | LoadedKey) -> Iterator[Handle]:
        if isinstance(key, int):
            yield self._persistent_key(key)
            return
        try:
            loaded = self._esapi.context_load(key.context)
        except TpmFault as fault:
            if fault.code == RC_INTEGRITY_P1:
                raise TpmFault(fault.code, "ContextLoad", slug="TPM_RESET") from fault
            raise
        with self._flushed(loaded):
            self._esapi.set_auth(loaded, key.auth)
            yield loaded

    @contextmanager
    def _flushed(self, handle: Handle) -> Iterator[Handle]:
        try:
            yield handle
        finally:
            self._esapi.flush(handle)

    def _persistent_key(self, handle: int) -> Handle:
        _check_persistent(handle)
        if handle not in self._persistent:
            self._persistent[handle] = self._esapi.object_at(handle)
        return self._persistent[handle]

    def _properties(self, first: int, count: int) -> dict[int, int]:
        data = self._esapi.capability(answers.CAP_TPM_PROPERTIES, first, count)
        return _read(answers.parse_properties, data)

    def _start_up(self) -> None:
        """Start a TPM that nobody started since its reset. On a device that is the kernel's business."""
        try:
            self._esapi.startup()
        except TpmFault as fault:
            if fault.code != RC_INITIALIZE:
                raise
            # It was started already, and the context is as good as new.
            self._esapi.stale = False


def _read(parse: Callable[[bytes], R], data: bytes) -> R:
    try:
        return parse(data)
    except HostileInput as error:
        raise DeviceFault("TPM_ERROR", "an answer of the TPM breaks its format") from error


def _is_ek(public: bytes, algorithm: AkAlgorithm) -> bool:
    try:
        attributes = parse_public(public).attributes
    except HostileInput:
        return False
    kind = ALG_RSA if algorithm == "rsa" else ALG_ECC
    wanted = ObjectAttributes.FIXED_TPM | ObjectAttributes.RESTRICTED | ObjectAttributes.DECRYPT
    return int.from_bytes(public[:2], "big") == kind and wanted in attributes


def _check_persistent(handle: int) -> None:
    if handle >> 24 != 0x81:
        raise Misuse("TPM_ARGUMENT", "a persistent handle begins with 81")


def _check_nv_index(index: int) -> None:
    if index >> 24 != 0x01:
        raise Misuse("TPM_ARGUMENT", "an NV index begins with 01")


def _check_auth(auth: bytes) -> None:
    if not 16 <= len(auth) <= 32:
        raise Misuse("TPM_ARGUMENT", "an auth value has 16 to 32 bytes")


def _check_public(public: bytes) -> None:
    try:
        parse_public(public)
    except HostileInput as error:
        raise Misuse("TPM_ARGUMENT", "the key's public area is none") from error


def _check_qualifying_data(data: bytes) -> None:
    if len(data) > MAX_QUALIFYING_DATA:
        raise Misuse(
            "TPM_ARGUMENT", f"qualifying data has {len(data)} bytes, at most {MAX_QUALIFYING_DATA} are allowed"
        )
