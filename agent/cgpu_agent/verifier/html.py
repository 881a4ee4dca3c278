"""HTML that cannot be broken by what it shows: text becomes markup only here, and only escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Final

from cgpu_agent.wire.text import printable

_NAME: Final = re.compile(r"[a-z][a-z0-9-]*")
_VOID: Final = frozenset({"meta", "br", "hr"})
_LIMIT: Final = 8192


class Markup(str):
    """Text that is markup already. Made by ``tag`` and ``join``, or from a literal in the source."""

    __slots__ = ()


def escape(text: str) -> Markup:
    """Text from anywhere as text on a page. Controls and marks that hide or turn text around are shown as escapes."""
    return Markup(html.escape(printable(text, _LIMIT), quote=True))


def tag(name: str, *children: str, **attributes: str) -> Markup:
    """An element. Children that are not ``Markup`` are escaped, attributes always.

    Args:
        name: element name, a literal.
        attributes: a trailing underscore is dropped (``class_``), others become hyphens (``aria_label``).
    """
    if not _NAME.fullmatch(name):
        raise ValueError("an element's name is a literal of this package")
    head = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{name}{head}>")
    return Markup(f"<{name}{head}>{join(children)}</{name}>")


def join(children: Iterable[str]) -> Markup:
    """Several pieces, one after the other."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))
