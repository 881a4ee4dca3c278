"""A real daemon opens sealed objects into memory on lease: whole, on record, or not at all; the key goes nowhere."""

from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cgpu_agent.client import AgentError, AsyncAgent
from cgpu_agent.client.lease import LeasedMemory
from cgpu_agent.errors import Denied, Misuse, Unavailable
from cgpu_agent.objects.stream import Sealer
from cgpu_agent.wire.audit import EMPTY, AuditRecord, follow
from cgpu_agent.wire.sealed import ObjectName
from fixtures.ctl import PASS, Ctl
from fixtures.daemon import PATIENCE, Daemon, booted_daemon
from fixtures.policies import permit
from fixtures.workload import ask

pytestmark = pytest.mark.swtpm

KEY = os.urandom(32)
"""A canary: it must turn up nowhere outside the agent's memory."""
PLAIN = os.urandom(1 << 20) + b"the weights" * 200_000
NAME = ObjectName("models/llama", "llama-70b", 3)
ME = f"principal.uid == {os.geteuid()}"
OPEN = permit("key.open", f'{ME} && resource == CGpu::Key::"models/llama"')
KEYS = """
[[key]]
id = "models/llama"
broker = "credential"
path = "llama.key"

[[key]]
id = "short"
broker = "credential"
path = "short.key"
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
        (credentials / "llama.key").write_bytes(KEY)
        (credentials / "short.key").write_bytes(KEY[:16])
        agent.environment["CREDENTIALS_DIRECTORY"] = str(credentials)
        yield agent


def sealed(plain: bytes, name: ObjectName = NAME, segment_size: int = 1 << 20) -> bytes:
    sink = io.BytesIO()
    sealer = Sealer(sink, KEY, name, segment_size)
    sealer.write(plain)
    sealer.finish()
    return sink.getvalue()


@pytest.fixture
def file(daemon: Daemon) -> Path:
    path = daemon.folder / "llama.sealed"
    path.write_bytes(sealed(PLAIN))
    return path


def records(daemon: Daemon) -> list[AuditRecord]:
    return follow((daemon.folder / "state" / "audit.jsonl").read_bytes(), EMPTY)[0]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_sdk_opens_an_object_in_three_lines_and_it_is_on_record(
    daemon: Daemon, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(daemon, OPEN)
    daemon.start()
    with daemon.client() as agent, file.open("rb") as source:
        with agent.open_sealed("models/llama", source, object_id="llama-70b", version=3) as plain:
            assert plain.readonly
            assert bytes(plain) == PLAIN
            kept = plain[:16]
        assert bytes(kept) == PLAIN[:16] or bytes(kept) == bytes(16)
        until(lambda: bytes(kept) == bytes(16))
        kept.release()
        (listed,) = agent.list_keys()
        assert (listed.key, listed.wrapped, listed.plain, listed.opens) == ("models/llama", False, False, True)
        with pytest.raises(Denied) as raised:
            agent.get_key("models/llama")
        assert raised.value.slug == "NOT_ALLOWED"

    async def another() -> bytes:
        async with AsyncAgent(daemon.socket) as agent:
            with file.open("rb") as source:
                async with agent.open_sealed("models/llama", source, object_id="llama-70b", version=3) as plain:
                    return bytes(plain)

    assert asyncio.run(another()) == PLAIN
    assert daemon.stop() == 0
    told = [each for each in records(daemon) if each.event in ("call", "key", "call-ended")]
    assert [each.event for each in told[:3]] == ["call", "key", "call-ended"]
    key, ended = told[1].data, told[2].data
    assert (key["key"], key["how"], key["object"], key["version"]) == ("models/llama", "open", "llama-70b", "3")
    assert (key["policies"], ended["code"]) == (["key.open"], "OK")
    log = str(daemon.folder / "state" / "audit.jsonl")
    assert Ctl(tmp_path, capsys)("audit", "verify", log).code == PASS
    kept_files = [path for path in daemon.folder.rglob("*") if path.is_file() and path.parent.name != "credentials"]
    for data in ("".join(daemon.journal).encode(), *(path.read_bytes() for path in kept_files)):
        assert KEY not in data
        assert PLAIN[:32] not in data


def test_every_size_is_opened_whole(daemon: Daemon) -> None:
    configure(daemon, OPEN)
    daemon.start()
    path = daemon.folder / "object"
    with daemon.client() as agent:
        for segment_size in (1 << 20, 1 << 12):
            for size in (0, 1, segment_size - 56, segment_size - 55, len(PLAIN)):
                path.write_bytes(sealed(PLAIN[:size], segment_size=segment_size))
                with (
                    path.open("rb") as source,
                    agent.open_sealed(
                        "models/llama", source, object_id="llama-70b", version=3, segment_size=segment_size
                    ) as plain,
                ):
                    assert bytes(plain) == PLAIN[:size]
    assert daemon.stop() == 0


def test_another_object_version_or_cut_does_not_open_and_says_so(daemon: Daemon, file: Path) -> None:
    configure(daemon, permit("key.open", f'{ME} && resource in [CGpu::Key::"models/llama", CGpu::Key::"short"]'))
    daemon.start()
    with daemon.client() as agent, file.open("rb") as source:
        for key, object_id, version, segment_size, slug in (
            ("models/llama", "llama-8b", 3, 1 << 20, "NOT_AUTHENTIC"),
            ("models/llama", "llama-70b", 2, 1 << 20, "NOT_AUTHENTIC"),
            ("models/llama", "llama-70b", 3, 1 << 12, "NOT_AUTHENTIC"),
            ("models/llama", "llama-70b", 3, 1 << 16, "BAD_SEGMENT_SIZE"),
            ("models/llama", "two words", 3, 1 << 20, "BAD_OBJECT_NAME"),
            ("models/llama", "llama-70b", 0, 1 << 20, "BAD_OBJECT_NAME"),
            ("models/llama", "llama-70b", 1 << 64, 1 << 20, "BAD_OBJECT_NAME"),
        ):
            with (
                pytest.raises(Misuse) as refused,
                agent.open_sealed(key, source, object_id=object_id, version=version, segment_size=segment_size),
            ):
                pass
            assert refused.value.slug == slug
        with (
            pytest.raises(Unavailable) as unfit,
            agent.open_sealed("short", source, object_id="llama-70b", version=3),
        ):
            pass
        assert unfit.value.slug == "KEY_NOT_FOR_OBJECTS"
        with (
            pytest.raises(Denied) as unknown,
            agent.open_sealed("models/other", source, object_id="llama-70b", version=3),
        ):
            pass
        assert unknown.value.slug == "NOT_ALLOWED"
    assert daemon.stop() == 0


def test_without_a_permit_there_is_not_even_a_lease(daemon: Daemon, file: Path) -> None:
    configure(daemon, permit("key.get", ME), permit("key.get_plain", ME))
    daemon.start()
    with file.open("rb") as source:
        with pytest.raises(Denied) as raised:
            LeasedMemory(daemon.lease_socket, 4096, source, PATIENCE)
        assert raised.value.slug == "NOT_ALLOWED"
        with (
            daemon.client() as agent,
            pytest.raises(AgentError),
            agent.open_sealed("models/llama", source, object_id="llama-70b", version=3),
        ):
            pass
    assert daemon.stop() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_another_uid_is_not_lent_to(daemon: Daemon, file: Path) -> None:
    configure(daemon, OPEN)
    file.chmod(0o644)
    daemon.start()
    assert ask(daemon.socket, "open") == PLAIN[:16].hex()
    assert ask(daemon.socket, "open", uid=12345)[0] == "NOT_ALLOWED"
    assert daemon.stop() == 0
    refused = [each.data for each in records(daemon) if each.event == "denied"]
    assert {"count": 1, "method": "lease", "reason": "NOT_ALLOWED", "uid": 12345} in refused


def test_leases_end_with_the_agent_and_with_the_policy(daemon: Daemon, file: Path) -> None:
    configure(daemon, OPEN)
    daemon.start()
    with (
        daemon.client() as agent,
        file.open("rb") as source,
        agent.open_sealed("models/llama", source, object_id="llama-70b", version=3) as plain,
    ):
        configure(daemon)
        daemon.reload()
        with pytest.raises(Denied), agent.open_sealed("models/llama", source, object_id="llama-70b", version=3):
            pass
        assert bytes(plain) == PLAIN
        assert daemon.stop() == 0
        assert bytes(plain) == bytes(len(PLAIN))
