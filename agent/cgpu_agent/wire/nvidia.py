"""The opaque part of an NVIDIA report: typed fields, each of its exact length; unknown ones are kept by number.

The layout is not published. Source: field numbers of NVIDIA's own verifiers, lengths and meanings as seen in signed
reports of GH100, GB100 and LS10. GPU and NVSwitch use some numbers for different things.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Literal

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.reader import Reader

Kind = Literal["gpu", "switch"]
Mode = Literal["spt", "mpt", "ppcie"]
"""Single pass-through, multi pass-through, protected PCIe."""

FWID_SIZE: Final = 48
PDI_SIZE: Final = 8
"""Bytes of a per-device identifier."""
NO_PDI: Final = bytes(PDI_SIZE)
_SWITCH_GPUS: Final = 8
_ON, _OFF = 0xAA, 0x55
_MODES: Final[tuple[Mode, ...]] = ("spt", "mpt", "ppcie")
_NAME = re.compile(r"[A-Za-z0-9._-]{0,32}")
_VERSION = re.compile(r"[0-9]+(\.[0-9]+){1,3}")
_BIOS = re.compile(r"[0-9A-F]{2}(\.[0-9A-F]{2}){4}")


class Field(IntEnum):
    """Field numbers with a known length. Where the two kinds differ, the name before ``_OR_`` is the GPU's."""

    DRIVER_VERSION = 3
    GPU_INFO = 4
    VBIOS_VERSION = 6
    NVDEC0_STATUS = 11
    MEASUREMENT_COUNTS = 12
    CPR_INFO = 13
    BOARD_ID = 14
    CHIP_SKU = 15
    CHIP_SKU_MOD = 16
    PROJECT = 17
    PROJECT_SKU = 18
    PROJECT_SKU_MOD = 19
    FWID = 20
    PROTECTED_PCIE_STATUS = 21
    SWITCH_PDIS_OR_DEVICE_PDI = 22
    FLOORSWEPT_OR_DISABLED_PORTS = 23
    POSITION_ID = 24
    LOCK_STATUS = 25
    SWITCH_GPU_PDIS = 26
    SYS_ENABLE_STATUS = 33
    OPAQUE_VERSION = 34
    CHIP_INFO = 35
    FEATURE_FLAG = 36


_SIZES: Final[Mapping[Kind, Mapping[Field, Collection[int]]]] = {
    "gpu": {
        Field.DRIVER_VERSION: range(2, 34),
        Field.GPU_INFO: (8,),
        Field.VBIOS_VERSION: (8,),
        Field.NVDEC0_STATUS: (1,),
        Field.MEASUREMENT_COUNTS: (256,),
        Field.CPR_INFO: (4,),
        Field.BOARD_ID: (4,),
        Field.CHIP_SKU: (4, 9),
        Field.CHIP_SKU_MOD: (2, 5),
        Field.PROJECT: (5,),
        Field.PROJECT_SKU: (5,),
        Field.PROJECT_SKU_MOD: (2,),
        Field.FWID: (FWID_SIZE,),
        Field.PROTECTED_PCIE_STATUS: (1,),
        Field.SWITCH_PDIS_OR_DEVICE_PDI: (18 * PDI_SIZE,),
        Field.SYS_ENABLE_STATUS: (2,),
        Field.OPAQUE_VERSION: (2,),
        Field.CHIP_INFO: range(2, 34),
        Field.FEATURE_FLAG: (2,),
    },
    "switch": {
        Field.VBIOS_VERSION: (14,),
        Field.MEASUREMENT_COUNTS: (104, 108),
        Field.FWID: (FWID_SIZE,),
        Field.SWITCH_PDIS_OR_DEVICE_PDI: (PDI_SIZE,),
        Field.FLOORSWEPT_OR_DISABLED_PORTS: (2,),
        Field.POSITION_ID: (2,),
        Field.LOCK_STATUS: (2,),
        Field.SWITCH_GPU_PDIS: (_SWITCH_GPUS * PDI_SIZE + 64,),
        Field.OPAQUE_VERSION: (2,),
    },
}


@dataclass(frozen=True, slots=True)
class GpuFields:
    """What a GPU says of itself. ``None``: this firmware does not say.

    Attributes:
        driver: driver version, ``550.90.07``.
        vbios: ``96.00.9F.00.01``.
        project, project_sku, chip_sku: board identity, part of the name of its VBIOS reference values.
        chip: chip name, ``GB202``.
        fwid: 48 bytes: digest of the firmware that runs on the device's root of trust.
        nvdec0: whether the video decoder is enabled.
        protected_pcie: whether protected-PCIe mode is on.
        mode: how the GPU is passed through.
        switch_pdis: identifiers of the NVSwitches behind its 18 links, in the GPU's byte order.
        opaque_version: layout version; 0 where the field is absent.
        unknown: fields of other numbers, as sent.
    """

    driver: str | None
    vbios: str | None
    project: str | None
    project_sku: str | None
    chip_sku: str | None
    chip: str | None
    fwid: bytes | None
    nvdec0: bool | None
    protected_pcie: bool | None
    mode: Mode | None
    switch_pdis: tuple[bytes, ...]
    opaque_version: int
    unknown: Mapping[int, bytes]


@dataclass(frozen=True, slots=True)
class SwitchFields:
    """What an NVSwitch says of itself. ``None``: this firmware does not say.

    Attributes:
        bios: ``96.10.55.00.01``.
        fwid: as for a GPU; LS10 does not send it.
        pdi: its own identifier, in the switch's byte order.
        gpu_pdis: identifiers of the GPUs behind its ports, eight entries that may repeat.
        position: 0-3 within the baseboard.
        locked: whether its configuration is locked.
        opaque_version, unknown: as for a GPU.
    """

    bios: str | None
    fwid: bytes | None
    pdi: bytes | None
    gpu_pdis: tuple[bytes, ...]
    position: int | None
    locked: bool | None
    opaque_version: int
    unknown: Mapping[int, bytes]


class _Raw:
    """Fields by number, of their right lengths, with the readers that the typed classes need."""

    def __init__(self, data: bytes, kind: Kind) -> None:
        reader = Reader(data, f"opaque data ({kind})", endian="little")
        sizes = _SIZES[kind]
        self._fail = reader.fail
        self._known: dict[int, bytes] = {}
        self.unknown: dict[int, bytes] = {}
        while reader.remaining:
            number = reader.u16("field number")
            value = reader.sized16(f"field {number}")
            if number in self._known or number in self.unknown:
                raise reader.fail("DUPLICATE_FIELD", f"field {number} occurs twice")
            if number not in sizes:
                self.unknown[number] = value
                continue
            if len(value) not in sizes[Field(number)]:
                raise reader.fail("BAD_FIELD", f"{Field(number).name} has {len(value)} bytes")
            self._known[number] = value

    def raw(self, field: Field) -> bytes | None:
        return self._known.get(field)

    def text(self, field: Field, pattern: re.Pattern[str] = _NAME) -> str | None:
        """ASCII, with any number of NULs after it."""
        value = self.raw(field)
        if value is None:
            return None
        text = value.rstrip(b"\0").decode("ascii", "replace")
        if pattern.fullmatch(text) is None:
            raise self._fail("BAD_FIELD", f"{field.name} is not text of the expected form")
        return text

    def number(self, field: Field, high: int) -> int | None:
        value = self.raw(field)
        if value is None:
            return None
        number = int.from_bytes(value, "little")
        if number > high:
            raise self._fail("BAD_FIELD", f"{field.name} is {number}, at most {high} is known")
        return number

    def switch(self, field: Field) -> bool | None:
        """0xAA on, 0x55 off."""
        value = self.raw(field)
        if value is None:
            return None
        if value[0] not in (_ON, _OFF):
            raise self._fail("BAD_FIELD", f"{field.name} is 0x{value[0]:02x}, neither on nor off")
        return value[0] == _ON

    def pdis(self, field: Field, count: int) -> tuple[bytes, ...]:
        value = self.raw(field)
        if value is None:
            return ()
        return tuple(value[at : at + PDI_SIZE] for at in range(0, count * PDI_SIZE, PDI_SIZE))

    def version(self) -> int:
        return self.number(Field.OPAQUE_VERSION, 0xFFFF) or 0


def _vbios_text(value: bytes | None) -> str | None:
    if value is None:
        return None
    # As an integer: the version's first four bytes in the low half, its fifth just above them.
    swapped = value[::-1]
    return ".".join(f"{byte:02X}" for byte in (*swapped[4:], swapped[3]))


def parse_gpu(opaque: bytes) -> GpuFields:
    """Parse the OpaqueData of a GPU's report.

    Raises:
        HostileInput: ``TRUNCATED``, ``DUPLICATE_FIELD``, ``BAD_FIELD`` (a length or value the field cannot have).
    """
    raw = _Raw(opaque, "gpu")
    mode = raw.number(Field.FEATURE_FLAG, len(_MODES) - 1)
    return GpuFields(
        driver=raw.text(Field.DRIVER_VERSION, _VERSION),
        vbios=_vbios_text(raw.raw(Field.VBIOS_VERSION)),
        project=raw.text(Field.PROJECT),
        project_sku=raw.text(Field.PROJECT_SKU),
        chip_sku=raw.text(Field.CHIP_SKU),
        chip=raw.text(Field.CHIP_INFO),
        fwid=raw.raw(Field.FWID),
        nvdec0=raw.switch(Field.NVDEC0_STATUS),
        protected_pcie=raw.switch(Field.PROTECTED_PCIE_STATUS),
        mode=None if mode is None else _MODES[mode],
        switch_pdis=raw.pdis(Field.SWITCH_PDIS_OR_DEVICE_PDI, 18),
        opaque_version=raw.version(),
        unknown=raw.unknown,
    )


def parse_switch(opaque: bytes) -> SwitchFields:
    """Parse the OpaqueData of an NVSwitch's report. Raises as ``parse_gpu`` does."""
    raw = _Raw(opaque, "switch")
    locked = raw.number(Field.LOCK_STATUS, 1)
    return SwitchFields(
        bios=raw.text(Field.VBIOS_VERSION, _BIOS),
        fwid=raw.raw(Field.FWID),
        pdi=raw.raw(Field.SWITCH_PDIS_OR_DEVICE_PDI),
        gpu_pdis=raw.pdis(Field.SWITCH_GPU_PDIS, _SWITCH_GPUS),
        position=raw.number(Field.POSITION_ID, 3),
        locked=None if locked is None else bool(locked),
        opaque_version=raw.version(),
        unknown=raw.unknown,
    )


def encode_fields(fields: Mapping[int, bytes]) -> bytes:
    """OpaqueData of these fields, in the order given."""
    for number, value in fields.items():
        if not 0 <= number <= 0xFFFF or len(value) > 0xFFFF:
            raise HostileInput("BAD_FIELD", f"field {number} does not fit its number or its length")
    return b"".join(
        number.to_bytes(2, "little") + len(value).to_bytes(2, "little") + value for number, value in fields.items()
    )
