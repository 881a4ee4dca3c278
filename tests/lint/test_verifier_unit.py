"""The shipped unit and reference configuration of the verifier service say what the service does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from cgpu_agent import configfile
from cgpu_agent.service import config as configuration
from cgpu_agent.service.__main__ import EXIT_CONFIG, STOP_SECONDS
from cgpu_agent.service.config import Config, Limits

UNITS = Path(__file__).resolve().parents[2] / "systemd"
SERVICE = UNITS / "cgpu-verifier.service"
REFERENCE = UNITS / "cgpu-verifier.toml"
EXPOSURE_ALLOWED = 15  # tenths
PATHS = {"policy", "reference", "certificate", "key", "simulated_certificate", "simulated_key", "collateral"}
"""Keys without a default: the file shows an example."""

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (apt-get install systemd)"
)


def settings() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in SERVICE.read_text().splitlines():
        if line and line[0] not in "#;[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def analyze(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, "LC_ALL": "C", **environment}
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, env=merged, timeout=60)


@needs_analyze
@pytest.mark.parametrize(("added", "silent"), [("", True), ("[Unit]\nProtectEverything=yes\n", False)])
def test_systemd_has_nothing_to_say_about_the_unit(tmp_path: Path, added: str, silent: bool) -> None:
    stub = tmp_path / "stub"
    stub.write_text("#!/bin/sh\n")
    stub.chmod(0o755)
    unit = tmp_path / SERVICE.name
    unit.write_text(SERVICE.read_text().replace("=/usr/bin/cgpu-verifier", f"={stub}") + added)
    answer = analyze("verify", "--man=no", unit, SYSTEMD_UNIT_PATH=f"{tmp_path}:")
    assert (answer.stdout + answer.stderr == "") == silent


@needs_analyze
@pytest.mark.parametrize(("without", "good"), [("nothing", True), ("CapabilityBoundingSet", False)])
def test_exposure_is_within_its_bound(tmp_path: Path, without: str, good: bool) -> None:
    unit = tmp_path / SERVICE.name
    lines = SERVICE.read_text().splitlines()
    unit.write_text("\n".join(line for line in lines if not line.startswith(f"{without}=")))
    answer = analyze("security", "--offline=true", f"--threshold={EXPOSURE_ALLOWED}", unit)
    assert (answer.returncode == 0) == good, answer.stdout


def test_bad_files_are_not_retried() -> None:
    assert settings()["RestartPreventExitStatus"] == [str(EXIT_CONFIG)]


def test_it_may_stop_in_order() -> None:
    assert int(settings()["TimeoutStopSec"][0]) > STOP_SECONDS


def test_every_connection_has_a_descriptor_and_every_byte_its_place() -> None:
    assert int(settings()["LimitNOFILE"][0]) >= 2 * Limits().connections
    assert settings()["MemoryMax"] == ["1G"]
    assert 4 * Limits().buffered_bytes <= 1 << 30


def test_the_network_is_as_wide_as_the_default_address() -> None:
    assert settings()["IPAddressDeny"] == ["any"]
    assert settings()["IPAddressAllow"] == ["localhost"]
    assert Config.__dataclass_fields__["listen"].default.startswith("127.0.0.1:")


def test_the_unit_hands_over_the_keys_that_the_reference_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    keys = configuration.load(REFERENCE).keys
    handed = {value.partition(":")[0] for value in settings()["LoadCredential"]}
    assert {path.name for path in (keys.replica, *keys.signing)} == handed


def uncommented() -> str:
    """``#key = value`` becomes a setting; prose has a space behind the ``#``."""
    return re.sub(r"^#(?=\S)", "", REFERENCE.read_text(), flags=re.MULTILINE)


def test_every_key_is_there_with_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials")
    document: dict[str, Any] = configfile.tomllib.loads(uncommented())
    assert document.keys() == {entry.name for entry in fields(Config)}
    for table in ("keys", "token", "trust", "platform", "gpu", "enrol", "limits"):
        kind = type(getattr(configuration.load(REFERENCE), table))
        assert document[table].keys() == {entry.name for entry in fields(kind)}
        for name in PATHS & document[table].keys():
            del document[table][name]
    shown, shipped = configuration.parse(document), configuration.load(REFERENCE)
    assert shown == shipped


def test_its_examples_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials")
    found = configuration.parse(configfile.tomllib.loads(uncommented()))
    assert found.enrol.enabled
    assert found.trust.policy == Path("/etc/cgpu-verifier/policy.cedar")
