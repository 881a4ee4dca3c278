"""The report that Azure's paravisor leaves in the vTPM: a hardware report, and the claims that it binds.

Source: the layout as Microsoft's and other public clients read it, and every length relation as seen on real reports.
Little-endian. Nothing in it is signed but the hardware report; the claims count only once that report binds them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from cgpu_agent.wire import strictjson
from cgpu_agent.wire.reader import Reader
from cgpu_agent.wire.snp import REPORT_SIZE as SNP_SIZE
from cgpu_agent.wire.tdx import TDREPORT_SIZE

REPORT_INDEX: Final = 0x01400001
"""NV index of the report; Trusted Launch has none."""
USER_DATA_INDEX: Final = 0x01400002
"""NV index of the guest's 64 bytes for the next report."""
AK_CERTIFICATE_INDEX: Final = 0x01C101D0
"""NV index of the platform AK's certificate, on every Azure VM with a vTPM."""
MAGIC: Final = b"HCLA"
MAX_HCL: Final = 4096
"""Bytes of the NV index, zero tail included; 2600 and 2048 are in use."""
MAX_CLAIMS: Final = 3072

_VERSIONS: Final = (1, 2)
_REQUEST_AK_CERT: Final = 2
_HARDWARE_AREA: Final = SNP_SIZE
_FRONT: Final = 1236
"""Bytes in front of the claims."""
_CLAIMS_HEADER: Final = 20
_SHA256: Final = 1
_MAX_KEYS: Final = 8
_MAX_MODULUS: Final = 1024
_UUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_USER_DATA = re.compile(r"[0-9A-Fa-f]{128}")


class ReportType(IntEnum):
    """What signed the hardware report; only the last two are read here."""

    VBS = 1
    SNP = 2
    TVM = 3
    TDX = 4


@dataclass(frozen=True, slots=True)
class HclReport:
    """``hardware``: ATTESTATION_REPORT or TDREPORT, by ``kind``. ``claims``: the JSON, exactly as it was hashed."""

    version: int
    kind: ReportType
    hardware: bytes
    claims: bytes


@dataclass(frozen=True, slots=True)
class Jwk:
    """An RSA public key of the claims."""

    modulus: int
    exponent: int


@dataclass(frozen=True, slots=True)
class RuntimeClaims:
    """What the paravisor says of the VM.

    Attributes:
        ak: HCLAkPub, the platform AK at 0x81000003.
        secure_boot: whether UEFI Secure Boot is on.
        vm_unique_id: UUID, lower case.
        user_data: 64 bytes that somebody in the guest wrote before the report was made; ``None`` in old reports.
    """

    ak: Jwk
    secure_boot: bool
    vm_unique_id: str
    user_data: bytes | None


def is_hcl(data: bytes) -> bool:
    """Whether the data claims to be such a report."""
    return data[:4] == MAGIC


def parse_hcl(data: bytes) -> HclReport:
    """Parse the content of NV index 0x01400001; only zeros may follow the claims.

    Raises:
        HostileInput: ``TOO_LARGE``, ``TRUNCATED``, ``BAD_VALUE``, ``UNKNOWN_VERSION``, ``WRONG_TYPE`` (a report of
            another kind), ``UNKNOWN_ALGORITHM``, ``TRAILING_BYTES``.
    """
    reader = Reader(data, "HCL report", "little")
    if len(data) > MAX_HCL:
        raise reader.fail("TOO_LARGE", f"{len(data)} bytes, at most {MAX_HCL} are allowed")
    version, report_size = _outer_header(reader)
    area = reader.take(_HARDWARE_AREA, "hardware report")
    data_size, inner_version = reader.u32("data size"), reader.u32("claims version")
    kind, hash_type = reader.u32("report type"), reader.u32("hash type")
    claims_size = reader.u32("claims size")
    if inner_version != 1:
        raise reader.fail("UNKNOWN_VERSION", f"claims of version {inner_version}")
    if kind not in (ReportType.SNP, ReportType.TDX):
        raise reader.fail("WRONG_TYPE", f"report type {kind} is neither SNP nor TDX")
    if hash_type != _SHA256:
        raise reader.fail("UNKNOWN_ALGORITHM", f"claims hashed by type {hash_type}, not SHA-256")
    if claims_size > MAX_CLAIMS:
        raise reader.fail("TOO_LARGE", f"{claims_size} bytes of claims, at most {MAX_CLAIMS} are allowed")
    if data_size != claims_size + _CLAIMS_HEADER or report_size != claims_size + _FRONT:
        raise reader.fail("BAD_VALUE", "the three lengths contradict each other")
    claims = reader.take(claims_size, "claims")
    if reader.rest().strip(b"\0"):
        raise reader.fail("TRAILING_BYTES", "bytes other than zeros after its end")
    size = SNP_SIZE if kind == ReportType.SNP else TDREPORT_SIZE
    if area[size:].strip(b"\0"):
        raise reader.fail("BAD_VALUE", "bytes other than zeros after the hardware report")
    return HclReport(version, ReportType(kind), area[:size], claims)


def _outer_header(reader: Reader) -> tuple[int, int]:
    if reader.take(4, "signature") != MAGIC:
        raise reader.fail("BAD_VALUE", "it does not begin with HCLA")
    version, report_size = reader.u32("version"), reader.u32("report size")
    request, status = reader.u32("request type"), reader.u32("status")
    if version not in _VERSIONS:
        raise reader.fail("UNKNOWN_VERSION", f"version {version} is not known")
    if request != _REQUEST_AK_CERT:
        raise reader.fail("WRONG_TYPE", f"request type {request} is not that of an AK's report")
    if status or reader.take(12, "reserved").strip(b"\0"):
        raise reader.fail("BAD_VALUE", "status or reserved fields are not zero")
    return version, report_size


def parse_claims(data: bytes) -> RuntimeClaims:
    """Read the runtime claims. Members that are not needed may be there: VMs differ in them.

    Raises:
        HostileInput: ``TOO_LARGE``, ``BAD_JSON``, ``DUPLICATE_KEY``, ``BAD_FIELD``.
    """
    document = strictjson.loads(data, "runtime claims", MAX_CLAIMS)
    fields = strictjson.Fields(document, "runtime claims")
    keys = fields.items("keys", _MAX_KEYS)
    found = [key for key in keys if isinstance(key, dict) and key.get("kid") == "HCLAkPub"]
    if len(found) != 1:
        raise fields.fail(f"{len(found)} keys named HCLAkPub, one is wanted")
    configuration = fields.fields("vm-configuration")
    secure_boot = configuration.raw("secure-boot")
    if not isinstance(secure_boot, bool):
        raise configuration.fail("secure-boot is neither true nor false")
    vm_id = configuration.text("vmUniqueId", 36)
    if _UUID.fullmatch(vm_id) is None:
        raise configuration.fail("vmUniqueId is no UUID")
    user_data = None
    if "user-data" in document:
        text = fields.text("user-data", 128)
        if _USER_DATA.fullmatch(text) is None:
            raise fields.fail("user-data is not 64 bytes in hex")
        user_data = bytes.fromhex(text)
    return RuntimeClaims(_jwk(found[0]), secure_boot, vm_id.lower(), user_data)


def _jwk(value: dict[str, Any]) -> Jwk:
    """An RSA key as JWK (RFC 7518, 6.3.1)."""
    fields = strictjson.Fields(value, "HCLAkPub")
    fields.choice("kty", frozenset({"RSA"}))
    return Jwk(_base64url_uint(fields, "n"), _base64url_uint(fields, "e"))


def _base64url_uint(fields: strictjson.Fields, name: str) -> int:
    text = fields.text(name, 2 * _MAX_MODULUS)
    try:
        value = strictjson.unb64url(text)
    except ValueError:
        raise fields.fail(f"{name} is not base64url") from None
    if not 0 < len(value) <= _MAX_MODULUS or value[0] == 0:
        raise fields.fail(f"{name} is not a number in its shortest form")
    return int.from_bytes(value, "big")
