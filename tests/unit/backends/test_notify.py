"""What systemd is told, and what it hands over."""

from __future__ import annotations

import os

import pytest

from cgpu_agent.backends.notify import Notifier, passed_descriptors
from fixtures.ear import Ear


def test_messages_are_those_of_the_protocol(ear: Ear) -> None:
    notifier = Notifier()
    notifier.ready()
    notifier.stopping()
    notifier.ping()
    assert ear.heard() == ["READY=1", "STOPPING=1", "WATCHDOG=1"]


def test_reload_carries_the_time_that_systemd_compares(ear: Ear) -> None:
    Notifier().reloading()
    first, second = ear.heard()[0].split("\n")
    assert first == "RELOADING=1"
    assert second.removeprefix("MONOTONIC_USEC=").isdigit()


def test_status_is_sent_when_it_changed(ear: Ear) -> None:
    notifier = Notifier()
    for line in ("a", "a", "b", "a"):
        notifier.status(line)
    assert ear.heard() == ["STATUS=a", "STATUS=b", "STATUS=a"]


def test_status_cannot_smuggle_another_message(ear: Ear) -> None:
    Notifier().status("why: x\nREADY=1\r\nMAINPID=1\x0bSTOPPING=1\u2028FDSTORE=1")
    (message,) = ear.heard()
    assert message == "STATUS=why: x READY=1 MAINPID=1 STOPPING=1 FDSTORE=1"


def test_status_with_bytes_that_are_no_text_is_sent_all_the_same(ear: Ear) -> None:
    Notifier().status("bad path /etc/\udcff")
    assert ear.heard() == ["STATUS=bad path /etc/?"]


def test_abstract_address_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"cgpu-test-{os.getpid()}"
    listening = Ear(f"\0{name}")
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
    Notifier().ready()
    assert listening.heard() == ["READY=1"]
    listening.close()


def test_what_is_kept_and_forgotten_is_said_by_its_name(ear: Ear) -> None:
    notifier = Notifier()
    notifier.keep("lease-1", [0])
    notifier.forget("lease-1")
    assert ear.heard() == ["FDSTORE=1\nFDNAME=lease-1", "FDSTOREREMOVE=1\nFDNAME=lease-1"]


@pytest.mark.parametrize(("room", "size"), [(None, 0), ("", 0), ("0", 0), ("128", 128), ("-1", 0), ("many", 0)])
def test_descriptors_are_kept_where_systemd_says_so(
    room: str | None, size: int, ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    if room is not None:
        monkeypatch.setenv("FDSTORE", room)
    assert Notifier().store_size == size
    assert "FDSTORE" not in os.environ
    monkeypatch.setenv("FDSTORE", "128")
    assert Notifier().store_size == 0  # NOTIFY_SOCKET is gone: nobody listens


@pytest.mark.parametrize("address", ["", "/nonexistent/notify", "/" + "x" * 200])
def test_manager_that_does_not_listen_is_no_reason_to_fail(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notifier = Notifier()
    notifier.ready()
    notifier.status("x")


@pytest.mark.parametrize(
    ("period", "pid", "seconds"),
    [
        ("30000000", None, 30.0),
        ("30000000", "own", 30.0),
        ("30000000", "1", None),
        ("0", None, None),
        ("", None, None),
        ("soon", None, None),
    ],
)
def test_watchdog_period_is_taken_when_it_is_for_this_process(
    period: str, pid: str | None, seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", period)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "own" else pid)
    assert Notifier().watchdog_seconds == seconds


def test_children_do_not_inherit_what_is_for_this_process(ear: Ear, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID"):
        monkeypatch.setenv(name, "1")
    Notifier()
    passed_descriptors()
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID"} & os.environ.keys()
    assert ear.heard() == []


@pytest.mark.parametrize(
    ("pid", "count"), [("1", "2"), ("", "2"), (None, "2"), ("own", "many"), ("own", ""), ("own", "0")]
)
def test_sockets_for_another_process_are_left_alone(
    pid: str | None, count: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pid is not None:
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()) if pid == "own" else pid)
    monkeypatch.setenv("LISTEN_FDS", count)
    monkeypatch.setenv("LISTEN_FDNAMES", "api:admin")
    assert passed_descriptors() == []
