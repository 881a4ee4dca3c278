"""The agent's files: nobody else's directory, never half a file."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest

from cgpu_agent.domain.store import Store
from cgpu_agent.errors import Unavailable

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a directory away")


def refused(folder: Path) -> bool:
    with pytest.raises(Unavailable) as caught:
        Store(folder)
    return caught.value.slug == "STATE_DIRECTORY" and caught.value.retry_after is None


def test_directory_is_made_closed_to_everybody_else(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        Store(tmp_path / "state")
    finally:
        os.umask(previous)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o770, 0o777, 0o750])
def test_directory_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    folder.chmod(mode)
    assert refused(folder)


@needs_root
def test_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    os.chown(folder, 1234, 1234)
    assert refused(folder)


def test_link_to_a_good_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "state").symlink_to(tmp_path / "real")
    assert refused(tmp_path / "state")


def test_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").touch(mode=0o600)
    assert refused(tmp_path / "state")


def test_directory_without_a_parent_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "absent" / "state")


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    assert store.read("a") is None
    store.write("a", b"one")
    store.write("a", b"two")
    assert store.read("a") == b"two"
    store.remove("a")
    store.remove("a")
    assert store.read("a") is None


def test_files_are_closed_to_everybody_else(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    store.write("a", b"x")
    store.append("b", b"x", at=0)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "state").iterdir()} == {0o600}


def test_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    store.write("a", b"old")
    reader = (tmp_path / "state" / "a").open("rb")
    store.write("a", b"new")
    with reader:
        assert reader.read() == b"old"
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["a"]


def test_write_that_does_not_fit_keeps_the_old_content(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    store.write("a", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(Unavailable) as caught:
            store.write("a", bytes(100))
        with pytest.raises(Unavailable):
            store.append("log", bytes(100), at=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.slug == "STATE_DIRECTORY"
    assert caught.value.retry_after  # room may come back
    assert store.read("a") == b"old"


def test_torn_write_of_an_earlier_run_does_not_matter(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    store.write("a", b"whole")
    (tmp_path / "state" / ".a.new").write_bytes(b"half and lon")
    assert store.read("a") == b"whole"
    store.write("a", b"new")
    assert store.read("a") == b"new"


def test_append_cuts_a_torn_tail(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    store.append("log", b"first;", at=0)
    store.append("log", b"torn rec", at=6)
    store.append("log", b"2;", at=6)
    assert store.read("log") == b"first;2;"


def test_link_in_the_place_of_a_file_is_not_followed(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    for name in ("log", ".a.new"):
        (tmp_path / "state" / name).symlink_to(target)
    with pytest.raises(Unavailable):
        store.append("log", b"x", at=0)
    with pytest.raises(Unavailable):
        store.write("a", b"x")
    assert target.read_bytes() == b"precious"


def test_unreadable_file_is_an_error_with_a_name(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    (tmp_path / "state" / "a").mkdir()
    with pytest.raises(Unavailable) as caught:
        store.read("a")
    assert caught.value.slug == "STATE_DIRECTORY"
    with pytest.raises(Unavailable):
        store.remove("a")
