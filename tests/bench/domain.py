"""What group commit is worth, without gRPC and the callers' own work: evidence beside a quote for each caller.

The platform AK is RSA, as on Azure: that is the quote which every caller would otherwise wait for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from online import AUDIENCE, in_turns
from ratios import Pair, per_second, seconds_each
from world import AK_HANDLE, BOOT_LOG, Helper, RawTpm, quote_and_read, swtpm_with_boot

from cgpu_agent.backends.logs import SystemLogs
from cgpu_agent.backends.tpm.owner import TpmOwner
from cgpu_agent.backends.tpm.transport import UnixPerCommand
from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.core import Core, Settings
from cgpu_agent.domain.evidence import Request
from cgpu_agent.domain.store import Store

T = TypeVar("T")

CALLERS = 256
SLOW_SECONDS = 0.2
_US = Caller(os.geteuid(), os.getegid(), (), os.getpid(), None, None, None, None, "pid")


class _Clock:
    def monotonic(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def time(self) -> float:
        return time.time()


class Agent:
    """The domain on a TPM of its own, in this process. One event loop's, which it keeps.

    Args:
        home: an empty directory with a short path.
        delay: seconds that every quote takes longer.
    """

    def __init__(self, home: Path, delay: float, stack: contextlib.ExitStack) -> None:
        home.mkdir(mode=0o700)
        tpm = swtpm_with_boot(home / "t")
        stack.callback(tpm.kill)
        RawTpm(tpm.data_socket).provision("rsa")
        self.socket = tpm.data_socket
        if delay:
            self.socket = home / "slow"
            slow = Helper("slow_tpm.py", str(self.socket), str(tpm.data_socket), str(delay))
            stack.callback(slow.stop)
            slow.says()
        owner = TpmOwner(lambda: UnixPerCommand(self.socket))
        stack.callback(owner.close)
        settings = Settings(
            boot_id=str(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()),
            platform_ak_handle=AK_HANDLE,
            create_platform_ak=None,
            register=13,
            evidence_pcrs=tuple(range(16)),
            agent={"build": "00" * 32, "config": "00" * 32, "policy": "00" * 32, "version": "0"},
            request_seconds=30.0,
            identity_strength="pid",
        )
        logs = SystemLogs([BOOT_LOG], home / "no-systemd-log")
        self._core = Core(tpm=owner, logs=logs, store=Store(home / "private"), clock=_Clock(), settings=settings)
        self._loop = asyncio.new_event_loop()
        stack.callback(self._loop.close)
        self._loop.run_until_complete(self._core.establish())

    def latencies(self, callers: int) -> list[float]:
        """Ask for evidence with so many callers at once; seconds that each waited."""
        return self._loop.run_until_complete(self._ask(callers))

    async def _ask(self, callers: int) -> list[float]:
        async def one() -> float:
            begun = time.perf_counter()
            await self._core.evidence.get(_US, Request(secrets.token_bytes(32), AUDIENCE))
            return time.perf_counter() - begun

        return list(await asyncio.gather(*(one() for _ in range(callers))))


@contextlib.contextmanager
def running(home: Path) -> Iterator[dict[str, Agent]]:
    """One on a fast TPM, one on a TPM as slow as a cloud's."""
    with contextlib.ExitStack() as stack:
        yield {
            "RSA": Agent(home / "d", 0, stack),
            f"RSA + {SLOW_SECONDS * 1e3:.0f} ms": Agent(home / "ds", SLOW_SECONDS, stack),
        }


def group_commit(home: Path, *, rounds: int) -> list[Pair]:
    """Rates with many callers, the longest wait among them, and what one caller alone pays."""
    with running(home) as agents:
        return [pair for name, agent in agents.items() for pair in _of(name, agent, rounds)]


def _of(name: str, agent: Agent, rounds: int) -> list[Pair]:
    commands = RawTpm(agent.socket).commands()
    waits: list[float] = []

    def many() -> float:
        begun = time.perf_counter()
        found = sorted(agent.latencies(CALLERS))
        waits.append(found[int(len(found) * 0.99)])
        return CALLERS / (time.perf_counter() - begun)

    found = in_turns(
        rounds,
        {
            "many": many,
            "one each": lambda: per_second(lambda: quote_and_read(commands), 0.3),
            "alone": lambda: seconds_each(lambda: agent.latencies(1), 4),
            "quote": lambda: seconds_each(lambda: quote_and_read(commands), 4),
        },
    )
    commands.close()
    quote, each = "TPM2_Quote and PCR_Read, RSA, in process", "one such quote each"
    at_once = f"{name}: evidence, {CALLERS} at once, in process"
    return [
        Pair.of(at_once, each, "/s", found["many"], found["one each"], ">= 40"),
        Pair.of(f"  {name}: p99 of their waits", quote, "s", waits[1:], found["quote"]),
        Pair.of(f"  {name}: evidence, one caller", quote, "s", found["alone"], found["quote"], "<= 1.1"),
    ]
