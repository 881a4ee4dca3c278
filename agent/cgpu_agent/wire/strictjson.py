"""JSON from strangers: one meaning per byte string, or a refusal.

Duplicate keys, unknown keys, floats, huge numbers, deep nesting, non-canonical base64 and over-long input are
refused, so that two readers of one document can never disagree about it.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable
from typing import Any, NoReturn

from cgpu_agent.errors import HostileInput

MAX_DEPTH = 16
_MAX_CONTAINERS = 1 << 16  # an empty list costs 2 bytes of input, and 60 of memory
_MAX_INTEGER_DIGITS = 20  # the digits of 2**64


def loads(data: bytes, what: str, limit: int) -> Any:
    """Parse one JSON document.

    Args:
        data: UTF-8 bytes without a byte order mark.
        what: name of the document, for messages.
        limit: largest accepted size in bytes, checked before parsing. Lists and objects nest ``MAX_DEPTH`` deep.

    Raises:
        HostileInput: ``TOO_LARGE``, ``BAD_JSON``, ``DUPLICATE_KEY``.
    """

    def refuse_float(_text: str) -> NoReturn:
        raise HostileInput("BAD_JSON", f"{what}: only whole numbers are allowed")

    def integer(text: str) -> int:
        if len(text) > _MAX_INTEGER_DIGITS:
            raise HostileInput("BAD_JSON", f"{what}: a number has more than {_MAX_INTEGER_DIGITS} digits")
        return int(text)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise HostileInput("DUPLICATE_KEY", f"{what}: key {key[:64]!r} appears twice")
            found[key] = value
        return found

    if len(data) > limit:
        raise HostileInput("TOO_LARGE", f"{what}: {len(data)} bytes, at most {limit} are allowed")
    if data.count(b"[") + data.count(b"{") > _MAX_CONTAINERS:
        raise HostileInput("TOO_LARGE", f"{what}: more than {_MAX_CONTAINERS} lists and objects")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_float=refuse_float,
            parse_constant=refuse_float,
            parse_int=integer,
        )
    except (ValueError, RecursionError) as error:
        raise HostileInput("BAD_JSON", f"{what}: not a valid JSON document") from error
    if _is_deep(value):
        raise HostileInput("BAD_JSON", f"{what}: nested more than {MAX_DEPTH} deep")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node) if isinstance(child, (dict, list))]
    return bool(level)


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def dumps(value: Any) -> bytes:
    """Compact JSON with sorted keys, the form in which this package writes what it signs."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def b64(data: bytes) -> str:
    """Standard base64 with padding (RFC 4648, 4)."""
    return base64.b64encode(data).decode("ascii")


def unb64url(text: str) -> bytes:
    """base64url without padding (RFC 7515, 2), one text for one value. Raises ``ValueError``."""
    value = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    if base64.urlsafe_b64encode(value).rstrip(b"=").decode("ascii") != text:
        raise ValueError("not the canonical text")
    return value


class Fields:
    """A JSON object whose every key must be asked for; ``end()`` refuses the ones that nobody asked for."""

    def __init__(self, value: Any, what: str) -> None:
        if not isinstance(value, dict):
            raise HostileInput("BAD_JSON", f"{what}: not a JSON object")
        self._left = dict(value)
        self._what = what

    def fail(self, message: str) -> HostileInput:
        return HostileInput("BAD_FIELD", f"{self._what}: {message}")

    def raw(self, name: str) -> Any:
        """The value of a key that must be there, of any type."""
        try:
            return self._left.pop(name)
        except KeyError:
            raise self.fail(f"{name} is missing") from None

    def absent(self, name: str) -> bool:
        """Consume the key and return true if it is ``null``; the key itself must be there."""
        if self._left.get(name, "") is None:
            del self._left[name]
            return True
        return False

    def text(self, name: str, limit: int) -> str:
        value = self.raw(name)
        try:
            if isinstance(value, str) and len(value.encode("utf-8")) <= limit:
                return value
        except UnicodeEncodeError:  # a lone surrogate: no reader could write it again
            pass
        raise self.fail(f"{name} is not a string of at most {limit} bytes of UTF-8")

    def choice(self, name: str, allowed: frozenset[str]) -> str:
        value = self.raw(name)
        if not isinstance(value, str) or value not in allowed:
            raise self.fail(f"{name} is not one of {', '.join(sorted(allowed))}")
        return value

    def integer(self, name: str, low: int, high: int) -> int:
        value = self.raw(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(f"{name} is not a whole number within {low}-{high}")
        return value

    def boolean(self, name: str) -> bool:
        value = self.raw(name)
        if not isinstance(value, bool):
            raise self.fail(f"{name} is not true or false")
        return value

    def hex(self, name: str, low: int, high: int) -> bytes:
        """Lower-case hex of ``low`` to ``high`` bytes."""
        return self.decode_hex(self.raw(name), name, low, high)

    def decode_hex(self, value: Any, name: str, low: int, high: int) -> bytes:
        if not isinstance(value, str) or not 2 * low <= len(value) <= 2 * high or value != value.lower():
            raise self.fail(f"{name} is not lower-case hex of {low}-{high} bytes")
        try:
            decoded = bytes.fromhex(value)
        except ValueError:
            raise self.fail(f"{name} is not hex") from None
        if decoded.hex() != value:  # fromhex skips spaces
            raise self.fail(f"{name} is not hex")
        return decoded

    def base64(self, name: str, limit: int) -> bytes:
        return self.decode_base64(self.raw(name), name, limit)

    def decode_base64(self, value: Any, name: str, limit: int) -> bytes:
        if not isinstance(value, str) or len(value) > (limit + 2) // 3 * 4:
            raise self.fail(f"{name} is not base64 of at most {limit} bytes")
        try:
            decoded = base64.b64decode(value, validate=True)
        except (ValueError, binascii.Error):
            raise self.fail(f"{name} is not base64") from None
        if len(decoded) > limit or b64(decoded) != value:
            raise self.fail(f"{name} is not canonical base64 of at most {limit} bytes")
        return decoded

    def items(self, name: str, limit: int) -> list[Any]:
        value = self.raw(name)
        if not isinstance(value, list) or len(value) > limit:
            raise self.fail(f"{name} is not a list of at most {limit}")
        return value

    def fields(self, name: str) -> Fields:
        return Fields(self.raw(name), f"{self._what}.{name}")

    def keys(self) -> list[str]:
        """Keys not consumed yet."""
        return list(self._left)

    def end(self) -> None:
        """Refuse keys that nobody asked for (slug ``UNKNOWN_KEY``)."""
        if self._left:
            raise HostileInput("UNKNOWN_KEY", f"{self._what}: unknown key {min(self._left)[:64]!r}")
