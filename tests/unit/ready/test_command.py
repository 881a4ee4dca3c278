"""The ``cgpu-ready`` command: activated by systemd or not at all, ended in order, and clearing by itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cgpu_agent.ready import __main__ as command
from cgpu_agent.wire.ready import CLEAR
from fixtures.daemon import _ACTIVATE
from fixtures.nvml import FakeDriver, fake_driver
from fixtures.readyhelper import PATIENCE, environment, heard

# The user that runs the test stands in for the agent's, which is not made here.
MAIN = """
import os, pwd, sys
from cgpu_agent.ready import __main__ as command
command.USER = pwd.getpwuid(os.geteuid()).pw_name
sys.exit(command.main([]))
"""


def folder(tmp_path: Path) -> Path:
    (tmp_path / "gpu").mkdir()
    return tmp_path / "gpu"


def start(driver: FakeDriver, *listeners: socket.socket) -> subprocess.Popen[str]:
    names, fds = ":".join("x" * len(listeners)), [str(sock.fileno()) for sock in listeners]
    return subprocess.Popen(
        [sys.executable, "-c", _ACTIVATE, str(len(listeners)), names, *fds, sys.executable, "-c", MAIN],
        env=environment(driver),
        pass_fds=[sock.fileno() for sock in listeners],
        stderr=subprocess.PIPE,
        text=True,
    )


def listener(path: Path, kind: int = socket.SOCK_SEQPACKET) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(str(path))
    sock.listen(4)
    return sock


def test_activated_it_clears_serves_and_stops_in_order(tmp_path: Path) -> None:
    driver = FakeDriver.loaded(folder(tmp_path))
    driver.say("ready", "1")
    with listener(tmp_path / "s") as listening, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(tmp_path / "s"))  # before it runs: that is what starts it
        sock.send(b"set")
        process = start(driver, listening)
        assert heard(sock) == b"refused"  # This process is not the main one of cgpu-agent.service.
        assert (driver.folder / "ready").read_text() == "0"
        driver.say("ready", "1")
        process.terminate()
        said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0
    assert (driver.folder / "ready").read_text() == "0"
    assert said == f"<4>refused a request of uid {os.geteuid()}, pid {os.getpid()}\n"


@pytest.mark.parametrize("kinds", [(), (socket.SOCK_STREAM,), (socket.SOCK_SEQPACKET,) * 2])
def test_without_the_one_socket_that_it_needs_it_does_not_start(tmp_path: Path, kinds: tuple[int, ...]) -> None:
    listeners = [listener(tmp_path / str(number), kind) for number, kind in enumerate(kinds)]
    process = start(FakeDriver.loaded(folder(tmp_path)), *listeners)
    said = process.communicate(timeout=PATIENCE)[1]
    for sock in listeners:
        sock.close()
    assert process.returncode == 1
    assert said == "<3>cgpu-ready is started by cgpu-ready.socket\n"


def test_without_a_driver_there_is_nothing_to_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "loaded_driver", lambda: None)
    assert command.main(["--clear"]) == 0


@pytest.mark.parametrize(("code", "status"), [(0, 0), (3, 0), (4, 1)])
def test_root_clears_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, status: int) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with fake_driver(folder(tmp_path)) as driver:
        monkeypatch.setattr(command, "loaded_driver", object)
        driver.say("ready", "1")
        if code:
            driver.fail("nvmlSystemSetConfComputeGpusReadyState", code)
        assert command.main(["--clear"]) == status
        assert (driver.folder / "ready").read_text() == ("1" if code else "0")


@pytest.mark.parametrize(
    ("answer", "status"),
    [(b"nvml 0", 0), (b"nvml 3", 0), (b"nvml 9", 1), (b"refused", 1), (b"nvml 0\n", 1), (b"", 1)],
)
def test_others_have_it_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, status: int) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(command, "loaded_driver", object)
    monkeypatch.setattr(command, "SOCKET", str(tmp_path / "s"))
    assert command.main(["--clear"]) == 1  # nobody listens
    with listener(tmp_path / "s") as listening:
        asking = subprocess.Popen(
            [sys.executable, "-c", ANSWER, str(listening.fileno()), answer.hex()], pass_fds=[listening.fileno()]
        )
        assert command.main(["--clear"]) == status
        assert asking.wait(PATIENCE) == 0


ANSWER = f"""
import socket, sys
sock, _ = socket.socket(fileno=int(sys.argv[1])).accept()
assert sock.recv(64) == {CLEAR!r}
sock.send(bytes.fromhex(sys.argv[2]))
"""
