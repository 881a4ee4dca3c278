"""Lowest versions of driver and firmware that a relying party accepts.

A validly measured old stack passes every other step: NVIDIA signs reference values for vulnerable versions too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cgpu_agent.errors import HostileInput, Misuse

_MAX_PARTS: Final = 4
_BIOS_PARTS: Final = 5


def driver_key(version: str) -> tuple[int, ...]:
    """A driver version (``550.90.07``) as something that compares. Raises ``HostileInput`` (``BAD_VERSION``)."""
    parts = version.split(".")
    if not 2 <= len(parts) <= _MAX_PARTS or not all(part.isascii() and part.isdigit() for part in parts):
        raise HostileInput("BAD_VERSION", "a driver version is two to four numbers with dots between them")
    return tuple(int(part) for part in parts)


def bios_key(version: str) -> bytes:
    """A firmware version (``96.00.9F.00.01``) as five bytes. Raises ``HostileInput`` (``BAD_VERSION``)."""
    parts = version.split(".")
    try:
        key = bytes.fromhex("".join(part for part in parts if len(part) == 2))
    except ValueError:
        key = b""
    if len(parts) != _BIOS_PARTS or len(key) != _BIOS_PARTS:
        raise HostileInput("BAD_VERSION", "a firmware version is five pairs of hex digits with dots between them")
    return key


@dataclass(frozen=True, slots=True)
class Floors:
    """Lowest accepted versions; ``None`` = any, and the verdict says so.

    Attributes:
        driver: of the GPU driver.
        vbios: of the GPU's firmware. Its first byte names the chip family; a floor is for one family only.
        switch_bios: of an NVSwitch's firmware.
    """

    driver: str | None = None
    vbios: str | None = None
    switch_bios: str | None = None

    def __post_init__(self) -> None:
        """Raises ``Misuse`` (``BAD_FLOOR``)."""
        try:
            if self.driver is not None:
                driver_key(self.driver)
            for bios in (self.vbios, self.switch_bios):
                if bios is not None:
                    bios_key(bios)
        except HostileInput as error:
            raise Misuse("BAD_FLOOR", error.message) from error


def require_driver(found: str | None, floor: str | None) -> str | None:
    """Compare a driver with its floor: a sentence, or ``None`` without a floor. Raises ``BELOW_FLOOR``."""
    if floor is None:
        return None
    if found is None or driver_key(found) < driver_key(floor):
        raise HostileInput("BELOW_FLOOR", f"driver {found or 'unknown'} is older than {floor}")
    return f"driver {found} is {floor} or newer"


def require_bios(found: str | None, floor: str | None) -> str | None:
    """Compare firmware with its floor: a sentence, or ``None`` without a floor. Raises ``BELOW_FLOOR``."""
    if floor is None:
        return None
    if found is None or bios_key(found)[0] != bios_key(floor)[0]:
        raise HostileInput("BELOW_FLOOR", f"firmware {found or 'unknown'} is not of the family of {floor}")
    if bios_key(found) < bios_key(floor):
        raise HostileInput("BELOW_FLOOR", f"firmware {found} is older than {floor}")
    return f"firmware {found} is {floor} or newer"
