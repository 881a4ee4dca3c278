"""Each API method once: its request, and what its answer becomes. Sync and async clients differ only in waiting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from cgpu_agent.api.v1 import (
    admin_pb2,
    evidence_pb2,
    gpus_pb2,
    keys_pb2,
    measured_boot_pb2,
    sealed_keys_pb2,
    transfer_buffers_pb2,
)
from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.wire.delivery import parse_context

if TYPE_CHECKING:
    from cgpu_agent.client.unwrap import Receiver

R = TypeVar("R")

boot_pb = measured_boot_pb2
transfer_pb = transfer_buffers_pb2

LogKind = Literal["boot", "systemd", "agent"]

_LOG_KINDS: dict[str, boot_pb.EventLogKind.ValueType] = {
    "boot": boot_pb.EVENT_LOG_KIND_BOOT,
    "systemd": boot_pb.EVENT_LOG_KIND_SYSTEMD,
    "agent": boot_pb.EVENT_LOG_KIND_AGENT,
}


@dataclass(frozen=True, slots=True)
class Quote:
    """A TPM2_Quote by the platform AK.

    Attributes:
        attest: TPMS_ATTEST; ``signature``: TPMT_SIGNATURE.
        caller_claims: who you are, as the kernel says, in the bytes that went into extraData; empty for a raw quote.
        pcrs: SHA-256 values the quote covers.
    """

    attest: bytes
    signature: bytes
    caller_claims: bytes
    pcrs: dict[int, bytes]


@dataclass(frozen=True, slots=True)
class Identity:
    """The VM's TPM keys; see ``GetIdentityResponse`` in the protos."""

    platform_ak: bytes
    platform_ak_certificate: bytes | None
    agent_ak: bytes
    agent_ak_certify_attest: bytes
    agent_ak_certify_signature: bytes
    ek_certificates: tuple[bytes, ...]
    ek_rsa: bytes
    ek_ecc: bytes
    manufacturer: str
    reset_count: int
    restart_count: int


@dataclass(frozen=True, slots=True)
class Platform:
    """What the platform below the vTPM says of itself; see ``GetPlatformResponse`` in the protos."""

    kind: str
    report: bytes | None
    certificates: tuple[bytes, ...]
    td_quote: bytes | None
    platform_ak: bytes
    platform_ak_certificate: bytes | None
    missing: dict[str, str]


@dataclass(frozen=True, slots=True)
class Measured:
    """An event that is now in the agent register and log."""

    sequence: int
    digest: bytes
    pcr: int


@dataclass(frozen=True, slots=True)
class GpuReport:
    """A GPU's attestation report.

    Attributes:
        report: SPDM request and response; ``chain``: PEM certificates, leaf first.
        caller_claims, ak_name: what the report's nonce was made of, with yours (see ``Gpus.GetReport`` in the
            protos); empty for a raw report.
    """

    report: bytes
    chain: bytes
    caller_claims: bytes = b""
    ak_name: bytes = b""


@dataclass(frozen=True, slots=True)
class Call(Generic[R]):
    """One call, ready to be made."""

    service: Literal["MeasuredBoot", "Evidence", "Gpus", "Keys", "Admin", "SealedKeys", "TransferBuffers"]
    method: str
    request: Any
    convert: Callable[[Any], R]


def get_evidence(
    nonce: bytes, audience: str, user_data: bytes | None, public_key: bytes | None, *, gpus: bool = False
) -> Call[bytes]:
    if user_data is not None and public_key is not None:
        raise Misuse("BAD_BINDING", "bind user_data or public_key, not both")
    request = evidence_pb2.GetEvidenceRequest(nonce=nonce, audience=audience, gpus=gpus)
    if user_data is not None:
        request.user_data = user_data
    if public_key is not None:
        request.public_key = public_key
    return Call("Evidence", "GetEvidence", request, lambda answer: answer.bundle)


def get_identity() -> Call[Identity]:
    return Call("MeasuredBoot", "GetIdentity", boot_pb.GetIdentityRequest(), _identity)


def _identity(answer: boot_pb.GetIdentityResponse) -> Identity:
    return Identity(
        answer.platform_ak,
        answer.platform_ak_certificate or None,
        answer.agent_ak,
        answer.agent_ak_certify.attest,
        answer.agent_ak_certify.signature,
        tuple(answer.ek_certificates),
        answer.ek_rsa,
        answer.ek_ecc,
        answer.manufacturer,
        answer.reset_count,
        answer.restart_count,
    )


def get_platform() -> Call[Platform]:
    return Call("MeasuredBoot", "GetPlatform", boot_pb.GetPlatformRequest(), _platform)


def _platform(answer: boot_pb.GetPlatformResponse) -> Platform:
    return Platform(
        answer.kind,
        answer.report or None,
        tuple(answer.certificates),
        answer.td_quote or None,
        answer.platform_ak,
        answer.platform_ak_certificate or None,
        dict(answer.missing),
    )


def get_quote(nonce: bytes, pcrs: Sequence[int]) -> Call[Quote]:
    return Call("MeasuredBoot", "GetQuote", boot_pb.GetQuoteRequest(nonce=nonce, pcrs=pcrs), _quote)


def get_raw_quote(nonce: bytes, pcrs: Sequence[int]) -> Call[Quote]:
    return Call("MeasuredBoot", "GetRawQuote", boot_pb.GetRawQuoteRequest(nonce=nonce, pcrs=pcrs), _quote)


def _quote(answer: boot_pb.GetQuoteResponse | boot_pb.GetRawQuoteResponse) -> Quote:
    claims = answer.caller_claims if isinstance(answer, boot_pb.GetQuoteResponse) else b""
    return Quote(answer.quote.attest, answer.quote.signature, claims, dict(answer.pcrs.values))


def read_pcrs(pcrs: Sequence[int]) -> Call[dict[int, bytes]]:
    request = boot_pb.ReadPcrsRequest(pcrs=pcrs)
    return Call("MeasuredBoot", "ReadPcrs", request, lambda answer: dict(answer.pcrs.values))


def get_event_log(kind: LogKind) -> Call[bytes]:
    if kind not in _LOG_KINDS:
        raise Misuse("BAD_LOG_KIND", "name the log: boot, systemd or agent")
    request = boot_pb.GetEventLogRequest(kind=_LOG_KINDS[kind])
    return Call("MeasuredBoot", "GetEventLog", request, lambda answer: answer.log)


def measure_event(content: bytes) -> Call[Measured]:
    request = boot_pb.MeasureEventRequest(content=content)
    return Call("MeasuredBoot", "MeasureEvent", request, lambda a: Measured(a.sequence, a.digest, a.pcr))


def activate_credential(ek: Literal["rsa", "ecc"], credential_blob: bytes, secret: bytes) -> Call[bytes]:
    kind = boot_pb.EK_KIND_RSA if ek == "rsa" else boot_pb.EK_KIND_ECC
    request = boot_pb.ActivateCredentialRequest(ek=kind, credential_blob=credential_blob, secret=secret)
    return Call("MeasuredBoot", "ActivateCredential", request, lambda answer: answer.certinfo)


@dataclass(frozen=True, slots=True)
class Key:
    """A released key.

    Attributes:
        secret: the key; kept out of ``repr``.
        key, broker: the agent's id of it, and who keeps it.
        generation: by the broker's count.
        expires: seconds since the epoch, by the VM's clock: ask again by then.
    """

    secret: bytes = field(repr=False)
    key: str
    broker: str
    generation: int
    expires: int


@dataclass(frozen=True, slots=True)
class Delivery:
    """A key as it came: ``wrapped``, or in ``plain``; bound to ``context``."""

    context: bytes
    wrapped: bytes | None
    plain: bytes | None = field(repr=False)

    def to_key(self, secret: bytes) -> Key:
        """Raises ``HostileInput``."""
        found = parse_context(self.context)
        return Key(secret, found.key, found.broker, found.generation, found.expires)


def list_keys() -> Call[list[keys_pb2.KeyInfo]]:
    return Call("Keys", "List", keys_pb2.ListKeysRequest(), lambda answer: list(answer.keys))


def get_key(name: str, recipient: bytes | None) -> Call[Delivery]:
    request = keys_pb2.GetKeyRequest(key=name, recipient=recipient or b"")
    return Call("Keys", "Get", request, _delivery)


def _delivery(answer: keys_pb2.GetKeyResponse) -> Delivery:
    wrapped = answer.WhichOneof("secret") == "wrapped"
    return Delivery(answer.context, answer.wrapped if wrapped else None, None if wrapped else answer.plain)


def open_sealed(name: str, lease: bytes, object_id: str, version: int, segment_size: int) -> Call[bool]:
    """A stream; each answer becomes whether the object is whole."""
    request = keys_pb2.OpenSealedRequest(key=name, lease=lease, object_id=object_id, segment_size=segment_size)
    try:
        request.object_version = version
    except ValueError as error:
        raise Misuse("BAD_OBJECT_NAME", "the object version is 1 to 18446744073709551615") from error
    return Call("Keys", "OpenSealed", request, lambda answer: answer.whole)


def new_receiver() -> Receiver:
    """Whom a key is wrapped to. Raises ``Misuse`` (``NO_CRYPTOGRAPHY``)."""
    try:
        from cgpu_agent.client.unwrap import Receiver  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise Misuse(
            "NO_CRYPTOGRAPHY", "wrapped keys take more: pip install 'cgpu-agent[keys]', or ask for the key in plain"
        ) from error
    return Receiver()


def opened(delivery: Delivery, receiver: Receiver | None) -> Key:
    """The key, whichever way it came. Raises ``HostileInput``: not as it was asked for."""
    if receiver is None:
        if delivery.plain is None:
            raise HostileInput("BAD_WRAP", "the key came wrapped, though nobody gave a public key")
        return delivery.to_key(delivery.plain)
    if delivery.wrapped is None:
        raise HostileInput("BAD_WRAP", "the key came in plain, though it was to be wrapped")
    return delivery.to_key(receiver.open(delivery.wrapped, delivery.context))


def list_gpus() -> Call[gpus_pb2.GpuSet]:
    return Call("Gpus", "List", gpus_pb2.ListGpusRequest(), lambda answer: answer.gpus)


def uuid_of(gpus: gpus_pb2.GpuSet, place: int) -> str:
    """The uuid of a GPU by its place in the list. Raises ``Misuse`` (``UNKNOWN_GPU``)."""
    if not 0 <= place < len(gpus.gpus):
        raise Misuse("UNKNOWN_GPU", f"there is no GPU number {place}: this machine has {len(gpus.gpus)}")
    return gpus.gpus[place].uuid


def attest_gpus() -> Call[gpus_pb2.GpuSet]:
    return Call("Gpus", "Attest", gpus_pb2.AttestGpusRequest(), lambda answer: answer.gpus)


def watch_gpus() -> Call[gpus_pb2.GpuSet]:
    return Call("Gpus", "Watch", gpus_pb2.WatchGpusRequest(), lambda answer: answer.gpus)


def get_gpu_report(uuid: str, nonce: bytes) -> Call[GpuReport]:
    request = gpus_pb2.GetGpuReportRequest(uuid=uuid, nonce=nonce)
    return Call("Gpus", "GetReport", request, lambda a: GpuReport(a.report, a.chain, a.caller_claims, a.ak_name))


def get_raw_gpu_report(uuid: str, nonce: bytes) -> Call[GpuReport]:
    request = gpus_pb2.GetRawGpuReportRequest(uuid=uuid, nonce=nonce)
    return Call("Gpus", "GetRawReport", request, lambda a: GpuReport(a.report, a.chain))


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a transfer is: bytes; bytes a second, and seconds that the rest takes at that rate (0 = not known).

    Attributes:
        ended: nothing more will happen.
        reason, message: why it failed, if it did.
    """

    ticket: int
    done: int
    total: int
    rate: float
    eta_seconds: float
    ended: bool
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Copy:
    """``size`` bytes between ``start`` of memory on lease and ``offset`` of an allocation.

    Attributes:
        lease: id of a lease of yours, of memory to write to.
    """

    to_device: bool
    lease: bytes
    start: int
    handle: int
    offset: int
    size: int


def open_channel(uuid: str) -> Call[bytes]:
    request = transfer_pb.OpenChannelRequest(gpu=uuid)
    return Call("TransferBuffers", "OpenChannel", request, lambda answer: answer.channel)


def close_channel(channel: bytes) -> Call[None]:
    request = transfer_pb.CloseChannelRequest(channel=channel)
    return Call("TransferBuffers", "CloseChannel", request, lambda _: None)


def allocate(channel: bytes, size: int) -> Call[int]:
    request = _numbers(lambda: transfer_pb.AllocateRequest(channel=channel, size=size))
    return Call("TransferBuffers", "Allocate", request, lambda answer: int(answer.handle))


def free(channel: bytes, handle: int) -> Call[None]:
    request = _numbers(lambda: transfer_pb.FreeRequest(channel=channel, handle=handle))
    return Call("TransferBuffers", "Free", request, lambda _: None)


def submit(channel: bytes, copies: Sequence[Copy]) -> Call[int]:
    request = _numbers(lambda: transfer_pb.SubmitRequest(channel=channel, copies=[_copy(each) for each in copies]))
    return Call("TransferBuffers", "Submit", request, lambda answer: int(answer.ticket))


def _copy(copy: Copy) -> transfer_pb.Copy:
    return transfer_pb.Copy(
        direction=transfer_pb.COPY_DIRECTION_TO_DEVICE if copy.to_device else transfer_pb.COPY_DIRECTION_FROM_DEVICE,
        lease=copy.lease,
        lease_offset=copy.start,
        handle=copy.handle,
        offset=copy.offset,
        length=copy.size,
    )


def load_sealed(
    channel: bytes, key: str, lease: bytes, object_id: str, version: int, segment_size: int, handle: int
) -> Call[int]:
    request = _numbers(
        lambda: transfer_pb.LoadSealedRequest(
            channel=channel,
            key=key,
            lease=lease,
            object_id=object_id,
            object_version=version,
            segment_size=segment_size,
            handle=handle,
        )
    )
    return Call("TransferBuffers", "LoadSealed", request, lambda answer: int(answer.ticket))


def watch_transfers(channel: bytes, ticket: int) -> Call[list[Progress]]:
    request = _numbers(lambda: transfer_pb.WatchTransfersRequest(channel=channel, ticket=ticket))
    return Call("TransferBuffers", "Watch", request, lambda answer: [_progress(each) for each in answer.transfers])


def synchronize(channel: bytes, ticket: int, milliseconds: int) -> Call[Progress]:
    request = _numbers(
        lambda: transfer_pb.SynchronizeRequest(channel=channel, ticket=ticket, milliseconds=milliseconds)
    )
    return Call("TransferBuffers", "Synchronize", request, lambda answer: _progress(answer.transfer))


def get_transfer_stats(channel: bytes) -> Call[list[transfer_pb.ChannelStats]]:
    request = transfer_pb.GetStatsRequest(channel=channel)
    return Call("TransferBuffers", "GetStats", request, lambda answer: list(answer.channels))


def _progress(found: transfer_pb.TransferProgress) -> Progress:
    ended = found.state in (transfer_pb.TRANSFER_STATE_DONE, transfer_pb.TRANSFER_STATE_FAILED)
    return Progress(
        found.ticket, found.done, found.total, found.rate, found.eta_seconds, ended, found.reason, found.message
    )


def _numbers(make: Callable[[], R]) -> R:
    """Raises ``Misuse`` (``BAD_NUMBER``) for numbers that the message has no room for."""
    try:
        return make()
    except ValueError as error:
        raise Misuse(
            "BAD_NUMBER", "handles, sizes, offsets and versions are not negative, and have limits"
        ) from error


def get_status() -> Call[admin_pb2.GetStatusResponse]:
    return Call("Admin", "GetStatus", admin_pb2.GetStatusRequest(), lambda answer: answer)


def get_metrics() -> Call[str]:
    return Call("Admin", "GetMetrics", admin_pb2.GetMetricsRequest(), lambda answer: answer.text)


def get_log_level() -> Call[admin_pb2.GetLogLevelResponse]:
    return Call("Admin", "GetLogLevel", admin_pb2.GetLogLevelRequest(), lambda answer: answer)


def set_log_level(level: str) -> Call[None]:
    return Call("Admin", "SetLogLevel", admin_pb2.SetLogLevelRequest(level=level), lambda _answer: None)


def show_sealed_keys() -> Call[sealed_keys_pb2.ShowSealedKeysResponse]:
    return Call("SealedKeys", "Show", sealed_keys_pb2.ShowSealedKeysRequest(), lambda answer: answer)


def create_sealed_keys(authority: bytes, fleet: str, owner_auth: bytes, *, replace_lost: bool) -> Call[None]:
    request = sealed_keys_pb2.CreateSealedKeysRequest(
        authority=authority, fleet=fleet, owner_auth=owner_auth, replace_lost=replace_lost
    )
    return Call("SealedKeys", "Create", request, lambda _: None)


def adopt_sealed_keys(authority: bytes, owner_auth: bytes) -> Call[int]:
    request = sealed_keys_pb2.AdoptSealedKeysRequest(authority=authority, owner_auth=owner_auth)
    return Call("SealedKeys", "Adopt", request, lambda answer: int(answer.generation))


def add_sealed_key(key: str, group: str, secret: bytes) -> Call[sealed_keys_pb2.SealedKeyInfo]:
    request = sealed_keys_pb2.AddSealedKeyRequest(key=key, group=group, secret=secret)
    return Call("SealedKeys", "Add", request, lambda answer: answer)


def rotate_sealed_key(key: str, secret: bytes) -> Call[sealed_keys_pb2.SealedKeyInfo]:
    request = sealed_keys_pb2.RotateSealedKeyRequest(key=key, secret=secret)
    return Call("SealedKeys", "Rotate", request, lambda answer: answer)


def remove_sealed_key(key: str, generation: int) -> Call[None]:
    request = sealed_keys_pb2.RemoveSealedKeyRequest(key=key, generation=generation)
    return Call("SealedKeys", "Remove", request, lambda _: None)


def raise_epoch(minimum: int) -> Call[int]:
    request = sealed_keys_pb2.RaiseEpochRequest(minimum=minimum)
    return Call("SealedKeys", "RaiseEpoch", request, lambda answer: int(answer.epoch))
