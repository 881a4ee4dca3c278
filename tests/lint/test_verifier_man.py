"""The manual page of ``cgpu-verifier`` says all that the program takes, nothing it does not, without a warning."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cgpu_agent.service.__main__ import STOP_SECONDS, build_parser
from cgpu_agent.service.app import Service
from cgpu_agent.service.config import load
from cgpu_agent.service.material import load as load_material
from fixtures.verifier import Verifier

PAGE = Path(__file__).resolve().parents[2] / "docs" / "man" / "cgpu-verifier.8"
TEXT = PAGE.read_text().replace("\\-", "-")


def parsers() -> list[argparse.ArgumentParser]:
    top = build_parser()
    below = [action for action in top._actions if isinstance(action, argparse._SubParsersAction)]
    return [top, *(child for action in below for child in action.choices.values())]


def test_every_option_is_told_and_no_other() -> None:
    taken = {name for parser in parsers() for action in parser._actions for name in action.option_strings}
    options = TEXT.split("\n.SH OPTIONS\n")[1].split("\n.SH ")[0]
    told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", options))
    assert told == {name for name in taken if name.startswith("--")}


def test_every_command_and_choice_is_told() -> None:
    synopsis = TEXT.split("\n.SH SYNOPSIS\n")[1].split("\n.SH ")[0]
    for word in ("serve", "check", "keygen", "signing", "replica", "ca"):
        assert word in synopsis


def test_every_request_is_told_and_no_other(tmp_path: Path) -> None:
    service = Service(load_material(load(Verifier(tmp_path).config)))
    told = set(re.findall(r"(?:GET|POST) (/[\w./-]+)", TEXT))
    assert told == service.paths


def test_the_time_to_stop_is_told() -> None:
    assert f"at most {STOP_SECONDS} seconds" in TEXT


@pytest.mark.parametrize(
    "command",
    [
        ("man", "--warnings", "-E", "UTF-8", "-Tutf8", "-Z", "-l"),
        ("groff", "-man", "-ww", "-z", "-Tutf8"),
        ("mandoc", "-T", "lint", "-W", "warning"),
    ],
    ids=lambda command: command[0],
)
def test_formatting_prints_no_warning(command: tuple[str, ...]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "80"}
    answer = subprocess.run([*command, PAGE], capture_output=True, text=True, env=environment, timeout=60)
    said = answer.stderr + (answer.stdout if command[0] == "mandoc" else "")
    assert said == ""
    assert answer.returncode == 0
