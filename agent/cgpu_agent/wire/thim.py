"""Answers of Azure's instance metadata service about the processor: AMD's certificates, and TD quotes.

Source: the answers as Microsoft's and other public clients read them, and one that was recorded. They come in plain
text from the host; what they hold counts by its own signatures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cgpu_agent.wire import strictjson
from cgpu_agent.wire.der import certificates_of_pem
from cgpu_agent.wire.strictjson import Fields

MAX_ANSWER: Final = 64 << 10
_MAX_PEM: Final = 32 << 10


@dataclass(frozen=True, slots=True)
class Certification:
    """``certificates``: DER, the chip's first, then those above it. ``tcb``: the firmware they are for, 8 bytes."""

    certificates: tuple[bytes, ...]
    tcb: bytes


def parse_certification(data: bytes) -> Certification:
    """Read the answer to ``GET /metadata/THIM/amd/certification``; members that are not needed may be there.

    Raises:
        HostileInput: ``TOO_LARGE``, ``BAD_JSON``, ``DUPLICATE_KEY``, ``BAD_FIELD``, and what ``wire.der`` raises.
    """
    fields = Fields(strictjson.loads(data, "certification", MAX_ANSWER), "certification")
    chip = certificates_of_pem(fields.text("vcekCert", _MAX_PEM).encode())
    if len(chip) != 1:
        raise fields.fail("vcekCert is not one certificate")
    chain = certificates_of_pem(fields.text("certificateChain", _MAX_PEM).encode())
    tcb = fields.text("tcbm", 16)
    return Certification(chip + chain, fields.decode_hex(tcb.lower(), "tcbm", 8, 8))


def parse_quote_answer(data: bytes, limit: int) -> bytes:
    """Read the answer to ``POST /acc/tdquote``: a TD quote of at most ``limit`` bytes, not yet parsed.

    Raises:
        HostileInput: ``TOO_LARGE``, ``BAD_JSON``, ``DUPLICATE_KEY``, ``BAD_FIELD``.
    """
    fields = Fields(strictjson.loads(data, "quote", MAX_ANSWER), "quote")
    text = fields.text("quote", (limit + 2) // 3 * 4)
    try:
        quote = strictjson.unb64url(text.rstrip("="))  # some send the padding, some do not
    except ValueError:
        raise fields.fail("quote is not base64url") from None
    if len(quote) > limit:
        raise fields.fail(f"quote has more than {limit} bytes")
    return quote
