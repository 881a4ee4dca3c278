"""``cgpuctl transfer`` on a real daemon with a software GPU: what it measures, copies, loads, and what it refuses."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cgpu_agent.api.v1 import gpus_pb2
from cgpu_agent.cli import transfercopy
from cgpu_agent.cli.progress import Progress
from cgpu_agent.client import calls
from cgpu_agent.client.lease import LeasedMemory
from cgpu_agent.objects.stream import Sealer
from cgpu_agent.wire.sealed import ObjectName
from fixtures.ctl import PASS, REFUSED, USAGE, Ctl, Ran
from fixtures.daemon import PATIENCE, Daemon, booted_daemon
from fixtures.policies import permit
from fixtures.softwaregpu import running_gpus, using

pytestmark = pytest.mark.swtpm

ME = f"principal.uid == {os.geteuid()}"
GRANTS = (permit("gpu.transfer", ME), permit("key.load", ME))
KEY = os.urandom(32)
PLAIN = os.urandom(1 << 20) + b"the weights" * 100_000
NAME = ObjectName("models/llama", "llama-70b", 3)
NAMED = ("--sealed", "models/llama", "--object-id", "llama-70b", "--object-version", "3")


def configure(daemon: Daemon, *permits: str) -> None:
    daemon.grants = "".join(permits)
    daemon.configure()
    key = f'\n[[key]]\nid = "{NAME.key_id}"\nbroker = "credential"\npath = "llama.key"\n'
    daemon.config.write_text(daemon.config.read_text() + key)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """One for all: nothing here changes it."""
    with running_gpus("--count", "2") as gpus, booted_daemon() as daemon:
        export = gpus.socket.parent / "export"
        export.mkdir()
        for name, data in using(gpus, lambda client: client.collateral(timeout=PATIENCE)).items():
            (export / name).write_bytes(data)
        daemon.tables["gpu"] = (
            f'backend = "software:{gpus.socket}"\ncollateral = "{export}"\nallow_simulated = true\n'
            f'device_roots = ["{export}/device-root.pem"]\nrim_roots = ["{export}/rim-root.pem"]'
        )
        credentials = daemon.folder / "credentials"
        credentials.mkdir(mode=0o700)
        (credentials / "llama.key").write_bytes(KEY)
        daemon.environment["CREDENTIALS_DIRECTORY"] = str(credentials)
        configure(daemon, *GRANTS)
        daemon.start()
        await_gpus(daemon)
        yield daemon
        assert daemon.stop() == 0


def await_gpus(daemon: Daemon) -> None:
    end = time.monotonic() + PATIENCE
    with daemon.client() as agent:
        while agent.list_gpus().state != gpus_pb2.GPU_SET_STATE_READY:
            assert time.monotonic() < end
            time.sleep(0.05)


class Transfer:
    """``cgpuctl transfer`` at that daemon."""

    def __init__(self, ctl: Ctl, daemon: Daemon) -> None:
        self._ctl = ctl
        self._socket = daemon.socket

    def __call__(self, *arguments: str) -> Ran:
        return self._ctl("transfer", *arguments, "--socket", self._socket)


@pytest.fixture
def transfer(daemon: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Transfer:
    return Transfer(Ctl(tmp_path, capsys), daemon)


def uuids(daemon: Daemon) -> list[str]:
    with daemon.client() as agent:
        return [gpu.uuid for gpu in agent.list_gpus().gpus]


def written(folder: Path, data: bytes) -> str:
    path = folder / "data"
    path.write_bytes(data)
    return str(path)


def sealed(folder: Path, plain: bytes = PLAIN, segment_size: int = 1 << 20) -> str:
    sink = io.BytesIO()
    sealer = Sealer(sink, KEY, NAME, segment_size)
    sealer.write(plain)
    sealer.finish()
    return written(folder, sink.getvalue())


@pytest.mark.parametrize(("direction", "ways"), [("to", {"to"}), ("from", {"from"}), ("both", {"to", "from"})])
def test_bench_measures_what_was_asked_for(
    transfer: Transfer, daemon: Daemon, direction: str, ways: set[str]
) -> None:
    ran = transfer("bench", "--gpu", "1", "--size", "1MiB", "--seconds", "1", "--direction", direction, "--json")
    assert (ran.code, ran.err) == (PASS, "")
    found = ran.json
    assert (found["gpu"], found["simulated"], found["size_bytes"]) == (uuids(daemon)[1], True, 1 << 20)
    assert found["directions"].keys() == ways
    for each in found["directions"].values():
        assert each["gigabytes_per_second"] == pytest.approx(each["copies"] * (1 << 20) / each["seconds"] / 1e9)
        assert each["multiples_of_0.25"] == pytest.approx(each["gigabytes_per_second"] * 4)
        assert each["small"]["copies"] > 0
        assert 0 < each["small"]["p50_seconds"] <= each["small"]["p99_seconds"]
    copies = sum(each["copies"] + each["small"]["copies"] + 1 for each in found["directions"].values())
    assert (found["transfers"], found["errors"]) == (copies, 0)


def test_bench_tells_people_which_gpu_it_was_and_that_it_is_simulated(transfer: Transfer, daemon: Daemon) -> None:
    uuid = uuids(daemon)[0]
    ran = transfer("bench", "--gpu", uuid, "--size", "100", "--seconds", "1")
    assert (ran.code, ran.err) == (PASS, "")
    assert ran.out.startswith(f"{uuid}, simulated: it protects nothing\n")
    assert ran.out.count("GB/s") == ran.out.count("p99") == 2


@pytest.mark.parametrize("size", [1, 4097, (16 << 20) + 5])
def test_a_file_comes_back_the_same(transfer: Transfer, daemon: Daemon, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    ran = transfer("copy", written(tmp_path, data), "--json")
    assert (ran.code, ran.err) == (PASS, "")
    assert (ran.json["result"], ran.json["bytes"]) == ("pass", size)
    assert ran.json["sha256"] == hashlib.sha256(data).hexdigest()
    assert ran.json["gpu"] == uuids(daemon)[0]
    assert ran.json["gigabytes_per_second"].keys() == {"to", "from"}
    ran = transfer("copy", str(tmp_path / "data"))
    assert (
        f"{size} bytes to {uuids(daemon)[0]} and back, the same: sha256 {hashlib.sha256(data).hexdigest()}" in ran.out
    )


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_bytes_that_do_not_come_back_the_same_are_noticed(
    transfer: Transfer, daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: tuple[str, ...]
) -> None:
    """Somebody writes to that device memory when all of the file is there."""

    class Meddling(Progress):
        def end(self) -> None:
            if self._what == "to device":
                overwrite(daemon)

    monkeypatch.setattr(transfercopy, "Progress", Meddling)
    ran = transfer("copy", written(tmp_path, bytes(100_000)), *form)
    assert ran.code == REFUSED
    assert "[TRANSFER_MISMATCH]" in ran.err
    if form:
        assert (ran.json["result"], ran.json["reason"]["slug"]) == ("refused", "TRANSFER_MISMATCH")
    else:
        assert ran.out == ""


def overwrite(daemon: Daemon) -> None:
    """One byte of the first allocation of this process's channel."""
    with daemon.client() as agent:
        (channel,) = agent._run(calls.get_transfer_stats(b""))
        with contextlib.closing(LeasedMemory(daemon.lease_socket, 1, None, PATIENCE)) as memory:
            memory.view[0] = 1
            ticket = agent._run(calls.submit(channel.channel, [calls.Copy(True, memory.id, 0, 1, 50_000, 1)]))
            while not agent._run(calls.synchronize(channel.channel, ticket, 1000)).ended:
                pass


def test_bytes_on_their_way_out_are_not_taken_for_those_that_come_back(
    transfer: Transfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cgpu_agent.client.channels.Channel.get", lambda *_, **__: None)
    assert "[TRANSFER_MISMATCH]" in transfer("copy", written(tmp_path, bytes(5000))).err


@pytest.mark.parametrize("segment", ["1MiB", "4KiB"])
def test_a_sealed_object_is_loaded(transfer: Transfer, tmp_path: Path, segment: str) -> None:
    path = sealed(tmp_path, segment_size=1 << 20 if segment == "1MiB" else 1 << 12)
    ran = transfer("copy", path, *NAMED, "--segment-size", segment, "--json")
    assert (ran.code, ran.err) == (PASS, "")
    assert (ran.json["result"], ran.json["bytes"]) == ("pass", len(PLAIN))
    assert f"{len(PLAIN)} bytes opened" in transfer("copy", path, *NAMED, "--segment-size", segment).out


@pytest.mark.parametrize(
    ("cut", "version", "reason"), [(0, "4", "NOT_AUTHENTIC"), (-1, "3", "NOT_AUTHENTIC"), (9, "3", "TRUNCATED")]
)
def test_another_object_is_not_loaded(
    transfer: Transfer, tmp_path: Path, cut: int, version: str, reason: str
) -> None:
    path = sealed(tmp_path)
    if cut:
        os.truncate(path, cut if cut > 0 else Path(path).stat().st_size + cut)
    ran = transfer("copy", path, *NAMED[:-1], version)
    assert (ran.code, ran.out) == (REFUSED, "")
    assert f"[{reason}]" in ran.err
    ran = transfer("copy", path, *NAMED[:-1], version, "--json")
    assert (ran.code, ran.json["result"], ran.json["reason"]["slug"]) == (REFUSED, "refused", reason)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("bench", "--gpu", "2"), "UNKNOWN_GPU"),
        (("bench", "--gpu", "GPU-x"), "UNKNOWN_GPU"),
        (("bench", "--gpu", "9" * 5000), "UNKNOWN_GPU"),
        (("bench", "--gpu", ""), "UNKNOWN_GPU"),
        (("bench", "--seconds", "0"), "BAD_ARGUMENT"),
        (("bench", "--seconds", "601"), "BAD_ARGUMENT"),
        (("bench", "--size", "0"), "BAD_ARGUMENT"),
        (("bench", "--size", "1MB"), "BAD_ARGUMENT"),
        (("bench", "--size", "-1"), "BAD_ARGUMENT"),
        (("bench", "--size", "900GiB"), "LEASE_SIZE"),
        (("copy", "FILE", "--sealed", "k"), "BAD_ARGUMENT"),
        (("copy", "FILE", "--object-id", "o", "--object-version", "1"), "BAD_ARGUMENT"),
        (("copy", "FILE.absent"), "NO_FILE"),
        (("copy", "/dev/null"), "NOT_A_FILE"),
        (("copy", "EMPTY"), "EMPTY_FILE"),
    ],
)
def test_what_cannot_be_done_is_a_usage_error(
    transfer: Transfer, tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    (tmp_path / "empty").touch()
    names = {"FILE": written(tmp_path, b"x"), "FILE.absent": str(tmp_path / "no"), "EMPTY": str(tmp_path / "empty")}
    ran = transfer(*(names.get(word, word) for word in arguments))
    assert (ran.code, ran.out) == (USAGE, "")
    assert f"[{reason}]" in ran.err


def test_a_file_that_no_gpu_has_room_for_is_refused(transfer: Transfer, tmp_path: Path) -> None:
    path = written(tmp_path, b"")
    os.truncate(path, 1 << 40)
    ran = transfer("copy", path)
    assert (ran.code, ran.out) == (REFUSED, "")
    assert "[DEVICE_MEMORY]" in ran.err


def test_all_ends_with_the_command(transfer: Transfer, daemon: Daemon, tmp_path: Path) -> None:
    assert transfer("copy", written(tmp_path, b"x")).code == PASS
    with daemon.client() as agent:
        assert agent._run(calls.get_transfer_stats(b"")) == []


def test_it_is_denied_unless_granted(transfer: Transfer, daemon: Daemon, tmp_path: Path) -> None:
    path = sealed(tmp_path)
    try:
        for grants, words in ((), ("bench",)), ((), ("copy", path)), (GRANTS[:1], ("copy", path, *NAMED)):
            configure(daemon, *grants)
            daemon.reload()
            await_gpus(daemon)
            ran = transfer(*words)
            assert (ran.code, ran.out) == (REFUSED, "")
            assert "[NOT_ALLOWED]" in ran.err
    finally:
        configure(daemon, *GRANTS)
        daemon.reload()
        await_gpus(daemon)
