"""What Intel TDX says about a guest: TDREPORT (valid on its own machine only) and the TD quote (valid anywhere).

Sources: Intel "TDX Module Base Architecture Specification" (TDREPORT_STRUCT); Intel "TDX DCAP Quoting Library API",
A.3 and A.4 (quotes of version 4 and 5). Little-endian. The certificates in a quote are bounded here only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cgpu_agent.wire.reader import Reader

TDREPORT_SIZE: Final = 1024
MAX_QUOTE: Final = 16 * 1024
MAX_CERTIFICATION: Final = 12 * 1024
MAX_AUTH_DATA: Final = 1024
MAX_ZERO_TAIL: Final = 256
"""Azure's quote service pads a quote of version 4 with 70 zeros."""

_TEE_TDX: Final = 0x81
_KEY_ECDSA_P256: Final = 2
_INTEL_QE: Final = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
_BODY_1_0: Final = 2
_BODY_1_5: Final = 3
_BODY_SIZES: Final = {_BODY_1_0: 584, _BODY_1_5: 648}
_CERTIFIED_BY_QE_REPORT: Final = 6
_CERTIFIED_BY_PCK_CHAIN: Final = 5
_DEBUG: Final = 1
_MR: Final = 48


@dataclass(frozen=True, slots=True)
class TdBody:
    """A guest (TD) and the module below it, as both structures tell them; digests are SHA-384.

    Attributes:
        tee_tcb_svn: 16 security versions, one a byte.
        mrseam, mrsignerseam, seam_attributes: the TDX module; the latter two are zero for Intel's own.
        attributes: TD attributes, 8 bytes as sent.
        mrtd: what the guest was built from.
        mrconfigid, mrowner, mrownerconfig: words of whoever built it.
        rtmrs: four registers that the guest extends.
        report_data: 64 bytes that the guest chose.
        service_td: digest of a TD that may serve (migrate) this one; empty where the structure has none.
    """

    tee_tcb_svn: bytes
    mrseam: bytes
    mrsignerseam: bytes
    seam_attributes: bytes
    attributes: bytes
    xfam: bytes
    mrtd: bytes
    mrconfigid: bytes
    mrowner: bytes
    mrownerconfig: bytes
    rtmrs: tuple[bytes, ...]
    report_data: bytes
    service_td: bytes

    @property
    def debug(self) -> bool:
        """Whether the host may read the guest's memory."""
        return bool(self.attributes[0] & _DEBUG)


@dataclass(frozen=True, slots=True)
class QeReport:
    """The report of the enclave that signs quotes (SGX REPORTBODY, 384 bytes), and who signed it."""

    attributes: bytes
    mr_signer: bytes
    product: int
    svn: int
    report_data: bytes
    signed: bytes
    r: int
    s: int

    @property
    def debug(self) -> bool:
        """Whether the enclave is open to a debugger."""
        return bool(self.attributes[0] & 2)


@dataclass(frozen=True, slots=True)
class TdQuote:
    """A TD quote with an ECDSA P-256 attestation key.

    Attributes:
        version: 4 or 5.
        body: the guest.
        signed: what the attestation key signed: header and body.
        r, s: by SHA-256 on P-256.
        attestation_key: x || y.
        qe: the enclave that holds this key, and the signature by the machine's PCK over its report.
        auth_data: bound by the enclave's report data together with the key.
        certificates: PEM, the PCK certificate first.
    """

    version: int
    body: TdBody
    signed: bytes
    r: int
    s: int
    attestation_key: bytes
    qe: QeReport
    auth_data: bytes
    certificates: bytes


def is_td_quote(data: bytes) -> bool:
    """Whether the data claims to be a TD quote."""
    return data[:2] in (b"\x04\0", b"\x05\0") and data[4:8] == _TEE_TDX.to_bytes(4, "little")


def parse_tdreport(data: bytes) -> TdBody:
    """Parse a TDREPORT of 1024 bytes. Its MAC proves nothing outside of its machine.

    Raises:
        HostileInput: ``TRUNCATED``, ``TRAILING_BYTES``, ``WRONG_TYPE``, ``BAD_VALUE``.
    """
    reader = Reader(data, "TDREPORT", "little")
    kind, subtype, version = (reader.u8(field) for field in ("type", "subtype", "version"))
    if kind != _TEE_TDX or subtype or version > 1:
        raise reader.fail("WRONG_TYPE", f"type {kind:02x}, subtype {subtype:02x}, version {version:02x}")
    _zero(reader, 13, "reserved")
    reader.take(16 + 2 * _MR, "CPUSVN and digests")
    report_data = reader.take(64, "REPORTDATA")
    _zero(reader, 32, "reserved")
    reader.take(32, "MAC")
    reader.u64("valid fields of the TCB")
    tee_tcb_svn = reader.take(16, "TEE_TCB_SVN")
    mrseam, mrsignerseam = reader.take(_MR, "MRSEAM"), reader.take(_MR, "MRSIGNERSEAM")
    seam_attributes = reader.take(8, "SEAM attributes")
    reader.take(16, "TEE_TCB_SVN2")
    _zero(reader, 95 + 17, "reserved")
    attributes, xfam, mrtd = reader.take(8, "ATTRIBUTES"), reader.take(8, "XFAM"), reader.take(_MR, "MRTD")
    config, owner, owner_config = (reader.take(_MR, field) for field in ("MRCONFIGID", "MROWNER", "MROWNERCONFIG"))
    rtmrs = tuple(reader.take(_MR, "RTMR") for _ in range(4))
    service_td = reader.take(_MR, "SERVTD_HASH")
    _zero(reader, 64, "reserved")
    reader.end()
    return TdBody(
        tee_tcb_svn=tee_tcb_svn,
        mrseam=mrseam,
        mrsignerseam=mrsignerseam,
        seam_attributes=seam_attributes,
        attributes=attributes,
        xfam=xfam,
        mrtd=mrtd,
        mrconfigid=config,
        mrowner=owner,
        mrownerconfig=owner_config,
        rtmrs=rtmrs,
        report_data=report_data,
        service_td=service_td,
    )


def parse_td_quote(data: bytes) -> TdQuote:
    """Parse a TD quote, after which only zeros may follow (at most 256). No signature is verified here.

    Raises:
        HostileInput: ``TOO_LARGE``, ``TRUNCATED``, ``TRAILING_BYTES``, ``UNKNOWN_VERSION``, ``UNKNOWN_ALGORITHM``,
            ``WRONG_TYPE``, ``BAD_VALUE``.
    """
    reader = Reader(data, "TD quote", "little")
    if len(data) > MAX_QUOTE:
        raise reader.fail("TOO_LARGE", f"{len(data)} bytes, at most {MAX_QUOTE} are allowed")
    version = _header(reader)
    body = _body(reader, version)
    signed = data[: reader.offset]
    size = reader.u32("signature data size")
    inner = Reader(reader.take(size, "signature data"), "TD quote signature data", "little")
    tail = reader.rest()
    if len(tail) > MAX_ZERO_TAIL or tail.strip(b"\0"):
        raise reader.fail("TRAILING_BYTES", f"{len(tail)} stray bytes after its end")
    r, s = _signature(inner)
    key = inner.take(64, "attestation key")
    certification = _certification(inner, _CERTIFIED_BY_QE_REPORT)
    inner.end()
    return _certified(version, body, signed, (r, s), key, certification)


def _header(reader: Reader) -> int:
    version, key_type, tee = reader.u16("version"), reader.u16("attestation key type"), reader.u32("TEE type")
    if version not in (4, 5):
        raise reader.fail("UNKNOWN_VERSION", f"version {version} is not known")
    if key_type != _KEY_ECDSA_P256:
        raise reader.fail("UNKNOWN_ALGORITHM", f"attestation key type {key_type}")
    if tee != _TEE_TDX:
        raise reader.fail("WRONG_TYPE", f"TEE type 0x{tee:x} is not TDX")
    reader.take(4, "reserved")
    if reader.take(16, "QE vendor") != _INTEL_QE:
        raise reader.fail("BAD_VALUE", "not made by Intel's quoting enclave")
    reader.take(20, "user data")
    return version


def _body(reader: Reader, version: int) -> TdBody:
    kind, size = _BODY_1_0, _BODY_SIZES[_BODY_1_0]
    if version == 5:
        kind, size = reader.u16("body type"), reader.u32("body size")
        if kind not in _BODY_SIZES:
            raise reader.fail("WRONG_TYPE", f"body type {kind} is no TD's")
        if size != _BODY_SIZES[kind]:
            raise reader.fail("BAD_VALUE", f"a body of {size} bytes for type {kind}")
    return TdBody(
        tee_tcb_svn=reader.take(16, "TEE_TCB_SVN"),
        mrseam=reader.take(_MR, "MRSEAM"),
        mrsignerseam=reader.take(_MR, "MRSIGNERSEAM"),
        seam_attributes=reader.take(8, "SEAM attributes"),
        attributes=reader.take(8, "ATTRIBUTES"),
        xfam=reader.take(8, "XFAM"),
        mrtd=reader.take(_MR, "MRTD"),
        mrconfigid=reader.take(_MR, "MRCONFIGID"),
        mrowner=reader.take(_MR, "MROWNER"),
        mrownerconfig=reader.take(_MR, "MROWNERCONFIG"),
        rtmrs=tuple(reader.take(_MR, "RTMR") for _ in range(4)),
        report_data=reader.take(64, "REPORTDATA"),
        service_td=b"" if kind == _BODY_1_0 else reader.take(16 + _MR, "TEE_TCB_SVN2 and MRSERVICETD")[16:],
    )


def _certified(
    version: int, body: TdBody, signed: bytes, signature: tuple[int, int], key: bytes, certification: bytes
) -> TdQuote:
    reader = Reader(certification, "QE certification", "little")
    report = reader.take(384, "QE report")
    qe_r, qe_s = _signature(reader)
    auth_size = reader.u16("auth data size")
    if auth_size > MAX_AUTH_DATA:
        raise reader.fail("TOO_LARGE", f"{auth_size} bytes of auth data, at most {MAX_AUTH_DATA} are allowed")
    auth_data = reader.take(auth_size, "auth data")
    certificates = _certification(reader, _CERTIFIED_BY_PCK_CHAIN)
    reader.end()
    qe = QeReport(
        attributes=report[48:64],
        mr_signer=report[128:160],
        product=int.from_bytes(report[256:258], "little"),
        svn=int.from_bytes(report[258:260], "little"),
        report_data=report[320:384],
        signed=report,
        r=qe_r,
        s=qe_s,
    )
    r, s = signature
    # The chain ends in one NUL, as C has it.
    return TdQuote(version, body, signed, r, s, key, qe, auth_data, certificates.removesuffix(b"\0"))


def _certification(reader: Reader, wanted: int) -> bytes:
    kind, size = reader.u16("certification type"), reader.u32("certification size")
    if kind != wanted:
        raise reader.fail("WRONG_TYPE", f"certification type {kind}, {wanted} is wanted")
    if size > MAX_CERTIFICATION:
        raise reader.fail("TOO_LARGE", f"{size} bytes of certification, at most {MAX_CERTIFICATION} are allowed")
    return reader.take(size, "certification")


def _signature(reader: Reader) -> tuple[int, int]:
    """r || s, both big-endian, unlike all else."""
    r, s = (int.from_bytes(reader.take(32, f"signature {name}"), "big") for name in "RS")
    if not r or not s:
        raise reader.fail("BAD_VALUE", "a signature of zero")
    return r, s


def _zero(reader: Reader, count: int, field: str) -> None:
    if reader.take(count, field).strip(b"\0"):
        raise reader.fail("BAD_VALUE", f"{field} bytes before offset {reader.offset} are not zero")
