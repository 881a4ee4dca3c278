"""The configuration: TOML -> frozen dataclasses. An unknown key or a bad value is an error that names it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cgpu_agent import configfile
from cgpu_agent.configfile import bad, whole
from cgpu_agent.egress.addresses import is_host
from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.egress import Destination, parse_destination

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


@dataclass(frozen=True, slots=True)
class _Entry:
    to: str
    private: bool = False


def load(path: Path) -> Config:
    """Read a configuration file. Raises ``Misuse`` (``BAD_CONFIG``), with the key at fault."""
    return parse(configfile.read(path)[0])


def parse(document: dict[str, Any]) -> Config:
    """Check a parsed document. Raises ``Misuse`` (``BAD_CONFIG``)."""
    return configfile.table(Config, document, {dict[Destination, bool]: _allow, int: _limit})


def _allow(value: Any, name: str) -> dict[Destination, bool]:
    if not isinstance(value, list):
        raise bad(f"{name} must be a list of destinations")
    allow: dict[Destination, bool] = {}
    for number, each in enumerate(value):
        destination, private = _entry(each, f"{name}[{number}]")
        if destination in allow:
            raise bad(f"{name}[{number}]: {destination} is there twice")
        allow[destination] = private
    return allow


def _entry(value: Any, name: str) -> tuple[Destination, bool]:
    if not isinstance(value, str | dict):
        raise bad(f'{name} must be "HOST:PORT" or {{ to = "HOST:PORT", private = true }}')
    entry = _Entry(value) if isinstance(value, str) else configfile.table(_Entry, value, {}, name)
    try:
        destination = parse_destination(entry.to)
    except HostileInput as error:
        raise bad(f"{name}: {error.message}") from None
    address = destination.address
    if address is not None and (entry.private or not is_host(address)):
        raise bad(f"{name}: private is for names" if entry.private else f"{name} is not the address of a host")
    return destination, entry.private


def _limit(value: Any, name: str) -> Any:
    most = MAX_CONNECTIONS if name == "limits.connections" else 86400 if name.endswith("_seconds") else 1 << 40
    return whole(1, most)(value, name)
