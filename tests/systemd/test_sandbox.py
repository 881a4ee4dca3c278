"""The sandbox of each unit as a process in it meets it; and the same attempts outside, where they must succeed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fixtures.nspawn import Container, machine

PROBE = "/srv/host/probe.py"
OF_OTHER_LIFE = (
    "ExecStart",
    "ExecStartPre",
    "ExecReload",
    "ExecStopPost",
    "Type",
    "NotifyAccess",
    "WatchdogSec",
    "Restart",
)
OF_OTHER_UNITS = ("Requires", "Wants", "After", "Before", "PartOf", "Sockets")
SYS_ADMIN = 1 << 21


def put_probe(container: Container) -> None:
    folder = container.console.parent
    shutil.copy(Path(__file__).parent / "probe.py", folder)
    # Everybody's by its mode, so that nothing refuses before the sandbox does.
    container.run("mknod", "--mode=0666", "/dev/fuse", "c", "10", "229")
    container.run("touch", "/tmp/of-somebody-else")


@pytest.fixture(scope="module")
def container(installed: Path) -> Iterator[Container]:
    with machine(installed) as container:
        # A way to everywhere: what refuses to connect is the sandbox, and not that there is no network.
        container.run("ip", "link", "set", "lo", "up")
        container.run("ip", "address", "add", "169.254.169.254/32", "dev", "lo")
        server = ("python3", "-m", "http.server", "--bind", "169.254.169.254", "80")
        container.run("systemd-run", "--unit=metadata", *server)
        container.until(lambda: "169.254.169.254:80" in container.run("ss", "--listening", "--tcp", "--numeric"))
        put_probe(container)
        yield container


def probe(container: Container, unit: str) -> dict[str, Any]:
    """Run the probe in a unit that has everything of another one but its program and how it lives."""
    lines = container.run("cat", f"/usr/lib/systemd/system/{unit}").splitlines()
    kept = [line for line in lines if line.partition("=")[0] not in (*OF_OTHER_LIFE, *OF_OTHER_UNITS)]
    kept[kept.index("[Service]")] = f"[Service]\nType=oneshot\nExecStart=/usr/bin/python3 -I {PROBE}"
    kept.append("[Service]\nStandardOutput=truncate:/srv/host/probe.json")
    container.write(f"/etc/systemd/system/probe-{unit}", "\n".join(kept) + "\n")
    container.run("systemctl", "daemon-reload")
    container.run("systemctl", "start", f"probe-{unit}")
    found = json.loads(container.run("cat", "/srv/host/probe.json"))
    assert isinstance(found, dict)
    return found


def test_outside_every_attempt_succeeds(container: Container) -> None:
    """Else a refusal below would prove nothing."""
    found = json.loads(container.unit("python3", "-I", PROBE))
    assert set(found["ended"].values()) == {"done"}, found


def test_filters_by_device_are_there_and_would_be_missed(container: Container) -> None:
    """Where the kernel's filter cannot be loaded systemd goes on without a word, and these tests would be blind."""
    open_fuse = ("python3", "-c", "open('/dev/fuse', 'r+b', 0)")
    closed = "--property=DevicePolicy=closed"
    container.unit(*open_fuse, options=(closed, "--property=DeviceAllow=/dev/fuse rw"))
    container.unit(*open_fuse, options=(closed,), good=False)


@pytest.mark.parametrize("unit", ["cgpu-agent.service", "cgpu-ready.service", "cgpu-egress.service"])
def test_in_the_units_every_attempt_fails(container: Container, unit: str) -> None:
    found = probe(container, unit)
    allowed = {name for name, end in found["ended"].items() if end == "done"}
    assert allowed == ({"AF_INET"} if unit == "cgpu-egress.service" else set()), found
    root = unit == "cgpu-ready.service"
    assert found["bounding"] == int(found["CapEff"], 16) == (SYS_ADMIN if root else 0)
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
    assert found["Uid"].startswith("0\t") is root
    assert found["ended"]["open /dev/fuse"] == "EPERM" or unit == "cgpu-egress.service"
