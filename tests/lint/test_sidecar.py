"""The examples for containers are what their engines read, and do what docs/sidecar.md asks for."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cgpu_agent.cli.main import main
from cgpu_agent.cli.parser import build_parser

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "systemd"
RECIPES = ROOT / "docs" / "recipes" / "sidecar"
COMPOSE = yaml.safe_load((RECIPES / "compose.yaml").read_text())
DAEMONSET = yaml.safe_load((RECIPES / "daemonset.yaml").read_text())
POD = DAEMONSET["spec"]["template"]["spec"]
CONTAINERS = [*POD["initContainers"], *POD["containers"]]
FOLDER = "/run/cgpu-agent/api"
MOUNT = "/run/cgpu-agent"


def commands() -> Iterator[list[str]]:
    """Each command line of cgpuctl in the examples."""
    for words in (
        *(service.get("command") for service in COMPOSE["services"].values()),
        *(c.get("command") for c in CONTAINERS),
    ):
        yield from (shlex.split(line) for line in re.findall(r"cgpuctl ([^;]*)", " ".join(words or ())))


def test_the_commands_are_good_ones() -> None:
    found = list(commands())
    assert len(found) == 2
    for words in found:
        build_parser().parse_args(words)


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_is_an_unprivileged_uid_of_its_own(name: str) -> None:
    service = COMPOSE["services"][name]
    assert re.fullmatch(r"[1-9]\d{4}:[1-9]\d{4}", service["user"])
    assert service["userns_mode"] == "host"
    assert (service["cap_drop"], service["read_only"]) == (["ALL"], True)
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert re.search(r"@sha256:[0-9a-f]{64}$", service["image"])


def test_one_service_alone_reaches_the_agent_and_that_by_the_folder() -> None:
    mounts = {
        name: [mount for mount in service["volumes"] if mount["type"] == "bind"]
        for name, service in COMPOSE["services"].items()
    }
    (mount,) = mounts.pop("key")
    assert (mount["source"], mount["target"], mount["read_only"]) == (FOLDER, MOUNT, True)
    assert mount["bind"] == {"create_host_path": False}
    assert not any(mounts.values())


def test_the_key_is_shared_in_memory() -> None:
    options = COMPOSE["volumes"]["keys"]["driver_opts"]
    assert (options["type"], options["device"]) == ("tmpfs", "tmpfs")
    assert "mode=0700" in options["o"]
    assert {"name": "keys", "emptyDir": {"medium": "Memory", "sizeLimit": "64Ki"}} in POD["volumes"]


@pytest.mark.parametrize("container", CONTAINERS, ids=lambda container: container["name"])
def test_a_container_meets_the_restricted_profile(container: dict[str, Any]) -> None:
    """Of Kubernetes' Pod Security Standards, but for the hostPath, which that forbids."""
    security = container["securityContext"]
    assert security == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert re.search(r"@sha256:[0-9a-f]{64}$", container["image"])


def test_the_pod_keeps_its_uid_and_has_no_token() -> None:
    security = POD["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] >= 10000
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert (POD["hostUsers"], POD["automountServiceAccountToken"]) == (True, False)
    assert not {"hostNetwork", "hostPID", "hostIPC"} & POD.keys()


def test_the_sidecar_alone_has_the_folder_and_no_other_of_the_node() -> None:
    host = [volume for volume in POD["volumes"] if "hostPath" in volume]
    assert host == [{"name": "agent", "hostPath": {"path": FOLDER, "type": "Directory"}}]
    mounts = {each["name"]: [m for m in each["volumeMounts"] if m["name"] == "agent"] for each in CONTAINERS}
    assert mounts == {"key": [{"name": "agent", "mountPath": MOUNT, "readOnly": True}], "server": []}
    assert POD["initContainers"][0]["restartPolicy"] == "Always"


def test_the_manifest_holds_together() -> None:
    assert (DAEMONSET["apiVersion"], DAEMONSET["kind"]) == ("apps/v1", "DaemonSet")
    labels = DAEMONSET["spec"]["template"]["metadata"]["labels"]
    assert DAEMONSET["spec"]["selector"]["matchLabels"] == labels
    volumes = {volume["name"] for volume in POD["volumes"]}
    assert {mount["name"] for each in CONTAINERS for mount in each["volumeMounts"]} == volumes


def test_the_policy_that_is_shown_is_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shown,) = re.findall(r"```cedar\n(.*?)```", (ROOT / "docs" / "sidecar.md").read_text(), flags=re.DOTALL)
    (tmp_path / "policy.cedar").write_text(shown)
    assert main(["policy", "check", str(tmp_path / "policy.cedar")]) == 0, capsys.readouterr()
    assert f"principal.uid == {POD['securityContext']['runAsUser']} " in shown


def test_compose_takes_the_file() -> None:
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("docker compose is not installed")
    command = ["docker", "compose", "-f", str(RECIPES / "compose.yaml"), "config", "--quiet"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (answer.returncode, answer.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_drop_in_moves_the_socket_and_leaves_a_link(tmp_path: Path) -> None:
    shutil.copytree(UNITS, tmp_path / "units")
    drop_ins = tmp_path / "units" / "cgpu-agent.socket.d"
    drop_ins.mkdir()
    shutil.copy(RECIPES / "containers.conf", drop_ins)
    environment = {**os.environ, "LC_ALL": "C", "SYSTEMD_UNIT_PATH": f"{tmp_path}/units:"}
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "units" / "cgpu-agent.socket")]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert "containers.conf" not in answer.stdout + answer.stderr
    settings = dict(re.findall(r"^(\w+)=(/.*)$", (RECIPES / "containers.conf").read_text(), flags=re.MULTILINE))
    assert settings == {"ListenStream": f"{FOLDER}/agent.sock", "Symlinks": f"{MOUNT}/agent.sock"}
