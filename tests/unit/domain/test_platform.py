"""The platform is found out once, and asked once for many."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from cgpu_agent.backends.base import Platform, PlatformKind, PlatformReport
from cgpu_agent.domain.platform import PlatformBelow
from cgpu_agent.errors import DeviceFault


@dataclass
class SlowPlatform:
    """A platform whose reports take a moment, and that counts them."""

    kind: PlatformKind = "azure-cvm-snp"
    asked: list[bytes | None] = field(default_factory=list)
    broken: bool = False

    async def report(self, user_data: bytes | None, *, timeout: float) -> PlatformReport:
        assert timeout == 7.0
        self.asked.append(user_data)
        await asyncio.sleep(0.02)
        if self.broken:
            raise DeviceFault("TPM_TIMEOUT", "late")
        return PlatformReport(self.kind, bytes([len(self.asked)]), fresh=user_data is not None)


def test_many_who_want_any_report_share_one() -> None:
    platform = SlowPlatform()
    below = PlatformBelow(lambda: found(platform), timeout=7.0)

    async def go() -> list[PlatformReport]:
        first = await asyncio.gather(*(below.report() for _ in range(50)))
        return [*first, await below.report()]

    reports = asyncio.run(go())
    assert [each.report for each in reports] == [b"\1"] * 50 + [b"\2"]


def test_each_who_brings_user_data_gets_a_report_of_his_own() -> None:
    platform = SlowPlatform()
    below = PlatformBelow(lambda: found(platform), timeout=7.0)

    async def go() -> list[PlatformReport]:
        return await asyncio.gather(below.report(bytes(64)), below.report(b"\1" * 64), below.report())

    assert [each.fresh for each in asyncio.run(go())] == [True, True, False]
    assert sorted(platform.asked, key=str) == sorted([bytes(64), b"\1" * 64, None], key=str)


def test_who_gives_up_takes_the_answer_from_nobody() -> None:
    below = PlatformBelow(lambda: found(SlowPlatform()), timeout=7.0)

    async def go() -> PlatformReport:
        impatient, patient = asyncio.create_task(below.report()), asyncio.create_task(below.report())
        await asyncio.sleep(0.005)
        impatient.cancel()
        return await patient

    assert asyncio.run(go()).report == b"\1"


def test_a_failure_is_not_kept() -> None:
    platform = SlowPlatform(broken=True)
    below = PlatformBelow(lambda: found(platform), timeout=7.0)

    async def go() -> PlatformReport:
        with pytest.raises(DeviceFault):
            await below.report()
        platform.broken = False
        return await below.report()

    assert asyncio.run(go()).report == b"\2"


def test_it_is_found_out_once_and_again_after_a_failure() -> None:
    tries: list[int] = []

    async def detect() -> Platform:
        tries.append(1)
        await asyncio.sleep(0.01)
        if len(tries) == 1:
            raise DeviceFault("TPM_IO", "not yet")
        return SlowPlatform()

    below = PlatformBelow(detect, timeout=7.0)

    async def go() -> None:
        with pytest.raises(DeviceFault):
            await below.report()
        await asyncio.gather(below.report(), below.report(bytes(64)), below.report(b"\1" * 64))

    asyncio.run(go())
    assert len(tries) == 2


async def found(platform: Platform) -> Platform:
    return platform
