"""Events reach every follower, in order; what could not be kept is told."""

from __future__ import annotations

import asyncio
import gc
import threading

from cgpu_agent.backends.base import GpuEvent
from cgpu_agent.backends.gpu.hub import LIMIT, Follower, Hub


def xid(number: int) -> GpuEvent:
    return GpuEvent("xid", "0000:01:00.0", f"XID {number}")


async def following(follower: Follower, count: int) -> list[GpuEvent]:
    return [await asyncio.wait_for(anext(follower), 30) for _ in range(count)]


def test_every_follower_gets_every_event_from_its_making_on() -> None:
    async def scenario() -> None:
        hub = Hub()
        hub.publish(xid(0))
        first = hub.follow()
        hub.publish(xid(1))
        second = hub.follow()
        hub.publish(xid(2))
        assert await following(first, 2) == [xid(1), xid(2)]
        assert await following(second, 1) == [xid(2)]

    asyncio.run(scenario())


def test_a_sleeping_follower_is_woken_from_another_thread() -> None:
    async def scenario() -> None:
        hub = Hub()
        follower = hub.follow()
        for number in range(3):
            waiting = asyncio.create_task(following(follower, 1))
            await asyncio.sleep(0)
            thread = threading.Thread(target=hub.publish, args=(xid(number),))
            thread.start()
            assert await waiting == [xid(number)]
            thread.join()

    asyncio.run(scenario())


def test_a_flood_is_bounded_and_its_loss_is_told() -> None:
    async def scenario() -> None:
        hub = Hub()
        follower = hub.follow()
        for number in range(100 * LIMIT):
            hub.publish(xid(number))
        hub.close()
        told = [event async for event in follower]
        assert len(told) <= LIMIT + 1
        assert told[0].kind == "watch-lost"
        assert told[-1] == xid(100 * LIMIT - 1)

    asyncio.run(scenario())


def test_an_outage_is_told_once_and_to_those_who_come_later() -> None:
    async def scenario() -> None:
        hub = Hub()
        early = hub.follow()
        hub.lose("xid", "no driver")
        hub.lose("xid", "no driver, again")
        late = hub.follow()
        hub.regain("xid")
        hub.publish(xid(1))
        outage = GpuEvent("watch-lost", None, "no driver")
        assert await following(early, 2) == [outage, xid(1)]
        assert await following(late, 2) == [outage, xid(1)]
        assert await following(hub.follow(), 0) == []
        hub.lose("xid", "no driver")
        assert await following(early, 1) == [outage]

    asyncio.run(scenario())


def test_a_closed_hub_ends_its_followers_after_what_waits() -> None:
    async def scenario() -> None:
        hub = Hub()
        before = hub.follow()
        hub.publish(xid(1))
        hub.close()
        assert [event async for event in before] == [xid(1)]
        assert [event async for event in hub.follow()] == []

    asyncio.run(scenario())


def test_a_follower_whose_loop_is_gone_holds_nobody_up() -> None:
    hub = Hub()

    async def scenario() -> Follower:
        return hub.follow()

    orphan = asyncio.run(scenario())
    hub.publish(xid(1))
    del orphan
    gc.collect()
    hub.publish(xid(2))
