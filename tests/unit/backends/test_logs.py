"""Logs are read to their end, whoever opened them, and never while systemd writes."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from cgpu_agent.backends import logs as logs_module
from cgpu_agent.backends.logs import MAX_LOG, SystemLogs
from cgpu_agent.errors import Unavailable

NOWHERE = Path("/nonexistent")


def test_the_first_readable_boot_log_counts(tmp_path: Path) -> None:
    (tmp_path / "credential").write_bytes(b"none")  # what the unit's fallback holds where there is no log
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "log").write_bytes(b"events")
    paths = [NOWHERE, tmp_path, tmp_path / "credential", tmp_path / "empty", tmp_path / "log"]
    assert SystemLogs(paths, NOWHERE).boot() == b"events"
    assert SystemLogs(paths[:-1], NOWHERE).boot() is None


def test_an_endless_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(bytes(MAX_LOG + 1))
    with pytest.raises(Unavailable) as caught:
        SystemLogs([tmp_path / "log"], NOWHERE).boot()
    assert caught.value.slug == "LOG_TOO_LARGE"


@pytest.mark.parametrize("handed_over", [False, True])
def test_systemd_log_is_read_from_its_beginning_each_time(tmp_path: Path, handed_over: bool) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one")
    descriptor = os.open(path, os.O_RDONLY) if handed_over else None
    logs = SystemLogs([], NOWHERE if handed_over else path, descriptor)
    for expected in (b"one", b"onetwo"):
        with logs.systemd() as log:
            assert log == expected
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the reader let go of the lock
            file.write(b"two")
    if descriptor is not None:
        os.close(descriptor)


@pytest.mark.parametrize("handed_over", [False, True])
def test_a_writer_that_keeps_the_lock_is_not_waited_for_without_end(
    tmp_path: Path, handed_over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs_module, "_LOCK_SECONDS", 0.05)
    path = tmp_path / "log"
    path.write_bytes(b"one")
    descriptor = os.open(path, os.O_RDONLY) if handed_over else None
    logs = SystemLogs([], NOWHERE if handed_over else path, descriptor)
    with path.open("ab") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        with pytest.raises(Unavailable) as caught, logs.systemd():
            pass
    assert (caught.value.slug, caught.value.retry_after) == ("LOG_LOCKED", 1.0)
    with logs.systemd() as log:
        assert log == b"one"
    if descriptor is not None:
        os.close(descriptor)


def test_no_systemd_log_is_none() -> None:
    with SystemLogs([], NOWHERE).systemd() as log:
        assert log is None
