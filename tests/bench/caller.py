"""The calling side, in a process of its own: reads one JSON task a line, answers with one JSON line.

A task: ``address`` (path), ``method``, ``request`` (hex), ``callers`` (connections that call at once), ``calls`` (of
each caller). The answer: ``p50`` and ``p99`` in seconds, ``rate`` in calls a second.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from typing import Any

import grpc

# A pool of its own for each channel, or all of them would share one connection.
_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 32 << 20))
_SECONDS = 60.0


class Caller:
    """Keeps its connections between tasks: connecting is not what is measured."""

    def __init__(self) -> None:
        self._calls: dict[tuple[str, str], list[Any]] = {}
        self._channels: dict[str, list[grpc.aio.Channel]] = {}

    async def run(self, task: dict[str, Any]) -> dict[str, float]:
        calls = await self._ready(task["address"], task["method"], task["callers"])
        request = bytes.fromhex(task["request"])
        begun = time.perf_counter()
        found = await asyncio.gather(*(self._one(call, request, task["calls"]) for call in calls))
        elapsed = time.perf_counter() - begun
        times = sorted(seconds for part in found for seconds in part)
        return {
            "p50": statistics.median(times),
            "p99": times[int(len(times) * 0.99)],
            "rate": len(times) / elapsed,
        }

    async def _ready(self, address: str, method: str, callers: int) -> list[Any]:
        channels = self._channels.setdefault(address, [])
        while len(channels) < callers:
            channel = grpc.aio.insecure_channel(f"unix:{address}", options=_OPTIONS)
            await asyncio.wait_for(channel.channel_ready(), _SECONDS)
            channels.append(channel)
        calls = self._calls.setdefault((address, method), [])
        calls += [channel.unary_unary(method) for channel in channels[len(calls) : callers]]
        return calls[:callers]

    @staticmethod
    async def _one(call: Any, request: bytes, times: int) -> list[float]:
        found = []
        for _ in range(times):
            begun = time.perf_counter()
            await call(request, timeout=_SECONDS)
            found.append(time.perf_counter() - begun)
        return found


async def main() -> None:
    caller, loop = Caller(), asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await caller.run(json.loads(line))), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
