"""The reference configuration says what the parser does: every key, with its default."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest

from cgpu_agent import configfile
from cgpu_agent.daemon import config as configuration
from cgpu_agent.daemon.brokerconfig import AzureTable, OpenBaoTable, TrusteeTable
from cgpu_agent.daemon.config import Config
from cgpu_agent.domain.policy import Action

REFERENCE = Path(__file__).resolve().parents[2] / "systemd" / "config.toml"
TABLES = ("sockets", "tpm", "logs", "platform", "gpu", "limits", "sealed", "egress")
BROKERS = ("openbao", "trustee", "azure")


def load(text: str, folder: Path) -> Config:
    path = folder / "config.toml"
    path.write_text(text)
    return replace(configuration.load(path), source=b"")


def uncommented(text: str) -> str:
    """``#key = value`` becomes a setting; prose and examples have a space behind the ``#``."""
    return re.sub(r"^#(?=\S)", "", text, flags=re.MULTILINE)


def test_as_shipped_it_changes_nothing(tmp_path: Path) -> None:
    assert load(REFERENCE.read_text(), tmp_path) == Config()


def test_every_key_uncommented_is_the_default(tmp_path: Path) -> None:
    assert load(uncommented(REFERENCE.read_text()), tmp_path) == Config()


def test_every_key_is_there() -> None:
    document = configfile.tomllib.loads(uncommented(REFERENCE.read_text()))
    assert document.keys() == {entry.name for entry in fields(Config)} - {"source", "key", *BROKERS}
    for table in TABLES:
        assert document[table].keys() == {entry.name for entry in fields(getattr(Config(), table))}


def test_the_key_that_it_shows_is_taken(tmp_path: Path) -> None:
    text = REFERENCE.read_text()
    shown = text[text.index("# [[key]]") : text.index("# Key brokers")]
    (key,) = load(re.sub(r"^# ", "", shown, flags=re.MULTILINE), tmp_path).key
    assert (key.id, key.broker, key.path, key.group) == ("models/llama", "credential", "llama.key", "models")


@pytest.mark.parametrize("kind", [OpenBaoTable, TrusteeTable, AzureTable])
def test_the_brokers_that_it_shows_are_taken(tmp_path: Path, kind: type[Any]) -> None:
    broker = kind.__name__.removesuffix("Table").lower()
    text = re.sub(r"^# ?", "", REFERENCE.read_text(), flags=re.MULTILINE)
    shown = re.search(rf"^\[{broker}\]\n(.+\n)+", text, flags=re.MULTILINE)
    assert shown is not None
    document = configfile.tomllib.loads(shown[0])
    assert document[broker].keys() == {entry.name for entry in fields(kind)}
    for entry in fields(kind):
        assert entry.default is MISSING or document[broker][entry.name] == entry.default
    assert getattr(load(shown[0], tmp_path), broker) is not None


def test_a_key_that_is_only_prose_would_be_noticed(tmp_path: Path) -> None:
    text = uncommented(REFERENCE.read_text()).replace("register = 13", "register = 14")
    assert load(text, tmp_path) != Config()


@pytest.mark.parametrize("action", Action)
def test_every_action_is_named(action: Action) -> None:
    assert action.value in REFERENCE.read_text()
