"""Configuration files: TOML -> frozen dataclasses. An unknown key or a bad value is an error that names it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from cgpu_agent.errors import Misuse

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same parser under its older name
    import tomli as tomllib

T = TypeVar("T")

Reader = Callable[[Any, str], Any]
"""Takes a value and its key's full name; gives what the dataclass holds, or raises ``bad``."""

MAX_FILE: Final = 1 << 20


def bad(message: str) -> Misuse:
    return Misuse("BAD_CONFIG", message)


def read(path: Path) -> tuple[dict[str, Any], bytes]:
    """A file's document, and its bytes. Raises ``Misuse`` (``BAD_CONFIG``), with the path."""
    try:
        with path.open("rb") as file:
            source = file.read(MAX_FILE + 1)
    except OSError as error:
        raise bad(f"{path} cannot be read: {error.strerror}") from error
    if len(source) > MAX_FILE:
        raise bad(f"{path} is larger than {MAX_FILE} bytes")
    try:
        return tomllib.loads(source.decode("utf-8")), source
    except ValueError as error:  # TOML and UTF-8 errors; the file is the operator's own, so its text may be shown
        raise bad(f"{path}: {error}") from error
    except RecursionError as error:
        raise bad(f"{path}: nested too deeply") from error


def table(kind: type[T], document: Any, readers: Mapping[Any, Reader], name: str = "") -> T:
    """A document, or a table of one, as the dataclass ``kind``; a field of ``bytes`` is never the file's.

    Args:
        readers: type of a field -> how it is read. Without one: text, true or false, 0 to 2^40, one of a ``Literal``;
            lists, tables and dataclasses of these; ``X | None`` as ``X``.
        name: the table's full name.

    Raises:
        Misuse: ``BAD_CONFIG``, with the key at fault.
    """
    if not isinstance(document, dict):
        raise bad(f"{name} must be a table ([{name}])")
    hints = {key: hint for key, hint in get_type_hints(kind).items() if hint is not bytes}
    where = f"{name}." if name else ""
    if unknown := document.keys() - hints.keys():
        raise bad(f"unknown key {where + min(unknown)!r}; known here: {', '.join(sorted(hints))}")
    for entry in fields(kind):  # type: ignore[arg-type]
        required = entry.default is MISSING and entry.default_factory is MISSING
        if required and entry.name not in document:
            raise bad(f"{where}{entry.name} is missing")
    return kind(**{key: _value(hints[key], value, readers, where + key) for key, value in document.items()})


def whole(low: int, high: int) -> Reader:
    """Of whole numbers within ``low`` and ``high``."""

    def reader(value: Any, name: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise bad(f"{name} must be a whole number, {low}-{high}")
        return value

    return reader


_WHOLE: Final = whole(0, 1 << 40)


def _value(hint: Any, value: Any, readers: Mapping[Any, Reader], name: str) -> Any:
    if hint in readers:
        return readers[hint](value, name)
    origin, inner = get_origin(hint), get_args(hint)
    if hint is bool or hint is str:
        if type(value) is not hint:
            raise bad(f"{name} must be {'true or false' if hint is bool else 'text'}")
        return value
    if hint is int:
        return _WHOLE(value, name)
    if origin in (Union, UnionType):
        return _value(inner[0], value, readers, name)
    if origin is Literal:
        if value not in inner:
            raise bad(f"{name} must be one of {', '.join(inner)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise bad(f"{name} must be a list{f' of tables ([[{name}]])' if is_dataclass(inner[0]) else ''}")
        return tuple(_value(inner[0], each, readers, f"{name}[{number}]") for number, each in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise bad(f"{name} must be a table ([{name}])")
        return {key: _value(inner[1], each, readers, f"{name}.{key}") for key, each in value.items()}
    return table(hint, value, readers, name)
