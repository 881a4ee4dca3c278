"""The installed units under a real systemd: start, stop, reload, crash, hang, who callers are, and a full house."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cgpu_agent.daemon.config import Limits
from cgpu_agent.rpc.keptleases import PER_LEASE
from cgpu_agent.rpc.leasedoor import _MAX_REFUSING
from fixtures.machine import AUDIENCE, judge
from fixtures.nspawn import CONFIG, PATIENCE, Container, machine
from fixtures.policies import permit

AGENT = "cgpu-agent.service"
SOCKETS = ("cgpu-agent.socket", "cgpu-agent-admin.socket", "cgpu-agent-lease.socket")
CONFIG_FILE = "/etc/cgpu-agent/config.toml"
POLICY_FILE = "/etc/cgpu-agent/policy.cedar"
DROP_IN = "/etc/systemd/system/cgpu-agent.service.d/test.conf"
SYSTEMD_LOG = "/run/log/systemd/tpm2-measure.log"
EXPOSURE_ALLOWED = 1.5
POLICY = """
@id("keys")
permit(
    principal is CGpu::Workload,
    action in [CGpu::Action::"key.get_plain", CGpu::Action::"key.open"],
    resource is CGpu::Key
);
"""
WITH_KEY = f'policy = "{POLICY_FILE}"\n{CONFIG}[[key]]\nid = "k"\nbroker = "credential"\n'
# Takes a lease, and lives as long as it.
HOLDER = """
import socket
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
    sock.connect("/run/cgpu-agent/lease.sock")
    sock.send(b"cgpu/lease/1\\0\\0" + (1 << 16).to_bytes(8, "big"))
    _, fds, _, _ = socket.recv_fds(sock, 512, 1)
    print("lent" if fds else "refused", flush=True)
    sock.recv(1)
"""

# Stops the thread that hears signals for a moment; SIGCONT, which newer systemd sends, does not end that.
HOLD_UP = """
import ctypes, os, sys, time
PTRACE_ATTACH, PTRACE_DETACH = 16, 17
libc, pid = ctypes.CDLL(None, use_errno=True), int(sys.argv[1])
assert libc.ptrace(PTRACE_ATTACH, pid, None, None) == 0, os.strerror(ctypes.get_errno())
os.waitpid(pid, 0)
print("held", flush=True)
time.sleep(0.5)
assert libc.ptrace(PTRACE_DETACH, pid, None, None) == 0, os.strerror(ctypes.get_errno())
"""


@pytest.fixture(scope="module")
def container(installed: Path) -> Iterator[Container]:
    with machine(installed) as container:
        yield container


@pytest.fixture
def vm(container: Container) -> Iterator[Container]:
    """For tests that stop or change the agent: it serves as installed, before and after each."""
    yield container
    container.run("rm", "-f", DROP_IN)
    container.write(CONFIG_FILE, CONFIG)
    container.run("systemctl", "daemon-reload")
    container.run("systemctl", "reset-failed")
    container.run("systemctl", "restart", AGENT)


def change(vm: Container, text: str, *, good: bool = True) -> None:
    """Change the unit by a drop-in, and start it anew, which must succeed or fail."""
    vm.write(DROP_IN, f"[Service]\n{text}\n")
    vm.run("systemctl", "daemon-reload")
    vm.run("systemctl", "reset-failed", AGENT)  # newer ones remember earlier starts over a daemon-reload
    vm.run("systemctl", "restart", AGENT, good=good)


def restarts(vm: Container) -> int:
    return int(vm.show(AGENT, "NRestarts"))


def caller(vm: Container, name: str, *options: str) -> dict[str, object]:
    """Evidence that a unit of that name gets, judged; returns who it says has asked."""
    nonce = secrets.token_bytes(32)
    command = ("cgpuctl", "evidence", "get", "--nonce", nonce.hex(), "--audience", AUDIENCE)
    result = judge(vm.unit(*command, name=name, options=options).encode(), nonce)
    assert result.accepted, result.steps
    assert result.statement is not None
    return dict(result.statement.caller)


def test_it_is_started_at_boot_and_says_in_one_line_how_it_is(container: Container) -> None:
    assert container.active(AGENT) == "active"
    assert restarts(container) == 0
    assert container.show(AGENT, "Type") == ("notify" if container.systemd < 253 else "notify-reload")
    assert container.show(AGENT, "StatusText").startswith("Serving")
    assert container.active("multi-user.target") == "active"
    assert not container.run("systemctl", "list-units", "--failed", "--plain", "--no-legend")


def test_systemd_takes_every_line_of_the_units_but_those_for_newer_ones(container: Container) -> None:
    container.run("systemctl", "daemon-reload")
    said = [line for line in container.journal("init.scope").splitlines() if "/cgpu-" in line]
    assert bool(said) is (container.systemd < 253), said
    assert all("50-newer-systemd.conf" in line for line in said), said


def test_systemd_finds_nothing_wrong_with_units_and_drop_ins(container: Container) -> None:
    units = container.run(
        "sh", "-c", "ls -d /usr/lib/systemd/system/cgpu-*.service /usr/lib/systemd/system/cgpu-*.socket"
    )
    done = container.popen("systemd-analyze", "verify", "--man=no", *units.split())
    said = "".join(done.communicate(timeout=PATIENCE)).splitlines()
    ours = [line for line in said if "cgpu-" in line and "50-newer-systemd.conf" not in line]
    assert not ours
    assert bool(said) is (container.systemd < 253), said


@pytest.mark.parametrize("service", [AGENT, "cgpu-ready.service", "cgpu-egress.service"])
def test_exposure_is_within_its_bound_as_this_systemd_weighs_it(container: Container, service: str) -> None:
    said = container.run("systemd-analyze", "security", "--no-pager", service).splitlines()[-1]
    found = re.search(r"exposure level for \S+: ([0-9.]+) ", said)
    assert found is not None, said
    assert float(found[1]) <= EXPOSURE_ALLOWED


# -- who asks


def test_a_caller_is_its_unit(container: Container) -> None:
    found = caller(container, "inference.service", "--property=User=www-data")
    assert (found["unit"], found["cgroup"]) == ("inference.service", "/system.slice/inference.service")
    assert (found["uid"], found["container"]) == (33, None)


def test_a_unit_in_a_slice_and_a_scope_are_told_apart(container: Container) -> None:
    assert caller(container, "batch.service", "--slice=tenant")["cgroup"] == "/tenant.slice/batch.service"
    assert caller(container, "session.scope", "--scope")["unit"] == "session.scope"


def test_a_container_is_its_scope_and_not_the_unit_around_it(container: Container) -> None:
    ident = secrets.token_hex(32)
    found = caller(container, f"docker-{ident}.scope", "--scope")
    assert (found["container"], found["unit"]) == (ident, f"docker-{ident}.scope")


def test_names_below_a_delegated_cgroup_are_not_believed(container: Container) -> None:
    forged = "/sys/fs/cgroup/system.slice/tenant.service/cgpu-agent.service"
    container.write("/srv/forge", f'mkdir {forged} && echo $$ >{forged}/cgroup.procs && exec "$@"')
    nonce = secrets.token_bytes(32)
    said = container.unit(
        *("sh", "/srv/forge", "cgpuctl", "evidence", "get", "--nonce", nonce.hex(), "--audience", AUDIENCE),
        name="tenant.service",
        options=("--property=User=www-data", "--property=Delegate=yes"),
    )
    result = judge(said.encode(), nonce)
    assert result.statement is not None
    assert result.statement.caller["unit"] == "tenant.service"
    assert result.statement.caller["cgroup"] == "/system.slice/tenant.service"


# -- sockets


def test_a_call_starts_a_stopped_agent_and_is_answered(vm: Container) -> None:
    vm.run("systemctl", "stop", AGENT)
    assert vm.active(AGENT) == "inactive"
    assert [vm.active(socket) for socket in SOCKETS] == ["active"] * 3
    vm.unit("cgpuctl", "boot", "show", options=("--property=User=www-data",))
    assert vm.active(AGENT) == "active"


def test_operators_ask_and_nobody_else(container: Container) -> None:
    assert "Serving" in container.unit("cgpuctl", "status")
    container.unit("cgpuctl", "status", options=("--property=User=www-data",), good=False)


def test_without_its_sockets_it_is_stopped_too(vm: Container) -> None:
    vm.run("systemctl", "stop", *SOCKETS)
    vm.until(lambda: vm.active(AGENT) == "inactive")
    assert vm.run("ls", "/run/cgpu-agent").split() == ["private", "ready.sock"]


def connect(container: Container, user: str, path: str, kind: str, *, good: bool = True) -> None:
    command = f"import socket as s; s.socket(s.AF_UNIX, s.{kind}).connect({path!r})"
    container.unit("python3", "-c", command, options=(f"--property=User={user}",), good=good)


@pytest.mark.parametrize(
    ("part", "path", "kind"),
    [
        ("cgpu-egress", "/run/cgpu-agent/egress.sock", "SOCK_STREAM"),
        ("cgpu-ready", "/run/cgpu-agent/ready.sock", "SOCK_SEQPACKET"),
    ],
)
def test_what_serves_the_agent_is_started_by_the_agents_user_alone(
    vm: Container, part: str, path: str, kind: str
) -> None:
    vm.run("systemctl", "start", f"{part}.socket")
    connect(vm, "www-data", path, kind, good=False)
    assert vm.active(f"{part}.service") == "inactive"
    connect(vm, "cgpu-agent", path, kind)
    vm.until(lambda: vm.active(f"{part}.service") == "active")
    vm.run("systemctl", "stop", f"{part}.service")
    assert vm.show(f"{part}.service", "Result") == "success"


def test_the_root_helper_ends_with_the_agent(vm: Container) -> None:
    vm.run("systemctl", "start", "cgpu-ready.service")
    vm.run("systemctl", "stop", AGENT)
    vm.until(lambda: vm.active("cgpu-ready.service") == "inactive")


# -- life


def test_a_restart_keeps_the_key_of_this_boot(vm: Container) -> None:
    before = json.loads(vm.unit("cgpuctl", "status", "--json"))["tpm"]
    vm.run("systemctl", "restart", AGENT)
    assert json.loads(vm.unit("cgpuctl", "status", "--json"))["tpm"] == before
    assert caller(vm, "again.service")["unit"] == "again.service"


def test_a_crash_is_followed_by_a_start_that_serves(vm: Container) -> None:
    before = restarts(vm)
    pid = vm.pid(AGENT)
    vm.run("kill", "-SEGV", str(pid))
    vm.until(lambda: vm.pid(AGENT) not in (0, pid) and vm.active(AGENT) == "active")
    assert restarts(vm) == before + 1
    assert "Failed with result 'signal'" in vm.journal(AGENT)
    assert caller(vm, "after.service")["unit"] == "after.service"


def test_a_hang_is_ended_by_the_watchdog(vm: Container) -> None:
    assert vm.show(AGENT, "WatchdogUSec") == "30s"
    change(vm, "WatchdogSec=2")
    pid = vm.pid(AGENT)
    vm.run("kill", "-STOP", str(pid))
    vm.until(lambda: vm.pid(AGENT) not in (0, pid) and vm.active(AGENT) == "active")
    assert "Watchdog timeout" in vm.journal(AGENT)
    assert restarts(vm) == 1


def test_an_agent_that_is_well_keeps_the_watchdog_quiet(vm: Container) -> None:
    change(vm, "WatchdogSec=2")
    pid = vm.pid(AGENT)
    vm.run("sleep", "5")
    assert vm.pid(AGENT) == pid


def test_a_log_that_is_roots_alone_is_handed_over_open(vm: Container) -> None:
    """Where this systemd knows OpenFile=; elsewhere evidence says that the log is missing."""
    vm.write(SYSTEMD_LOG, "")
    vm.run("chmod", "0600", SYSTEMD_LOG)
    vm.run("systemctl", "restart", AGENT)
    logs = json.loads(vm.unit("cgpuctl", "evidence", "get", "--nonce", "00" * 32, "--audience", AUDIENCE))["logs"]
    vm.run("rm", SYSTEMD_LOG)
    assert logs["systemd"] == ("" if vm.systemd >= 253 else None)


def test_a_key_that_systemd_keeps_is_released(vm: Container) -> None:
    vm.write(POLICY_FILE, POLICY)
    vm.write(CONFIG_FILE, WITH_KEY)
    vm.write("/srv/key", "0123456789abcdef")
    if vm.systemd < 252:
        change(vm, "LoadCredential=k:/srv/key")
    else:
        vm.run("mkdir", "-p", "/etc/credstore.encrypted")
        vm.run("systemd-creds", "encrypt", "--with-key=host", "--name=k", "/srv/key", "/etc/credstore.encrypted/k")
        change(vm, "LoadCredentialEncrypted=k")
    assert vm.unit("cgpuctl", "key", "get", "--plain", "k") == "0123456789abcdef"


def test_a_lease_outlives_restart_and_kill_and_ends_with_a_stop(vm: Container) -> None:
    vm.write(POLICY_FILE, POLICY)
    vm.write(CONFIG_FILE, WITH_KEY)
    vm.run("systemctl", "restart", AGENT)
    vm.write("/srv/holder.py", HOLDER)
    holder = vm.popen("systemd-run", "--quiet", "--pipe", "--wait", "--collect", "python3", "/srv/holder.py")
    assert holder.stdout is not None
    assert holder.stdout.readline() == "lent\n"
    vm.until(lambda: vm.show(AGENT, "NFileDescriptorStore") == "2")
    vm.run("systemctl", "daemon-reexec")  # as an upgrade of systemd does
    for again in (("systemctl", "restart", AGENT), ("systemctl", "kill", "--signal=KILL", AGENT)):
        pid = vm.pid(AGENT)
        vm.run(*again)
        vm.until(lambda pid=pid: vm.pid(AGENT) not in (0, pid) and vm.active(AGENT) == "active")
        assert vm.show(AGENT, "NFileDescriptorStore") == "2"
        assert holder.poll() is None, "the lease has ended"
    vm.until(lambda: vm.journal(AGENT).count("leases of the last run go on kept=1 resumed=1") == 2)
    vm.run("systemctl", "stop", AGENT)
    assert holder.wait(PATIENCE) == 0


def test_a_good_file_is_reloaded_and_measured(vm: Container) -> None:
    pid = vm.pid(AGENT)
    vm.write(CONFIG_FILE, f'log_level = "debug"\n{CONFIG}')
    vm.run("systemctl", "reload", AGENT)
    vm.until(lambda: "configuration reloaded changed=True" in vm.journal(AGENT))
    assert vm.pid(AGENT) == pid
    assert vm.show(AGENT, "StatusText").startswith("Serving")


def test_a_bad_file_changes_nothing_but_the_status_line(vm: Container) -> None:
    pid = vm.pid(AGENT)
    vm.write(CONFIG_FILE, f"nonsense = 1\n{CONFIG}")
    vm.run("systemctl", "reload", AGENT)
    assert "configuration:" in vm.show(AGENT, "StatusText")
    assert (vm.pid(AGENT), vm.active(AGENT)) == (pid, "active")
    assert caller(vm, "still.service")["unit"] == "still.service"


def reload_while_busy(vm: Container, unit: str) -> subprocess.Popen[str]:
    """Have a unit reloaded that hears of it late; returns when it can. The process prints its status line then."""
    busy = vm.popen("python3", "-c", HOLD_UP, str(vm.pid(unit)))
    assert busy.stdout is not None
    assert busy.stdout.readline() == "held\n"
    reload = vm.popen("sh", "-c", f"systemctl reload {unit} && systemctl show --value --property=StatusText {unit}")
    assert busy.wait(PATIENCE) == 0
    return reload


def test_a_reload_lasts_until_the_new_configuration_is_in_use(vm: Container) -> None:
    vm.write(POLICY_FILE, POLICY)
    vm.write(CONFIG_FILE, WITH_KEY)
    vm.run("systemctl", "restart", AGENT)
    # The agent waits for whoever writes it.
    vm.run("sh", "-c", f"mv {POLICY_FILE} /srv/policy && mkfifo --mode=644 {POLICY_FILE}")
    reload = reload_while_busy(vm, AGENT)
    vm.run("sleep", "2")
    assert reload.poll() is None
    vm.run("sh", "-c", f"exec 3>{POLICY_FILE} && mv /srv/policy {POLICY_FILE} && cat {POLICY_FILE} >&3")
    assert reload.wait(PATIENCE) == 0


def test_destinations_are_in_force_when_their_reload_returns(vm: Container) -> None:
    vm.run("systemctl", "start", "cgpu-egress.service")
    assert vm.show("cgpu-egress.service", "StatusText") == "Destinations allowed: 0"
    vm.write("/etc/cgpu-agent/egress.toml", 'allow = ["kbs.example:443"]\n')
    said, _ = reload_while_busy(vm, "cgpu-egress.service").communicate(timeout=PATIENCE)
    assert said == "Destinations allowed: 1\n"
    vm.run("systemctl", "stop", "cgpu-egress.socket", "cgpu-egress.service")


def test_a_bad_file_at_start_is_not_tried_again(vm: Container) -> None:
    vm.write(CONFIG_FILE, f"nonsense = 1\n{CONFIG}")
    vm.run("systemctl", "restart", AGENT, good=False)
    assert (vm.active(AGENT), vm.show(AGENT, "ExecMainStatus")) == ("failed", "2")
    assert restarts(vm) == 0
    assert "nonsense" in vm.show(AGENT, "StatusText")


def test_callers_of_an_agent_with_a_bad_file_do_not_cost_the_sockets_for_good(vm: Container) -> None:
    vm.write(CONFIG_FILE, f"nonsense = 1\n{CONFIG}")
    vm.run("systemctl", "restart", AGENT, good=False)
    for _ in range(8):
        vm.unit("cgpuctl", "boot", "show", good=False)
    assert [vm.active(unit) for unit in (AGENT, SOCKETS[0])] == ["failed", "failed"]
    vm.write(CONFIG_FILE, CONFIG)
    vm.run("systemctl", "reset-failed", AGENT, *SOCKETS)
    vm.run("systemctl", "start", AGENT)
    assert [vm.active(unit) for unit in (AGENT, *SOCKETS)] == ["active"] * 4
    assert caller(vm, "mended.service")["unit"] == "mended.service"


def test_an_agent_that_cannot_stay_is_given_up_after_five_starts(vm: Container) -> None:
    change(vm, "ExecStartPre=+/bin/sh -c 'echo >>/run/starts; exit 1'\nRestartSec=100ms", good=False)
    vm.until(lambda: vm.show(AGENT, "SubState") == "failed")
    assert vm.run("cat", "/run/starts") == "\n" * 5


# -- a full house

LIMITS = Limits()
OTHER_THREADS = 100
"""Those that are no caller's."""
LENDS = f"""\
policy = "/etc/cgpu-agent/policy.cedar"
{CONFIG}
[[key]]
id = "kek"
broker = "credential"
"""


@contextmanager
def crowd(vm: Container) -> Iterator[dict[str, Any]]:
    """As many callers and leases as the configuration allows, until the end; yields what they are told."""
    shutil.copy(Path(__file__).parent / "crowd.py", vm.console.parent)
    sizes = (LIMITS.connections, LIMITS.connections_per_uid, LIMITS.leases, LIMITS.leases_per_uid)
    # The interpreter that has the agent's libraries, or is told in crowd.py where they are.
    python = vm.run("head", "--lines=1", "/usr/bin/cgpu-agent").removeprefix("#!").split()[0]
    command = (python, "-I", "/srv/host/crowd.py", *map(str, sizes))
    unit = ("systemd-run", "--quiet", "--unit=crowd", "--pipe", "--wait", "--collect")
    process = vm.popen(*unit, *command, stdin=subprocess.PIPE)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said, process.communicate(timeout=PATIENCE)[1]
        yield json.loads(said)
    finally:
        process.communicate(timeout=PATIENCE)


def held(vm: Container) -> tuple[int, int]:
    """Threads and descriptors of the agent, which is one process."""
    pid = vm.pid(AGENT)
    assert vm.run("cat", f"/sys/fs/cgroup/system.slice/{AGENT}/cgroup.procs").split() == [str(pid)]
    threads, descriptors = (len(vm.run("ls", f"/proc/{pid}/{kind}").split()) for kind in ("task", "fd"))
    return threads, descriptors


def leases(vm: Container) -> tuple[int, int]:
    """On lease, as the agent counts them; and descriptors that systemd keeps of them."""
    found = vm.unit("cgpuctl", "metrics").partition("\ncgpu_agent_leases ")[2]
    return int(found.split()[0]), int(vm.show(AGENT, "NFileDescriptorStore"))


def test_all_that_the_limits_allow_fits_and_one_more_is_told(vm: Container) -> None:
    rules = permit("key.open", "true")
    vm.run("sh", "-c", "cat /usr/share/cgpu-agent/policy.cedar - >/etc/cgpu-agent/policy.cedar", text=rules)
    vm.write(CONFIG_FILE, LENDS)
    vm.run("systemctl", "restart", AGENT)
    _, descriptors = held(vm)
    with crowd(vm) as told:
        assert told["members"] == ["served"] * (LIMITS.connections // LIMITS.connections_per_uid)
        assert told["one more"]["call"].startswith("CONNECTION_LOST: ")
        assert told["one more"]["lease"].startswith("LEASE_LIMIT: ")
        assert f"{LIMITS.connections} connected" in vm.unit("cgpuctl", "status")

        threads, all_descriptors = held(vm)
        # A door asks its server how far it is over a connection of its own, once there is a crowd.
        own = 8
        assert all_descriptors - descriptors <= 4 * LIMITS.connections + 5 * LIMITS.leases + own
        assert all_descriptors + 5 * LIMITS.channels + 1024 < int(vm.show(AGENT, "LimitNOFILESoft"))
        assert threads < LIMITS.leases + OTHER_THREADS
        assert threads + 2 * LIMITS.channels + _MAX_REFUSING + OTHER_THREADS < int(vm.show(AGENT, "TasksMax"))

        assert leases(vm) == (LIMITS.leases, PER_LEASE * LIMITS.leases)
        vm.run("systemctl", "restart", AGENT)
        assert leases(vm) == (LIMITS.leases, PER_LEASE * LIMITS.leases)
    vm.until(lambda: leases(vm) == (0, 0))
