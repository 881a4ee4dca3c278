"""How much strangers may make the service hold: bytes of bodies and verifications, counted and refused beyond."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from starlette.requests import Request

from cgpu_agent.errors import Exhausted, Misuse, Unavailable

RETRY_SECONDS: Final = 1.0


class Budget:
    """Units that all running requests share; one event loop's."""

    def __init__(self, capacity: int) -> None:
        self._capacity: Final = capacity
        self.used = 0

    def take(self, units: int) -> None:
        """Raises ``Unavailable`` (``BUSY``) where there are not as many left."""
        if self.used + units > self._capacity:
            raise Unavailable("BUSY", "the service has as much to do as it can hold", retry_after=RETRY_SECONDS)
        self.used += units

    def give_back(self, units: int) -> None:
        self.used -= units


@asynccontextmanager
async def body_of(request: Request, *, limit: int, seconds: float, budget: Budget) -> AsyncIterator[bytes]:
    """The request's body, whose bytes count against ``budget`` as they arrive and until the context ends.

    A slow sender thus holds what it has sent, and no more than ``seconds`` long.

    Raises:
        Exhausted: ``BODY_TOO_LARGE``, as soon as that is known.
        Misuse: ``BODY_TOO_SLOW``.
        Unavailable: ``BUSY``.
    """
    taken = 0
    chunks: list[bytes] = []

    async def collect() -> bytes:
        nonlocal taken
        async for chunk in request.stream():
            if taken + len(chunk) > limit:
                raise _too_large(limit)
            budget.take(len(chunk))
            taken += len(chunk)
            chunks.append(chunk)
        return b"".join(chunks)

    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced[:20]) > limit:
        raise _too_large(limit)
    try:
        try:
            data = await asyncio.wait_for(collect(), seconds)
        except (asyncio.TimeoutError, TimeoutError):
            raise Misuse("BODY_TOO_SLOW", f"the body did not arrive within {seconds:g} seconds") from None
        chunks.clear()
        yield data
    finally:
        budget.give_back(taken)


def _too_large(limit: int) -> Exhausted:
    return Exhausted("BODY_TOO_LARGE", f"the body has more than {limit} bytes")
