"""A thread that hangs holds up nobody, and gives back what it has when it comes loose."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cgpu_agent.domain.errand import Errand
from cgpu_agent.errors import Misuse, Unavailable


def test_jobs_run_in_order_and_their_errors_arrive() -> None:
    async def scenario() -> None:
        ended: list[str] = []
        errand = Errand(lambda: ended.append("end"))
        assert await errand.run(lambda: 7, 10) == 7

        def refuse() -> None:
            raise Misuse("NO", "no")

        with pytest.raises(Misuse):
            await errand.run(refuse, 10)
        await errand.finish(lambda: ended.append("last"))
        assert ended == ["last", "end"]

    asyncio.run(scenario())


def test_a_job_that_hangs_is_left_and_ends_when_it_ends() -> None:
    async def scenario() -> None:
        hang, ended = threading.Event(), asyncio.Event()
        last: list[int] = []
        errand = Errand(ended.set)
        with pytest.raises(Unavailable) as raised:
            await errand.run(hang.wait, 0.05)
        assert raised.value.slug == "SOURCE_STALLED"
        await errand.finish(lambda: last.append(1))
        assert not last
        assert not ended.is_set()
        hang.set()
        await asyncio.wait_for(ended.wait(), 30)
        assert last == [1]

    asyncio.run(scenario())


def test_a_job_that_nobody_waits_for_any_more_is_not_begun() -> None:
    async def scenario() -> None:
        hang, begun = threading.Event(), threading.Event()
        errand = Errand(lambda: None)
        for job in (hang.wait, begun.set):
            with pytest.raises(Unavailable):
                await errand.run(job, 0.05)
        hang.set()
        await errand.finish(lambda: None)
        assert not begun.is_set()

    asyncio.run(scenario())
