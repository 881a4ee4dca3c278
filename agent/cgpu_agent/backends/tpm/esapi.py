"""Single TPM commands through the TSS: the one file that imports tpm2_pytss, and bytes are all that leaves it.

Rule of this file, held by a lint test: a result of the library becomes bytes by ``marshal()`` at once and is read by
our own parsers. Attributes below a result may be memory that the library has already freed.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any, Final, Literal, NewType

# The library writes every error to stderr, expected ones too; it reads this at its first call.
os.environ.setdefault("TSS2_LOG", "all+none")

from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_EO,
    TPM2_SE,
    TPM2_SU,
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPM2B_NV_PUBLIC,
    TPM2B_OPERAND,
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMA_SESSION,
    TPML_DIGEST_VALUES,
    TPML_PCR_SELECTION,
    TPMS_CONTEXT,
    TPMT_RSA_DECRYPT,
    TPMT_SIG_SCHEME,
    TPMT_SIGNATURE,
    TPMT_SYM_DEF,
    TPMT_TK_VERIFIED,
    PyTCTI,
    TSS2_Exception,
)

from cgpu_agent.backends.base import Signed
from cgpu_agent.backends.tpm.answers import parse_sized
from cgpu_agent.backends.tpm.faults import TpmFault, from_library
from cgpu_agent.backends.tpm.keys import sized
from cgpu_agent.backends.tpm.transport import Transport, converse
from cgpu_agent.errors import DeviceFault, HostileInput, Misuse

Handle = NewType("Handle", int)
Hierarchy = Literal["endorsement", "owner", "null"]
"""An object or session as ESYS numbers it: valid in its context only. Not a TPM handle."""

_NO_SYMMETRIC: Final = b"\x00\x10"
_AES128_CFB: Final = bytes.fromhex("000600800043")
_SHA256: Final = TPM2_ALG.SHA256


class _Tcti(PyTCTI):  # type: ignore[misc]
    """Puts a transport below ESYS. Keeps the error of a failed command, which ESYS reduces to a general failure."""

    def __init__(self, transport: Transport, command_timeout: float, deadline: float) -> None:
        super().__init__()
        self.deadline = deadline
        self.failure: Exception | None = None
        self._transport: Final = transport
        self._command_timeout: Final = command_timeout
        self._command = b""

    def do_transmit(self, command: bytes) -> None:
        self._command = command

    def do_receive(self, timeout: int) -> bytes:  # noqa: ARG002 - ESYS always passes "wait for ever"
        deadline = min(self.deadline, time.monotonic() + self._command_timeout)
        try:
            return converse(self._transport, self._command, deadline)
        except Exception as error:
            self.failure = error
            raise


class Esapi:
    """One ESYS context over one transport, for one thread.

    Every method sends one command with empty passwords, unless it says otherwise, and raises ``DeviceFault`` (see
    ``faults``); bytes that do not unmarshal are ``Misuse`` ``TPM_ARGUMENT``.

    Args:
        transport: carries the frames; closed by ``close``.
        command_timeout: seconds for one TPM command.
        deadline: see the attribute.

    Attributes:
        broken: a command failed below the TPM. Only ``close`` works now.
        stale: broken, or objects were lost on the way: make a new context before the next job.
    """

    def __init__(self, transport: Transport, *, command_timeout: float, deadline: float = math.inf) -> None:
        self._transport: Final = transport
        self._tcti: Final = _Tcti(transport, command_timeout, deadline)
        try:
            self._esys: Final[Any] = ESAPI(self._tcti)
        except TSS2_Exception as error:
            transport.close()
            raise DeviceFault("TPM_IO", "the TSS could not be started") from error
        self.broken = False
        self.stale = False

    @property
    def exclusive(self) -> bool:
        return self._transport.exclusive

    @property
    def deadline(self) -> float:
        """No command runs past this (``time.monotonic`` scale). Set for each job."""
        return self._tcti.deadline

    @deadline.setter
    def deadline(self, value: float) -> None:
        self._tcti.deadline = value

    def close(self) -> None:
        """Free the context and close the transport. Idempotent."""
        self.broken = self.stale = True
        self._esys.close()
        self._transport.close()

    def startup(self) -> None:
        """TPM2_Startup(CLEAR)."""
        self._call("Startup", self._esys.startup, TPM2_SU.CLEAR)

    def capability(self, kind: int, first: int, count: int) -> bytes:
        """TPM2_GetCapability: TPMS_CAPABILITY_DATA."""
        _, data = self._call("GetCapability", self._esys.get_capability, kind, first, count)
        return _bytes(data)

    def read_clock(self) -> bytes:
        """TPM2_ReadClock: TPMS_TIME_INFO."""
        info = self._call("ReadClock", self._esys.read_clock)
        return _bytes(info)

    def get_random(self, count: int) -> bytes:
        """TPM2_GetRandom."""
        data = self._call("GetRandom", self._esys.get_random, count)
        return _content(data)

    def pcr_read(self, selection: bytes) -> tuple[int, bytes, bytes]:
        """TPM2_PCR_Read: update counter, TPML_PCR_SELECTION of what was read, TPML_DIGEST."""
        wanted = _argument(TPML_PCR_SELECTION, selection)
        counter, chosen, values = self._call("PCR_Read", self._esys.pcr_read, wanted)
        return int(counter), _bytes(chosen), _bytes(values)

    def pcr_extend(self, index: int, digests: bytes) -> None:
        """TPM2_PCR_Extend by a TPML_DIGEST_VALUES."""
        values = _argument(TPML_DIGEST_VALUES, digests)
        self._call("PCR_Extend", self._esys.pcr_extend, ESYS_TR(index), values)

    def object_at(self, tpm_handle: int) -> Handle:
        """Refer to what lives at a TPM handle: persistent key, NV index, transient object or session.

        ESYS keeps one object a handle however often it is asked for, so it is never closed here.
        """
        return Handle(self._call("ReadPublic", self._esys.tr_from_tpmpublic, tpm_handle))

    def read_public(self, key: Handle) -> bytes:
        """TPM2_ReadPublic: TPMT_PUBLIC."""
        public, *_ = self._call("ReadPublic", self._esys.read_public, key)
        return _content(public)

    def create_primary(self, template: bytes, hierarchy: Hierarchy = "endorsement") -> tuple[Handle, bytes]:
        """TPM2_CreatePrimary from a TPMT_PUBLIC: the key, its TPMT_PUBLIC."""
        wanted = _sized(TPM2B_PUBLIC, template)
        below = getattr(ESYS_TR, hierarchy.upper())
        handle, public, *_ = self._call("CreatePrimary", self._esys.create_primary, None, wanted, below)
        return Handle(handle), _content(public)

    def evict_control(self, key: Handle, tpm_handle: int) -> None:
        """TPM2_EvictControl: copy a loaded key to a persistent handle of the owner."""
        self._call("EvictControl", self._esys.evict_control, ESYS_TR.OWNER, key, tpm_handle)

    def create(self, parent: Handle, template: bytes, auth: bytes) -> tuple[bytes, bytes]:
        """TPM2_Create from a TPMT_PUBLIC: TPMT_PUBLIC and TPM2B_PRIVATE content of the new key."""
        sensitive = _argument(TPM2B_SENSITIVE_CREATE, sized(sized(auth) + sized(b"")))
        wanted = _sized(TPM2B_PUBLIC, template)
        private, public, *_ = self._call("Create", self._esys.create, parent, sensitive, wanted)
        return _content(public), _content(private)

    def seal(self, parent: Handle, template: bytes, data: bytes, session: Handle) -> tuple[bytes, bytes]:
        """TPM2_Create of a data object: as ``create``, with the data encrypted on its way by ``session``."""
        sensitive = _argument(TPM2B_SENSITIVE_CREATE, sized(sized(b"") + sized(data)))
        wanted = _sized(TPM2B_PUBLIC, template)
        self._set_attributes(session, TPMA_SESSION.CONTINUESESSION | TPMA_SESSION.DECRYPT)
        private, public, *_ = self._call("Create", self._esys.create, parent, sensitive, wanted, session2=session)
        return _content(public), _content(private)

    def load(self, parent: Handle, public: bytes, private: bytes) -> Handle:
        """TPM2_Load."""
        inner = _sized(TPM2B_PRIVATE, private)
        outer = _sized(TPM2B_PUBLIC, public)
        return Handle(self._call("Load", self._esys.load, parent, inner, outer))

    def context_save(self, key: Handle) -> bytes:
        """TPM2_ContextSave: TPMS_CONTEXT, with what ESYS needs to load it again."""
        context = self._call("ContextSave", self._esys.context_save, key)
        return _bytes(context)

    def context_load(self, context: bytes) -> Handle:
        """TPM2_ContextLoad."""
        saved = _argument(TPMS_CONTEXT, context)
        return Handle(self._call("ContextLoad", self._esys.context_load, saved))

    def set_owner_auth(self, auth: bytes) -> None:
        """Give later commands the password of the owner hierarchy; sends nothing."""
        self._call("TR_SetAuth", self._esys.tr_set_auth, ESYS_TR.OWNER, auth)

    def set_auth(self, key: Handle, auth: bytes) -> None:
        """Give later commands the password of ``key``; sends nothing."""
        self._call("TR_SetAuth", self._esys.tr_set_auth, key, auth)

    def flush(self, handle: Handle) -> None:
        """TPM2_FlushContext. Never raises: a failure makes the context stale, so that a new one clears away."""
        if self.broken:
            return
        try:
            self._call("FlushContext", self._esys.flush_context, handle)
        except DeviceFault:
            self.stale = True

    def quote(self, key: Handle, qualifying_data: bytes, selection: bytes) -> Signed:
        """TPM2_Quote with the key's own scheme."""
        pcrs = _argument(TPML_PCR_SELECTION, selection)
        attest, signature = self._call("Quote", self._esys.quote, key, pcrs, qualifying_data)
        return Signed(_content(attest), _bytes(signature))

    def certify(self, key: Handle, by: Handle, qualifying_data: bytes) -> Signed:
        """TPM2_Certify with the scheme of ``by``."""
        scheme = TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL)
        attest, signature = self._call("Certify", self._esys.certify, key, by, qualifying_data, scheme)
        return Signed(_content(attest), _bytes(signature))

    def nv_read_public(self, index: Handle) -> bytes:
        """TPM2_NV_ReadPublic: TPM2B_NV_PUBLIC."""
        public, _ = self._call("NV_ReadPublic", self._esys.nv_read_public, index)
        return _bytes(public)

    def nv_read(self, index: Handle, count: int, offset: int, *, owner: bool) -> bytes:
        """TPM2_NV_Read by the owner, or with the index's own (empty) auth."""
        by = ESYS_TR.OWNER if owner else index
        data = self._call("NV_Read", self._esys.nv_read, index, count, offset, by)
        return _content(data)

    def nv_define(self, public: bytes) -> None:
        """TPM2_NV_DefineSpace by the owner, of a TPMS_NV_PUBLIC, with an empty auth."""
        wanted = _sized(TPM2B_NV_PUBLIC, public)
        self._call("NV_DefineSpace", self._esys.nv_define_space, b"", wanted)

    def nv_undefine(self, index: Handle) -> None:
        """TPM2_NV_UndefineSpace by the owner."""
        self._call("NV_UndefineSpace", self._esys.nv_undefine_space, index)

    def nv_write(self, index: Handle, data: bytes, session: Handle | None = None) -> None:
        """TPM2_NV_Write from the first byte on: by the owner, or by the policy that ``session`` satisfies."""
        by, session1 = (ESYS_TR.OWNER, ESYS_TR.PASSWORD) if session is None else (index, session)
        self._call("NV_Write", self._esys.nv_write, index, data, 0, by, session1=session1)

    def nv_increment(self, index: Handle) -> None:
        """TPM2_NV_Increment with the index's own (empty) auth."""
        self._call("NV_Increment", self._esys.nv_increment, index, index)

    def load_external(self, public: bytes) -> Handle:
        """TPM2_LoadExternal of a TPMT_PUBLIC for the owner hierarchy: no policy takes a ticket of TPM_RH_NULL."""
        outer = _sized(TPM2B_PUBLIC, public)
        return Handle(self._call("LoadExternal", self._esys.load_external, outer, None, ESYS_TR.OWNER))

    def verify_signature(self, key: Handle, digest: bytes, signature: bytes) -> bytes:
        """TPM2_VerifySignature of a TPMT_SIGNATURE: TPMT_TK_VERIFIED."""
        signed = _argument(TPMT_SIGNATURE, signature)
        ticket = self._call("VerifySignature", self._esys.verify_signature, key, digest, signed)
        return _bytes(ticket)

    def sign(self, key: Handle, digest: bytes, session: Handle) -> bytes:
        """TPM2_Sign with the scheme of the key, authorised by its policy: TPMT_SIGNATURE."""
        scheme = TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL)
        signature = self._call("Sign", self._esys.sign, key, digest, scheme, session1=session)
        return _bytes(signature)

    def unseal(self, item: Handle, session: Handle) -> bytes:
        """TPM2_Unseal, authorised by the item's policy; the answer comes encrypted by ``session``."""
        self._set_attributes(session, TPMA_SESSION.CONTINUESESSION | TPMA_SESSION.ENCRYPT)
        data = self._call("Unseal", self._esys.unseal, item, session1=session)
        return _content(data)

    def start_salted_session(self, key: Handle, *, policy: bool) -> Handle:
        """TPM2_StartAuthSession salted to a storage key: only who knows the salt can use or read it.

        It is a policy session, or one that only encrypts; it lives until it is flushed.
        """
        aes = _argument(TPMT_SYM_DEF, _AES128_CFB)
        kind = TPM2_SE.POLICY if policy else TPM2_SE.HMAC
        session = Handle(
            self._call("StartAuthSession", self._esys.start_auth_session, key, ESYS_TR.NONE, kind, aes, _SHA256)
        )
        self._set_attributes(session, TPMA_SESSION.CONTINUESESSION)
        return session

    def session_nonce(self, session: Handle) -> bytes:
        """The nonce that the TPM gave to a session last; sends nothing."""
        nonce = self._call("TRSess_GetNonceTPM", self._esys.trsess_get_nonce_tpm, session)
        return _content(nonce)

    def policy_nv(self, session: Handle, index: Handle, operand: bytes, operation: int) -> None:
        """TPM2_PolicyNV from offset 0, read with the index's own (empty) auth."""
        wanted = _sized(TPM2B_OPERAND, operand)
        self._call("PolicyNV", self._esys.policy_nv, index, index, session, wanted, TPM2_EO(operation))

    def policy_authorize(self, session: Handle, approved: bytes, ref: bytes, name: bytes, ticket: bytes) -> None:
        """TPM2_PolicyAuthorize by the key of this Name, which the ticket says has signed."""
        shown = _argument(TPMT_TK_VERIFIED, ticket)
        self._call("PolicyAuthorize", self._esys.policy_authorize, session, approved, name, shown, ref)

    def policy_signed(self, session: Handle, key: Handle, nonce: bytes, cp_hash: bytes, signature: bytes) -> None:
        """TPM2_PolicySigned for one session and one command; expiration 0 asks for no ticket."""
        signed = _argument(TPMT_SIGNATURE, signature)
        self._call("PolicySigned", self._esys.policy_signed, key, session, signed, nonce, cp_hash, b"", expiration=0)

    def start_policy_session(self, hash_algorithm: int) -> Handle:
        """TPM2_StartAuthSession: an unsalted policy session that lives until it is flushed."""
        none = _argument(TPMT_SYM_DEF, _NO_SYMMETRIC)
        nobody = ESYS_TR.NONE
        session = Handle(
            self._call(
                "StartAuthSession",
                self._esys.start_auth_session,
                nobody,
                nobody,
                TPM2_SE.POLICY,
                none,
                hash_algorithm,
            )
        )
        # Otherwise the TPM ends the session by itself, but only when a command succeeds.
        self._set_attributes(session, TPMA_SESSION.CONTINUESESSION)
        return session

    def _set_attributes(self, session: Handle, attributes: int) -> None:
        self._call("TRSess_SetAttributes", self._esys.trsess_set_attributes, session, attributes)

    def policy_secret_endorsement(self, session: Handle) -> None:
        """TPM2_PolicySecret with the endorsement hierarchy's empty auth; expiration 0 asks for no ticket."""
        self._call("PolicySecret", self._esys.policy_secret, ESYS_TR.ENDORSEMENT, session, expiration=0)

    def policy_pcr(self, session: Handle, selection: bytes) -> None:
        """TPM2_PolicyPCR with the values that these PCRs (TPML_PCR_SELECTION) have now."""
        pcrs = _argument(TPML_PCR_SELECTION, selection)
        self._call("PolicyPCR", self._esys.policy_pcr, session, b"", pcrs)

    def rsa_decrypt(self, key: Handle, ciphertext: bytes, scheme: bytes, session: Handle) -> bytes:
        """TPM2_RSA_Decrypt by a TPMT_RSA_DECRYPT, with an empty label; ``session`` authorises the key."""
        wanted = _argument(TPMT_RSA_DECRYPT, scheme)
        plain = self._call("RSA_Decrypt", self._esys.rsa_decrypt, key, ciphertext, wanted, session1=session)
        return _content(plain)

    def activate_credential(
        self, key: Handle, ek: Handle, id_object: bytes, encrypted_secret: bytes, session: Handle | None
    ) -> bytes:
        """TPM2_ActivateCredential; ``session`` authorises the EK, ``None`` stands for its empty password."""
        blob = _sized(TPM2B_ID_OBJECT, id_object)
        secret = _sized(TPM2B_ENCRYPTED_SECRET, encrypted_secret)
        by = ESYS_TR.PASSWORD if session is None else session
        found = self._call("ActivateCredential", self._esys.activate_credential, key, ek, blob, secret, session2=by)
        return _content(found)

    def _call(self, command: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.broken:
            raise DeviceFault("TPM_IO", "the TPM context was closed after a failure")
        try:
            return function(*args, **kwargs)
        except TSS2_Exception as error:
            failure = self._tcti.failure
            if isinstance(failure, DeviceFault):
                self.broken = self.stale = True
                raise failure from failure.__cause__
            fault = TpmFault(int(error.rc), command)
            if from_library(fault.code):
                self.broken = self.stale = True
            elif fault.slug == "TPM_RESET":
                self.stale = True
            raise fault from (failure or error)
        except Exception as error:
            self.broken = self.stale = True
            raise DeviceFault("TPM_IO", f"the answer to TPM2_{command} could not be used") from error


def _argument(kind: Any, data: bytes) -> Any:
    try:
        value, used = kind.unmarshal(data)
    except TSS2_Exception as error:
        raise Misuse("TPM_ARGUMENT", f"not a {kind.__name__}") from error
    if used != len(data):
        raise Misuse("TPM_ARGUMENT", f"not exactly one {kind.__name__}")
    return value


def _sized(kind: Any, content: bytes) -> Any:
    if len(content) > 0xFFFF:
        raise Misuse("TPM_ARGUMENT", f"too long for a {kind.__name__}")
    return _argument(kind, sized(content))


def _bytes(result: Any) -> bytes:
    try:
        return bytes(result.marshal())
    except Exception as error:
        raise DeviceFault("TPM_ERROR", "an answer of the TPM breaks its format") from error


def _content(result: Any) -> bytes:
    try:
        return parse_sized(_bytes(result), "TPM2B")
    except HostileInput as error:
        raise DeviceFault("TPM_ERROR", "an answer of the TPM breaks its format") from error
