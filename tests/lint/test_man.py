"""The manual pages say all that the programs take, nothing they do not, and are formatted without a warning."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from cgpu_agent.cli.parser import build_parser
from cgpu_agent.daemon import __main__ as daemon
from cgpu_agent.daemon.brokerconfig import AzureTable, OpenBaoTable, TrusteeTable
from cgpu_agent.daemon.config import Config, KeyConfig
from cgpu_agent.domain.core import REMEDIES
from cgpu_agent.domain.policy import Action
from cgpu_agent.egress import __main__ as egress
from cgpu_agent.ready import __main__ as ready

PAGES = Path(__file__).resolve().parents[2] / "docs" / "man"
CGPUCTL, DAEMON, CONFIG = PAGES / "cgpuctl.1", PAGES / "cgpu-agent.8", PAGES / "cgpu-agent.toml.5"
READY, EGRESS = PAGES / "cgpu-ready.8", PAGES / "cgpu-egress.8"
SECTIONS = {
    CGPUCTL: {"COMMANDS", "OPTIONS", "EXIT STATUS", "ENVIRONMENT", "FILES", "EXAMPLES", "LIMITATIONS", "SEE ALSO"},
    DAEMON: {"OPTIONS", "SIGNALS", "EXIT STATUS", "ENVIRONMENT", "FILES", "EXAMPLES", "LIMITATIONS", "SEE ALSO"},
    CONFIG: {"EXAMPLES", "LIMITATIONS", "SEE ALSO"},
    EGRESS: {"OPTIONS", "SIGNALS", "EXIT STATUS", "ENVIRONMENT", "FILES", "EXAMPLES", "LIMITATIONS", "SEE ALSO"},
    READY: {"OPTIONS", "SIGNALS", "EXIT STATUS", "ENVIRONMENT", "FILES", "EXAMPLES", "LIMITATIONS", "SEE ALSO"},
}
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
EVERYWHERE = {"--help"}


def plain(source: str) -> str:
    """The words of a page: man(7) macros, fonts and escapes taken out."""
    source = re.sub(r'^\.\\".*$|^\.[A-Z]{1,3}\b ?', "", source, flags=re.MULTILINE)
    source = re.sub(r"\\f(?:[BIRP]|\(CW)|\\c$|\\&", "", source, flags=re.MULTILINE)
    for escape, char in {r"\-": "-", r"\~": " ", r"\ ": " ", r"\(dq": '"', r"\e": "\\"}.items():
        source = source.replace(escape, char)
    return source


def parts(page: Path, macro: str) -> dict[str, str]:
    """Text below each heading (``SH``, or ``SS`` within its section)."""
    pieces = re.split(rf"^\.(?:SH|{macro}) (.*)$", page.read_text(), flags=re.MULTILINE)
    return {plain(title): plain(body) for title, body in zip(pieces[1::2], pieces[2::2], strict=True)}


def commands(parser: argparse.ArgumentParser, path: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in below:
        for name, child in action.choices.items():
            yield from commands(child, f"{path} {name}".strip())
    if not below:
        yield path, parser


COMMANDS = dict(commands(build_parser()))


def long_options(parser: argparse.ArgumentParser) -> set[str]:
    return {name for action in parser._actions for name in action.option_strings if name.startswith("--")}


@pytest.mark.parametrize("page", SECTIONS, ids=lambda page: page.name)
def test_page_has_its_sections(page: Path) -> None:
    assert {"NAME", "SYNOPSIS", "DESCRIPTION", *SECTIONS[page]} <= parts(page, "SH").keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_told_with_its_options_and_no_others(command: str) -> None:
    told = set(OPTION.findall(parts(CGPUCTL, "SS")[command]))
    assert told | EVERYWHERE == long_options(COMMANDS[command]) | EVERYWHERE


@pytest.mark.parametrize("command", COMMANDS)
def test_choices_of_a_command_are_told(command: str) -> None:
    text = parts(CGPUCTL, "SS")[command]
    for action in COMMANDS[command]._actions:
        assert all(str(choice) in text for choice in action.choices or ())


def test_no_command_is_told_that_does_not_exist() -> None:
    headings = re.findall(r"^\.SS (.*)$", CGPUCTL.read_text(), flags=re.MULTILINE)
    assert headings == list(COMMANDS)


def test_options_of_cgpuctl_itself_are_told() -> None:
    assert set(OPTION.findall(parts(CGPUCTL, "SH")["OPTIONS"])) == long_options(build_parser())


def test_the_examples_are_good_commands() -> None:
    shown = parts(CGPUCTL, "SH")["EXAMPLES"].replace("\\\n", " ")
    lines = re.findall(r"^[$#] cgpuctl ([^>\n]*)", shown, flags=re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        build_parser().parse_args(shlex.split(line))


@pytest.mark.parametrize(
    ("main", "page", "some"),
    [
        (daemon.main, DAEMON, {"--config", "--check"}),
        (egress.main, EGRESS, {"--config", "--check"}),
        (ready.main, READY, {"--clear"}),
    ],
)
def test_options_of_the_daemons_are_told(
    main: Callable[[list[str]], int], page: Path, some: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    taken = set(OPTION.findall(capsys.readouterr().out))
    assert some <= taken
    assert set(OPTION.findall(parts(page, "SH")["OPTIONS"])) == taken


@pytest.mark.parametrize("slug", REMEDIES)
def test_every_problem_with_a_remedy_is_told(slug: str) -> None:
    assert slug in parts(DAEMON, "SH")["DIAGNOSTICS"]


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _defaults() -> Iterator[tuple[str, str, Any]]:
    for entry in fields(Config):
        value = getattr(Config(), entry.name)
        if entry.name == "source" or value is None:
            continue
        if isinstance(value, (str, int)):
            yield "TOP LEVEL", entry.name, value
        elif entry.name == "key":
            shown = KeyConfig("shown", "credential")
            yield from (("[[key]]", inner.name, getattr(shown, inner.name)) for inner in fields(shown)[2:])
        else:
            for inner in fields(value):
                yield f"[{entry.name}]", inner.name, getattr(value, inner.name)


@pytest.mark.parametrize(("section", "key", "default"), list(_defaults()))
def test_every_key_is_told_with_its_default(section: str, key: str, default: Any) -> None:
    found = re.search(rf"^{key} +=(.*)$", parts(CONFIG, "SH")[section], flags=re.MULTILINE)
    assert found is not None
    told = found.group(1).strip()
    assert told == _toml(default) or int(told, 0) == default


@pytest.mark.parametrize("broker", [AzureTable, OpenBaoTable, TrusteeTable])
def test_every_key_of_a_broker_is_told(broker: type[Any]) -> None:
    section = parts(CONFIG, "SH")[f"[{broker.__name__.removesuffix('Table').lower()}]"]
    for entry in fields(broker):
        default = "" if entry.default is MISSING else f'= "{entry.default}"'
        assert re.search(rf"^{entry.name} *{default} ?$", section, flags=re.MULTILINE)


@pytest.mark.parametrize("action", Action)
def test_every_action_is_told(action: Action) -> None:
    assert action.value in parts(CONFIG, "SH")["TOP LEVEL"]


@pytest.mark.parametrize("page", SECTIONS, ids=lambda page: page.name)
@pytest.mark.parametrize(
    "command",
    [
        ("man", "--warnings", "-E", "UTF-8", "-Tutf8", "-Z", "-l"),
        ("groff", "-man", "-ww", "-z", "-Tutf8"),
        ("mandoc", "-T", "lint", "-W", "warning"),
    ],
    ids=lambda command: command[0],
)
def test_formatting_prints_no_warning(page: Path, command: tuple[str, ...]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "80"}
    answer = subprocess.run([*command, page], capture_output=True, text=True, env=environment, timeout=60)
    said = answer.stderr + (answer.stdout if command[0] == "mandoc" else "")
    assert said == ""
    assert answer.returncode == 0
