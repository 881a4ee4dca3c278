"""The package over its life: install, upgrade, downgrade, reinstall, remove and purge, under a real systemd."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cgpu_agent import __version__
from fixtures.nspawn import CONFIG, Container, machine

AGENT = "cgpu-agent.service"
ENABLED = (AGENT, "cgpu-agent.socket", "cgpu-agent-admin.socket", "cgpu-agent-lease.socket", "cgpu-ready.socket")
NEWER = "99.0"
CALLER = """
import pathlib, socket, time
connected = 0
while not pathlib.Path("/run/done").exists():
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect("/run/cgpu-agent/agent.sock")
    connected += 1
    time.sleep(0.05)
print(connected)
"""
"""Connects all the time, with nothing of what is being exchanged."""

COMMANDS = ("cgpu-agent", "cgpu-egress", "cgpu-ready", "cgpuctl")


@pytest.fixture(scope="module")
def container(tree: Path) -> Iterator[Container]:
    with machine(tree) as container:
        yield container


@pytest.fixture(scope="module")
def folder(container: Container, package: Path) -> Path:
    """What the container sees as /srv/host: this version as old.deb, and one that says it is newer."""
    folder = container.console.parent
    shutil.copy(package, folder / "old.deb")
    subprocess.run(["dpkg-deb", "--raw-extract", package, folder / "newer"], check=True)
    control, module = folder / "newer/DEBIAN/control", folder / "newer/usr/lib/cgpu-agent/cgpu_agent/__init__.py"
    control.write_text(control.read_text().replace(f"Version: {__version__}", f"Version: {NEWER}"))
    module.write_text(module.read_text().replace(__version__, NEWER))
    (module.parent / "__pycache__" / "__init__.cpython-311.pyc").unlink()
    subprocess.run(["dpkg-deb", "-Zzstd", "--build", folder / "newer", folder / "new.deb"], check=True)
    shutil.rmtree(folder / "newer")
    return folder


@pytest.fixture
def serving(container: Container, folder: Path) -> Container:
    """A machine as after an install: made so again, where the test before left it otherwise."""
    if not as_installed(container):
        container.run("systemctl", "unmask", AGENT)
        container.run("dpkg", "--purge", "cgpu-agent")
        container.write("/etc/cgpu-agent/config.toml", CONFIG)
        install(container, "old")
        assert as_installed(container)
    return container


def as_installed(vm: Container) -> bool:
    states = [(vm.show(unit, "UnitFileState"), vm.active(unit)) for unit in ENABLED]
    return states == [("enabled", "active")] * 5 and version(vm) == __version__


def install(vm: Container, which: str) -> str:
    """Install a package; the operator's configuration stays."""
    return vm.run("dpkg", "--force-confold", "--install", f"/srv/host/{which}.deb")


def version(vm: Container) -> str:
    """What the agent that runs says it is."""
    return str(json.loads(vm.unit("cgpuctl", "status", "--json"))["version"])


def test_after_an_install_the_agent_serves_and_will_after_the_next_boot(serving: Container) -> None:
    assert serving.show(AGENT, "StatusText").startswith("Serving")
    assert [serving.show(unit, "UnitFileState") for unit in ENABLED] == ["enabled"] * 5
    assert [serving.active(unit) for unit in ENABLED] == ["active"] * 5
    # The way out is there for whoever lists a destination.
    assert serving.show("cgpu-egress.socket", "UnitFileState") == "disabled"
    assert serving.active("cgpu-egress.socket") == "inactive"


def test_the_files_are_roots_and_as_they_were_packed(serving: Container) -> None:
    listed = serving.run("dpkg", "--listfiles", "cgpu-agent").splitlines()
    said = serving.run("dpkg", "--verify", "cgpu-agent").split()
    # The tree is made without documentation; the configuration is the operator's.
    assert [path for path in said if path.startswith("/") and "/usr/share/doc/" not in path] == [
        "/etc/cgpu-agent/config.toml"
    ], said
    there = [path for path in listed if not path.startswith("/usr/share/doc/cgpu-agent")]
    text = "\n".join(there)
    modes = serving.run("sh", "-c", "xargs -d '\\n' stat --format='%U:%G %a %n'", text=text).splitlines()
    assert len(modes) == len(there)
    for line in modes:
        owner, mode, path = line.split(" ", 2)
        assert owner == "root:root", line
        assert int(mode, 8) & 0o7022 == 0, f"{path} has mode {mode}"


def test_all_of_it_runs_on_debians_python_with_the_libraries_it_depends_on(serving: Container) -> None:
    for command in COMMANDS:
        assert serving.run(command, "--version").split() == [command, __version__]
    # Compiled in the package, so that no process has to, or may.
    found = serving.run("find", "/usr/lib/cgpu-agent", "-name", "*.py", "-printf", "%P\n").splitlines()
    compiled = serving.run("find", "/usr/lib/cgpu-agent", "-name", "*.pyc", "-printf", "%P\n").splitlines()
    assert len(found) == len(compiled) > 500
    script = "find /usr/lib/cgpu-agent -name '*.so' -exec ldd {} +"
    libraries = serving.run("sh", "-c", script)
    assert libraries.count("/usr/lib/cgpu-agent/") > 10
    assert "not found" not in libraries
    assert "fapi" not in libraries
    everything = "import sys, pkgutil, importlib; sys.path.insert(0, '/usr/lib/cgpu-agent'); import cgpu_agent as a\n"
    everything += "[importlib.import_module(m.name) for m in pkgutil.walk_packages(a.__path__, 'cgpu_agent.')\n"
    everything += " if not m.name.startswith('cgpu_agent.service.')]"
    serving.run("/usr/bin/python3", "-I", "-W", "error::SyntaxWarning", "-c", everything)


def test_a_shell_completes_what_cgpuctl_takes(serving: Container) -> None:
    source = "source /usr/share/bash-completion/completions/cgpuctl; COMP_WORDS=(cgpuctl ev); COMP_CWORD=1; _cgpuctl"
    assert "evidence" in serving.run("bash", "-c", f"{source}; echo ${{COMPREPLY[@]}}").split()


def test_an_upgrade_starts_the_new_version_and_callers_wait_instead_of_failing(serving: Container) -> None:
    before, accepted = serving.pid(AGENT), serving.show("cgpu-agent.socket", "ActiveEnterTimestampMonotonic")
    serving.run("systemctl", "start", "cgpu-egress.service", "cgpu-ready.service")
    others = [serving.pid("cgpu-egress.service"), serving.pid("cgpu-ready.service")]
    caller = serving.popen("/usr/bin/python3", "-I", "-c", CALLER)
    install(serving, "new")
    serving.run("touch", "/run/done")
    said, errors = caller.communicate(timeout=60)
    assert caller.returncode == 0, errors
    assert int(said) > 10
    serving.run("rm", "/run/done")
    assert version(serving) == NEWER
    assert serving.pid(AGENT) != before
    assert not {0, *others} & {serving.pid("cgpu-egress.service"), serving.pid("cgpu-ready.service")}
    assert serving.show(AGENT, "NRestarts") == "0"
    assert serving.show("cgpu-agent.socket", "ActiveEnterTimestampMonotonic") == accepted
    assert serving.show(AGENT, "StatusText").startswith("Serving"), "the key of this boot is still there"
    assert serving.run("cat", "/etc/cgpu-agent/config.toml") == CONFIG


def test_a_downgrade_is_an_upgrade(serving: Container) -> None:
    install(serving, "new")
    install(serving, "old")
    assert version(serving) == __version__
    assert serving.show(AGENT, "StatusText").startswith("Serving")


def test_an_upgrade_mends_what_systemd_had_given_up(serving: Container) -> None:
    drop_in = "/run/systemd/system/cgpu-agent.service.d/bad.conf"
    serving.write(drop_in, "[Service]\nExecStartPre=/bin/test ! -e /run/bad\nRestartSec=100ms\n")
    serving.run("touch", "/run/bad")
    serving.run("systemctl", "daemon-reload")
    serving.run("systemctl", "restart", AGENT, good=False)
    serving.until(lambda: serving.active(AGENT) == "failed")
    serving.run("rm", drop_in, "/run/bad")
    serving.run("systemctl", "start", AGENT, good=False)  # nothing is in the way but the start limit
    install(serving, "new")
    assert [serving.active(unit) for unit in ENABLED] == ["active"] * 5
    assert version(serving) == NEWER


def test_what_operators_disabled_stays_disabled_and_running(serving: Container) -> None:
    serving.run("systemctl", "disable", AGENT)
    before = serving.pid(AGENT)
    install(serving, "new")
    assert serving.show(AGENT, "UnitFileState") == "disabled"
    assert serving.pid(AGENT) not in (0, before)


def test_what_operators_disabled_and_stopped_stays_so(serving: Container) -> None:
    serving.run("systemctl", "disable", "--now", *ENABLED)
    install(serving, "new")
    assert [serving.show(unit, "UnitFileState") for unit in ENABLED] == ["disabled"] * 5
    assert [serving.active(unit) for unit in ENABLED] == ["inactive"] * 5


def test_what_operators_masked_stays_masked(serving: Container) -> None:
    serving.run("systemctl", "stop", *ENABLED)
    serving.run("systemctl", "mask", AGENT)
    install(serving, "new")
    assert serving.show(AGENT, "UnitFileState") == "masked"
    assert serving.active(AGENT) == "inactive"


def test_what_is_enabled_is_started_again_though_it_was_stopped(serving: Container) -> None:
    """As every Debian package does; mask it to keep it down."""
    serving.run("systemctl", "stop", AGENT)
    install(serving, "old")
    assert serving.active(AGENT) == "active"


def test_removal_keeps_state_and_configuration_and_the_next_install_goes_on(serving: Container) -> None:
    serving.run("systemctl", "enable", "--now", "cgpu-egress.socket")
    serving.run("dpkg", "--remove", "cgpu-agent")
    assert not serving.run("systemctl", "list-units", "--plain", "--no-legend", "cgpu-*")
    assert serving.show(AGENT, "LoadState") == "not-found"
    assert [serving.active(unit) for unit in ENABLED] == ["inactive"] * 5
    assert not serving.run("pgrep", "--full", "cgpu-agent", good=False)
    assert serving.run("cat", "/etc/cgpu-agent/config.toml") == CONFIG
    serving.run("test", "-s", "/var/lib/cgpu-agent/audit.jsonl")
    serving.run("test", "!", "-e", "/usr/lib/cgpu-agent")
    install(serving, "old")
    assert serving.show(AGENT, "StatusText").startswith("Serving"), "the key of this boot is still there"


def test_a_purge_leaves_the_user_and_nothing_else(serving: Container) -> None:
    serving.run("systemctl", "enable", "--now", "cgpu-egress.socket")
    install(serving, "old")
    serving.run("dpkg", "--purge", "cgpu-agent")
    for path in ("/etc/cgpu-agent", "/var/lib/cgpu-agent", "/usr/lib/cgpu-agent"):
        serving.run("test", "!", "-e", path)
    links = serving.run("find", "/etc/systemd", "/var/lib/systemd", "-name", "cgpu-*")
    assert not links
    assert serving.run("id", "--user", "--name", "cgpu-agent").strip() == "cgpu-agent"
