"""A server that is asked how far it is: late or not, and room when it has come to what went in before."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from cgpu_agent.daemon.servers import _OneQueue
from cgpu_agent.rpc.pressure import AHEAD, Pressure

HEALTH = "/grpc.health.v1.Health/Check"
OPTIONS = (("grpc.use_local_subchannel_pool", 1),)


class Order(grpc.aio.ServerInterceptor):
    """Which methods were called, in the order in which the server took the calls."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        self.seen.append(details.method)
        return await continuation(details)


def serving(tmp_path: Path, scenario: Callable[[str, Order], Coroutine[Any, Any, None]]) -> None:
    """Run a scenario with the path of a server's socket and what it sees."""

    async def run() -> None:
        order, path = Order(), str(tmp_path / "s")
        server = grpc.aio.server(interceptors=(order,))
        queue: Any = _OneQueue(server)
        health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), queue)
        server.add_insecure_port(f"unix:{path}")
        await server.start()
        await scenario(path, order)
        await server.stop(0)

    asyncio.run(run())


async def answered(pressure: Pressure) -> None:
    while not pressure._answered:  # noqa: ASYNC110 - another thread waits for it
        await asyncio.sleep(0.001)


def test_a_server_that_is_late_is_pressed_for_a_while_and_one_on_time_is_not(tmp_path: Path) -> None:
    async def scenario(path: str, _order: Order) -> None:
        pressure = Pressure(asyncio.get_running_loop(), path, lambda: None)
        assert not pressure.pressed(time.monotonic())
        assert pressure.pressed(time.monotonic() + 1.0)  # it was asked, and says nothing
        time.sleep(0.05)  # noqa: ASYNC251 - the loop does something else
        await answered(pressure)
        assert pressure.pressed(time.monotonic())
        await answered(pressure)
        assert not pressure.pressed(time.monotonic() + 100.0)
        await answered(pressure)

    serving(tmp_path, scenario)


def test_there_is_room_again_when_the_server_has_come_to_what_went_in(tmp_path: Path) -> None:
    async def scenario(path: str, order: Order) -> None:
        heard = asyncio.Event()
        pressure = Pressure(asyncio.get_running_loop(), path, heard.set)
        pressure.took(AHEAD - 1, time.monotonic())
        assert pressure.room == 1
        assert order.seen == []
        pressure.took(1, time.monotonic())
        assert pressure.room == 0
        await asyncio.wait_for(heard.wait(), 30)
        assert pressure.room == AHEAD
        assert len(order.seen) == 1

    serving(tmp_path, scenario)


def test_what_fills_the_room_after_a_question_takes_another(tmp_path: Path) -> None:
    async def scenario(path: str, order: Order) -> None:
        heard = asyncio.Event()
        pressure = Pressure(asyncio.get_running_loop(), path, heard.set)
        pressure.pressed(time.monotonic())
        pressure.took(AHEAD, time.monotonic())
        await asyncio.wait_for(heard.wait(), 30)
        assert len(order.seen) == 2

    serving(tmp_path, scenario)


def test_a_server_takes_calls_of_all_methods_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    """Else the answer to a question would say nothing of the calls before it."""

    def call(channel: grpc.Channel, method: str) -> grpc.Future:
        return channel.unary_unary(method).future(b"", timeout=30)

    async def scenario(path: str, order: Order) -> None:
        with grpc.insecure_channel(f"unix:{path}", options=OPTIONS) as channel, ThreadPoolExecutor(1) as pool:
            await asyncio.get_running_loop().run_in_executor(pool, call(channel, HEALTH).result)
            calls = [call(channel, HEALTH) for _ in range(40)]
            last = call(channel, "/none/None")
            time.sleep(0.5)  # noqa: ASYNC251 - all of them are in the server before it takes any
            for each in (*calls, last):
                await asyncio.to_thread(each.exception)
        assert order.seen[-1] == "/none/None"

    serving(tmp_path, scenario)


def test_a_server_that_is_not_there_holds_up_nobody_for_ever(tmp_path: Path) -> None:
    async def scenario() -> None:
        heard = asyncio.Event()
        pressure = Pressure(asyncio.get_running_loop(), str(tmp_path / "none"), heard.set)
        pressure.took(AHEAD, time.monotonic())
        await asyncio.wait_for(heard.wait(), 30)
        assert pressure.room == AHEAD

    asyncio.run(scenario())


def test_a_loop_that_is_closed_is_asked_in_vain(tmp_path: Path) -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    assert not Pressure(loop, str(tmp_path / "none"), lambda: None).pressed(time.monotonic())
