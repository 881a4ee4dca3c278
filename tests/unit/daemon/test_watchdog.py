"""systemd is told that all is well only while all is well."""

from __future__ import annotations

import asyncio
import math
import time

import pytest

from cgpu_agent.backends.notify import Notifier
from cgpu_agent.backends.tpm.owner import TpmOwner
from cgpu_agent.backends.tpm.software import Swtpm
from cgpu_agent.daemon.watchdog import Watchdog
from cgpu_agent.errors import DeviceFault
from fixtures.ear import Ear

PERIOD = 30.0


class Part:
    """A part of the daemon that can fall silent."""

    age = 0.0

    def heartbeat_age(self, now: float) -> float:
        return self.age


@pytest.fixture
def notifier(ear: Ear, monkeypatch: pytest.MonkeyPatch) -> Notifier:
    monkeypatch.setenv("WATCHDOG_USEC", str(int(PERIOD * 1e6)))
    return Notifier()


def test_ping_comes_three_times_a_period(notifier: Notifier, ear: Ear) -> None:
    watchdog = Watchdog(notifier, {})
    for second in range(1000, 1060):
        watchdog.feed(float(second))
    assert ear.heard() == ["WATCHDOG=1"] * 6


def test_nothing_is_fed_while_a_part_is_stuck(notifier: Notifier, ear: Ear) -> None:
    part = Part()
    watchdog = Watchdog(notifier, {"TPM thread": (part.heartbeat_age, 60.0), "door": (Part().heartbeat_age, 1.0)})
    part.age = 61.0
    assert watchdog.stuck(1000.0) == ("TPM thread",)
    watchdog.feed(1000.0)
    assert ear.heard() == []
    part.age = 60.0
    watchdog.feed(1001.0)
    assert ear.heard() == ["WATCHDOG=1"]


def test_part_whose_thread_ended_is_stuck(notifier: Notifier, ear: Ear) -> None:
    part = Part()
    part.age = math.inf
    watchdog = Watchdog(notifier, {"front door": (part.heartbeat_age, 10.0)})
    watchdog.feed(1000.0)
    assert (watchdog.stuck(1000.0), ear.heard()) == (("front door",), [])


def test_no_ping_where_systemd_wants_none(ear: Ear) -> None:
    Watchdog(Notifier(), {}).feed(1000.0)
    assert ear.heard() == []


@pytest.mark.swtpm
def test_tpm_thread_that_hangs_past_its_deadline_is_stuck(notifier: Notifier, ear: Ear, swtpm: Swtpm) -> None:
    async def scenario() -> None:
        owner = TpmOwner(swtpm.transport, command_timeout=1.0)
        watchdog = Watchdog(notifier, {"TPM thread": (owner.heartbeat_age, 60.0)})
        try:
            with pytest.raises(DeviceFault):
                await owner.run(lambda _: time.sleep(0.3), timeout=0.05)
            now = time.monotonic()
            assert watchdog.stuck(now) == ()  # late, but not yet for long
            assert watchdog.stuck(now + 61.0) == ("TPM thread",)
            watchdog.feed(now + 61.0)
            assert ear.heard() == []
        finally:
            owner.close()

    asyncio.run(scenario())
