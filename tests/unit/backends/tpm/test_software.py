"""The emulated TPM starts for real, ends in order, and never touches what it does not own."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cgpu_agent.backends.tpm import raw
from cgpu_agent.backends.tpm.commands import Commands
from cgpu_agent.backends.tpm.software import Swtpm
from cgpu_agent.errors import DeviceFault, Misuse, Unavailable
from cgpu_agent.wire.tpm import PcrSelection, extend

pytestmark = pytest.mark.swtpm

PCR7 = PcrSelection.of("sha256", [7])


def pcr7(tpm: Swtpm) -> bytes:
    commands = Commands(tpm.transport())
    try:
        return commands.pcr_read(PCR7)[7]
    finally:
        commands.close()


def test_state_is_closed_to_other_users(swtpm: Swtpm) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in (swtpm.directory, swtpm.data_socket)}
    assert modes == {swtpm.directory.name: 0o700, "sock": 0o600}


def test_starting_twice_keeps_the_process(swtpm: Swtpm) -> None:
    pid = swtpm.pid
    swtpm.start()
    assert swtpm.pid == pid


def test_stop_and_kill_are_idempotent(swtpm: Swtpm) -> None:
    swtpm.stop()
    swtpm.stop()
    assert swtpm.pid is None
    swtpm.start()
    swtpm.kill()
    swtpm.kill()
    assert not swtpm.running


def test_stop_ends_also_a_tpm_that_hangs(swtpm: Swtpm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cgpu_agent.backends.tpm.software._STOP_TIMEOUT", 0.05)
    assert swtpm.pid is not None
    os.kill(swtpm.pid, signal.SIGSTOP)
    swtpm.stop()
    assert not swtpm.running


def test_restart_after_a_kill_finds_its_stale_sockets_no_obstacle(swtpm: Swtpm) -> None:
    swtpm.kill()
    assert swtpm.data_socket.exists()
    swtpm.start()
    assert pcr7(swtpm) == bytes(32)


def test_restart_zeroes_the_pcrs_and_replay_fills_them_again(swtpm: Swtpm) -> None:
    log = [(7, b"a" * 32), (7, b"b" * 32), (0, b"c" * 32)]
    expected = extend("sha256", extend("sha256", bytes(32), b"a" * 32), b"b" * 32)
    swtpm.replay_boot(log)
    assert pcr7(swtpm) == expected
    swtpm.restart()
    assert pcr7(swtpm) == bytes(32)
    swtpm.replay_boot(log)
    assert pcr7(swtpm) == expected


@pytest.mark.parametrize("entry", [(24, bytes(32)), (-1, bytes(32)), (7, bytes(31)), (7, b"")])
def test_refuses_a_boot_log_that_is_none(swtpm: Swtpm, entry: tuple[int, bytes]) -> None:
    with pytest.raises(Misuse):
        swtpm.replay_boot([entry])


def test_platform_index_is_not_for_the_owner_to_write(swtpm: Swtpm) -> None:
    swtpm.provision_nv(0x01C101D0, b"certificate")
    with pytest.raises(DeviceFault) as caught:
        swtpm.execute(raw.nv_write(0x01C101D0, b"x", 0, raw.OWNER))
    assert caught.value.slug == "TPM_AUTH"


def test_refuses_an_index_larger_than_the_emulator_stores(swtpm: Swtpm) -> None:
    with pytest.raises(Misuse):
        swtpm.provision_nv(0x01C101D0, b"certificate", size=4096)
    with pytest.raises(Misuse):
        swtpm.provision_nv(0x01C101D0, b"certificate", size=4)


def test_disabled_platform_hierarchy_defines_nothing(swtpm: Swtpm) -> None:
    swtpm.disable_platform_hierarchy()
    with pytest.raises(DeviceFault):
        swtpm.provision_nv(0x01C101D0, b"certificate")


def test_second_emulator_on_a_directory_is_refused_and_harms_nothing(swtpm: Swtpm) -> None:
    with pytest.raises(Unavailable) as caught:
        Swtpm(swtpm.directory).start()
    assert caught.value.slug == "SWTPM_DIRECTORY"
    assert pcr7(swtpm) == bytes(32)


def test_missing_program_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable) as caught:
        Swtpm(tmp_path / "tpm").start()
    assert caught.value.slug == "SWTPM_MISSING"
    assert "apt-get install swtpm" in caught.value.message


def test_refuses_a_directory_that_others_may_enter(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for name in ("open", "link"):
        with pytest.raises(Unavailable) as caught:
            Swtpm(tmp_path / name).start()
        assert caught.value.slug == "SWTPM_DIRECTORY"


@pytest.mark.parametrize("name", ["x" * 100, "a,mode=0666"])
def test_refuses_a_directory_whose_name_swtpm_would_misread(tmp_path: Path, name: str) -> None:
    with pytest.raises(Unavailable) as caught:
        Swtpm(tmp_path / name).start()
    assert caught.value.slug == "SWTPM_DIRECTORY"


def test_program_that_ends_at_once_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "swtpm").symlink_to("/bin/false")
    monkeypatch.setenv("PATH", str(tmp_path))
    with tempfile.TemporaryDirectory() as folder, pytest.raises(DeviceFault) as caught:
        Swtpm(Path(folder) / "tpm").start()
    assert caught.value.slug == "SWTPM_FAILED"


def test_emulator_dies_with_its_parent() -> None:
    program = (
        "import sys, time; from cgpu_agent.backends.tpm.software import Swtpm\n"
        "tpm = Swtpm(sys.argv[1], die_with_parent=True); tpm.start(); print(tpm.pid, flush=True); time.sleep(60)"
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, "-c", program, f"{folder}/tpm"]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE) as parent:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
            child = os.pidfd_open(pid)
            parent.kill()
        ended = select.poll()
        ended.register(child, select.POLLIN)
        assert ended.poll(30_000), "swtpm outlived its parent"
        os.close(child)
