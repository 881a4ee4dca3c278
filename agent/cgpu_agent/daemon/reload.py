"""What is in force of configuration, policy and trust in GPUs, and how a reload changes it."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import structlog

from cgpu_agent import __version__
from cgpu_agent.daemon import config as configuration
from cgpu_agent.daemon import logging as journal
from cgpu_agent.daemon.approvals import load_approvals
from cgpu_agent.daemon.brokerconfig import BROKER_TABLES
from cgpu_agent.daemon.build import build_digest
from cgpu_agent.daemon.config import Config, LogLevel
from cgpu_agent.daemon.gpus import load_judge
from cgpu_agent.daemon.policy import load_policy
from cgpu_agent.domain.core import Core
from cgpu_agent.domain.gpujudge import GpuJudge
from cgpu_agent.domain.gpustate import Reason
from cgpu_agent.domain.policy import Policy
from cgpu_agent.errors import AgentError, Misuse
from cgpu_agent.wire.bundle import MAX_CERTIFICATE

_FIXED = ("runtime_dir", "state_dir", "sockets", "tpm", "logs", "platform", "gpu", "limits", "key", *BROKER_TABLES)
"""What of the configuration takes a restart."""

log = structlog.get_logger()


class InForce:
    """What the agent goes by now.

    Args:
        config: as loaded.
        path: where to read it again; ``None`` = defaults, nothing to read.

    Attributes:
        problem: what of the last reload is not applied; ``None`` = nothing.

    Raises:
        Misuse: ``BAD_POLICY``, ``BAD_CONFIG``.
    """

    def __init__(self, config: Config, path: Path | None) -> None:
        self.config = self._started_with = config
        self.policy = load_policy(config)
        self.judge = load_judge(config.gpu)
        self.log_level = config.log_level
        self.problem: str | None = None
        self._path = path
        self._build = build_digest()

    def digests(self) -> dict[str, str]:
        """See ``Manifest.agent``."""
        return {
            "build": self._build,
            "config": self.config.digest,
            "policy": self.policy.digest,
            "version": __version__,
        }

    def ak_certificate(self) -> bytes | None:
        """The configured certificate of the platform AK; before enrolment there may be none yet."""
        configured = self._started_with.tpm.ak_certificate
        if configured == "nv":
            return None
        try:
            with Path(configured).open("rb") as file:
                return file.read(2 * MAX_CERTIFICATE)
        except OSError as error:
            log.warning("no AK certificate", file=configured, why=error.strerror)
            return None

    def use_log_level(self, level: LogLevel) -> None:
        self.log_level = level
        journal.configure(level)

    async def record(self, core: Core, event: str) -> None:
        """Put an event of the agent's own on record; what stands in the way is a state to show, not to end on."""
        if core.audit is None:
            return
        try:
            await core.audit.record(event, self.digests())
        except AgentError as error:
            core.audit_problem = error

    async def reload(self, core: Core) -> None:
        """Read configuration and policy again; a bad file changes nothing but ``problem``."""
        try:
            fresh = configuration.load(self._path)
            policy = await asyncio.to_thread(load_policy, fresh)
            judge = await asyncio.to_thread(load_judge, self._started_with.gpu)
            approvals = await asyncio.to_thread(load_approvals, self._started_with.sealed)
        except Misuse as error:
            self.problem = error.message
            log.error("configuration not reloaded", why=error.message)
            return
        if core.vault is not None:
            core.vault.use(approvals)
        fixed = [name for name in _FIXED if getattr(fresh, name) != getattr(self._started_with, name)]
        self.problem = f"restart to apply changes to {', '.join(fixed)}" if fixed else None
        changed = fresh.source != self.config.source or policy.digest != self.policy.digest
        self.use_log_level(fresh.log_level)
        await self._trust(core, judge, policy)
        self.config = fresh
        self.policy = policy
        core.certify(self.ak_certificate())
        await renew(core)
        if changed:
            await self.record(core, "agent-reload")
            try:
                await core.reloaded(self.digests())
            except AgentError as error:
                log.error("the reload was not measured", reason=error.slug, why=error.message)
        log.info("configuration reloaded", changed=changed, restart_for=fixed)

    async def _trust(self, core: Core, judge: GpuJudge, policy: Policy) -> None:
        """Drop the GPUs where what is trusted, or who may do what, is about to change."""
        if core.gpus is None:
            return
        if judge.digest != self.judge.digest:
            self.judge = judge
            await core.gpus.use(judge)
        elif policy.digest != self.policy.digest:
            await core.gpus.distrust(Reason("POLICY_CHANGED", "the policy has changed"))


async def renew(core: Core) -> None:
    """Look again for what the platform renews while the machine runs."""
    with contextlib.suppress(AgentError):  # a TPM that does not answer is the probe's to tell
        if await core.renew():
            log.info("the platform AK has another certificate")
