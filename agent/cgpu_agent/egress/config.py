"""The configuration: TOML -> frozen dataclasses. An unknown key or a bad value is an error that names it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from cgpu_agent.egress.addresses import is_host
from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.wire.egress import Destination, parse_destination

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same parser under its older name
    import tomli as tomllib

MAX_FILE: Final = 1 << 20
MAX_CONNECTIONS: Final = 200


@dataclass(frozen=True, slots=True)
class Limits:
    """``connections`` at a time; for each the seconds until it is open, without a byte and in all, and the bytes."""

    connections: int = 64
    connect_seconds: int = 10
    idle_seconds: int = 60
    total_seconds: int = 600
    sent_bytes: int = 16 << 20
    received_bytes: int = 64 << 20


@dataclass(frozen=True, slots=True)
class Config:
    """Everything the program can be told. ``allow``: destination -> whether its name may have a private address."""

    allow: dict[Destination, bool]
    limits: Limits = field(default_factory=Limits)


def _bad(message: str) -> Misuse:
    return Misuse("BAD_CONFIG", message)


def load(path: Path) -> Config:
    """Read a configuration file. Raises ``Misuse`` (``BAD_CONFIG``), with the key at fault."""
    try:
        with path.open("rb") as file:
            source = file.read(MAX_FILE + 1)
    except OSError as error:
        raise _bad(f"{path} cannot be read: {error.strerror}") from error
    if len(source) > MAX_FILE:
        raise _bad(f"{path} is larger than {MAX_FILE} bytes")
    try:
        document = tomllib.loads(source.decode("utf-8"))
    except ValueError as error:  # TOML and UTF-8 errors; the file is the operator's own, so its text may be shown
        raise _bad(f"{path}: {error}") from error
    except RecursionError as error:
        raise _bad(f"{path}: nested too deeply") from error
    return parse(document)


def parse(document: dict[str, Any]) -> Config:
    """Check a parsed document. Raises ``Misuse`` (``BAD_CONFIG``)."""
    _known(document, "", {"allow", "limits"})
    if not isinstance(document.get("allow"), list):
        raise _bad("allow must be a list of destinations")
    allow: dict[Destination, bool] = {}
    for number, entry in enumerate(document["allow"]):
        destination, private = _entry(entry, f"allow[{number}]")
        if destination in allow:
            raise _bad(f"allow[{number}]: {destination} is there twice")
        allow[destination] = private
    return Config(allow, _limits(document.get("limits", {})))


def _known(table: Any, where: str, known: set[str]) -> None:
    if not isinstance(table, dict):
        raise _bad(f"{where.rstrip('.')} must be a table")
    if unknown := table.keys() - known:
        raise _bad(f"unknown key {where + min(unknown)!r}; known here: {', '.join(sorted(known))}")


def _entry(entry: Any, name: str) -> tuple[Destination, bool]:
    private = False
    if not isinstance(entry, str):
        _known(entry, f"{name}.", {"to", "private"})
        entry, private = entry.get("to"), entry.get("private", False)
    if not isinstance(entry, str) or not isinstance(private, bool):
        raise _bad(f'{name} must be "HOST:PORT" or {{ to = "HOST:PORT", private = true }}')
    try:
        destination = parse_destination(entry)
    except HostileInput as error:
        raise _bad(f"{name}: {error.message}") from None
    address = destination.address
    if address is not None and (private or not is_host(address)):
        raise _bad(f"{name}: private is for names" if private else f"{name} is not the address of a host")
    return destination, private


def _limits(table: Any) -> Limits:
    names = {entry.name for entry in fields(Limits)}
    _known(table, "limits.", names)
    for name, value in table.items():
        most = MAX_CONNECTIONS if name == "connections" else 86400 if name.endswith("_seconds") else 1 << 40
        if type(value) is not int or not 1 <= value <= most:
            raise _bad(f"limits.{name} must be a whole number, 1-{most}")
    return Limits(**table)
