"""A real daemon that releases keys: to the workload that policy names, in the state that it demands, on record."""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cgpu_agent.api.v1 import gpus_pb2
from cgpu_agent.client.aio import AsyncAgent
from cgpu_agent.errors import Denied, Exhausted, Unavailable
from cgpu_agent.wire.audit import EMPTY, AuditRecord, follow
from fixtures.ctl import PASS, Ctl
from fixtures.daemon import PATIENCE, Daemon, booted_daemon
from fixtures.policies import permit
from fixtures.softwaregpu import GpuProcess, running_gpus, using
from fixtures.workload import ask

pytestmark = pytest.mark.swtpm

SECRET = os.urandom(16).hex().encode()
"""A canary: it must turn up nowhere but with the workload."""
ME = f"principal.uid == {os.geteuid()}"
KEYS = """
[[key]]
id = "models/llama"
broker = "credential"
path = "llama.key"
group = "models"

[[key]]
id = "plain"
broker = "credential"
path = "llama.key"
"""


def configure(daemon: Daemon, *permits: str) -> None:
    daemon.grants = "".join(permits)
    daemon.configure()
    daemon.config.write_text(daemon.config.read_text() + KEYS)


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with booted_daemon() as agent:
        credentials = agent.folder / "credentials"
        credentials.mkdir(mode=0o700)
        (credentials / "llama.key").write_bytes(SECRET)
        agent.environment["CREDENTIALS_DIRECTORY"] = str(credentials)
        yield agent


def records(daemon: Daemon) -> list[AuditRecord]:
    return follow((daemon.folder / "state" / "audit.jsonl").read_bytes(), EMPTY)[0]


WRAPPED = permit("key.get", f'{ME} && resource.group == "models"')
PLAIN = permit("key.get_plain", f'{ME} && resource == CGpu::Key::"plain"')


def test_the_sdk_gets_a_key_in_three_lines_and_it_is_on_record(daemon: Daemon) -> None:
    configure(daemon, WRAPPED, PLAIN)
    daemon.start()
    with daemon.client() as agent:
        key = agent.get_key("models/llama")
        assert (key.secret, key.key, key.broker) == (SECRET, "models/llama", "credential")
        assert agent.get_key("plain", plain=True).secret == SECRET
        assert [(each.key, each.wrapped, each.plain) for each in agent.list_keys()] == [
            ("models/llama", True, False),
            ("plain", False, True),
        ]
        for name, plain in (("models/llama", True), ("plain", False), ("nothing", False)):
            with pytest.raises(Denied) as raised:
                agent.get_key(name, plain=plain)
            assert raised.value.slug == "NOT_ALLOWED"

    async def another() -> bytes:
        async with AsyncAgent(daemon.socket) as agent:
            return (await agent.get_key("models/llama")).secret

    assert asyncio.run(another()) == SECRET
    assert daemon.stop() == 0
    told = [
        (each.event, each.data.get("key"), each.data.get("code"))
        for each in records(daemon)
        if each.event in ("call", "key", "call-ended")
    ]
    assert told[:6] == [
        ("call", None, None),
        ("key", "models/llama", None),
        ("call-ended", None, "OK"),
        ("call", None, None),
        ("key", "plain", None),
        ("call-ended", None, "OK"),
    ]
    assert sum(event == "key" for event, _, _ in told) == 3


def test_a_policy_that_is_reloaded_ends_what_it_no_longer_permits(daemon: Daemon) -> None:
    configure(daemon, PLAIN)
    daemon.start()
    with daemon.client() as agent:
        assert agent.get_key("plain", plain=True).secret == SECRET
        configure(daemon)
        daemon.reload()
        with pytest.raises(Denied):
            agent.get_key("plain", plain=True)
        assert agent.list_keys() == []
    assert daemon.stop() == 0


def test_without_a_permit_nobody_gets_a_key(daemon: Daemon) -> None:
    configure(daemon)
    daemon.start()
    with daemon.client() as agent:
        assert agent.list_keys() == []
        for plain in (True, False):
            with pytest.raises(Denied):
                agent.get_key("models/llama", plain=plain)
    assert daemon.stop() == 0


def test_a_uid_gets_so_many_keys_a_minute_over_whatever_connections(daemon: Daemon) -> None:
    daemon.tables["limits"] = "keys_per_minute = 1"
    configure(daemon, PLAIN)
    daemon.start()
    with daemon.client() as one, daemon.client() as other:
        assert one.get_key("plain", plain=True).secret == SECRET
        for agent, name in ((one, "plain"), (other, "plain"), (other, "nothing")):
            with pytest.raises(Exhausted) as raised:
                agent.get_key(name, plain=True)
            assert raised.value.slug == "KEY_LIMIT"
            assert raised.value.retry_after is not None
            assert 0 < raised.value.retry_after <= 60
        with pytest.raises(Exhausted):
            other.list_keys()  # which costs three decisions a key
    if os.geteuid() == 0:
        assert ask(daemon.socket, "key", uid=12345)[0] == "NOT_ALLOWED"  # not KEY_LIMIT: it has a count of its own
    assert daemon.stop() == 0
    assert sum(record.event == "key" for record in records(daemon)) == 1


def test_whoever_waits_as_long_as_told_is_served(daemon: Daemon) -> None:
    daemon.tables["limits"] = "keys_per_minute = 20"
    configure(daemon, PLAIN)
    daemon.start()
    with daemon.client() as agent:

        def refusal() -> Exhausted:
            for _ in range(1000):
                try:
                    agent.get_key("plain", plain=True)
                except Exhausted as error:
                    return error
            raise AssertionError("never refused")

        wait = refusal().retry_after
        assert wait is not None
        time.sleep(wait)
        assert agent.get_key("plain", plain=True).secret == SECRET
    assert daemon.stop() == 0


def test_refusals_are_counted_and_not_written_one_by_one(daemon: Daemon) -> None:
    configure(daemon, WRAPPED)
    daemon.start()
    before = (daemon.folder / "state" / "audit.jsonl").read_bytes()
    with daemon.client() as agent:
        for name in ("plain", "nothing"):
            for _ in range(20):
                with pytest.raises(Denied):
                    agent.get_key(name)
    assert (daemon.folder / "state" / "audit.jsonl").read_bytes() == before
    assert daemon.stop() == 0
    (counted,) = (each.data for each in records(daemon) if each.event == "denied")
    assert (counted["count"], counted["reason"], counted["method"]) == (40, "NOT_ALLOWED", "/cgpu.agent.v1.Keys/Get")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_another_uid_gets_nothing(daemon: Daemon) -> None:
    configure(daemon, PLAIN)
    daemon.start()
    assert ask(daemon.socket, "key") == SECRET.hex()
    assert ask(daemon.socket, "key", uid=12345)[0] == "NOT_ALLOWED"
    assert ask(daemon.socket, "keys", uid=12345) == []
    assert daemon.stop() == 0


def test_a_key_that_systemd_did_not_hand_over_is_absent(daemon: Daemon) -> None:
    configure(daemon, PLAIN)
    del daemon.environment["CREDENTIALS_DIRECTORY"]
    daemon.start()
    with daemon.client() as agent, pytest.raises(Unavailable) as raised:
        agent.get_key("plain", plain=True)
    assert raised.value.slug == "KEY_ABSENT"
    assert daemon.stop() == 0


def test_cgpuctl_writes_a_key_for_its_owner_alone(
    daemon: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ctl = Ctl(tmp_path, capsys)
    configure(daemon, WRAPPED)
    daemon.start()
    out = tmp_path / "llama.key"
    got = ctl("key", "get", "models/llama", "-o", str(out), "--socket", daemon.socket)
    assert (got.code, got.err) == (PASS, "")
    assert SECRET.decode() not in got.out
    assert out.read_bytes() == SECRET
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    listed = ctl("key", "list", "--json", "--socket", daemon.socket).json
    assert listed == [
        {
            "broker": "credential",
            "key": "models/llama",
            "loads": [],
            "opens": False,
            "plain": False,
            "wrapped": True,
        }
    ]
    assert "models/llama" in ctl("key", "list", "--socket", daemon.socket).out
    assert daemon.stop() == 0
    log = str(daemon.folder / "state" / "audit.jsonl")
    assert ctl("audit", "verify", log).code == PASS


@pytest.fixture
def gpus() -> Iterator[GpuProcess]:
    with running_gpus() as process:
        files = using(process, lambda client: client.collateral(timeout=PATIENCE))
        folder = process.socket.parent / "export"
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        yield process


def test_a_gpu_that_is_not_trusted_any_more_ends_the_release(daemon: Daemon, gpus: GpuProcess) -> None:
    export = gpus.socket.parent / "export"
    daemon.tables["gpu"] = (
        f'backend = "software:{gpus.socket}"\nallow_simulated = true\ncollateral = "{export}"\n'
        f'device_roots = ["{export}/device-root.pem"]\nrim_roots = ["{export}/rim-root.pem"]'
    )
    configure(daemon, permit("key.get_plain", f'{ME} && context.gpus == "ready"'))
    daemon.start()
    with daemon.client() as agent:

        def until(state: gpus_pb2.GpuSetState.ValueType) -> None:
            end = time.monotonic() + PATIENCE
            while agent.list_gpus().state != state:
                assert time.monotonic() < end
                time.sleep(0.05)

        until(gpus_pb2.GPU_SET_STATE_READY)
        assert agent.get_key("plain", plain=True).secret == SECRET
        using(gpus, lambda client: client.misbehave("dev-tools", gpu=1, timeout=PATIENCE))
        until(gpus_pb2.GPU_SET_STATE_NOT_READY)
        with pytest.raises(Denied):
            agent.get_key("plain", plain=True)
    assert daemon.stop() == 0
