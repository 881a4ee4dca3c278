"""The life of the daemon: it starts, serves, shows how it is, takes up what changed, and stops."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from pathlib import Path
from typing import Any, cast, get_args

import structlog

from cgpu_agent import __version__
from cgpu_agent.backends.notify import Notifier
from cgpu_agent.daemon import status
from cgpu_agent.daemon.config import Config, LogLevel
from cgpu_agent.daemon.metrics import families
from cgpu_agent.daemon.parts import make_parts
from cgpu_agent.daemon.rejections import Rejections
from cgpu_agent.daemon.reload import InForce, renew
from cgpu_agent.daemon.watchdog import Heartbeat, Watchdog
from cgpu_agent.domain.core import is_final
from cgpu_agent.domain.gpus import GpuSessions
from cgpu_agent.errors import AgentError, Misuse
from cgpu_agent.wire.metrics import exposition

_DRAIN_SECONDS = 5.0
_STATUS_SECONDS = 1.0
_PROBE_SECONDS = 5.0
_RENEW_SECONDS = 3600.0
_DISK_SECONDS = 60.0

log = structlog.get_logger()


class App:
    """One run of the daemon.

    Args:
        config: as loaded.
        config_path: where to read it again at a reload; ``None`` = defaults, nothing to read.
        notifier: the service manager's ear.
    """

    def __init__(self, config: Config, config_path: Path | None, notifier: Notifier) -> None:
        self._notifier = notifier
        self._in_force = InForce(config, config_path)
        self._parts = make_parts(config, self._in_force, notifier, self)
        self._core = self._parts.core
        self._servers = (self._parts.public, self._parts.admin)
        self._started = self._kept_up = time.monotonic()
        self._watchdog = Watchdog(notifier, self._heartbeats(float(config.tpm.request_seconds)))

    def _heartbeats(self, request_seconds: float) -> dict[str, Heartbeat]:
        """Whose silence ends this run of the agent. The event loop's does, because it feeds the watchdog."""
        parts, core, slow = self._parts, self._core, 60.0 + 4.0 * request_seconds
        found: dict[str, Heartbeat] = {
            "TPM thread": (parts.tpm.heartbeat_age, 2.0 * request_seconds),
            "front door": (parts.public.door.heartbeat_age, 10.0),
            "admin door": (parts.admin.door.heartbeat_age, 10.0),
            "lease door": (parts.lease_door.heartbeat_age, 10.0),
            "upkeep": (lambda now: now - self._kept_up, slow),
        }
        if core.audit is not None:
            found["audit writer"] = (core.audit.heartbeat_age, _DISK_SECONDS)
        if core.gpus is not None:
            found["GPU watch"] = (core.gpus.heartbeat_age, slow)
        return found

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            AgentError: the daemon could not begin to serve.
        """
        stop, reload = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        # Before READY=1: a reload signal that arrives early must not kill.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, reload.set)
        self._notifier.status("Starting")
        gpus = self._core.gpus
        if gpus is not None:
            await gpus.start()  # first of all: nobody watched the GPUs while the agent was away
        await self._in_force.record(self._core, "agent-start")
        await self._resume_leases()
        for server in self._servers:
            await server.start()
        self._parts.lease_door.start()
        if self._parts.metrics_door is not None:
            self._parts.metrics_door.start()
        stopped = asyncio.create_task(stop.wait())
        establishing = asyncio.create_task(self._establish())
        tasks = {stopped, establishing}
        try:
            # Give the TPM a moment, so that "started" usually means "serving"; but a silent TPM is a state to show,
            # not a reason to fail the start.
            await asyncio.wait(
                tasks, timeout=self._core.settings.request_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            await self._show()
            self._notifier.ready()
            log.info("ready", version=__version__, socket=self._parts.public.public_path)
            tasks |= {
                asyncio.create_task(work)
                for work in (self._beat(), self._keep_up(), self._probe(), self._renew(), self._reloads(reload))
            }
            if gpus is not None:
                tasks |= {asyncio.create_task(work) for work in (gpus.run(), self._tell_gpus(gpus))}
            running: set[asyncio.Task[Any]] = tasks
            while not stop.is_set():
                ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    task.result()  # one that failed ends the daemon, and systemd starts another
        finally:
            await self._shut(tasks)

    async def _resume_leases(self) -> None:
        """Before anybody can ask for one."""
        kept = self._parts.kept
        if kept:
            resumed = await asyncio.to_thread(self._parts.lease_door.resume, kept)
            log.info("leases of the last run go on", kept=len(kept), resumed=resumed)
            kept.clear()

    async def _shut(self, tasks: set[asyncio.Task[Any]]) -> None:
        self._notifier.stopping()
        self._core.stop()
        self._notifier.status("Stopping: finishing running calls")
        log.info("stopping")
        if self._core.gpus is not None:
            await self._core.gpus.stop()
        with contextlib.suppress(asyncio.TimeoutError):  # which closes the latch; the next start does it for sure
            await asyncio.wait_for(self._follow(), _DRAIN_SECONDS)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        if self._core.channels is not None:
            await self._core.channels.stop()
        await asyncio.gather(*(server.stop(_DRAIN_SECONDS) for server in self._servers))
        await asyncio.to_thread(self._parts.lease_door.close)
        if self._parts.metrics_door is not None:
            await asyncio.to_thread(self._parts.metrics_door.close)
        await self._parts.recorder.settle()
        await self._audit_denials(now=True)
        await self._in_force.record(self._core, "agent-stop")
        if self._core.release is not None:
            self._core.release.close()
        await asyncio.get_running_loop().run_in_executor(None, self._parts.tpm.close)

    async def _establish(self) -> None:
        """Reach the TPM, patiently: a vTPM may come late, or come back."""
        wait = 1.0
        while True:
            try:
                await self._core.establish()
            except AgentError as error:
                final = is_final(error)
                log.error("evidence is not available", reason=error.slug, why=error.message, final=final)
                await self._show()
                if final:
                    return
                await asyncio.sleep(wait)
                wait = min(wait * 2, 30.0)
            else:
                log.info("serving evidence", agent_ak=self._core.boot.keys.agent_ak_name.hex())
                return

    async def _beat(self) -> None:
        """Show the state, and that it moves. Waits for nobody, so that it can also show what does not."""
        while True:
            await asyncio.sleep(_STATUS_SECONDS)
            self._watchdog.feed(time.monotonic())
            await self._show()

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(_STATUS_SECONDS)
            self._kept_up = time.monotonic()
            if await self._core.watch_vm():
                log.error("this VM was restored from a snapshot, or copied")
                await self._in_force.record(self._core, "vm-restored")
            await self._audit_denials()
            await self._follow()

    async def _audit_denials(self, *, now: bool = False) -> None:
        """Put counted refusals on record; a write that succeeds also ends an earlier trouble."""
        if self._core.audit is None:
            return
        try:
            if await self._core.audit.flush_denials(now=now):
                self._core.audit_problem = None
        except AgentError as error:
            self._core.audit_problem = error

    async def _follow(self) -> None:
        """Have the latch of the sealed keys as the machine is."""
        if self._core.vault is not None:
            await self._core.vault.follow(self._core.trusted)

    async def _probe(self) -> None:
        while True:
            await asyncio.sleep(_PROBE_SECONDS)
            if self._core.established:
                with contextlib.suppress(AgentError):  # kept as the core's state
                    await self._core.boot.probe()

    async def _renew(self) -> None:
        """Look again now and then for what the platform renews while the machine runs."""
        while True:
            await asyncio.sleep(_RENEW_SECONDS)
            await renew(self._core)

    async def _tell_gpus(self, gpus: GpuSessions) -> None:
        """Every change of the GPUs, in the journal."""
        told: object = None
        rejections = Rejections()
        async for view in gpus.watch():
            if view.state != told:
                told = view.state
                await self._follow()
                reason = view.reason
                log.info("GPUs", state=told, line=view.line, reason=None if reason is None else reason.slug)
            for uuid, why in rejections.news(view.sessions):
                log.warning("GPU rejected", uuid=uuid, reason=why.slug, why=why.message)

    async def _show(self) -> None:
        """Make systemd's line and grpc.health tell the same truth."""
        await self._parts.public.set_serving(self._core.ready())
        await self._parts.admin.set_serving(True)
        line = status.line(self._core, self._servers, self._watchdog.stuck(time.monotonic()), self._in_force.problem)
        self._notifier.status(line)

    async def _reloads(self, asked: asyncio.Event) -> None:
        while await asked.wait():
            asked.clear()
            self._notifier.reloading()
            await self._in_force.reload(self._core)
            await self._show()
            self._notifier.ready()

    # -- for the operator: see ``rpc.admin.Operated``

    def status(self) -> status.pb.GetStatusResponse:
        stuck, uptime = self._watchdog.stuck(time.monotonic()), time.monotonic() - self._started
        return status.compose(self._core, self._servers, stuck, self._in_force.problem, uptime)

    def metrics(self) -> str:
        problems = status.problems(self._core, self._watchdog.stuck(time.monotonic()), self._in_force.problem)
        state = status.state_of(self._core, problems)
        return exposition(families(self._core, self._servers, self._parts.tpm, self._parts.leases, state, problems))

    def log_level(self) -> tuple[str, str]:
        return self._in_force.log_level, self._in_force.config.log_level

    def set_log_level(self, level: str) -> None:
        if level not in get_args(LogLevel):
            raise Misuse("BAD_LOG_LEVEL", f"the level must be one of {', '.join(get_args(LogLevel))}")
        log.warning("log level set", level=level)
        self._in_force.use_log_level(cast(LogLevel, level))
