"""A client that reaches nobody says what to do about it."""

from __future__ import annotations

import asyncio
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from cgpu_agent.client import Admin, Agent, AsyncAgent
from cgpu_agent.client.connect import DEFAULT_ADMIN_SOCKET, DEFAULT_SOCKET, find_socket, unreachable
from cgpu_agent.errors import AgentError, Misuse, Unavailable


def test_socket_is_the_given_one_else_the_environments_else_the_well_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CGPU_AGENT_SOCKET", "CGPU_AGENT_ADMIN_SOCKET"):
        monkeypatch.delenv(name, raising=False)
    assert (find_socket(None), find_socket(None, admin=True)) == (DEFAULT_SOCKET, DEFAULT_ADMIN_SOCKET)
    monkeypatch.setenv("CGPU_AGENT_SOCKET", "/e")
    monkeypatch.setenv("CGPU_AGENT_ADMIN_SOCKET", "/ea")
    assert (find_socket(None), find_socket(None, admin=True)) == ("/e", "/ea")
    assert (find_socket("/g"), find_socket("/g", admin=True)) == ("/g", "/g")


def test_absent_socket_is_said_to_be_absent(tmp_path: Path) -> None:
    found = unreachable(str(tmp_path / "none"))
    assert found.slug == "NO_SOCKET"
    assert "systemctl start" in found.message


def test_file_that_is_no_socket_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert unreachable(str(tmp_path / "file")).slug == "NO_SOCKET"


def test_socket_that_nobody_listens_at_may_come_back(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
    found = unreachable(path)
    assert (found.slug, found.retry_after) == ("NO_AGENT", 1.0)


def test_agent_that_listens_but_hung_up_may_be_asked_again(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()
        assert unreachable(path).slug == "CONNECTION_LOST"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_closed_directory_is_a_matter_of_permission(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    path = closed / "sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        os.seteuid(54321)
        try:
            assert unreachable(str(path)).slug == "SOCKET_DENIED"
        finally:
            os.seteuid(0)


def test_call_that_the_agents_end_cut_may_be_made_again(tmp_path: Path) -> None:
    """Nobody here cancels a call and asks what became of it."""
    path = str(tmp_path / "sock")

    def cut(_request: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.CANCELLED, "")
        raise AssertionError

    handlers = {"ReadPcrs": grpc.unary_unary_rpc_method_handler(cut)}
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("cgpu.agent.v1.MeasuredBoot", handlers),))
    server.add_insecure_port(f"unix:{path}")
    server.start()
    with Agent(path, timeout=5) as agent, pytest.raises(Unavailable) as caught:
        agent.read_pcrs()
    assert (caught.value.slug, caught.value.retry_after) == ("CONNECTION_LOST", 0.5)
    server.stop(0).wait()


def test_sync_and_async_clients_fail_alike(tmp_path: Path) -> None:
    path = str(tmp_path / "none")

    async def ask() -> AgentError:
        async with AsyncAgent(path, timeout=5) as agent:
            with pytest.raises(Unavailable) as caught:
                await agent.get_identity()
            return caught.value

    with Agent(path, timeout=5) as agent, pytest.raises(Unavailable) as caught:
        agent.get_identity()
    assert caught.value.slug == asyncio.run(ask()).slug == "NO_SOCKET"
    with pytest.raises(Unavailable) as refused:
        Admin(path).get_status()
    assert refused.value.slug == "NO_SOCKET"


def test_older_agent_is_told_from_a_broken_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        server = grpc.aio.server()
        server.add_insecure_port(f"unix:{tmp_path}/sock")
        await server.start()
        async with AsyncAgent(str(tmp_path / "sock"), timeout=5) as agent:
            with pytest.raises(Misuse) as caught:
                await agent.get_identity()
        assert caught.value.slug == "UNIMPLEMENTED"
        await server.stop(0)

    asyncio.run(scenario())


def test_silent_agent_is_a_deadline(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "sock"))
        sock.listen()
        with Agent(str(tmp_path / "sock"), timeout=0.1) as agent, pytest.raises(Unavailable) as caught:
            agent.get_identity()
    assert (caught.value.slug, caught.value.retry_after) == ("DEADLINE", 1.0)


def test_wrong_use_is_found_before_anything_is_sent() -> None:
    with Agent("/nonexistent") as agent:
        for ask in (
            lambda: agent.get_evidence(bytes(16), "rp", user_data=b"x", public_key=b"y"),
            lambda: agent.get_event_log("kernel"),  # type: ignore[arg-type]
        ):
            with pytest.raises(Misuse):
                ask()
