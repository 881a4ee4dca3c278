"""Makes what an NVIDIA GPU has: five certificates, measurements, opaque fields, signed reports.

It plays a GH100. The shapes are those that ``wire.spdm`` and ``wire.nvidia`` read; the values are invented.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cgpu_agent.backends.gpu.software.pki import CA, SIGNER, Seed, Signer, issue, pem, root
from cgpu_agent.wire.nvidia import Field, encode_fields
from cgpu_agent.wire.spdm import Measurement, encode_signed
from cgpu_agent.wire.spdm12 import encode_chain

CHIP: Final = "GH100"
MODEL: Final = "Software GPU (simulated, protects nothing)"
DRIVER: Final = "550.90.07"
VBIOS: Final = "96.00.9F.00.01"
FWID: Final = hashlib.sha384(b"cgpu-agent software GPU: firmware").digest()
BLOCKS: Final = 64

_VBIOS_FIELD: Final = bytes.fromhex("009f009601000000")
_OFF: Final = b"\x55"
_SHA384_OID: Final = bytes.fromhex("0609608648016503040202")
_DEVICE_NAME: Final = x509.ObjectIdentifier("1.3.6.1.4.1.412.274.1")  # DMTF: device information
_COMPOSITE_DEVICE_ID: Final = x509.ObjectIdentifier("2.23.133.5.4.1")


def measured(block: int) -> bytes:
    """The digest that block ``block`` (from 1) of an honest software GPU holds."""
    return hashlib.sha384(b"cgpu-agent software GPU: block %d" % block).digest()


def _tlv(tag: int, content: bytes) -> bytes:
    """DER of up to 255 bytes."""
    size = bytes((len(content),)) if len(content) < 0x80 else bytes((0x81, len(content)))
    return bytes((tag,)) + size + content


def _fwid_extension(key: ec.EllipticCurvePublicKey) -> x509.UnrecognizedExtension:
    """CompositeDeviceID: version, key of the layer below, FWID."""
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    fwid = _tlv(0x30, _SHA384_OID + _tlv(0x04, FWID))
    return x509.UnrecognizedExtension(_COMPOSITE_DEVICE_ID, _tlv(0x30, b"\2\1\1" + spki + fwid))


@dataclass(frozen=True)
class Device:
    """A GPU's identity: leaf, boot ROM, provisioner, family, root."""

    signers: tuple[Signer, ...]
    pdi: bytes

    @property
    def leaf(self) -> Signer:
        return self.signers[0]

    @cached_property
    def uuid(self) -> str:
        """As a driver names it."""
        return f"GPU-{uuid.UUID(bytes=hashlib.sha256(b'uuid' + self.pdi).digest()[:16], version=4)}"

    @cached_property
    def chain(self) -> bytes:
        """Certificates as SPDM slots hold them."""
        return encode_chain([each.certificate.public_bytes(Encoding.DER) for each in reversed(self.signers)])

    def report(self, nonce: bytes, measurements: Sequence[Measurement]) -> bytes:
        """A signed report over 32 bytes of nonce, as NVML hands it over."""
        signed = encode_signed(nonce, measurements, os.urandom(32), encode_fields(_fields()))
        return signed + self.leaf.sign(signed)


def blocks() -> list[Measurement]:
    """What a GPU measured, block by block."""
    return [Measurement(index, 1, measured(index)) for index in range(1, BLOCKS + 1)]


def _fields() -> dict[int, bytes]:
    return {
        Field.VBIOS_VERSION: _VBIOS_FIELD,
        Field.BOARD_ID: bytes(4),
        Field.CHIP_SKU: b"000\0",
        Field.CHIP_SKU_MOD: b"0\0",
        Field.PROJECT: b"0000\0",
        Field.PROJECT_SKU: b"0000\0",
        Field.PROJECT_SKU_MOD: b"0\0",
        Field.DRIVER_VERSION: DRIVER.encode() + b"\0",
        Field.GPU_INFO: bytes(8),
        Field.MEASUREMENT_COUNTS: bytes(256),
        Field.CPR_INFO: bytes(4),
        Field.NVDEC0_STATUS: _OFF,
        Field.FWID: FWID,
        Field.PROTECTED_PCIE_STATUS: _OFF,
        Field.OPAQUE_VERSION: b"\1\0",
        Field.FEATURE_FLAG: bytes(2),
    }


@dataclass(frozen=True)
class Maker:
    """The maker of software GPUs and of their reference values, with a root for each."""

    seed: Seed
    root: Signer = field(init=False)
    rim_root: Signer = field(init=False)
    identity: Signer = field(init=False)
    provisioner: Signer = field(init=False)

    def __post_init__(self) -> None:
        made = root(self.seed, "Software GPU Device Identity CA (simulated)")
        identity = issue(self.seed, made, f"Software GPU {CHIP} Identity (simulated)")
        object.__setattr__(self, "root", made)
        object.__setattr__(self, "rim_root", root(self.seed, "Software GPU RIM Root CA (simulated)"))
        object.__setattr__(self, "identity", identity)
        provisioner = issue(self.seed, identity, f"Software GPU {CHIP} Provisioner (simulated)")
        object.__setattr__(self, "provisioner", provisioner)

    def device(self, number: int, life: int = 0) -> Device:
        """GPU ``number``; another ``life`` is another piece of hardware in the same place."""
        label = f"gpu/{number}/{life}"
        pdi = self.seed.derive(f"pdi/{label}", 8)
        boot_rom = issue(
            self.seed,
            self.provisioner,
            f"{CHIP} A01 GSP BROM (simulated)",
            CA,
            label=f"{label}/brom",
            serial=int.from_bytes(b"\x41" + pdi, "big"),
        )
        name = f"NVIDIA:{CHIP}:{pdi.hex().upper()}".encode()
        extensions = (
            *SIGNER,
            (x509.SubjectAlternativeName([x509.OtherName(_DEVICE_NAME, _tlv(0x0C, name))]), False),
            (_fwid_extension(boot_rom.key.public_key()), False),
        )
        leaf = issue(self.seed, boot_rom, f"{CHIP} A01 GSP FMC LF (simulated)", extensions, label=f"{label}/leaf")
        return Device((leaf, boot_rom, self.provisioner, self.identity, self.root), pdi)

    def stranger(self) -> Maker:
        """Another maker, whose root nobody pinned."""
        return Maker(Seed(self.seed.derive("stranger", 32)))

    @property
    def device_root_pem(self) -> bytes:
        return pem([self.root.certificate])

    @property
    def rim_root_pem(self) -> bytes:
        return pem([self.rim_root.certificate])
