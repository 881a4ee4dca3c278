"""Text inside binary structures: strict decoding, and a form that is safe to print on a terminal."""

from __future__ import annotations

from typing import Final

from cgpu_agent.errors import HostileInput

PRINTABLE_LIMIT: Final = 2048


def utf16_field(data: bytes, field: str) -> str:
    """Decode a UTF-16LE field with at most one closing NUL.

    Raises ``HostileInput`` (``BAD_TEXT``) for odd lengths, lone surrogates and NULs inside.
    """
    try:
        text = data.decode("utf-16-le").removesuffix("\0")
    except UnicodeDecodeError:
        raise HostileInput("BAD_TEXT", f"{field} is not UTF-16") from None
    if "\0" in text:
        raise HostileInput("BAD_TEXT", f"{field} has a NUL inside")
    return text


def utf8_field(data: bytes, field: str) -> str:
    """Decode a UTF-8 field with at most one closing NUL. Raises as ``utf16_field`` does."""
    try:
        text = data.decode("utf-8").removesuffix("\0")
    except UnicodeDecodeError:
        raise HostileInput("BAD_TEXT", f"{field} is not UTF-8") from None
    if "\0" in text:
        raise HostileInput("BAD_TEXT", f"{field} has a NUL inside")
    return text


def printable(text: str, limit: int = PRINTABLE_LIMIT) -> str:
    """Escape what could steer a terminal or hide text (controls, bidi marks), and cut at ``limit`` characters."""
    shown = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text[:limit])
    return shown if len(text) <= limit else f"{shown}… ({len(text)} characters)"
