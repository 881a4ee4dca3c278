"""A tunnel that ends leaves nothing behind that listens on its sockets."""

from __future__ import annotations

import asyncio
import socket

import pytest

from cgpu_agent.egress.config import Limits
from cgpu_agent.egress.tunnel import Tally, Tunnel


def test_a_broken_connection_ends_both_directions() -> None:
    inner, agent = socket.socketpair()
    outer, world = socket.socketpair()

    async def scenario() -> None:
        for sock in (inner, outer):
            sock.setblocking(False)
        agent.shutdown(socket.SHUT_RD)  # nobody reads any more, as when the agent was killed, but nothing has ended
        world.send(b"an answer")
        with pytest.raises(BrokenPipeError):
            await Tunnel(inner, outer, Limits(), Tally()).run()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert not asyncio.get_running_loop().remove_reader(inner)

    with inner, agent, outer, world:
        asyncio.run(scenario())
