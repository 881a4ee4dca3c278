"""Policy text before Cedar sees it: bounded, so that it cannot crash the parser; split, so that errors have lines.

Cedar's parser and validator recurse without a limit of their own: deep brackets, nested ``if`` and long operator
chains overflow the stack, which ends the process. Nothing here understands policies; the tokens are those of the
grammar (cedar-policy-core ``grammar.lalrpop``), and text they cannot cover is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

MAX_BYTES: Final = 256 << 10
MAX_DEPTH: Final = 32
"""Brackets and ``if`` around each other. A thread with a stack of 1 MiB survives 60."""
MAX_TOKENS: Final = 4096
"""Tokens of one policy: bounds chains such as ``a.b.c`` or ``a + b + c``. A stack of 1 MiB survives 10,000."""

_TOKEN: Final = re.compile(
    r"""
    (?P<blank> \s+ | //[^\n\r]* )
  | (?P<token> "[^"\\]*(?:\\.[^"\\]*)*"              # STRINGLIT
             | \??[A-Za-z_][A-Za-z0-9_]*             # words; with a question mark, the slots of templates
             | [0-9]+
             | ::|==|!=|<=|>=|\|\||&&
             | [@.,;:(){}\[\]<>+\-*/%!=] )
    """,
    re.VERBOSE,
)
_OPENING: Final = frozenset("([{")
_CLOSING: Final = frozenset(")]}")
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a policy text.

    Attributes:
        policy: the policy's ``@id``, else its number ("#3", from 1); empty where no policy is to blame.
        line: from 1; where the policy begins, or where its text is malformed; 0 where the whole text is to blame.
        message: what is wrong, for the policy's author.
    """

    policy: str
    line: int
    message: str

    def __str__(self) -> str:
        place = f"line {self.line}" if self.line else ""
        whose = f"policy {self.policy}" if self.policy else ""
        return f"{', '.join(filter(None, (place, whose)))}: {self.message}" if place or whose else self.message


@dataclass(frozen=True, slots=True)
class Source:
    """One policy of a text.

    Attributes:
        number: position in the text, from 0; Cedar calls the policy ``policy<number>``.
        id: value of ``@id``, or empty.
        effect: ``permit`` or ``forbid``, or whatever else stands in its place.
        line: where it begins, from 1.
        annotations: by name; the values as written between their quotes.
        words: its tokens; texts with their quotes.
        text: the policy itself, from its first token to its semicolon.
    """

    number: int
    id: str
    effect: str
    line: int
    annotations: Mapping[str, str]
    words: tuple[str, ...]
    text: str

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.id if _ID.fullmatch(self.id) else f"#{self.number + 1}"


class Malformed(Exception):
    """The text cannot be split; holds why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def split(text: str) -> tuple[Source, ...]:
    """The policies of ``text``, none of them deep or long enough to hurt Cedar.

    Raises:
        Malformed: too large, too deep, too long, a template, or not made of Cedar's tokens.
    """
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise Malformed(Problem("", 0, "is not UTF-8 text")) from None
    if size > MAX_BYTES:
        raise Malformed(Problem("", 0, f"is larger than {MAX_BYTES} bytes"))
    return tuple(_policies(text))


def _policies(text: str) -> Iterator[Source]:
    number, words, begin, line = 0, list[str](), 0, 1
    depth, opened = 0, list[int]()
    for word, offset, at in _tokens(text):
        if not words:
            begin, line = offset, at
        words.append(word)
        if len(words) > MAX_TOKENS:
            raise _malformed(number, line, words, f"is longer than {MAX_TOKENS} words and signs")
        if word in _OPENING:
            opened.append(depth)
            depth += 1
        elif word in _CLOSING:
            if not opened:
                raise _malformed(number, at, words, f"{word} closes nothing")
            depth = opened.pop()
        elif word == "if":
            depth += 1
        elif word == "," and opened:
            depth = opened[-1] + 1  # what followed an "else" ends here
        elif word == ";" and not opened:
            yield _source(number, line, words, text[begin : offset + 1])
            number, words, depth = number + 1, [], 0
        if depth > MAX_DEPTH:
            raise _malformed(number, at, words, f"is nested deeper than {MAX_DEPTH}")
    if words:
        raise _malformed(number, line, words, "does not end with a semicolon outside brackets")


def _malformed(number: int, line: int, words: list[str], message: str) -> Malformed:
    return Malformed(Problem(_source(number, line, [*words, ";"], "").name, line, message))


def _tokens(text: str) -> Iterator[tuple[str, int, int]]:
    """Token, offset and line of everything but blanks and comments."""
    offset, line = 0, 1
    while offset < len(text):
        match = _TOKEN.match(text, offset)
        if match is None:
            raise Malformed(Problem("", line, _stray(text[offset])))
        token = match["token"]
        if token is not None:
            if token.startswith("?"):
                raise Malformed(Problem("", line, f"{token}: templates are not supported"))
            yield token, offset, line
        line += match[0].count("\n")
        offset = match.end()


def _stray(char: str) -> str:
    if char == '"':
        return "a quoted text does not end"
    return f"the character {char!a} does not belong here"


def _source(number: int, line: int, words: list[str], text: str) -> Source:
    """The last of ``words`` is a semicolon, so that looking ahead by one cannot run past the end."""
    annotations: dict[str, str] = {}
    position = 0
    while words[position] == "@" and position + 2 < len(words):
        name, value = words[position + 1], ""
        position += 2
        if words[position] == "(" and words[position + 2 : position + 3] == [")"] and position + 3 < len(words):
            value = words[position + 1][1:-1]
            position += 3
        annotations.setdefault(name, value)
    return Source(number, annotations.get("id", ""), words[position], line, annotations, tuple(words), text)


def check_ids(sources: tuple[Source, ...]) -> Iterator[Problem]:
    """Every policy needs a plain ``@id`` of its own: decisions name it, also to clients."""
    seen: dict[str, int] = {}
    for source in sources:
        if not source.id:
            yield Problem(source.name, source.line, 'has no @id("name")')
        elif not _ID.fullmatch(source.id):
            yield Problem(source.name, source.line, "its @id may hold up to 64 letters, digits, and . _ -")
        elif source.id in seen:
            yield Problem(source.id, source.line, f"its @id is taken by the policy of line {seen[source.id]}")
        else:
            seen[source.id] = source.line
