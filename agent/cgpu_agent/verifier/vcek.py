"""What AMD certifies of the key that signed a report: which chip, of which product, at which firmware versions.

Source: AMD "Versioned Chip Endorsement Key (VCEK) Certificate and KDS Interface Specification" (57230), 3. A VLEK is
the same for a cloud in place of a chip.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cryptography import x509

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.snp import Product, Tcb

VCEK_NAME: Final = "SEV-VCEK"
VLEK_NAME: Final = "SEV-VLEK"

_AMD: Final = "1.3.6.1.4.1.3704.1."
_PRODUCT, _HWID, _CSP = f"{_AMD}2", f"{_AMD}4", f"{_AMD}5"
_BOOTLOADER, _TEE, _SNP, _MICROCODE, _FMC = (f"{_AMD}3.{number}" for number in (1, 2, 3, 8, 9))
_UNUSED = tuple(f"{_AMD}3.{number}" for number in (4, 5, 6, 7))
_PRODUCTS: Final[Mapping[str, Product]] = {"Milan": "milan", "Genoa": "genoa", "Turin": "turin"}
_HWID_SIZES: Final[Mapping[Product, int]] = {"milan": 64, "genoa": 64, "turin": 8}
_CHIP_ID_SIZE: Final = 64


@dataclass(frozen=True, slots=True)
class ChipCertificate:
    """``chip_id``: as the report has it, 64 bytes; ``None`` for a VLEK, which names no chip."""

    product: Product
    tcb: Tcb
    chip_id: bytes | None


def chip_certificate(certificate: x509.Certificate, *, vlek: bool) -> ChipCertificate:
    """Read AMD's extensions of a VCEK or VLEK.

    Raises:
        HostileInput: ``BAD_CERTIFICATE`` for an extension that is missing or malformed, ``UNKNOWN_PRODUCT``.
    """
    found = _extensions(certificate)
    name = _text(found, _PRODUCT)
    product = _PRODUCTS.get(name.partition("-")[0])
    if product is None:
        raise HostileInput("UNKNOWN_PRODUCT", "the certificate is for a product that is not known")
    for oid in _UNUSED:
        if oid in found and _integer(found, oid):
            raise HostileInput("BAD_CERTIFICATE", "a firmware version in the certificate where there is no firmware")
    tcb = Tcb(
        bootloader=_integer(found, _BOOTLOADER),
        tee=_integer(found, _TEE),
        snp=_integer(found, _SNP),
        microcode=_integer(found, _MICROCODE),
        fmc=_integer(found, _FMC) if product == "turin" else 0,
    )
    if vlek:
        if not _text(found, _CSP):
            raise HostileInput("BAD_CERTIFICATE", "a VLEK that names no cloud")
        return ChipCertificate(product, tcb, None)
    chip_id = found.get(_HWID, b"")
    if len(chip_id) != _HWID_SIZES[product]:
        raise HostileInput("BAD_CERTIFICATE", f"a chip id of {len(chip_id)} bytes in the certificate")
    return ChipCertificate(product, tcb, chip_id.ljust(_CHIP_ID_SIZE, b"\0"))


def _extensions(certificate: x509.Certificate) -> dict[str, bytes]:
    """AMD's own extensions, raw. The certificate was read before, so its extensions can be."""
    return {
        each.oid.dotted_string: each.value.value
        for each in certificate.extensions
        if isinstance(each.value, x509.UnrecognizedExtension)
    }


def _integer(found: Mapping[str, bytes], oid: str) -> int:
    """DER INTEGER of 0 to 255."""
    value = found.get(oid, b"")
    short = len(value) == 3 and value[:2] == b"\x02\x01" and value[2] < 0x80
    padded = len(value) == 4 and value[:3] == b"\x02\x02\x00" and value[3] >= 0x80
    if not short and not padded:
        raise HostileInput("BAD_CERTIFICATE", f"extension {oid} is no firmware version")
    return value[-1]


def _text(found: Mapping[str, bytes], oid: str) -> str:
    """DER IA5String or UTF8String, at most 127 ASCII characters."""
    value = found.get(oid, b"")
    if len(value) < 2 or value[0] not in (0x16, 0x0C) or value[1] != len(value) - 2 or not value[2:].isascii():
        raise HostileInput("BAD_CERTIFICATE", f"extension {oid} is no text")
    return value[2:].decode("ascii")
