"""What the hardware below a vTPM says of it, as it travels in an evidence bundle."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final

from cgpu_agent.wire.hcl import MAX_CLAIMS
from cgpu_agent.wire.strictjson import Fields, b64
from cgpu_agent.wire.tdx import MAX_QUOTE

MAX_REPORT: Final = MAX_QUOTE
"""An HCL report, a bare SNP report or a bare TD quote, the largest of them."""
MAX_CERTIFICATES: Final = 8
MAX_CERTIFICATE: Final = 8192


@dataclass(frozen=True, slots=True)
class PlatformWords:
    """A report, and what it takes to read it.

    Attributes:
        report: HCL report, bare SNP report or bare TD quote.
        claims: runtime claims beside a bare report, exactly as they were hashed; an HCL report has its own.
        td_quote: TD quote over an HCL report's TDREPORT.
        certificates: of AMD, DER. Nothing signs that these and no others came along: they speak for themselves.
    """

    report: bytes
    claims: bytes | None = None
    td_quote: bytes | None = None
    certificates: tuple[bytes, ...] = ()

    def digest(self) -> bytes:
        """SHA-256("cgpu/platform-words/1" || 00 || report || claims || td_quote), each framed.

        A part is framed as u32be(length) || bytes; one that is not there is FFFFFFFF.
        """
        framed = b"cgpu/platform-words/1\0"
        for part in (self.report, self.claims, self.td_quote):
            framed += b"\xff\xff\xff\xff" if part is None else len(part).to_bytes(4, "big") + part
        return hashlib.sha256(framed).digest()

    def to_json(self) -> dict[str, Any]:
        """As a bundle has it."""
        return {
            "certificates": [b64(der) for der in self.certificates],
            "claims": None if self.claims is None else b64(self.claims),
            "report": b64(self.report),
            "td_quote": None if self.td_quote is None else b64(self.td_quote),
        }


def parse_platform(fields: Fields) -> PlatformWords:
    """Raises ``HostileInput``."""
    words = PlatformWords(
        report=fields.base64("report", MAX_REPORT),
        claims=None if fields.absent("claims") else fields.base64("claims", MAX_CLAIMS),
        td_quote=None if fields.absent("td_quote") else fields.base64("td_quote", MAX_QUOTE),
        certificates=tuple(
            fields.decode_base64(der, "certificates", MAX_CERTIFICATE)
            for der in fields.items("certificates", MAX_CERTIFICATES)
        ),
    )
    fields.end()
    return words
