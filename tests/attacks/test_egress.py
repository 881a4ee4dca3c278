"""Only the agent gets out by its way out, only to where it was allowed, and nobody on the way reads along."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

import pytest

from cgpu_agent.backends.egress import Answer, Remote
from cgpu_agent.egress import net
from cgpu_agent.egress.config import Config, parse
from cgpu_agent.egress.proxy import MAX_ADDRESSES, Proxy
from cgpu_agent.errors import AgentError, Unavailable
from cgpu_agent.wire.egress import MAX_HEAD, Address, encode_answer
from fixtures.egress import (
    PATIENCE,
    Egress,
    Pki,
    Server,
    Website,
    Wiretap,
    allowing,
    connect_to,
    echo,
    exactly,
    heard,
    http,
    running_egress,
    serving,
)

SECRET = b"the key that is released"
REAL = "93.184.215.14"
"""A global address; nothing here connects to it."""


def refusal(reason: str) -> bytes:
    return encode_answer(reason)


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


@pytest.fixture
def echoing() -> Iterator[Server]:
    with serving(echo) as (server,):
        yield server


@pytest.fixture
def egress(tmp_path: Path, echoing: Server) -> Iterator[Egress]:
    limits = {"idle_seconds": 1, "total_seconds": 3, "sent_bytes": 1000, "received_bytes": 2000, "connections": 2}
    with running_egress(tmp_path, allowing(f'"127.0.0.1:{echoing.port}"', **limits)) as process:
        yield process


# -- who


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")
def test_another_user_is_refused_though_it_can_connect(echoing: Server) -> None:
    with tempfile.TemporaryDirectory(prefix="egress-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        with running_egress(Path(name), allowing(f'"127.0.0.1:{echoing.port}"')) as egress:
            other = [sys.executable, "-c", OTHER, egress.socket, connect_to(f"127.0.0.1:{echoing.port}").hex()]
            said = subprocess.run(other, capture_output=True, timeout=PATIENCE)
            assert said.stderr == b""
            assert said.stdout == refusal("NOT_THE_AGENT")
            assert egress.said("NOT_THE_AGENT").startswith("<4>connection reason=NOT_THE_AGENT uid=65534 ")
    assert echoing.connections == 0


OTHER = """
import os, socket, sys
os.setgroups([])
os.setuid(65534)
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
try:
    sock.send(bytes.fromhex(sys.argv[2]))
except BrokenPipeError:
    pass  # It was refused before it asked.
os.write(1, sock.recv(1000))
"""


def test_root_is_not_the_agent(tmp_path: Path, echoing: Server) -> None:
    with running_egress(tmp_path, allowing(f'"127.0.0.1:{echoing.port}"'), uid=12345) as egress:
        assert egress.ask(connect_to(f"127.0.0.1:{echoing.port}")) == refusal("NOT_THE_AGENT")
    assert echoing.connections == 0


# -- where


def test_nowhere_else(egress: Egress, echoing: Server) -> None:
    port = echoing.port
    for elsewhere in (
        f"127.0.0.2:{port}",
        f"localhost:{port}",
        f"127.0.0.1:{port - 1}",
        f"[::1]:{port}",
        "a.example:1",
    ):
        assert egress.ask(connect_to(elsewhere)) == refusal("NOT_ALLOWED")
    for spelling in (f"127.1:{port}", f"0x7f000001:{port}", f"[::ffff:7f00:1]:{port}", f"127.0.0.1.:{port}"):
        assert egress.ask(connect_to(spelling)) == refusal("BAD_REQUEST")
    assert echoing.connections == 0


def test_a_name_of_this_machine_leads_nowhere(tmp_path: Path, echoing: Server) -> None:
    """By the resolver of the machine itself."""
    entry = f'{{ to = "localhost:{echoing.port}", private = true }}'
    with running_egress(tmp_path, allowing(entry)) as egress:
        assert egress.ask(connect_to(f"localhost:{echoing.port}")) == refusal("ADDRESS_NOT_ALLOWED")
        assert "host=localhost" in egress.said("reason=ADDRESS_NOT_ALLOWED")
    assert echoing.connections == 0


Resolve = Callable[[str], Awaitable[list[Address]]]
Asked = TypeVar("Asked")


def with_proxy(
    config: Config, resolve: Resolve, port: int, folder: Path, ask: Callable[[str], Awaitable[Asked]]
) -> tuple[Asked, list[tuple[str, int]]]:
    """What is answered through a proxy in this process, and what it dialled; all leads to a port of this machine."""
    dialled: list[tuple[str, int]] = []

    async def dial(address: Address, to: int) -> socket.socket:
        dialled.append((str(address), to))
        return await net.dial(ipaddress.ip_address("127.0.0.1"), port)

    async def main() -> Asked:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "proxy.sock"))
            listener.listen(4)
            proxy = Proxy(config, os.geteuid(), resolve=resolve, dial=dial)
            proxying = asyncio.ensure_future(proxy.serve(listener))
            try:
                return await ask(str(folder / "proxy.sock"))
            finally:
                proxying.cancel()
                await asyncio.wait([proxying])

    return asyncio.run(main()), dialled


def run_proxy(
    config: Config, resolve: Resolve, request: bytes, port: int, folder: Path
) -> tuple[bytes, list[tuple[str, int]]]:
    async def ask(path: str) -> bytes:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(request)
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
        writer.close()
        return answer

    return with_proxy(config, resolve, port, folder, ask)


def answering(*answers: list[str]) -> Resolve:
    """A name server that gives another answer each time."""
    left = [[ipaddress.ip_address(text) for text in answer] for answer in answers]

    async def resolve(host: str) -> list[Address]:
        assert host == "vault.example"
        return left.pop(0)

    return resolve


VAULT = connect_to("vault.example:8200")


def vault(*, private: bool = False) -> Config:
    return parse({"allow": [{"to": "vault.example:8200", "private": private}], "limits": {"connect_seconds": 5}})


def test_a_name_leads_to_the_address_that_was_checked_though_its_next_answer_is_another(
    tmp_path: Path, echoing: Server
) -> None:
    """DNS rebinding: the second answer, which would be taken by who connects to a name, is this machine."""
    rebinding = answering([REAL], ["127.0.0.1"])
    answer, dialled = run_proxy(vault(), rebinding, VAULT, echoing.port, tmp_path)
    assert answer == refusal("CONNECTED")
    assert dialled == [(REAL, 8200)]


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["::1"],
        ["169.254.169.254"],
        ["168.63.129.16"],
        ["0.0.0.0"],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"],
        ["fe80::1"],
        ["224.0.0.1"],
        [REAL, "127.0.0.1"],
        ["127.0.0.1", REAL],
    ],
)
def test_a_name_that_leads_near_the_machine_leads_nowhere(
    tmp_path: Path, echoing: Server, addresses: list[str], private: bool
) -> None:
    answer, dialled = run_proxy(vault(private=private), answering(addresses), VAULT, echoing.port, tmp_path)
    assert (answer, dialled) == (refusal("ADDRESS_NOT_ALLOWED"), [])


@pytest.mark.parametrize("private", [False, True])
def test_a_private_address_is_for_entries_that_say_so(tmp_path: Path, echoing: Server, private: bool) -> None:
    answer, dialled = run_proxy(vault(private=private), answering(["10.1.2.3"]), VAULT, echoing.port, tmp_path)
    assert answer == refusal("CONNECTED" if private else "ADDRESS_NOT_ALLOWED")
    assert dialled == ([("10.1.2.3", 8200)] if private else [])


def test_a_name_with_many_addresses_does_not_have_them_all_tried(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    many = answering([f"93.184.215.{number}" for number in range(200)])
    answer, dialled = run_proxy(vault(), many, VAULT, port, tmp_path)
    assert (answer, len(dialled)) == (refusal("UNREACHABLE"), MAX_ADDRESSES)


def test_a_name_without_an_address_leads_nowhere(tmp_path: Path, echoing: Server) -> None:
    assert run_proxy(vault(), answering([]), VAULT, echoing.port, tmp_path) == (refusal("NO_ADDRESS"), [])


def test_a_name_that_nobody_answers_for_is_not_waited_for(tmp_path: Path, echoing: Server) -> None:
    async def silent(_: str) -> list[Address]:
        await asyncio.sleep(PATIENCE)
        return []

    config = parse({"allow": ["vault.example:8200"], "limits": {"connect_seconds": 1}})
    assert run_proxy(config, silent, VAULT, echoing.port, tmp_path) == (refusal("CONNECT_TIMEOUT"), [])


def test_lookups_that_hang_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that holds lookups back cannot make threads without end; the program ends all the same."""

    async def main() -> None:
        resolver = net.Resolver()
        asking = [asyncio.ensure_future(resolver("vault.example")) for _ in range(net.MAX_LOOKUPS)]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable) as caught:
            await resolver("vault.example")
        assert caught.value.slug == "BUSY"
        let_go.set()
        assert await asyncio.gather(*asking) == [[ipaddress.ip_address("127.0.0.1")]] * net.MAX_LOOKUPS
        assert await resolver("vault.example")

    let_go = threading.Event()

    def held(*_: object, **__: object) -> list[object]:
        let_go.wait(PATIENCE)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", held)
    asyncio.run(main())


# -- what


@pytest.mark.parametrize(
    "more",
    [
        "Host: vault.example:8200\r\n",
        "Content-Length: 4\r\n",
        "Transfer-Encoding: chunked\r\n",
        "Proxy-Authorization: Basic eA==\r\n",
        f"X: {'x' * MAX_HEAD}\r\n",
        f"X: {'x' * 10_000_000}\r\n",
    ],
)
def test_any_other_request_is_refused(egress: Egress, echoing: Server, more: str) -> None:
    request = connect_to(f"127.0.0.1:{echoing.port}")
    assert egress.ask(request[:-2] + more.encode() + b"\r\n") == refusal("BAD_REQUEST")
    assert echoing.connections == 0


def test_bytes_that_come_before_the_answer_are_no_part_of_the_tunnel(egress: Egress, echoing: Server) -> None:
    assert egress.ask(connect_to(f"127.0.0.1:{echoing.port}") + b"GET / HTTP/1.1\r\n") == refusal("BAD_REQUEST")
    assert echoing.connections == 0


def test_a_request_that_ends_early_is_refused(egress: Egress, echoing: Server) -> None:
    with egress.connect() as sock:
        sock.sendall(connect_to(f"127.0.0.1:{echoing.port}")[:-1])
        sock.shutdown(socket.SHUT_WR)
        assert heard(sock) == refusal("BAD_REQUEST")


def test_a_request_byte_by_byte_has_its_time(tmp_path: Path, echoing: Server) -> None:
    async def main() -> bytes:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "proxy.sock"))
            listener.listen(4)
            proxy = Proxy(vault(), os.geteuid(), patience=0.5)
            proxying = asyncio.ensure_future(proxy.serve(listener))
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "proxy.sock"))

            async def trickle() -> None:
                for byte in VAULT * 1000:
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0.1)

            trickling = asyncio.ensure_future(trickle())
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
            trickling.cancel()
            proxying.cancel()
            await asyncio.wait([proxying, trickling])
            writer.close()
            return answer

    assert asyncio.run(main()) == refusal("REQUEST_TOO_SLOW")


# -- how much


@pytest.mark.parametrize(("count", "through"), [(1000, True), (1001, False)])
def test_more_bytes_than_allowed_end_the_connection(
    egress: Egress, echoing: Server, count: int, through: bool
) -> None:
    with egress.tunnel(echoing.port) as sock:
        sock.sendall(b"x" * count)
        sock.shutdown(socket.SHUT_WR)
        assert len(heard(sock)) == (count if through else 0)
    assert f"reason={'ENDED' if through else 'SENT_BYTES'}" in egress.said("reason=")


def test_more_bytes_back_than_allowed_end_the_connection(tmp_path: Path) -> None:
    with (
        serving(lambda sock: sock.sendall(b"x" * 5000)) as (server,),
        running_egress(tmp_path, allowing(f'"127.0.0.1:{server.port}"', received_bytes=2000)) as egress,
    ):
        with egress.tunnel(server.port) as sock:
            assert len(heard(sock)) <= 2000
        egress.said("reason=RECEIVED_BYTES")


def test_a_connection_on_which_nothing_moves_is_cut(egress: Egress, echoing: Server) -> None:
    with egress.tunnel(echoing.port) as sock:
        assert heard(sock) == b""
    egress.said("reason=IDLE")


def test_a_half_open_connection_is_cut_too(egress: Egress) -> None:
    def never_ends(sock: socket.socket) -> None:
        heard(sock)
        time.sleep(PATIENCE)

    with serving(never_ends) as (server,):
        egress.reload(allowing(f'"127.0.0.1:{server.port}"', idle_seconds=1))
        with egress.tunnel(server.port) as sock:
            sock.shutdown(socket.SHUT_WR)
            assert heard(sock) == b""
    egress.said("reason=IDLE")


def test_a_connection_that_trickles_is_cut_in_the_end(egress: Egress, echoing: Server) -> None:
    with egress.tunnel(echoing.port) as sock, suppress(ConnectionError):
        for _ in range(900):
            sock.sendall(b".")
            if not sock.recv(1):
                break
            time.sleep(0.05)
    egress.said("reason=TOTAL_TIME")


def test_connections_are_bounded_and_those_that_are_open_go_on(egress: Egress, echoing: Server) -> None:
    with ExitStack() as stack:
        open_ones = [stack.enter_context(egress.tunnel(echoing.port)) for _ in range(2)]
        assert egress.ask(connect_to(f"127.0.0.1:{echoing.port}")) == refusal("BUSY")
        for sock in open_ones:
            sock.sendall(b"here")
            assert exactly(sock, 4) == b"here"
    egress.said("sent=4 received=4")
    while egress.ask(connect_to("127.0.0.1:1")) == refusal("BUSY"):
        pass  # The proxy has yet to notice that they ended.


def test_what_is_said_through_it_is_in_no_log(egress: Egress, echoing: Server) -> None:
    with egress.tunnel(echoing.port) as sock:
        sock.sendall(SECRET)
        assert exactly(sock, len(SECRET)) == SECRET
    egress.ask(b"CONNECT " + SECRET + b"\x1b[2J\r\n\r\n")
    egress.said("BAD_REQUEST")
    egress.said("sent=")
    assert SECRET.decode() not in "\n".join(egress.journal)


# -- the agent's side: the proxy, the network and the host lie


def through(tmp_path: Path, port: int, ca: Path, method: str = "GET", name: str = "127.0.0.1") -> Answer:
    with running_egress(tmp_path, allowing(f'"{name}:{port}"')) as egress:
        remote = Remote(f"{name}:{port}", ca_file=ca, socket=egress.socket)
        return asyncio.run(remote.request(method, "/", timeout=PATIENCE, headers={"X-Token": SECRET.decode()}))


def test_a_server_with_another_cas_certificate_is_told_nothing(tmp_path: Path, pki: Pki) -> None:
    site = Website(Pki(tmp_path, "another").server("127.0.0.1"), [http(b"")])
    with serving(site) as (server,), pytest.raises(AgentError) as caught:
        through(tmp_path, server.port, pki.file)
    assert (caught.value.slug, site.requests) == ("EGRESS_TLS", [])


@pytest.mark.parametrize("names", [("vault.example",), ("127.0.0.2",), ()])
def test_a_server_with_another_name_is_told_nothing(tmp_path: Path, pki: Pki, names: tuple[str, ...]) -> None:
    site = Website(pki.server(*names), [http(b"")])
    with serving(site) as (server,), pytest.raises(AgentError) as caught:
        through(tmp_path, server.port, pki.file)
    assert (caught.value.slug, site.requests) == ("EGRESS_TLS", [])


@pytest.mark.parametrize(("names", "good"), [(("vault.example",), True), (("other.example", "127.0.0.1"), False)])
def test_a_name_must_be_in_the_certificate(tmp_path: Path, pki: Pki, names: tuple[str, ...], good: bool) -> None:
    site = Website(pki.server(*names), [http(SECRET)])

    async def ask(path: str) -> str:
        remote = Remote("vault.example:8200", ca_file=pki.file, socket=path)
        try:
            return (await remote.request("POST", "/", timeout=PATIENCE)).body.decode()
        except AgentError as error:
            return error.slug

    with serving(site) as (server,):
        said, dialled = with_proxy(vault(), answering([REAL]), server.port, tmp_path, ask)
    assert said == (SECRET.decode() if good else "EGRESS_TLS")
    assert dialled == [(REAL, 8200)]
    assert len(site.requests) == (1 if good else 0)


def test_a_server_without_tls_is_told_nothing(tmp_path: Path, pki: Pki) -> None:
    seen: list[bytes] = []

    def plain(sock: socket.socket) -> None:
        seen.append(sock.recv(65536))
        sock.sendall(http(b"welcome"))

    with serving(plain) as (server,), pytest.raises(AgentError) as caught:
        through(tmp_path, server.port, pki.file)
    assert caught.value.slug == "EGRESS_TLS"
    assert not any(SECRET in data for data in seen)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_an_old_tls_is_refused(tmp_path: Path, pki: Pki) -> None:
    context = pki.server("127.0.0.1")
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    site = Website(context, [http(b"")])
    with serving(site) as (server,), pytest.raises(AgentError) as caught:
        through(tmp_path, server.port, pki.file)
    assert (caught.value.slug, site.requests) == ("EGRESS_TLS", [])


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\n\r\nallow: all but",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nallow: all but",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nallow: all but",
        b"HTTP/1.0 200 OK\r\n\r\nallow: all but",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nallow: all but",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nallow: all but",
        b"HTTP/1.1 101 Go\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nallow: all but",
        b"HTTP/1.1 200 OK\r\nContent-Len",
    ],
)
def test_an_answer_that_was_cut_is_no_answer(tmp_path: Path, pki: Pki, answer: bytes) -> None:
    """Who carries TLS can end it at any byte, and no alert of TLS is waited for."""
    with serving(Website(pki.server("127.0.0.1"), [answer])) as (server,), pytest.raises(AgentError) as caught:
        through(tmp_path, server.port, pki.file, "POST")
    assert caught.value.slug == "EGRESS_BAD_ANSWER"


def test_an_answer_that_was_altered_is_no_answer(tmp_path: Path, pki: Pki) -> None:
    marker = b"\x17\x03\x03"

    def flip(data: bytes) -> bytes:
        # The last byte of the last record: what the server answered.
        return data[:-1] + bytes([data[-1] ^ 1]) if data.startswith(marker) else data

    site = Website(pki.server("127.0.0.1"), [http(b"x" * 1000)])
    with (
        serving(site) as (server,),
        serving(Wiretap(server.port, flip)) as (tapped,),
        pytest.raises(AgentError) as caught,
    ):
        through(tmp_path, tapped.port, pki.file, "POST")
    assert caught.value.slug in ("EGRESS_TLS", "EGRESS_BAD_ANSWER")


@pytest.mark.parametrize(
    "said",
    [b"", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 CONNECTED\r\n\r\nmore", b"x" * 5000, b"HTTP/1.1 403 x\r\n\r\n"],
)
def test_a_proxy_that_says_anything_else_is_no_way_out(tmp_path: Path, pki: Pki, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(4)
        lying = subprocess.Popen(
            [sys.executable, "-c", LYING, str(listener.fileno()), said.hex()], pass_fds=[listener.fileno()]
        )
        remote = Remote("vault.example:1", ca_file=pki.file, socket=str(tmp_path / "s"))
        with pytest.raises(AgentError) as caught:
            asyncio.run(remote.request("POST", "/", timeout=PATIENCE))
        assert lying.wait(PATIENCE) == 0
    assert caught.value.slug == "EGRESS_UNREACHABLE"


LYING = """
import socket, sys
sock, _ = socket.socket(fileno=int(sys.argv[1])).accept()
sock.recv(65536)
sock.send(bytes.fromhex(sys.argv[2]))
"""


def test_the_environment_leads_nowhere_and_gets_no_keys(
    tmp_path: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    with serving(Website(pki.server("127.0.0.1"), [http(SECRET)])) as (server,):
        assert through(tmp_path, server.port, pki.file).body == SECRET
    assert not (tmp_path / "keys").exists()
