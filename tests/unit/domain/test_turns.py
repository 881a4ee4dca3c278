"""Nobody crowds out the others at the device."""

from __future__ import annotations

import asyncio

import pytest

from cgpu_agent.domain.turns import RoundRobin, Turns, together
from cgpu_agent.errors import Exhausted


def test_owners_are_served_in_turn_and_each_in_order() -> None:
    queue: RoundRobin[str] = RoundRobin()
    for entry in ("a1", "a2", "a3", "b1", "c1", "c2"):
        queue.push(entry[0], entry)
    assert [queue.pop() for _ in range(6)] == ["a1", "b1", "c1", "a2", "c2", "a3"]
    assert not queue


def test_one_call_overtakes_a_flood_of_another_caller() -> None:
    async def scenario() -> list[str]:
        turns, order = Turns(width=1), []

        async def job(owner: str, name: str) -> None:
            async with turns.turn(owner):
                order.append(name)
                await asyncio.sleep(0)

        flood = [asyncio.create_task(job("flood", f"flood{n}")) for n in range(20)]
        await asyncio.sleep(0)
        await job("quiet", "quiet")
        await asyncio.gather(*flood)
        return order

    order = asyncio.run(scenario())
    assert order.index("quiet") <= 3
    assert len(order) == 21


def test_refuses_more_waiting_jobs_of_one_caller_than_allowed_and_of_no_other() -> None:
    async def scenario() -> None:
        turns, hold = Turns(width=1, waiting_each=2), asyncio.Event()

        async def job(owner: str) -> None:
            async with turns.turn(owner):
                await hold.wait()

        tasks = [asyncio.create_task(job("a")) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Exhausted) as caught:
            await job("a")
        assert caught.value.slug == "TOO_MANY_CALLS"
        other = asyncio.create_task(job("b"))
        await asyncio.sleep(0)
        assert turns.waiting == 3
        hold.set()
        await asyncio.gather(*tasks, other)
        assert turns.waiting == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("granted", [False, True])
def test_a_caller_that_leaves_gives_its_turn_back(granted: bool) -> None:
    async def scenario() -> None:
        turns, hold = Turns(width=1), asyncio.Event()

        async def first() -> None:
            async with turns.turn("a"):
                await hold.wait()

        async def waiting() -> None:
            async with turns.turn("b"):
                raise AssertionError("it left before its turn")

        holder = asyncio.create_task(first())
        await asyncio.sleep(0)
        leaver = asyncio.create_task(waiting())
        await asyncio.sleep(0)
        if granted:  # the turn comes in the same step of the loop in which it leaves
            hold.set()
            await asyncio.sleep(0)
        leaver.cancel()
        hold.set()
        await asyncio.gather(leaver, return_exceptions=True)
        await holder
        async with turns.turn("c"):
            pass

    asyncio.run(asyncio.wait_for(scenario(), 5))


def test_where_one_fails_the_others_are_ended_with_it() -> None:
    ended: list[str] = []

    async def scenario() -> None:
        async def slow() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                ended.append("slow")

        async def broken() -> None:
            await asyncio.sleep(0)
            raise Exhausted("TOO_MANY_CALLS", "no")

        with pytest.raises(Exhausted):
            await together(slow(), broken(), slow())
        assert ended == ["slow", "slow"]
        assert await together(asyncio.sleep(0, 1), asyncio.sleep(0, "two")) == (1, "two")

    asyncio.run(scenario())
