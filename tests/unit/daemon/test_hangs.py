"""Each part of the daemon hangs for real, and the watchdog knows which; when it moves again that is known, too."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from cgpu_agent.backends.notify import Notifier
from cgpu_agent.daemon.app import App
from cgpu_agent.daemon.config import load
from cgpu_agent.daemon.parts import SystemClock
from cgpu_agent.daemon.watchdog import Heartbeat, Watchdog
from cgpu_agent.domain.audit import AuditLog
from cgpu_agent.domain.gpustate import EXPIRED, Reason
from fixtures.daemon import Daemon, booted_daemon
from fixtures.gpusessions import site
from fixtures.leases import Lending, running
from fixtures.machine import BOOT_ID
from fixtures.softwaregpu import running_gpus
from frontdoor_kit import Kit, connect, until, with_kit


class Watched:
    """One part under a watchdog."""

    def __init__(self, age: object, limit: float) -> None:
        heartbeat: Heartbeat = (age, limit)  # type: ignore[assignment]
        self._watchdog = Watchdog(Notifier(), {"part": heartbeat})

    def stuck(self) -> bool:
        return self._watchdog.stuck(time.monotonic()) == ("part",)


def test_the_audit_logs_writer_at_a_disk_that_does_not_answer(tmp_path: Path) -> None:
    """A FIFO that nobody reads stands for the disk."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    log = folder / "audit.jsonl"

    async def scenario() -> None:
        audit = AuditLog(folder, BOOT_ID, SystemClock())
        part = Watched(audit.heartbeat_age, 0.2)
        await audit.record("before", {})
        assert not part.stuck()
        log.rename(folder / "away")
        os.mkfifo(log)
        writing = asyncio.create_task(audit.record("stuck", {}))
        await until(part.stuck)
        reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
        await asyncio.wait([writing])
        assert not part.stuck()
        os.close(reader)

    asyncio.run(scenario())


def test_the_lease_doors_thread() -> None:
    async def scenario(lending: Lending) -> None:
        part = Watched(lending.door.heartbeat_age, 0.2)
        held, identifier = threading.Event(), lending.door._identifier

        class Hanging:
            def require_identity(self, credentials: object) -> None:
                held.wait()
                lending.door._identifier = identifier

        lending.door._identifier = Hanging()  # type: ignore[assignment]
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(lending.path)
            await until(part.stuck)
            held.set()
            await until(lambda: not part.stuck())

    running(scenario)


def test_the_front_doors_thread() -> None:
    async def scenario(kit: Kit) -> None:
        part, held = Watched(kit.front.heartbeat_age, 0.2), threading.Event()
        kit.front._on_open = lambda _: (held.wait(), None)[1]
        with contextlib.closing(connect(kit.public)):
            await until(part.stuck)
            held.set()
            await until(lambda: not part.stuck())

    with_kit(scenario)


def test_the_watch_over_gpus_at_a_record_that_never_comes() -> None:
    async def scenario() -> None:
        with running_gpus("--count", "1") as process:
            async with site(process) as here:
                part = Watched(here.sessions.heartbeat_age, 60.0)
                await here.tick()
                assert here.state == "ready"
                recorded = here.log.dropped

                async def never(_reason: Reason) -> None:
                    await asyncio.Event().wait()

                here.log.dropped = never  # type: ignore[method-assign]
                here.sessions.state.doubt(EXPIRED)
                ticking = asyncio.create_task(here.sessions._poll())
                for _ in range(3):  # by the clock, a minute passes three times
                    await asyncio.sleep(0.2)
                    here.clock.pass_by(61.0)
                assert part.stuck()
                ticking.cancel()
                here.log.dropped = recorded  # type: ignore[method-assign]
                await here.tick()
                assert not part.stuck()

    asyncio.run(scenario())


@pytest.mark.swtpm
def test_no_part_of_the_daemon_is_left_out() -> None:
    async def scenario(daemon: Daemon) -> None:
        app = App(load(daemon.config), daemon.config, Notifier())
        watched = app._watchdog._heartbeats
        assert watched.keys() == {
            "TPM thread",
            "front door",
            "admin door",
            "lease door",
            "upkeep",
            "audit writer",
            "GPU watch",
        }
        assert "upkeep" in app._watchdog.stuck(time.monotonic() + 1000.0)
        app._parts.tpm.close()

    with booted_daemon() as daemon:
        daemon.tables["gpu"] = f'backend = "software:{daemon.folder}/gpu.sock"'
        daemon.configure()
        asyncio.run(scenario(daemon))
