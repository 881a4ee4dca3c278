"""Files that an administrator fetched for an agent that has no network: AMD's certificates, and a TD quote."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.der import certificates_of_pem

CERTIFICATES: Final = "amd.pem"
"""VCEK or VLEK, its CA and AMD's root (PEM, in any order)."""
TD_QUOTE: Final = "td_quote.bin"
MAX_FILE: Final = 64 << 10


class PlatformStore:
    """A directory with the files above, read again at each use: they change with the processor's firmware.

    Methods raise ``HostileInput``: ``UNREADABLE``, ``TOO_LARGE``, and what ``wire.der`` raises.
    """

    def __init__(self, folder: Path) -> None:
        self._folder: Final = folder

    def certificates(self) -> tuple[bytes, ...]:
        """AMD's certificates, DER; none where there is no file."""
        data = self._read(CERTIFICATES)
        return () if data is None else certificates_of_pem(data)

    def td_quote(self) -> bytes | None:
        return self._read(TD_QUOTE)

    def _read(self, name: str) -> bytes | None:
        try:
            with (self._folder / name).open("rb") as file:
                data = file.read(MAX_FILE + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise HostileInput("UNREADABLE", f"{name} cannot be read: {error.strerror}") from error
        if len(data) > MAX_FILE:
            raise HostileInput("TOO_LARGE", f"{name} has more than {MAX_FILE} bytes")
        return data
