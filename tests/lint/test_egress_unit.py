"""The shipped units and reference configuration of the way out say what the program does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from cgpu_agent import configfile
from cgpu_agent.egress import config as configuration
from cgpu_agent.egress.__main__ import DEFAULT_CONFIG, EXIT_CONFIG, USER
from cgpu_agent.egress.config import MAX_CONNECTIONS, Config, Limits
from cgpu_agent.egress.net import MAX_LOOKUPS
from cgpu_agent.wire.egress import SOCKET, STATUS

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "systemd"
SERVICE, LISTENER, AGENT = (
    UNITS / name for name in ("cgpu-egress.service", "cgpu-egress.socket", "cgpu-agent.service")
)
REFERENCE = UNITS / "egress.toml"
EXPOSURE_ALLOWED = 15  # tenths

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (apt-get install systemd)"
)


def settings(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line and line[0] not in "#;[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def analyze(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, "LC_ALL": "C", **environment}
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, env=merged, timeout=60)


@needs_analyze
@pytest.mark.parametrize("unit", [SERVICE.name, LISTENER.name])
@pytest.mark.parametrize(("added", "silent"), [("", True), ("[Unit]\nProtectEverything=yes\n", False)])
def test_systemd_has_nothing_to_say_about_the_units(tmp_path: Path, unit: str, added: str, silent: bool) -> None:
    stub = tmp_path / "stub"
    stub.write_text("#!/bin/sh\n")
    stub.chmod(0o755)
    for path in (SERVICE, LISTENER):
        text = path.read_text().replace("=/usr/bin/cgpu-egress", f"={stub}")
        (tmp_path / path.name).write_text(text + (added if path.name == unit else ""))
    answer = analyze("verify", "--man=no", tmp_path / unit, SYSTEMD_UNIT_PATH=f"{tmp_path}:")
    assert (answer.stdout + answer.stderr == "") == silent


@needs_analyze
@pytest.mark.parametrize(
    ("without", "good"), [("nothing", True), ("CapabilityBoundingSet", False), ("SystemCallFilter", False)]
)
def test_exposure_is_within_its_bound(tmp_path: Path, without: str, good: bool) -> None:
    unit = tmp_path / SERVICE.name
    lines = SERVICE.read_text().splitlines()
    unit.write_text("\n".join(line for line in lines if not line.startswith(f"{without}=")))
    answer = analyze("security", "--offline=true", f"--threshold={EXPOSURE_ALLOWED}", unit)
    assert (answer.returncode == 0) == good, answer.stdout


def test_the_agents_user_alone_reaches_it() -> None:
    listener = settings(LISTENER)
    assert listener["ListenStream"] == [SOCKET]
    assert listener["FileDescriptorName"] == ["egress"]
    assert (
        (listener["SocketMode"], listener["SocketUser"]) == (["0600"], [USER]) == (["0600"], settings(AGENT)["User"])
    )


def test_it_can_tell_the_agents_user() -> None:
    assert "PrivateUsers" not in settings(SERVICE)


def test_its_user_is_its_own_and_is_made() -> None:
    (user,) = settings(SERVICE)["User"]
    assert user != USER
    assert re.search(rf"^u {user} - ", (UNITS / "cgpu-agent.sysusers.conf").read_text(), re.MULTILINE)


def test_it_and_not_the_agent_has_a_network() -> None:
    assert settings(SERVICE)["RestrictAddressFamilies"] == ["AF_INET AF_INET6 AF_UNIX"]
    assert "PrivateNetwork" not in settings(SERVICE)
    assert settings(AGENT)["PrivateNetwork"] == ["yes"]
    assert settings(AGENT)["RestrictAddressFamilies"] == ["AF_UNIX"]


def test_metadata_of_clouds_is_out_of_reach_whatever_the_program_does() -> None:
    assert settings(SERVICE)["IPAddressDeny"] == ["link-local multicast"]


def test_a_bad_file_is_not_retried() -> None:
    assert settings(SERVICE)["RestartPreventExitStatus"] == [str(EXIT_CONFIG)]


def test_every_connection_has_descriptors_and_every_lookup_a_thread() -> None:
    assert int(settings(SERVICE)["LimitNOFILE"][0]) >= 2 * MAX_CONNECTIONS + 8 * MAX_LOOKUPS + 64
    assert int(settings(SERVICE)["TasksMax"][0]) > MAX_LOOKUPS


def uncommented() -> str:
    """``#key = value`` becomes a setting; prose has a space behind the ``#``."""
    return re.sub(r"^#(?=\S)", "", REFERENCE.read_text(), flags=re.MULTILINE)


def test_as_shipped_nothing_gets_out() -> None:
    assert configuration.load(REFERENCE) == Config({})
    assert f"# {DEFAULT_CONFIG} - " in REFERENCE.read_text()


def test_every_key_is_there_with_its_default() -> None:
    document = configfile.tomllib.loads(uncommented())
    assert document.keys() == {entry.name for entry in fields(Config)}
    assert document["limits"].keys() == {entry.name for entry in fields(Limits)}
    assert configuration.parse(document) == Config({})


def test_its_examples_are_accepted() -> None:
    text = REFERENCE.read_text()
    entries = [*re.findall(r'\("([^"]+)", "([^"]+)"\)', text)[0], re.findall(r"\{ to = .*\}", text)[0]]
    listed = ", ".join(entry if entry.startswith("{") else f'"{entry}"' for entry in entries)
    assert list(configuration.parse(configfile.tomllib.loads(f"allow = [{listed}]")).allow.values()) == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("page", ["docs/man/cgpu-egress.8", "docs/egress.md"])
def test_every_answer_and_key_is_told(page: str) -> None:
    text = (ROOT / page).read_text()
    for word in (*STATUS, *(entry.name for entry in fields(Limits)), "private"):
        assert word in text
