"""The shipped units: systemd understands every line, the sandbox is as tight as promised, the daemon fits in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cgpu_agent.daemon.__main__ import EXIT_CONFIG
from cgpu_agent.daemon.config import Config
from cgpu_agent.domain.loading import LOADS, PIECE
from cgpu_agent.ready.__main__ import USER
from cgpu_agent.ready.identity import UNIT
from cgpu_agent.rpc.keptleases import PER_LEASE
from cgpu_agent.rpc.leasedoor import _MAX_REFUSING
from cgpu_agent.wire.ready import SOCKET

UNITS = Path(__file__).resolve().parents[2] / "systemd"
SERVICE = UNITS / "cgpu-agent.service"
SOCKETS = {
    "api": UNITS / "cgpu-agent.socket",
    "admin": UNITS / "cgpu-agent-admin.socket",
    "lease": UNITS / "cgpu-agent-lease.socket",
}
METRICS = UNITS / "cgpu-agent-metrics.socket"
RELOAD = UNITS / "cgpu-agent.service.d" / "50-newer-systemd.conf"
DEVICE = UNITS / "dev-tpmrm0.device.d" / "50-cgpu-agent.conf"
HELPER, HELPER_SOCKET = UNITS / "cgpu-ready.service", UNITS / "cgpu-ready.socket"
PERSISTENCED = UNITS / "nvidia-persistenced.service.d" / "zz-cgpu-agent.conf"
EVERY_FILE = [SERVICE, *SOCKETS.values(), METRICS, RELOAD, DEVICE, HELPER, HELPER_SOCKET]

DESCRIPTORS_PER_CALLER = 4
DESCRIPTORS_PER_LEASE = 5
EXPOSURE_ALLOWED = 15  # tenths

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (apt-get install systemd)"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make files of other users")


def settings(path: Path) -> dict[str, list[str]]:
    """Key -> values in order of assignment, for unit files without continued lines."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line and line[0] not in "#;[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, "LC_ALL": "C", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=merged, timeout=60)


def verify(folder: Path, *units: str) -> list[str]:
    """What systemd-analyze says of these units. The gate is silence: unknown keys do not change the exit status."""
    # The trailing colon adds the system's own units, which ours refer to.
    answer = run(
        "systemd-analyze", "verify", "--man=no", *(folder / unit for unit in units), SYSTEMD_UNIT_PATH=f"{folder}:"
    )
    return (answer.stdout + answer.stderr).splitlines()


def systemd_version() -> int:
    return int(run("systemd-analyze", "--version").stdout.split()[1])


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units as installed, without the drop-in for newer systemd; a stub stands in for the daemon."""
    stub = tmp_path / "stub"
    stub.write_text("#!/bin/sh\n")
    stub.chmod(0o755)
    folder = tmp_path / "units"
    shutil.copytree(UNITS, folder, ignore=shutil.ignore_patterns(RELOAD.parent.name))
    for unit in (folder / SERVICE.name, folder / HELPER.name):
        unit.write_text(re.sub(r"/usr/bin/cgpu-(agent|ready)\b", str(stub), unit.read_text()))
    return folder


ALL_UNITS = (SERVICE.name, *(path.name for path in (*SOCKETS.values(), METRICS)), HELPER.name, HELPER_SOCKET.name)


@needs_analyze
def test_systemd_has_nothing_to_say_about_the_units(installed: Path) -> None:
    assert verify(installed, *ALL_UNITS) == []


@needs_analyze
@pytest.mark.parametrize("name", [*ALL_UNITS, str(DEVICE.relative_to(UNITS))])
def test_the_gate_sees_a_line_that_systemd_would_ignore(installed: Path, name: str) -> None:
    with (installed / name).open("a") as file:
        file.write("[Unit]\nProtectEverything=yes\n")
    assert any("ProtectEverything" in line for line in verify(installed, *ALL_UNITS))


@needs_analyze
def test_the_drop_in_holds_nothing_but_what_newer_systemd_knows(installed: Path) -> None:
    shutil.copytree(RELOAD.parent, installed / RELOAD.parent.name)
    said = verify(installed, SERVICE.name)
    if systemd_version() >= 253:
        assert said == []
    else:
        assert [line.partition(": ")[2] for line in said] == [
            "Failed to parse service type, ignoring: notify-reload",
            "Unknown key 'OpenFile' in section [Service], ignoring.",
        ]


@needs_analyze
@pytest.mark.parametrize("service", [SERVICE, HELPER], ids=lambda path: path.name)
def test_exposure_is_within_its_bound(service: Path) -> None:
    answer = run("systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE_ALLOWED}", service)
    assert answer.returncode == 0, answer.stdout


@needs_analyze
@pytest.mark.parametrize("service", [SERVICE, HELPER], ids=lambda path: path.name)
@pytest.mark.parametrize("key", ["CapabilityBoundingSet", "SystemCallFilter"])
def test_exposure_without_a_setting_of_weight_is_out_of_bounds(tmp_path: Path, key: str, service: Path) -> None:
    weaker = tmp_path / service.name
    weaker.write_text("\n".join(line for line in service.read_text().splitlines() if not line.startswith(f"{key}=")))
    answer = run("systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE_ALLOWED}", weaker)
    assert answer.returncode != 0


@pytest.mark.parametrize("path", EVERY_FILE, ids=lambda path: path.name)
def test_callers_keep_their_uids(path: Path) -> None:
    assert "PrivateUsers" not in settings(path)
    assert "DynamicUser" not in settings(path)


@pytest.mark.parametrize("path", EVERY_FILE, ids=lambda path: path.name)
def test_proc_of_callers_is_not_hidden(path: Path) -> None:
    found = settings(path)
    assert set(found.get("ProtectProc", [])) <= {"default"}
    assert set(found.get("ProcSubset", [])) <= {"all"}


def test_the_service_gets_all_sockets() -> None:
    names = {path.name for path in SOCKETS.values()}
    service = settings(SERVICE)
    assert set(" ".join(service["Sockets"]).split()) == names
    assert names <= set(" ".join(service["Requires"]).split())


@pytest.mark.parametrize("name", SOCKETS)
def test_a_socket_carries_the_name_and_path_that_the_daemon_knows(name: str) -> None:
    socket = settings(SOCKETS[name])
    assert socket["FileDescriptorName"] == [name]
    assert socket["Service"] == [SERVICE.name]
    listen = "ListenSequentialPacket" if name == "lease" else "ListenStream"
    assert socket[listen] == [getattr(Config().sockets, name)]


def test_workloads_reach_their_socket_and_only_operators_the_other() -> None:
    api, admin, lease = (settings(SOCKETS[name]) for name in ("api", "admin", "lease"))
    assert api["SocketMode"] == lease["SocketMode"] == ["0666"]
    assert admin["SocketMode"] == ["0600"]


def test_metrics_are_opt_in_and_for_operators() -> None:
    socket = settings(METRICS)
    assert (socket["FileDescriptorName"], socket["Service"]) == (["metrics"], [SERVICE.name])
    assert (socket["SocketUser"], socket["SocketMode"]) == (settings(SERVICE)["User"], ["0600"])
    assert Config().sockets.metrics == "none"
    assert METRICS.name not in SERVICE.read_text()


def test_the_daemon_may_call_its_own_admin_socket() -> None:
    """Its self check does; as another user it could not pass mode 0600."""
    assert settings(SOCKETS["admin"])["SocketUser"] == settings(SERVICE)["User"]


def test_what_belongs_to_this_boot_outlives_the_process() -> None:
    service = settings(SERVICE)
    assert [f"/run/{name}" for name in service["RuntimeDirectory"]] == [Config().runtime_dir]
    assert service["RuntimeDirectoryMode"] == ["0700"]
    assert service["RuntimeDirectoryPreserve"] == ["yes"]


def test_a_machine_without_an_event_log_still_starts() -> None:
    service = settings(SERVICE)
    assert service["SetCredential"] == ["eventlog:none"]
    assert service["LoadCredential"] == [f"eventlog:{Config().logs.boot}"]


def test_a_bad_configuration_is_not_retried() -> None:
    assert settings(SERVICE)["RestartPreventExitStatus"] == [str(EXIT_CONFIG)]


def test_every_allowed_caller_has_descriptors() -> None:
    limits = Config().limits
    needed = DESCRIPTORS_PER_CALLER * limits.connections + DESCRIPTORS_PER_LEASE * limits.leases + 5 * limits.channels
    assert int(settings(SERVICE)["LimitNOFILE"][0]) >= needed + 1024


def test_what_is_lent_fits_into_the_units_memory_and_threads() -> None:
    service, limits = settings(SERVICE), Config().limits
    assert service["MemoryMax"] == [f"{limits.lease_mib_in_all // 1024 + 2}G"]
    assert int(service["TasksMax"][0]) >= limits.leases + 2 * limits.channels + _MAX_REFUSING + 100


def test_secrets_do_not_go_to_a_swap() -> None:
    assert settings(SERVICE)["MemorySwapMax"] == ["0"]


def test_everything_that_is_staged_for_gpus_can_be_kept_off_swap() -> None:
    (most,) = settings(SERVICE)["LimitMEMLOCK"]
    staged = Config().limits.channels * (512 << 10) + LOADS * 2 * PIECE
    assert most.endswith("M")
    assert int(most[:-1]) << 20 >= staged


def test_every_lease_outlives_a_restart_and_none_a_stop() -> None:
    service = settings(SERVICE)
    assert int(service["FileDescriptorStoreMax"][0]) >= PER_LEASE * Config().limits.leases
    assert f"FDSTORE={service['FileDescriptorStoreMax'][0]}" in service["Environment"]
    assert "FileDescriptorStorePreserve" not in service


def test_the_start_may_wait_for_the_tpm_as_long_as_the_daemon_does() -> None:
    assert int(settings(SERVICE)["TimeoutStartSec"][0]) > 2 * Config().tpm.request_seconds


def test_no_phase_is_measured_while_the_agent_runs() -> None:
    """With "shutdown" in PCR 11, no approval of it would be left by which the latch could be closed."""
    assert "systemd-pcrphase.service" in settings(SERVICE)["After"][0].split()


def test_readiness_is_not_lost_where_the_newer_type_is_unknown() -> None:
    assert settings(SERVICE)["Type"] == ["notify"]


def test_the_tss_is_silent() -> None:
    assert "TSS2_LOG=all+NONE" in settings(SERVICE)["Environment"]


def test_the_agents_user_alone_reaches_the_root_helper() -> None:
    socket = settings(HELPER_SOCKET)
    assert socket["ListenSequentialPacket"] == [Config().gpu.ready_helper] == [SOCKET]
    assert (socket["SocketMode"], socket["SocketUser"]) == (["0600"], [USER]) == (["0600"], settings(SERVICE)["User"])


def test_the_root_helper_has_one_capability_and_the_agents_devices() -> None:
    helper = settings(HELPER)
    assert helper["CapabilityBoundingSet"] == ["CAP_SYS_ADMIN"]
    assert helper["DeviceAllow"] == [each for each in settings(SERVICE)["DeviceAllow"] if "nvidia" in each]


def test_the_ready_state_is_cleared_however_agent_and_helper_end() -> None:
    assert settings(SERVICE)["ExecStopPost"] == ["-/usr/bin/cgpu-ready --clear"]
    assert settings(HELPER)["ExecStopPost"] == ["/usr/bin/cgpu-ready --clear"]
    assert settings(HELPER)["PartOf"] == settings(HELPER)["Before"] == [UNIT] == [SERVICE.name]


@needs_analyze
@pytest.mark.parametrize("shipped", [True, False])
def test_nvidia_persistenced_sets_no_ready_state(tmp_path: Path, shipped: bool) -> None:
    """systemd complains of a command that does not exist, as long as it is in the list."""
    unit, drop_in = tmp_path / "nvidia-persistenced.service", tmp_path / "nvidia-persistenced.service.d"
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    drop_in.mkdir()
    (drop_in / "override.conf").write_text("[Service]\nExecStartPost=/nonexistent/nvidia-smi conf-compute -srs 1\n")
    if shipped:
        shutil.copy(PERSISTENCED, drop_in)
    assert any("/nonexistent/nvidia-smi" in line for line in verify(tmp_path, unit.name)) == (not shipped)


@needs_root
@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="systemd-sysusers is not installed")
def test_users_and_directories_come_out_as_the_units_expect(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    for program, name in (("systemd-sysusers", "sysusers"), ("systemd-tmpfiles", "tmpfiles")):
        create = ["--create"] if name == "tmpfiles" else []
        answer = run(program, f"--root={tmp_path}", *create, UNITS / f"cgpu-agent.{name}.conf")
        assert answer.returncode == 0, answer.stderr
    service = settings(SERVICE)
    user, group = service["User"][0], service["SupplementaryGroups"][0]
    assert re.search(rf"^{user}:.*/nologin$", (tmp_path / "etc/passwd").read_text(), re.MULTILINE)
    assert re.search(rf"^{group}:.*:{user}$", (tmp_path / "etc/group").read_text(), re.MULTILINE)
    for folder in ("run/cgpu-agent", "etc/cgpu-agent"):
        info = (tmp_path / folder).stat()
        assert (info.st_uid, info.st_gid, info.st_mode & 0o7777) == (0, 0, 0o755)
