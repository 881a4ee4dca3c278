"""Who is not the agent cannot open the GPUs through the root helper, and nothing keeps them open when it is gone."""

from __future__ import annotations

import array
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cgpu_agent.ready.helper import MAX_ASKING
from cgpu_agent.rpc import peer
from fixtures.nvml import FakeDriver
from fixtures.readyhelper import PATIENCE, UNKNOWN_OPTION, HelperProcess, heard, running_helper, silent

SET_READY = "nvmlSystemSetConfComputeGpusReadyState"
DONE, REFUSED = b"nvml 0", b"refused"

# Another process, of the same or another user: connects, says a word, prints the answer, stays.
CALLER = """
import os, socket, sys
if sys.argv[3] != str(os.geteuid()):
    os.setgroups([])
    os.setuid(int(sys.argv[3]))
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(sys.argv[1])
sock.send(sys.argv[2].encode())
print(sock.recv(64).decode(), flush=True)
sys.stdin.read()
"""

# The agent, with a child that keeps its connection.
PARENT = """
import os, socket, sys
sys.stdin.readline()
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(sys.argv[1])
child = os.fork()
if not child:
    os.close(1)
    sys.stdin.read()
    os._exit(0)
sock.send(b"set")
print("asked", flush=True)
print(sock.recv(64).decode(), child, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where another user can reach the helper's socket."""
    with tempfile.TemporaryDirectory(prefix="ready-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def driver(tmp_path: Path) -> FakeDriver:
    return FakeDriver.loaded(tmp_path)


@pytest.fixture(params=[peer.SO_PEERPIDFD, UNKNOWN_OPTION], ids=["", "old-kernel"])
def helper(driver: FakeDriver, folder: Path, request: pytest.FixtureRequest) -> Iterator[HelperProcess]:
    with running_helper(driver, folder, option=request.param) as process:
        yield process


def caller(helper: HelperProcess, word: str, uid: int) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CALLER, helper.socket, word, str(uid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def finish(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


# -- who


def test_another_process_of_the_agents_user_cannot_set(helper: HelperProcess) -> None:
    process, answer = caller(helper, "set", os.geteuid())
    assert answer == "refused"
    finish(process)
    assert not helper.ready
    assert SET_READY in helper.driver.calls()  # by the helper's own start, and by nothing since
    assert helper.driver.calls().count(SET_READY) == 1


def test_another_user_cannot_set_though_its_process_is_in_the_agents_place(driver: FakeDriver, folder: Path) -> None:
    with running_helper(driver, folder, uid=os.geteuid() + 1) as helper:
        assert helper.ask(b"set") == REFUSED
        assert not helper.ready


def test_root_is_not_the_agent_and_may_clear(driver: FakeDriver, folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with running_helper(driver, folder, uid=12345) as helper:
        driver.say("ready", "1")
        assert helper.ask(b"set") == REFUSED
        assert helper.ask(b"clear") == DONE
        assert not helper.ready


def test_another_user_cannot_clear(driver: FakeDriver, folder: Path) -> None:
    """It would take the GPUs from everybody."""
    me = os.geteuid()
    agent, other = (12345, 65534) if me == 0 else (me + 1, me)
    with running_helper(driver, folder, uid=agent) as helper:
        driver.say("ready", "1")
        process, answer = caller(helper, "clear", other)
        finish(process)
        assert answer == "refused"
        assert helper.ready


def test_who_died_before_it_was_looked_at_is_nobody(helper: HelperProcess) -> None:
    """Its connection may live on in a child, and its pid may be somebody else's."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, helper.socket], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    helper.is_agent(parent.pid)
    helper.driver.hang(SET_READY)
    with helper.connect() as busy:
        busy.send(b"clear")  # keeps the helper busy
        while helper.driver.calls().count(SET_READY) < 2:
            pass
        parent.stdin.write("\n")
        parent.stdin.flush()
        assert parent.stdout.readline() == "asked\n"
        parent.kill()
        parent.wait()
        helper.driver.release()
        assert heard(busy) == DONE
    assert helper.ask(b"?") == REFUSED  # later than the dead one's request
    assert not helper.ready
    assert helper.driver.calls().count(SET_READY) == 2
    parent.communicate()


# -- what


@pytest.mark.parametrize("word", [b"get", b"SET", b"set ", b"set\0", b"clear\n", b"s", b"set" * 5000, b"\xff" * 16])
def test_any_other_word_is_refused(helper: HelperProcess, word: bytes) -> None:
    assert helper.ask(word) == REFUSED
    assert not helper.ready


def test_a_word_in_two_messages_is_none(helper: HelperProcess) -> None:
    with helper.connect() as sock:
        sock.send(b"se")
        assert (heard(sock), heard(sock)) == (REFUSED, b"")
        with pytest.raises(OSError, match="Broken pipe"):
            sock.send(b"t")
    assert not helper.ready


@pytest.mark.parametrize("second", [b"set", b"clear", b"x", b"x" * 100_000])
def test_two_requests_on_a_connection_do_not_set(helper: HelperProcess, second: bytes) -> None:
    helper.driver.hang(SET_READY)
    with helper.connect() as busy, helper.connect() as sock:
        busy.send(b"clear")
        sock.send(b"set")
        sock.send(second)
        helper.driver.release()
        assert heard(busy) == DONE
        assert heard(sock) in (REFUSED, b"")  # The kernel throws the answer away when a word was left unread.
    assert helper.driver.calls().count(SET_READY) == 2  # at its start, and to clear


@pytest.mark.parametrize("second", [b"set", b"clear", b"x"])
def test_a_word_on_a_lease_ends_it(helper: HelperProcess, second: bytes) -> None:
    with helper.lease() as lease:
        lease.send(second)
        assert heard(lease) == b""
        assert not helper.ready


def test_descriptors_that_come_along_are_not_taken(helper: HelperProcess) -> None:
    inside, outside = socket.socketpair()
    with helper.connect() as sock:
        sock.sendmsg([b"clear"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [outside.fileno()]))])
        assert heard(sock) == DONE
    outside.close()
    with inside:
        inside.settimeout(PATIENCE)
        assert heard(inside) == b""


def test_a_second_lease_is_refused_and_the_first_goes_on(helper: HelperProcess) -> None:
    with helper.lease() as lease:
        assert helper.ask(b"set") == REFUSED
        assert helper.ready
        assert silent(lease)


# -- for how long


def test_the_ready_state_ends_with_the_connection(helper: HelperProcess) -> None:
    helper.lease().close()
    assert helper.cleared()
    helper.lease().close()
    assert helper.cleared()


def test_a_half_closed_lease_ends(helper: HelperProcess) -> None:
    with helper.lease() as lease:
        lease.shutdown(socket.SHUT_WR)
        assert heard(lease) == b""
        assert not helper.ready


def test_the_ready_state_ends_with_the_agent_though_a_child_keeps_its_connection(helper: HelperProcess) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, helper.socket], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    helper.is_agent(parent.pid)
    parent.stdin.write("\n")
    parent.stdin.flush()
    assert parent.stdout.readline() == "asked\n"
    answer, child = parent.stdout.readline().rsplit(" ", 1)
    assert answer.encode() == DONE
    assert helper.ready
    parent.kill()
    parent.wait()
    os.kill(int(child), 0)
    assert helper.cleared()
    parent.communicate()  # ends the child, too


def test_clearing_ends_the_lease_before_it_is_answered(helper: HelperProcess) -> None:
    with helper.lease() as lease:
        assert helper.ask(b"clear") == DONE
        assert not helper.ready
        assert heard(lease) == b""


def test_who_gave_up_waiting_gets_nothing_set(helper: HelperProcess) -> None:
    helper.driver.hang(SET_READY)
    with helper.connect() as busy:
        busy.send(b"clear")
        with helper.connect() as impatient:
            impatient.send(b"set")
        helper.driver.release()
        assert heard(busy) == DONE
    assert helper.ask(b"?") == REFUSED
    assert helper.driver.calls().count(SET_READY) == 2  # at its start, and to clear


def test_who_says_nothing_is_cut_and_holds_nobody_up(driver: FakeDriver, folder: Path) -> None:
    with running_helper(driver, folder, patience=0.2) as helper, helper.connect() as silent_one:
        helper.lease().close()
        assert heard(silent_one) == b""


def test_the_silent_are_bounded(helper: HelperProcess) -> None:
    with ExitStack() as stack:
        silent_ones = [stack.enter_context(helper.connect()) for _ in range(MAX_ASKING)]
        with helper.connect() as one_more:
            assert heard(one_more) == b""
        assert all(map(silent, silent_ones))
        silent_ones[0].send(b"clear")
        assert heard(silent_ones[0]) == DONE
        stack.enter_context(helper.lease())


# -- the driver and the helper's own life


def test_a_start_clears_what_nobody_holds(driver: FakeDriver, folder: Path) -> None:
    driver.say("ready", "1")
    with running_helper(driver, folder) as helper:
        assert not helper.ready


def test_a_stop_clears(helper: HelperProcess) -> None:
    with helper.lease():
        assert helper.stop() == 0
        assert not helper.ready


def test_what_cannot_be_cleared_is_tried_until_it_is(helper: HelperProcess) -> None:
    lease = helper.lease()
    helper.driver.fail(SET_READY, 19)
    lease.close()
    assert helper.ask(b"clear") == b"nvml 19"
    assert helper.ready
    (helper.driver.folder / f"{SET_READY}.error").unlink()
    assert helper.cleared()


def test_a_set_that_failed_may_have_worked_and_is_cleared(helper: HelperProcess) -> None:
    helper.driver.fail(SET_READY, 10)
    assert helper.ask(b"set") == b"nvml 10"
    helper.driver.say("ready", "1")
    (helper.driver.folder / f"{SET_READY}.error").unlink()
    assert helper.cleared()


def test_a_driver_that_was_loaded_anew_is_opened_anew(helper: HelperProcess) -> None:
    helper.driver.load("second", "999.1")
    helper.lease().close()
    assert helper.cleared()


def test_without_a_driver_it_serves_and_says_so(driver: FakeDriver, folder: Path) -> None:
    driver.forget("boot")
    with running_helper(driver, folder) as helper:
        assert helper.ask(b"clear") == helper.ask(b"set") == b"nvml 9"
        driver.say("boot", "now")
        helper.lease().close()
