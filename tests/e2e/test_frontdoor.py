"""The front door at work: who is cut when, what a slow or silent caller costs, and how it comes back from trouble."""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from cgpu_agent.errors import Unavailable
from cgpu_agent.rpc.addresses import adopt_listener, bind_listener
from cgpu_agent.rpc.admission import DoorLimits
from cgpu_agent.rpc.environment import self_check_environment
from cgpu_agent.rpc.fairshare import FairShare
from cgpu_agent.rpc.frontdoor import FrontDoor
from cgpu_agent.rpc.identify import Identified, Identifier
from cgpu_agent.rpc.peer import SO_PASSRIGHTS
from cgpu_agent.rpc.pressure import AHEAD
from cgpu_agent.rpc.pump import BUFFER_SIZE
from frontdoor_kit import SERVICE, Client, Kit, call, connect, descriptors, entries, needs_root, until, with_kit

KIT = Path(__file__).parent.parent / "frontdoor_kit.py"


# -- the caller's life


def test_a_killed_caller_ends_its_stream() -> None:
    async def scenario(kit: Kit) -> None:
        async with kit.client("hold") as client:
            assert await client.says() == "holding"
            client.process.kill()
            await until(lambda: kit.cancelled == 1)
            await until(lambda: kit.front.stats().open == 0)

    with_kit(scenario)


def test_a_grandchild_that_holds_the_connection_is_cut_when_the_caller_dies() -> None:
    async def scenario(kit: Kit) -> None:
        note = kit.root / "heir"
        async with kit.client("hold", heir=str(note)) as client:
            await until(lambda: note.exists() and note.read_text() == "holding")
            client.go_on()
            assert await client.says() == "holding"
            assert kit.cancelled == 0
            client.process.kill()
            await until(lambda: note.read_text() == "ended")
            await until(lambda: kit.cancelled == 1)
            assert kit.front.stats().cut_dead == 1

    with_kit(scenario)


def test_a_connection_left_by_a_dead_caller_is_never_served() -> None:
    """The caller is dead before the door accepts; a child holds its socket."""

    async def scenario(kit: Kit) -> None:
        program = (
            "import os, socket, subprocess, sys; s = socket.socket(1); s.connect(sys.argv[1]);"
            "subprocess.Popen([sys.executable, '-c', 'import socket; socket.socket(fileno=%d).recv(1)' % s.fileno()],"
            " pass_fds=[s.fileno()])"
        )
        await asyncio.to_thread(subprocess.run, [sys.executable, "-c", program, kit.public], check=True)
        kit.front.start()
        await until(lambda: kit.front.stats().cut_dead == 1)
        assert kit.opened == []
        assert kit.front.stats().open == 0

    with_kit(scenario, opened=False)


def test_listeners_hear_of_every_caller_once() -> None:
    async def scenario(kit: Kit) -> None:
        for count in range(1, 4):
            with connect(kit.public):
                await until(lambda count=count: len(kit.opened) == count)
            await until(lambda count=count: len(kit.closed) == count)
        assert kit.opened == kit.closed
        assert not any(caller.alive() for caller in kit.closed)

    with_kit(scenario)


# -- load and waste


def test_hundreds_of_connections_leave_nothing_behind() -> None:
    async def scenario(kit: Kit) -> None:
        await call(kit.public, "Who")
        await until(lambda: kit.front.stats().open == 0)
        before = descriptors()
        for _ in range(4):
            sockets = [connect(kit.public) for _ in range(50)]
            await until(lambda: kit.front.stats().open == 50)
            for sock in sockets:
                sock.close()
            await until(lambda: kit.front.stats().open == 0)
        await until(lambda: descriptors() <= before)
        assert entries(kit.root / "inner") == ["grpc.sock"]
        assert (await call(kit.public, "Who"))["alive"]

    with_kit(scenario)


@pytest.mark.parametrize("garbage", [b"", b"\0" * 100_000, b"GET / HTTP/1.1\r\n\r\n", os.urandom(300_000)])
def test_garbage_ends_its_own_connection_only(garbage: bytes) -> None:
    async def scenario(kit: Kit) -> None:
        reader, writer = await asyncio.open_unix_connection(kit.public)
        writer.write(garbage)
        if not garbage:
            writer.close()
        while await asyncio.wait_for(ignore_reset(reader), 30):
            pass
        writer.close()
        await until(lambda: kit.front.stats().open == 0)
        assert (await call(kit.public, "Who"))["alive"]

    with_kit(scenario)


async def ignore_reset(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(65536)
    except ConnectionError:
        return b""


def test_what_a_used_up_budget_left_is_moved_in_the_next_turn() -> None:
    """The end was announced together with the data that used the budget up; no event comes again."""

    async def scenario(kit: Kit) -> None:
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(kit.inner)
            silent.listen()
            with connect(kit.public) as sock:
                sock.send(b"x")
            kit.front.start()
            await until(lambda: kit.front.stats().accepted == 1)
            await until(lambda: kit.front.stats().open == 0)

    with_kit(scenario, DoorLimits(bytes_per_wake=1), serve=False, opened=False)


def refuses_descriptors() -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            return sock.getsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS) == 1
        except OSError:
            return False


@pytest.mark.skipif(not refuses_descriptors(), reason="this kernel cannot refuse descriptors (Linux 6.16)")
def test_descriptors_cannot_be_sent_to_the_door() -> None:
    """Dropping one can hang where its file system is the sender's own."""

    async def scenario(kit: Kit) -> None:
        with connect(kit.public) as sock, pytest.raises(PermissionError):
            socket.send_fds(sock, [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], [sock.fileno()])

    with_kit(scenario)


@pytest.mark.skipif(refuses_descriptors(), reason="they cannot even be sent")
def test_descriptors_sent_to_the_door_are_not_kept() -> None:
    async def scenario(kit: Kit) -> None:
        with connect(kit.public) as sock:
            ours, theirs = socket.socketpair()
            with ours:
                socket.send_fds(sock, [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], [theirs.fileno()])
                theirs.close()
                # Only a door that closes what it was sent makes this an end of file.
                ours.setblocking(False)
                assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(ours, 1), 30) == b""

    with_kit(scenario)


def test_a_reader_that_stops_costs_the_door_one_buffer() -> None:
    """A hand-made HTTP/2 client: it grants a window of 2 GiB, asks for a gigabyte, and does not read."""

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    def header(name: bytes, value: bytes) -> bytes:
        return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value

    async def scenario(kit: Kit) -> None:
        headers = (
            header(b":method", b"POST")
            + header(b":scheme", b"http")
            + header(b":path", f"/{SERVICE}/Flood".encode())
            + header(b":authority", b"x")
            + header(b"content-type", b"application/grpc")
            + header(b"te", b"trailers")
        )
        whole_window = 2**31 - 1
        with connect(kit.public) as sock:
            sock.send(
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
                + frame(4, 0, 0, (4).to_bytes(2, "big") + whole_window.to_bytes(4, "big"))
                + frame(8, 0, 0, (whole_window - 65535).to_bytes(4, "big"))
                + frame(1, 4, 1, headers)
                + frame(0, 1, 1, b"\0" + (4).to_bytes(4, "big") + b"1024")
            )
            await until(lambda: kit.front.stats().held_bytes > 0)
            # Others are served meanwhile, and the heap of unread bytes does not grow.
            for _ in range(20):
                assert (await call(kit.public, "Who"))["alive"]
                assert 0 < kit.front.stats().held_bytes <= BUFFER_SIZE
            received = 0
            while received < 64 * 1024 * 1024:
                received += len(await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 1 << 20), 30))
        await until(lambda: kit.front.stats().open == 0)
        assert kit.front.stats().held_bytes == 0

    with_kit(scenario)


# -- limits


@needs_root
def test_one_uid_cannot_take_all_connections() -> None:
    async def scenario(kit: Kit) -> None:
        async with kit.client("raw", uid=1234, count=5) as greedy:
            await greedy.says()
            await until(lambda: kit.front.stats().refused_by_limit == 2)
            greedy.go_on()
            assert await greedy.says() == 2
            assert (await kit.ask("who", uid=4321))["uid"] == 4321
        await until(lambda: kit.front.stats().open == 0)
        assert (await kit.ask("who", uid=1234))["uid"] == 1234

    with_kit(scenario, DoorLimits(max_per_uid=3))


@needs_root
def test_who_sends_much_is_read_in_shares_while_others_send_and_whole_when_alone() -> None:
    async def scenario(kit: Kit) -> None:
        kit.front._shares = FairShare(rate=0.0, burst=8192.0)
        async with kit.client("send", uid=4321, size=1, every=0.05) as light:
            await light.says()
            async with kit.client("send", uid=1234, size=1 << 20) as early:
                assert await early.says() == 1 << 20  # nobody waits
            assert kit.front._pressure is not None
            kit.front._pressure._until = math.inf
            async with kit.client("send", uid=1234, size=1 << 20) as heavy:
                answered = asyncio.create_task(heavy.says())
                for _ in range(40):
                    assert await light.says() == 1
                assert not answered.done()
                light.process.kill()
                assert await answered == 1 << 20

    with_kit(scenario)


def test_not_all_that_one_sends_alone_waits_in_a_server_that_is_late() -> None:
    """Whoever comes next would wait for all of it."""

    async def scenario(kit: Kit) -> None:
        assert kit.front._pressure is not None
        kit.front._pressure._until = math.inf
        async with kit.client("send", size=1 << 16, every=0.05) as alone:
            assert await alone.says() == 1 << 16
            (connection,) = kit.front._table.values()
            before = connection.inward.moved
            time.sleep(0.5)  # noqa: ASYNC251 - the server does something else
            assert 0 < connection.inward.moved - before <= AHEAD
            assert await alone.says() == 1 << 16

    with_kit(scenario)


@needs_root
def test_callers_without_an_identity_have_a_small_limit_of_their_own() -> None:
    async def scenario(kit: Kit) -> None:
        async with kit.client("raw", uid=65534, count=5) as nobody:
            await nobody.says()
            await until(lambda: kit.front.stats().refused_by_limit == 3)
            assert (await kit.ask("who", uid=1234))["uid"] == 1234

    with_kit(scenario, DoorLimits(max_unidentified=2))


@needs_root
def test_the_daemon_itself_gets_in_when_the_door_is_full() -> None:
    async def scenario(kit: Kit) -> None:
        async with kit.client("raw", count=2) as first:
            await first.says()
            await until(lambda: kit.front.stats().open == 2)
            async with kit.client("raw", uid=1234) as late:
                await late.says()
                await until(lambda: kit.front.stats().refused_by_limit == 1)
            await kit.front.verify_self(lambda: own_pid(kit))

    with_kit(scenario, DoorLimits(max_connections=2))


# -- trouble and recovery


def test_a_server_out_of_descriptors_waits_without_spinning_and_recovers() -> None:
    async def scenario() -> None:
        async with Client([sys.executable, str(KIT), json.dumps({"nofile": 80})]) as server:
            public = await server.says()
            async with grpc.aio.insecure_channel(f"unix:{public}") as channel:

                async def reached(condition: Callable[[dict[str, int]], bool]) -> None:
                    for _ in range(600):
                        if condition(json.loads(await channel.unary_unary(f"/{SERVICE}/Stats")(b"", timeout=30))):
                            return
                        await asyncio.sleep(0.05)
                    pytest.fail("the server did not get there")

                await reached(lambda stats: stats["open"] == 1)
                sockets = [connect(public) for _ in range(60)]
                await reached(lambda stats: stats["out_of_resources"] >= 2)
                used = cpu_seconds(server.pid)
                await asyncio.sleep(1.0)
                assert cpu_seconds(server.pid) - used < 0.5
                for sock in sockets:
                    sock.close()
                await reached(lambda stats: stats["open"] == 1)
                assert (await call(public, "Who"))["alive"]
            server.process.stdin.close()
            await asyncio.to_thread(server.process.wait)

    asyncio.run(scenario())


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_callers_are_dropped_while_the_inner_server_is_absent_and_served_when_it_is_there() -> None:
    async def scenario(kit: Kit) -> None:
        with connect(kit.public) as sock:
            assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 1), 30) == b""
        assert kit.front.stats().inner_unavailable == 1
        assert kit.front.stats().open == 0
        await kit.serve()
        assert (await call(kit.public, "Who"))["alive"]

    with_kit(scenario, serve=False)


def test_a_full_inner_queue_is_tried_again() -> None:
    async def scenario(kit: Kit) -> None:
        with socket.socket(socket.AF_UNIX) as slow:
            slow.bind(kit.inner)
            slow.listen(0)
            slow.setblocking(False)
            callers = [connect(kit.public) for _ in range(3)]
            await until(lambda: kit.front.stats().open == 3)
            for caller in callers:
                caller.send(b"x")
            loop = asyncio.get_running_loop()
            for _ in callers:
                inside, _address = await asyncio.wait_for(loop.sock_accept(slow), 30)
                with inside:
                    assert await asyncio.wait_for(loop.sock_recv(inside, 1), 30) == b"x"
            for caller in callers:
                caller.close()
        assert kit.front.stats().inner_unavailable == 0

    with_kit(scenario, DoorLimits(connect_tries=1000), serve=False)


def test_a_full_inner_queue_is_not_tried_for_ever() -> None:
    async def scenario(kit: Kit) -> None:
        with socket.socket(socket.AF_UNIX) as stuck:
            stuck.bind(kit.inner)
            stuck.listen(0)
            callers = [connect(kit.public) for _ in range(3)]
            await until(lambda: kit.front.stats().inner_unavailable == 2)
            for caller in callers:
                caller.close()

    with_kit(scenario, DoorLimits(connect_tries=3), serve=False)


@needs_root
def test_another_process_at_the_inner_socket_gets_no_caller() -> None:
    async def scenario(kit: Kit) -> None:
        program = (
            "import socket, sys; s = socket.socket(1); s.bind(sys.argv[1]); s.listen(); print(1, flush=True);"
            "c, _ = s.accept(); print(len(c.recv(10)), flush=True)"
        )
        with connect(kit.public) as sock:
            sock.send(b"secret")
            async with Client([sys.executable, "-c", program, kit.inner]) as impostor:
                await impostor.says()
                kit.front.start()
                assert await impostor.says() == 0
        assert kit.front.stats().inner_unavailable == 1

    with_kit(scenario, serve=False, opened=False)


# -- beginning and end


async def own_pid(kit: Kit) -> int:
    return int((await call(kit.public, "Who"))["pid"])


def test_the_self_check_passes_only_with_the_daemons_own_pid() -> None:
    async def other() -> int:
        return os.getpid() + 1

    async def broken() -> int:
        raise RuntimeError("secret")

    async def scenario(kit: Kit) -> None:
        await kit.front.verify_self(lambda: own_pid(kit))
        for probe in (other, broken):
            with pytest.raises(Unavailable) as refused:
                await kit.front.verify_self(probe)
            assert refused.value.slug == "FRONTDOOR_SELF_CHECK"
            assert "secret" not in refused.value.message

    with_kit(scenario)


def test_stopping_keeps_callers_and_closing_cuts_them() -> None:
    async def scenario(kit: Kit) -> None:
        async with kit.client("hold") as client:
            await client.says()
            kit.front.stop_accepting()
            kit.front.stop_accepting()
            with pytest.raises(FileNotFoundError):
                connect(kit.public)
            assert (kit.cancelled, kit.front.stats().open) == (0, 1)
            assert kit.front.heartbeat_age(0.0) == 0.0
            kit.front.close()
            kit.front.close()
            await until(lambda: kit.cancelled == 1)
            assert kit.front.stats().open == 0
            assert kit.front.heartbeat_age(0.0) == float("inf")

    with_kit(scenario)


def test_a_socket_of_systemd_outlives_the_door() -> None:
    async def scenario(kit: Kit) -> None:
        path = str(kit.root / "systemd.sock")
        with socket.socket(socket.AF_UNIX) as held:
            held.bind(path)
            held.listen()
            listener = adopt_listener(socket.socket(fileno=os.dup(held.fileno())))
            door = FrontDoor([listener], kit.inner, Identifier(self_check_environment()))
            door.start()
            with connect(path):
                await until(lambda: door.stats().open == 1)
            door.close()
            connect(path).close()

    with_kit(scenario)


def test_a_socket_file_that_is_no_longer_the_doors_is_left_alone() -> None:
    async def scenario(kit: Kit) -> None:
        (kit.root / "agent.sock").unlink()
        successor = bind_listener(kit.public, 0o666)
        kit.front.close()
        connect(kit.public).close()
        successor.close()
        assert "agent.sock" not in entries(kit.root)

    with_kit(scenario)


def test_a_listener_that_fails_does_not_stop_the_door() -> None:
    def fails(_caller: Identified) -> None:
        raise RuntimeError

    async def run() -> None:
        async with Kit() as kit:
            path = str(kit.root / "second.sock")
            door = FrontDoor(
                [bind_listener(path, 0o600)],
                kit.inner,
                Identifier(self_check_environment()),
                on_open=fails,
            )
            door.start()
            with connect(path):
                await until(lambda: door.stats().open == 1)
            door.close()

    asyncio.run(run())
