"""The report an AMD Secure Processor signs about an SNP guest: ATTESTATION_REPORT, versions 2 and 3.

Source: AMD "SEV Secure Nested Paging Firmware ABI Specification" (56860), 7.3 and 2.2 (TCB_VERSION). Little-endian.
Fields that must be zero are demanded to be, the unsigned tail included: no two byte strings are one report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from cgpu_agent.wire.reader import Reader

Product = Literal["milan", "genoa", "turin"]
"""Families of processors that share certificates: the third, fourth and fifth generation of EPYC."""

REPORT_SIZE: Final = 1184
SIGNED_SIZE: Final = 0x2A0
"""The signature covers the bytes in front of itself."""
VERSIONS: Final = (2, 3)

_ECDSA_P384_SHA384: Final = 1
_COORDINATE: Final = 72
_P384: Final = 48
_POLICY_MUST: Final = 1 << 17
_POLICY_MIGRATION: Final = 1 << 18
_POLICY_DEBUG: Final = 1 << 19
_MODELS: Final[tuple[tuple[int, range, Product], ...]] = (
    (0x19, range(0x10), "milan"),
    (0x19, range(0x10, 0x20), "genoa"),
    (0x19, range(0xA0, 0xB0), "genoa"),
    (0x1A, range(0x12), "turin"),
)


@dataclass(frozen=True, slots=True)
class Tcb:
    """Security versions of the firmware below the guest; ``fmc`` exists from Turin on, and is 0 before."""

    bootloader: int
    tee: int
    snp: int
    microcode: int
    fmc: int = 0

    def to_json(self) -> dict[str, int]:
        """As a verdict's JSON has it."""
        return {
            "bootloader": self.bootloader,
            "fmc": self.fmc,
            "microcode": self.microcode,
            "snp": self.snp,
            "tee": self.tee,
        }


@dataclass(frozen=True, slots=True)
class SnpReport:
    """An ATTESTATION_REPORT.

    Attributes:
        version: 2 or 3.
        guest_svn: security version of the guest's image, by its id block.
        policy: GUEST_POLICY; read it by ``debug`` and ``migration``.
        vmpl: privilege level of the software that asked for the report; 0 is the highest.
        report_data: 64 bytes that this software chose.
        measurement: 48 bytes, SHA-384 over what was launched.
        id_key_digest: SHA-384 of the key that signed the id block; zero where there was none.
        current_tcb, reported_tcb, committed_tcb, launch_tcb: 8 bytes each, for ``parse_tcb``.
        signing_key: 0 the chip's key (VCEK), 1 the key the cloud got of AMD (VLEK).
        masked: the report hides the chip.
        product: by the processor's family and model; version 2 does not say (``None``).
        chip_id: 64 bytes.
        r, s: the ECDSA signature on P-384 over ``signed`` by SHA-384.
    """

    version: int
    guest_svn: int
    policy: int
    family_id: bytes
    image_id: bytes
    vmpl: int
    current_tcb: bytes
    signing_key: int
    masked: bool
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    reported_tcb: bytes
    product: Product | None
    chip_id: bytes
    committed_tcb: bytes
    launch_tcb: bytes
    signed: bytes
    r: int
    s: int

    @property
    def debug(self) -> bool:
        """Whether the host may read the guest's memory."""
        return bool(self.policy & _POLICY_DEBUG)

    @property
    def migration(self) -> bool:
        """Whether a migration agent may, which could be anyone's."""
        return bool(self.policy & _POLICY_MIGRATION)


def parse_tcb(raw: bytes, product: Product) -> Tcb:
    """Read a TCB_VERSION (2.2), whose layout changed with Turin. Raises ``HostileInput`` (``BAD_VALUE``)."""
    reader = Reader(raw, "TCB_VERSION", "little")
    if product == "turin":
        fmc, bootloader, tee, snp = (reader.u8(field) for field in ("FMC", "boot loader", "TEE", "SNP"))
        _zero(reader, 3, "reserved")
        microcode = reader.u8("microcode")
    else:
        fmc, bootloader, tee = 0, reader.u8("boot loader"), reader.u8("TEE")
        _zero(reader, 4, "reserved")
        snp, microcode = reader.u8("SNP"), reader.u8("microcode")
    reader.end()
    return Tcb(bootloader, tee, snp, microcode, fmc)


def parse_snp_report(data: bytes) -> SnpReport:
    """Parse an ATTESTATION_REPORT of exactly 1184 bytes. The signature is not verified here.

    Raises:
        HostileInput: ``TRUNCATED``, ``TRAILING_BYTES``, ``UNKNOWN_VERSION``, ``UNKNOWN_ALGORITHM``, ``BAD_VALUE``.
    """
    reader = Reader(data, "ATTESTATION_REPORT", "little")
    version = reader.u32("VERSION")
    if version not in VERSIONS:
        raise reader.fail("UNKNOWN_VERSION", f"version {version} is not known")
    guest_svn, policy = reader.u32("GUEST_SVN"), reader.u64("POLICY")
    if not policy & _POLICY_MUST:
        raise reader.fail("BAD_VALUE", "a guest policy without the bit that is always set")
    family_id, image_id = reader.take(16, "FAMILY_ID"), reader.take(16, "IMAGE_ID")
    vmpl, algorithm = reader.u32("VMPL"), reader.u32("SIGNATURE_ALGO")
    if algorithm != _ECDSA_P384_SHA384:
        raise reader.fail("UNKNOWN_ALGORITHM", f"signature algorithm {algorithm}")
    current_tcb = reader.take(8, "CURRENT_TCB")
    reader.u64("PLATFORM_INFO")
    signing_key, masked = _key_info(reader)
    _zero(reader, 4, "reserved")
    report_data, measurement = reader.take(64, "REPORT_DATA"), reader.take(48, "MEASUREMENT")
    host_data, id_key_digest = reader.take(32, "HOST_DATA"), reader.take(48, "ID_KEY_DIGEST")
    reader.take(48 + 32 + 32, "AUTHOR_KEY_DIGEST, REPORT_ID, REPORT_ID_MA")
    reported_tcb = reader.take(8, "REPORTED_TCB")
    product = _product(reader, version)
    chip_id, committed_tcb = reader.take(64, "CHIP_ID"), reader.take(8, "COMMITTED_TCB")
    for field in ("CURRENT", "COMMITTED"):
        reader.take(3, f"{field} build, minor, major")
        _zero(reader, 1, "reserved")
    launch_tcb = reader.take(8, "LAUNCH_TCB")
    _zero(reader, SIGNED_SIZE - reader.offset, "reserved")
    r, s = _coordinate(reader, "signature R"), _coordinate(reader, "signature S")
    _zero(reader, REPORT_SIZE - reader.offset, "signature tail")
    reader.end()
    return SnpReport(
        version=version,
        guest_svn=guest_svn,
        policy=policy,
        family_id=family_id,
        image_id=image_id,
        vmpl=vmpl,
        current_tcb=current_tcb,
        signing_key=signing_key,
        masked=masked,
        report_data=report_data,
        measurement=measurement,
        host_data=host_data,
        id_key_digest=id_key_digest,
        reported_tcb=reported_tcb,
        product=product,
        chip_id=chip_id,
        committed_tcb=committed_tcb,
        launch_tcb=launch_tcb,
        signed=data[:SIGNED_SIZE],
        r=r,
        s=s,
    )


def _key_info(reader: Reader) -> tuple[int, bool]:
    """Bit 0: an author key signed the id key. Bit 1: the chip is hidden. Bits 2-4: which key signs."""
    info = reader.u32("key info")
    if info >> 5:
        raise reader.fail("BAD_VALUE", "reserved bits of the key info are set")
    return info >> 2, bool(info & 2)


def _product(reader: Reader, version: int) -> Product | None:
    family, model, _ = (reader.u8(field) for field in ("CPUID_FAM_ID", "CPUID_MOD_ID", "CPUID_STEP"))
    _zero(reader, 21, "reserved")
    if version == 2:
        if family or model:
            raise reader.fail("BAD_VALUE", "a processor model in a version that has none")
        return None
    for known, models, product in _MODELS:
        if family == known and model in models:
            return product
    raise reader.fail("UNKNOWN_PRODUCT", f"no known processor has family 0x{family:02x} and model 0x{model:02x}")


def _coordinate(reader: Reader, field: str) -> int:
    value = reader.uint(_COORDINATE, field)
    if not value or value >> (8 * _P384):
        raise reader.fail("BAD_VALUE", f"{field} is no number of P-384")
    return value


def _zero(reader: Reader, count: int, field: str) -> None:
    if reader.take(count, field).strip(b"\0"):
        raise reader.fail("BAD_VALUE", f"{field} bytes before offset {reader.offset} are not zero")
