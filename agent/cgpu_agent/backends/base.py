"""What the domain knows of the outside world: Protocols that real devices and simulators implement alike."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

from cgpu_agent.wire.tpm import ClockInfo, KeyBlob, PcrSelection
from cgpu_agent.wire.tpmpolicy import NvIndex

T = TypeVar("T")

AkAlgorithm = Literal["rsa", "ecc"]


@dataclass(frozen=True, slots=True)
class Signed:
    """An attestation structure and its signature, as the TPM marshalled them."""

    attest: bytes
    """TPMS_ATTEST, no size prefix."""
    signature: bytes
    """TPMT_SIGNATURE."""


@dataclass(frozen=True, slots=True)
class LoadedKey:
    """A loaded key's saved context: usable until the next TPM reset, loads without its parent."""

    context: bytes
    """Marshalled TPMS_CONTEXT."""
    public: bytes
    """TPMT_PUBLIC."""
    auth: bytes = field(repr=False)
    """Kept out of ``repr``, so that no log or traceback shows it."""


@dataclass(frozen=True, slots=True)
class BootApproval:
    """An owner's approval of a boot for one group of keys, as a TPM takes it.

    Attributes:
        authority: TPMT_PUBLIC of the owner's key.
        selection: PCRs whose present values it is about.
        epoch_index: counter that must not be above ``epoch``.
        approved: digest of PolicyPCR and PolicyNV.
        ref: policyRef.
        signature: TPMT_SIGNATURE over ``approved || ref``.
    """

    authority: bytes
    selection: PcrSelection
    epoch_index: NvIndex
    epoch: int
    approved: bytes
    ref: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class TpmInfo:
    """What the TPM says of itself. Not evidence: a host could answer this."""

    manufacturer: str
    """Four ASCII letters, trailing spaces and NULs removed (``MSFT``, ``IBM``)."""
    firmware_version: int
    vendor: str


class SealingCommands(Protocol):
    """What sealed keys take of a TPM, in bytes; as ``TpmCommands``, whose part it is.

    Nothing that a method loads or starts is left behind, however it ends. ``parent`` is the Name of the storage key
    that a blob was made below; ``Unavailable`` ``KEY_LOST``: this TPM has that key no more (TPM2_Clear).
    Methods that take a ``BootApproval`` raise ``Unavailable``: ``KEY_NOT_APPROVED`` (another boot, another authority
    or a bad signature), ``KEY_APPROVAL_OLD``, ``KEY_INDEX_LOST`` (see ``nv_content``), ``KEY_LOST``.
    """

    def storage_key(self, owner_auth: bytes = b"") -> bytes:
        """TPMT_PUBLIC of our storage key in the owner hierarchy, made and persisted where there is none.

        Raises ``Unavailable``: ``KEY_INDEX_LOST`` when a key of another kind has its handle.
        """

    def nv_define(self, index: NvIndex, owner_auth: bytes = b"") -> None:
        """Define an index with an empty auth, in the place of whatever has its handle."""

    def holds(self, parent: bytes) -> bool:
        """Whether the storage key is the one of this Name."""

    def nv_undefine(self, index: int, owner_auth: bytes = b"") -> None:
        """Undefine whatever has that handle, if anything has."""

    def nv_public(self, index: int) -> NvIndex | None:
        """What has that handle."""

    def nv_content(self, index: NvIndex) -> bytes | None:
        """Content of an index by AUTHREAD, or ``None`` when it is not there or was not written.

        Raises ``Unavailable``: ``KEY_INDEX_LOST`` when something else has that handle.
        """

    def nv_increment(self, index: NvIndex) -> None:
        """Count up by AUTHWRITE. Raises ``Unavailable``: ``KEY_INDEX_LOST``."""

    def nv_write(
        self, index: NvIndex, data: bytes, *, parent: bytes, setter: KeyBlob, approval: BootApproval
    ) -> None:
        """Write a POLICYWRITE index whose policy is PolicySigned by ``setter``."""

    def create_setter(self, parent: bytes, policy: bytes) -> KeyBlob:
        """Make a signing key that only its policy lets sign."""

    def seal(self, parent: bytes, policy: bytes, data: bytes) -> KeyBlob:
        """Make a data object of 1 to 128 bytes that only its policy opens."""

    def unseal(self, parent: bytes, blob: KeyBlob, approval: BootApproval, latch: NvIndex, operand: bytes) -> bytes:
        """Open a data object whose policy is PolicyAuthorize, then PolicyNV(``latch`` == ``operand``).

        Raises ``Unavailable``: ``KEY_LATCH_CLOSED``, also when it was closed while the object was being opened.
        """


class TpmCommands(Protocol):
    """TPM commands in bytes. Valid only inside a job of ``Tpm.run``, on the owner's thread.

    Every method raises ``DeviceFault``: ``TPM_TIMEOUT``, ``TPM_IO``, ``TPM_RESET`` (the TPM lost its state),
    ``TPM_BUSY`` (out of slots), ``TPM_NV_FULL``, ``TPM_AUTH``, ``TPM_ERROR`` for the rest; argument errors
    are ``Misuse``.
    """

    @property
    def sealing(self) -> SealingCommands: ...

    def info(self) -> TpmInfo: ...

    def clock(self) -> ClockInfo:
        """TPM2_ReadClock."""

    def random(self, count: int) -> bytes:
        """``count`` bytes (1-32) of TPM2_GetRandom."""

    def pcr_read(self, selection: PcrSelection) -> dict[int, bytes]:
        """PCR values of one bank; starts over if a PCR changed between its partial reads."""

    def pcr_extend(self, index: int, digest: bytes) -> None:
        """Extend one PCR of the SHA-256 bank with a 32-byte digest."""

    def persistent_public(self, handle: int) -> bytes | None:
        """TPMT_PUBLIC of a persistent key, or ``None`` when the handle is free."""

    def create_platform_ak(self, handle: int, algorithm: AkAlgorithm) -> bytes:
        """Make a restricted NODA signing key in the endorsement hierarchy, persist it, return its TPMT_PUBLIC."""

    def create_agent_ak(self, auth: bytes) -> KeyBlob:
        """Make a restricted NODA ECC P-256 signing key below an endorsement-hierarchy parent.

        Below that hierarchy, because elsewhere the TPM obfuscates resetCount and firmwareVersion (Part 1, 36.7).
        """

    def load_agent_ak(self, blob: KeyBlob, auth: bytes) -> LoadedKey:
        """Load a key made by ``create_agent_ak`` in this TPM (any boot) and save its context."""

    def quote(self, key: int | LoadedKey, qualifying_data: bytes, selection: PcrSelection) -> Signed:
        """TPM2_Quote by a persistent handle (empty auth) or a loaded key. At most 48 bytes of qualifying data."""

    def certify(self, key: LoadedKey, by: int, qualifying_data: bytes) -> Signed:
        """TPM2_Certify ``key`` by the persistent key ``by`` (empty auth)."""

    def create_decryption_key(self, policy: bytes) -> LoadedKey:
        """Make an RSA-2048 decryption key in the null hierarchy that only ``policy`` lets be used; empty auth.

        Each has random bytes in its template: nobody makes it again, and the TPM keeps nothing of it. It ends with
        its saved context, or with the TPM's next reset.

        Args:
            policy: 32 bytes, as ``wire.tpm.pcr_policy`` makes them.
        """

    def rsa_decrypt(self, key: LoadedKey, selection: PcrSelection, ciphertext: bytes, oaep: str | None) -> bytes:
        """TPM2_RSA_Decrypt by a ``create_decryption_key`` over these PCRs; ``TPM_AUTH`` where one of them changed.

        Args:
            oaep: hash of OAEP and of its MGF1, with an empty label; ``None``: PKCS #1 v1.5.
        """

    def nv_read(self, index: int) -> bytes | None:
        """Content of an NV index (at most 16 KiB), or ``None`` when it does not exist or was never written."""

    def nv_write(self, index: int, data: bytes) -> None:
        """Write an NV index whole (1 to 1024 bytes), by the owner; it is defined where it does not exist.

        One that has another size is not touched: ``TPM_ERROR``.
        """

    def ek_public(self, algorithm: AkAlgorithm) -> bytes:
        """TPMT_PUBLIC of the EK of the TCG default template (persistent one if present, else recreated)."""

    def activate_credential(
        self, ak: int, ek_algorithm: AkAlgorithm, id_object: bytes, encrypted_secret: bytes
    ) -> bytes:
        """TPM2_ActivateCredential for a persistent AK. Inputs are TPM2B contents; returns the certInfo secret."""


class Tpm(Protocol):
    """A TPM owned by one thread. Jobs run one after the other, each as a unit."""

    async def run(self, job: Callable[[TpmCommands], T], *, timeout: float, idempotent: bool = True) -> T:
        """Run ``job`` on the owner's thread.

        Args:
            job: composes commands; must not keep the ``TpmCommands`` it is given.
            timeout: seconds for waiting and running together; expiry raises ``DeviceFault("TPM_TIMEOUT")``.
            idempotent: rerun once after a transport error (the TPM is reopened first); otherwise such an error
                raises ``DeviceFault`` with ``outcome_unknown``.

        Raises:
            DeviceFault: see ``TpmCommands``; also ``TPM_CLOSED`` after ``close``.
            Unavailable: ``TPM_QUEUE_FULL`` when too many jobs wait.
        """

    def heartbeat_age(self, now: float) -> float:
        """Seconds (``time.monotonic`` scale) since the owner thread last proved it is alive and not stuck.

        An idle owner counts as alive. A job that overran its deadline does not.
        """

    def close(self) -> None:
        """Stop the owner; jobs in the queue fail with ``TPM_CLOSED``. Idempotent."""


GpuArchitecture = Literal["ampere", "hopper", "blackwell", "other"]
MultiGpuMode = Literal["none", "protected-pcie", "nvle", "unknown"]


@dataclass(frozen=True, slots=True)
class GpuInfo:
    """What driver and device say of one GPU. Not evidence: no NVIDIA signature covers the modes.

    ``None`` = this device or driver has no such thing; that is an answer, not a failure.
    """

    uuid: str
    """``GPU-...``, as the driver names it."""
    bdf: str
    """PCI address, ``0000:01:00.0``, lower case."""
    model: str
    architecture: GpuArchitecture
    driver: str
    vbios: str
    cc: bool | None
    """Confidential computing is on."""
    cc_environment: str | None
    """``prod``, ``sim`` or ``unavailable``."""
    dev_tools: bool | None
    multi_gpu: MultiGpuMode
    protected_memory: int | None
    """Bytes."""
    key_rotation_threshold: int | None
    """Attacker-advantage exponent (50-65) at which the driver rotates its link keys; not bytes."""


@dataclass(frozen=True, slots=True)
class GpuEvidence:
    """A device's own words, to be judged elsewhere."""

    report: bytes
    """SPDM GET_MEASUREMENTS request and MEASUREMENTS response, as NVML gives them."""
    chain: bytes
    """PEM certificates, leaf first."""


@dataclass(frozen=True, slots=True)
class GpuEvent:
    """Something happened to the devices; whoever trusts them must look again."""

    kind: Literal["appeared", "vanished", "driver-reloaded", "xid", "watch-lost", "ready-lost"]
    bdf: str | None
    detail: str


class Gpus(Protocol):
    """All GPUs of this VM behind one driver. Calls are serialised per device by the backend.

    Every method raises ``DeviceFault``: ``GPU_TIMEOUT``, ``GPU_LOST``, ``GPU_DRIVER`` (the driver does not answer or
    was replaced), ``GPU_CLOSED``, ``GPU_ERROR`` for the rest; ``Unavailable`` ``GPU_QUEUE_FULL``, and
    ``GPU_UNSUPPORTED`` where the device has no such thing.
    """

    kind: Literal["nvml", "software", "none"]

    async def pci(self, *, timeout: float) -> tuple[str, ...]:
        """PCI addresses of every NVIDIA GPU and switch that the kernel sees (sysfs), whatever the driver says."""

    async def list(self, *, timeout: float) -> tuple[GpuInfo, ...]:
        """The GPUs that the driver sees."""

    async def evidence(self, uuid: str, nonce: bytes, *, timeout: float) -> GpuEvidence:
        """A fresh report over 32 bytes of nonce, and the device's certificate chain."""

    async def ready(self, *, timeout: float) -> bool | None:
        """The system-wide ready state: whether GPUs accept work. ``None`` = there is no such state here."""

    async def set_ready(self, ready: bool, *, timeout: float) -> None:
        """Set it. Clearing must work whenever the driver does."""

    def events(self) -> AsyncIterator[GpuEvent]:
        """Events from now on, without end; ``watch-lost`` when some may have been missed."""

    def heartbeat_age(self, now: float) -> float:
        """As ``Tpm.heartbeat_age``: the oldest of the device threads."""

    def close(self) -> None:
        """Stop. Idempotent; a ready state that is still set may stay so."""


PlatformKind = Literal["azure-trusted-launch", "azure-cvm-snp", "azure-cvm-tdx", "tsm-snp", "tsm-tdx", "plain"]
"""What this VM looks like from inside. Not evidence: only a report is, once somebody judged it."""


@dataclass(frozen=True, slots=True)
class PlatformReport:
    """What the platform below the vTPM says of itself, to be judged elsewhere.

    Attributes:
        report: an HCL report, a bare ATTESTATION_REPORT or a bare TD quote; ``None`` where there is none.
        certificates: of AMD, DER, in any order.
        td_quote: the TD quote over an HCL report's TDREPORT.
        fresh: the report was made for the user data that were asked for.
        missing: (part, reason) pairs: what a reader would expect and does not get, and why.
    """

    kind: PlatformKind
    report: bytes | None = None
    certificates: tuple[bytes, ...] = ()
    td_quote: bytes | None = None
    fresh: bool = False
    missing: tuple[tuple[str, str], ...] = ()


class Platform(Protocol):
    """What stands below the vTPM. Callers are serialised by the backend."""

    kind: PlatformKind

    async def report(self, user_data: bytes | None, *, timeout: float) -> PlatformReport:
        """The platform's report, made for ``user_data`` (64 bytes) where that can be; ``None``: any will do.

        Where it cannot be, the report that is there: its reader is told by ``fresh`` and ``missing``.

        Args:
            timeout: seconds for all of it.

        Raises:
            DeviceFault: as ``TpmCommands``, ``TPM_TIMEOUT`` among them; ``TSM_ERROR`` from the kernel's interface.
            HostileInput: a report that breaks its format.
        """


BrokerKind = Literal["credential", "sealed", "openbao", "trustee", "azure"]


@dataclass(frozen=True, slots=True)
class ReleasedKey:
    """A key that a broker let go.

    Attributes:
        secret: 1 to ``MAX_SECRET`` bytes; kept out of ``repr``.
        generation: which of the key's generations it is, by the broker's count.
    """

    secret: bytes = field(repr=False)
    generation: int


MAX_SECRET = 8192


class Attester(Protocol):
    """What a broker may have the agent show of this VM, for the one release that it is asked for.

    Every answer is made afresh. All raise ``AgentError``.
    """

    async def bundle(self, nonce: bytes, audience: str) -> bytes:
        """Evidence of purpose ``release``: its statement names broker, key, caller, and whom the key is for.

        Args:
            nonce: 8 to 64 bytes, from the relying party.
            audience: the relying party's name.
        """

    async def raw_quote(self, data: bytes, pcrs: tuple[int, ...]) -> tuple[Signed, dict[int, bytes]]:
        """A quote by the platform AK over a relying party's own bytes (1 to 48), and the SHA-256 values it covers."""

    async def platform_ak(self) -> bytes:
        """TPMT_PUBLIC of the key that signs raw quotes."""

    async def platform(self, user_data: bytes | None) -> PlatformReport:
        """As ``Platform.report``."""

    async def gpu_reports(self, nonce: bytes) -> tuple[tuple[GpuInfo, GpuEvidence], ...]:
        """Every GPU's report over these 32 bytes; none where there are no GPUs."""


class KeyBroker(Protocol):
    """Whoever keeps keys and lets them go to a VM that shows what it is."""

    kind: BrokerKind
    sees_gpus: bool
    """Whether who keeps the keys judges the GPUs itself, and does not leave that to the agent alone."""

    async def release(self, path: str, attester: Attester, *, timeout: float) -> ReleasedKey:
        """Get a key.

        Args:
            path: the broker's own name of it.
            attester: shows the broker what it asks for.
            timeout: seconds for all of it.

        Raises:
            Denied: ``KEY_REFUSED``: the broker's policy does not let this VM, or this caller, have it.
            Unavailable: ``KEY_ABSENT``: there is no such key; ``BROKER_UNREACHABLE``, with ``retry_after``;
                ``BROKER_ANSWER``: it answered what nobody can read; and what ``Attester`` raises.
        """

    def close(self) -> None:
        """Forget what it holds. Idempotent."""


class MeasurementLogs(Protocol):
    """The logs that explain the PCRs."""

    def boot(self) -> bytes | None:
        """The firmware's TCG log, or ``None`` when the machine has none. It cannot change within a boot."""

    def systemd(self) -> AbstractContextManager[bytes | None]:
        """systemd's log, or ``None``; its writers are held off (``LOCK_SH``) while the context is open.

        Raises ``Unavailable`` (``LOG_LOCKED``) when a writer keeps the lock.
        """


class Clock(Protocol):
    """Time, injected so that tests can move it."""

    def monotonic(self) -> float:
        """Seconds on CLOCK_BOOTTIME: also counts suspend."""

    def time(self) -> float:
        """Seconds since the epoch, from the host's clock: never trusted for a verdict."""
