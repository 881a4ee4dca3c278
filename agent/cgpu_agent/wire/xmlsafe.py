"""XML from strangers, before any parser interprets it: no DTD, no entities, no surprises in size, depth or encoding.

Whatever XML can do besides elements, attributes and text begins with ``<!`` or ``<?``. Documents that hold either are
refused as bytes, so every later parser, whichever it is, sees plain elements only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final
from xml.etree.ElementTree import Element, ParseError, TreeBuilder, XMLParser

from cgpu_agent.errors import HostileInput

_MAX_DEPTH: Final = 16
_MAX_ELEMENTS: Final = 4096
_DECLARATION = re.compile(rb"<\?xml version=(?P<q>[\"'])1\.0(?P=q)( encoding=(?P<e>[\"'])(?i:utf-8)(?P=e))?\s*\?>\s*")


class _Builder(TreeBuilder):
    """Stops while the document is read, not once it is in memory."""

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0
        self._count = 0

    def start(self, tag: str, attrs: dict[str, str], /) -> Element:
        self._depth += 1
        self._count += 1
        if self._depth > _MAX_DEPTH or self._count > _MAX_ELEMENTS:
            raise HostileInput("BAD_XML", f"XML: nested over {_MAX_DEPTH} deep, or over {_MAX_ELEMENTS} elements")
        return super().start(tag, attrs)

    def end(self, tag: str, /) -> Element:
        self._depth -= 1
        return super().end(tag)


def parse_xml(document: bytes, what: str, limit: int) -> Element:
    """Parse one document into elements.

    Args:
        document: UTF-8 without byte order mark; an XML declaration may stand at its very start.
        what: name of the document, for messages.
        limit: largest accepted size in bytes.

    Raises:
        HostileInput: ``TOO_LARGE``, ``BAD_XML`` (not well-formed, not UTF-8, too deep), ``XML_FORBIDDEN`` (a DTD, an
            entity declaration, a comment, CDATA, a processing instruction).
    """
    if len(document) > limit:
        raise HostileInput("TOO_LARGE", f"{what}: {len(document)} bytes, at most {limit} are allowed")
    declaration = _DECLARATION.match(document)
    body = document[declaration.end() :] if declaration else document
    if b"<!" in body or b"<?" in body:
        raise HostileInput("XML_FORBIDDEN", f"{what}: only elements, attributes and text are allowed")
    try:
        body.decode("utf-8")
        parser = XMLParser(target=_Builder(), encoding="utf-8")  # noqa: S314 - nothing is left that could expand
        parser.feed(body)
        root: Element = parser.close()
    except (ParseError, ValueError) as error:
        raise HostileInput("BAD_XML", f"{what}: not well-formed XML in UTF-8") from error
    return root


class Node:
    """One element read strictly: what the format does not name is refused, what it demands must be there."""

    __slots__ = ("_element", "_what")

    def __init__(self, element: Element, what: str) -> None:
        self._element = element
        self._what = what

    def fail(self, message: str) -> HostileInput:
        """Build (not raise) a refusal that names the document."""
        return HostileInput("BAD_RIM", f"{self._what}: {message}")

    @property
    def attributes(self) -> Mapping[str, str]:
        """Attribute names, with their namespace in braces, and values."""
        return self._element.attrib

    @property
    def tag(self) -> str:
        """Element name, with its namespace in braces."""
        return self._element.tag

    @property
    def local(self) -> str:
        """Element name without its namespace, cut for messages."""
        return self._element.tag.rpartition("}")[2][:40]

    def attribute(self, name: str) -> str:
        """An attribute that must be there."""
        try:
            return self._element.attrib[name]
        except KeyError:
            raise self.fail(f"{self.local} has no {name.rpartition('}')[2]}") from None

    def children(self, *tags: str) -> list[Node]:
        """The child elements, each of one of these names, with no text between them."""
        texts = [self._element.text, *(child.tail for child in self._element)]
        if any(text and not text.isspace() for text in texts):
            raise self.fail(f"text within {self.local}")
        nodes = [Node(child, self._what) for child in self._element]
        for node in nodes:
            if node.tag not in tags:
                raise self.fail(f"{node.local} within {self.local}")
        return nodes

    def sequence(self, *tags: str) -> list[Node]:
        """The child elements: exactly these names, in this order."""
        nodes = self.children(*tags)
        if [node.tag for node in nodes] != list(tags):
            raise self.fail(f"{self.local} lacks a part, or has one twice or out of order")
        return nodes

    def text(self) -> str:
        """The text of an element without children."""
        if len(self._element):
            raise self.fail(f"{self.local} has elements where text is expected")
        return self._element.text or ""
