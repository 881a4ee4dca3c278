"""``egress.toml``: every key, and each refusal names what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from cgpu_agent.configfile import MAX_FILE
from cgpu_agent.egress.config import Config, Limits, load
from cgpu_agent.errors import Misuse
from cgpu_agent.wire.egress import Destination


def read(folder: Path, text: str | bytes) -> Config:
    path = folder / "egress.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load(path)


def test_entries_in_both_forms(tmp_path: Path) -> None:
    text = 'allow = ["a.example:1", { to = "b.example:2", private = true }, { to = "[::1]:3" }]'
    allow = {Destination("a.example", 1): False, Destination("b.example", 2): True, Destination("::1", 3): False}
    assert read(tmp_path, text) == Config(allow, Limits())


def test_limits_are_taken(tmp_path: Path) -> None:
    found = read(tmp_path, "allow = []\n[limits]\nconnections = 3\nidle_seconds = 1\nsent_bytes = 5")
    assert found.limits == Limits(connections=3, idle_seconds=1, sent_bytes=5)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "allow"),
        ("allow = 'a:1'", "allow"),
        ("allow = [1]", "allow[0]"),
        ("allow = [[]]", "allow[0]"),
        ("allow = ['a:1', 'A:1']", "allow[1]"),
        ("allow = ['*:1']", "allow[0]"),
        ("allow = ['a']", "allow[0]"),
        ("allow = ['a:1', 'a:1']", "allow[1]: a:1"),
        ("allow = ['0.0.0.0:1']", "allow[0]"),
        ("allow = [{ to = 'a:1', privat = true }]", "'allow[0].privat'"),
        ("allow = [{ private = true }]", "allow[0]"),
        ("allow = [{ to = 'a:1', private = 1 }]", "allow[0]"),
        ("allow = [{ to = '10.0.0.1:1', private = true }]", "allow[0]"),
        ("allow = []\nlogs = 1", "'logs'"),
        ("allow = []\nlimits = 1", "limits"),
        ("allow = []\n[limits]\nbytes = 1", "'limits.bytes'"),
        ("allow = []\n[limits]\nconnections = 0", "limits.connections"),
        ("allow = []\n[limits]\nconnections = 201", "limits.connections"),
        ("allow = []\n[limits]\nconnections = true", "limits.connections"),
        ("allow = []\n[limits]\nidle_seconds = 1.5", "limits.idle_seconds"),
        ("allow = []\n[limits]\ntotal_seconds = 86401", "limits.total_seconds"),
        ("allow = []\n[limits]\nsent_bytes = -1", "limits.sent_bytes"),
        ("allow = [", "egress.toml"),
        (b"allow = ['\xff:1']", "egress.toml"),
        ("a = " + "[" * 5000, "egress.toml"),
        (b" " * (MAX_FILE + 1), "larger"),
    ],
)
def test_a_bad_file_is_refused_and_the_fault_named(tmp_path: Path, text: str | bytes, named: str) -> None:
    with pytest.raises(Misuse) as caught:
        read(tmp_path, text)
    assert caught.value.slug == "BAD_CONFIG"
    assert named in caught.value.message


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Misuse, match="cannot be read"):
        load(tmp_path / "none")
