"""``cgpu-egress`` as a process of its own, between the agent's HTTPS client and real TLS servers."""

from __future__ import annotations

import asyncio
import hashlib
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cgpu_agent.backends.egress import Answer, Remote
from cgpu_agent.egress import __main__ as egress_command
from cgpu_agent.errors import AgentError
from fixtures.egress import (
    PATIENCE,
    Egress,
    Pki,
    Website,
    Wiretap,
    allowing,
    command,
    connect_to,
    echo,
    exactly,
    heard,
    http,
    running_egress,
    serving,
)

SECRET = b"the key that is released"


def ask(egress: Egress, port: int, pki: Pki, method: str = "GET", **more: object) -> Answer:
    remote = Remote(f"127.0.0.1:{port}", ca_file=pki.file, socket=egress.socket)
    return asyncio.run(remote.request(method, "/v1/key", timeout=PATIENCE, **more))  # type: ignore[arg-type]


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


@pytest.fixture
def echoing(tmp_path: Path) -> Iterator[tuple[Egress, int]]:
    """A proxy, and a port that it allows: whatever comes there goes back."""
    with serving(echo) as (server,), running_egress(tmp_path, allowing(f'"127.0.0.1:{server.port}"')) as egress:
        yield egress, server.port


# -- the agent's client through it


def test_an_allowed_server_is_asked_over_tls_that_the_proxy_cannot_read(tmp_path: Path, pki: Pki) -> None:
    site = Website(pki.server("127.0.0.1"), [http(SECRET, 200, "X-Word: one")])
    with (
        serving(site) as (server,),
        serving(tap := Wiretap(server.port)) as (tapped,),
        running_egress(tmp_path, allowing(f'"127.0.0.1:{tapped.port}"')) as egress,
    ):
        answer = ask(egress, tapped.port, pki, "POST", headers={"Authorization": "Bearer hush"}, body=b"please")
        line = egress.said("reason=")
    assert (answer.status, answer.headers["x-word"], answer.body) == (200, "one", SECRET)
    (head,) = site.requests
    assert head.endswith(b"\r\n\r\nplease")
    assert head.startswith(b"POST /v1/key HTTP/1.1\r\n")
    assert f"host: 127.0.0.1:{tapped.port}\r\n".encode() in head
    assert b"Authorization: Bearer hush\r\n" in head
    # What passed the proxy is all that the wiretap saw behind it: TLS, and no word of either side.
    assert tap.seen[:2] == b"\x16\x03"
    assert not any(word in tap.seen for word in (SECRET, b"hush", b"please", b"/v1/key", b"X-Word"))
    # LOST: who closes TLS without waiting for the other side's last word leaves it unread.
    words = rf"reason=(ENDED|LOST) host=127\.0\.0\.1 port={tapped.port} address=127\.0\.0\.1"
    assert re.fullmatch(rf"<6>connection {words} sent=\d+ received=\d+ seconds=\d+\.\d+", line)


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="no IPv6 on this machine")
def test_an_ipv6_address_is_asked(tmp_path: Path, pki: Pki) -> None:
    site = Website(pki.server("::1"), [http(SECRET)])
    with serving(site, host="::1") as (server,):
        where = f"[::1]:{server.port}"
        with running_egress(tmp_path, allowing(f'"{where}"')) as egress:
            remote = Remote(where, ca_file=pki.file, socket=egress.socket)
            assert asyncio.run(remote.request("GET", "/", timeout=PATIENCE)).body == SECRET
    assert f"host: {where}\r\n".encode() in site.requests[0]


def test_a_destination_that_is_not_listed_is_denied(tmp_path: Path, pki: Pki) -> None:
    site = Website(pki.server("127.0.0.1"), [http(SECRET)])
    with serving(site) as (server,), running_egress(tmp_path, allowing('"127.0.0.1:1"')) as egress:
        with pytest.raises(AgentError) as caught:
            ask(egress, server.port, pki)
        assert egress.said("NOT_ALLOWED").startswith("<4>connection reason=NOT_ALLOWED host=127.0.0.1")
    assert caught.value.slug == "EGRESS_DENIED"
    assert server.connections == 0


def test_where_nobody_listens_is_unreachable(tmp_path: Path, pki: Pki) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with running_egress(tmp_path, allowing(f'"127.0.0.1:{port}"')) as egress, pytest.raises(AgentError) as caught:
        ask(egress, port, pki)
    assert caught.value.slug == "EGRESS_UNREACHABLE"


def test_without_the_proxy_the_world_is_unreachable(tmp_path: Path, pki: Pki) -> None:
    remote = Remote("127.0.0.1:1", ca_file=pki.file, socket=str(tmp_path / "none"))
    with pytest.raises(AgentError) as caught:
        asyncio.run(remote.request("POST", "/"))
    assert caught.value.slug == "EGRESS_UNREACHABLE"


# -- its life


def test_activated_it_serves_whoever_waits_and_stops_in_order(echoing: tuple[Egress, int]) -> None:
    egress, port = echoing
    with egress.tunnel(port) as sock:
        sock.sendall(b"hello")
        assert exactly(sock, 5) == b"hello"
        assert egress.stop() == 0
        assert heard(sock) == b""
    assert egress.manager.wait(lambda: "STOPPING=1" in egress.manager.lines)
    assert "STATUS=Destinations allowed: 1" in egress.manager.lines
    assert "reason=STOPPED" in egress.said("sent=5 received=5")


@pytest.mark.parametrize("kinds", [(), (socket.SOCK_SEQPACKET,), (socket.SOCK_STREAM,) * 2])
def test_without_the_one_socket_that_it_needs_it_does_not_start(tmp_path: Path, kinds: tuple[int, ...]) -> None:
    (tmp_path / "egress.toml").write_text(allowing())
    listeners = [socket.socket(socket.AF_UNIX, kind) for kind in kinds]
    process = command(tmp_path, *listeners)
    assert process.wait(PATIENCE) == 1
    for sock in listeners:
        sock.close()
    assert (tmp_path / "journal").read_text() == "<3>cgpu-egress is started by cgpu-egress.socket\n"


def test_a_bad_file_ends_it_with_a_status_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "egress.toml").write_text("allow = ['*:443']")
    assert command(tmp_path).wait(PATIENCE) == 2
    assert (tmp_path / "journal").read_text().startswith("<3>bad configuration: allow[0]: a destination is")


@pytest.mark.parametrize(("text", "status"), [("allow = []", 0), ("allow = 1", 2)])
def test_a_file_can_be_checked(tmp_path: Path, text: str, status: int) -> None:
    (tmp_path / "egress.toml").write_text(text)
    assert egress_command.main(["--check", "--config", str(tmp_path / "egress.toml")]) == status


def test_a_reload_changes_what_is_allowed(echoing: tuple[Egress, int]) -> None:
    egress, port = echoing
    egress.reload(allowing('"a.example:1"', '"b.example:1"'))
    assert egress.ask(connect_to(f"127.0.0.1:{port}")) == b"HTTP/1.1 403 NOT_ALLOWED\r\n\r\n"
    assert "STATUS=Destinations allowed: 2" in egress.manager.lines
    egress.reload(allowing(f'"127.0.0.1:{port}"'))
    egress.tunnel(port).close()


@pytest.mark.parametrize("text", ["allow = ['*:443']", "", "allow = []\nmore = 1", "allow = ["])
def test_a_reload_of_a_bad_file_changes_nothing_and_says_why(echoing: tuple[Egress, int], text: str) -> None:
    egress, port = echoing
    egress.reload(text)
    egress.tunnel(port).close()
    assert egress.said("bad configuration").startswith("<3>bad configuration, the one before it stays: ")
    assert any(line.startswith("STATUS=Destinations allowed: 1; the file is bad: ") for line in egress.manager.lines)


def test_a_reload_leaves_open_connections_alone(echoing: tuple[Egress, int]) -> None:
    egress, port = echoing
    with egress.tunnel(port) as sock:
        egress.reload(allowing())
        sock.sendall(b"still here")
        assert exactly(sock, 10) == b"still here"


# -- bytes and time


def until_full(sock: socket.socket, data: bytes) -> int:
    """How much went out before nothing did for a while."""
    sock.settimeout(0.5)
    sent = 0
    with suppress(TimeoutError):
        while sent < len(data):
            sent += sock.send(data[sent : sent + 65536])
    sock.settimeout(PATIENCE)
    return sent


def test_many_bytes_come_through_as_they_are_and_wait_for_a_slow_reader(tmp_path: Path) -> None:
    data = bytes(range(256)) * (48 << 10)
    may_read = threading.Event()

    def slow(sock: socket.socket) -> None:
        may_read.wait(PATIENCE)
        sock.sendall(hashlib.sha256(heard(sock)).digest())

    with serving(slow) as (server,), running_egress(tmp_path, allowing(f'"127.0.0.1:{server.port}"')) as egress:
        sock = egress.tunnel(server.port)
        with sock:
            sent = until_full(sock, data)
            assert sent < len(data)  # Nobody reads: the sender has to wait, and nothing grows.
            may_read.set()
            sock.sendall(data[sent:])
            sock.shutdown(socket.SHUT_WR)
            assert heard(sock) == hashlib.sha256(data).digest()
        assert f"sent={len(data)} received=32" in egress.said("reason=ENDED")


def test_a_half_closed_connection_still_carries_the_other_way(tmp_path: Path) -> None:
    def late(sock: socket.socket) -> None:
        asked = heard(sock)
        sock.sendall(b"you said " + asked)

    with (
        serving(late) as (server,),
        running_egress(tmp_path, allowing(f'"127.0.0.1:{server.port}"')) as egress,
        egress.tunnel(server.port) as sock,
    ):
        sock.sendall(b"that")
        sock.shutdown(socket.SHUT_WR)
        assert heard(sock) == b"you said that"


def test_a_signal_to_a_busy_proxy_is_heard(echoing: tuple[Egress, int]) -> None:
    egress, port = echoing
    with egress.tunnel(port):
        egress.process.send_signal(signal.SIGINT)
        assert egress.process.wait(PATIENCE) == 0
