"""What commands of several groups take alike."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 - it has no public name
"""What commands are added to."""

DEFAULT_AUDIENCE = "local"

ONE_EACH: Mapping[str, Any] = {"type": Path, "action": "append", "default": [], "metavar": "FILE"}
SEVERAL: Mapping[str, Any] = {"type": Path, "nargs": "+", "action": "extend", "default": [], "metavar": "FILE"}
"""For commands without a file of their own, which this would swallow."""


def group(commands: Commands, name: str, *, help: str, description: str) -> Commands:  # noqa: A002 - argparse's word
    """A command that has commands of its own, which are to be added to what is returned."""
    parser = commands.add_parser(name, help=help, description=description)
    return parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)


def add_json(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_socket(parser: argparse.ArgumentParser) -> None:
    _socket(parser, "the agent's socket", "CGPU_AGENT_SOCKET")


def add_admin_socket(parser: argparse.ArgumentParser) -> None:
    _socket(parser, "the agent's admin socket", "CGPU_AGENT_ADMIN_SOCKET")


def _socket(parser: argparse.ArgumentParser, what: str, variable: str) -> None:
    parser.add_argument("--socket", metavar="PATH", help=f"{what} (default: {variable}, else /run/cgpu-agent)")
