"""How the agent asks a server in the world: what is tried again, when it stops asking, and what each failure is."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cgpu_agent.backends.egress import ATTEMPTS, Answer, Breaker, Remote
from cgpu_agent.errors import AgentError, DeviceFault, Misuse, Unavailable
from fixtures.egress import PATIENCE, Pki, Website, allowing, http, running_egress, serving
from fixtures.gpusessions import MovableClock

Ask = Callable[..., Answer]


class Waits:
    """Stands where asyncio.sleep does: no test waits, and all see for how long."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


@contextmanager
def asking(folder: Path, handler: Callable[[socket.socket], None], pki: Pki, **more: object) -> Iterator[Ask]:
    """A function that asks this server through a real proxy."""
    with serving(handler) as (server,):
        where = f"127.0.0.1:{server.port}"
        with running_egress(folder, allowing(f'"{where}"')) as egress:
            more.setdefault("sleep", Waits())
            remote = Remote(where, ca_file=pki.file, socket=egress.socket, **more)  # type: ignore[arg-type]

            def ask(method: str = "GET", path: str = "/", timeout: float = PATIENCE, **extra: object) -> Answer:
                return asyncio.run(remote.request(method, path, timeout=timeout, **extra))  # type: ignore[arg-type]

            yield ask


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


def refused(ask: Ask, method: str = "GET", **more: object) -> AgentError:
    with pytest.raises(AgentError) as caught:
        ask(method, **more)
    return caught.value


def site(pki: Pki, *answers: bytes) -> Website:
    return Website(pki.server("127.0.0.1"), list(answers))


# -- what is tried again


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_what_may_be_asked_twice_is_asked_again(tmp_path: Path, pki: Pki, method: str) -> None:
    waits = Waits()
    server = site(pki, b"", b"", http(b"at last"))
    with asking(tmp_path, server, pki, sleep=waits, jitter=lambda: 0.5) as ask:
        assert ask(method).body == b"at last"
    assert waits.seconds == [0.25, 0.5]
    assert len(server.requests) == ATTEMPTS == 3


def test_it_gives_up_after_the_last_attempt(tmp_path: Path, pki: Pki) -> None:
    server = site(pki, b"")
    with asking(tmp_path, server, pki) as ask:
        error = refused(ask)
    assert (error.slug, len(server.requests)) == ("EGRESS_BAD_ANSWER", ATTEMPTS)
    assert error.retry_after is not None


def test_what_may_have_been_done_is_not_asked_again(tmp_path: Path, pki: Pki) -> None:
    server = site(pki, b"", http(b"twice"))
    with asking(tmp_path, server, pki) as ask:
        error = refused(ask, "POST")
    assert isinstance(error, DeviceFault)
    assert (error.slug, error.outcome_unknown, error.retry_after) == ("EGRESS_BAD_ANSWER", True, None)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [204, 301, 400, 404, 429, 500, 503])
def test_every_status_is_an_answer_and_no_redirect_is_followed(tmp_path: Path, pki: Pki, status: int) -> None:
    server = site(pki, http(b"", status, "Location: https://127.0.0.1:1/"))
    with asking(tmp_path, server, pki) as ask:
        assert ask().status == status
    assert len(server.requests) == 1


# -- bounds


@pytest.mark.parametrize(
    ("answer", "slug"),
    [
        (http(b"x" * 100), None),
        (http(b"x" * 101), "EGRESS_TOO_LARGE"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\n" + b"x" * 100 + b"\r\n0\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n65\r\n" + b"x" * 101, "EGRESS_TOO_LARGE"),
        (http(b"", 200, f"X: {'x' * 200_000}"), "EGRESS_BAD_ANSWER"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "EGRESS_BAD_ANSWER"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx", "EGRESS_BAD_ANSWER"),
    ],
)
def test_an_answer_is_bounded_and_is_http(tmp_path: Path, pki: Pki, answer: bytes, slug: str | None) -> None:
    with asking(tmp_path, site(pki, answer), pki, max_body=100) as ask:
        if slug is None:
            assert ask().body == b"x" * 100
        else:
            assert refused(ask).slug == slug


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_who_does_not_answer_is_not_waited_for(tmp_path: Path, pki: Pki, method: str) -> None:
    def silent(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.recv(65536)

    with asking(tmp_path, silent, pki) as ask:
        error = refused(ask, method, timeout=0.3)
    assert isinstance(error, DeviceFault)
    assert (error.slug, error.outcome_unknown) == ("EGRESS_TIMEOUT", method == "POST")


@pytest.mark.parametrize(
    "bad",
    [
        {"path": "/a b"},
        {"path": "/a\r\nX: y"},
        {"path": "/ä"},
        {"path": ""},
        {"headers": {"X": "y\r\nZ: w"}},
        {"headers": {"X\r\n": "y"}},
        {"headers": {"X": "ä"}},
        {"headers": {"host": "other.example"}},
        {"headers": {"Content-Length": "0"}},
        {"headers": {"Transfer-Encoding": "chunked"}},
        {"headers": {"CONNECTION": "keep-alive"}},
        {"method": "GE T"},
        {"method": "G\u00c9T"},
    ],
)
def test_what_http_cannot_say_is_the_callers_mistake(tmp_path: Path, pki: Pki, bad: dict[str, object]) -> None:
    server = site(pki, http(b""))
    with asking(tmp_path, server, pki) as ask:
        error = refused(ask, **bad)  # type: ignore[arg-type]
    assert isinstance(error, Misuse)
    assert (error.slug, server.requests) == ("EGRESS_BAD_REQUEST", [])


# -- the breaker


def test_who_fails_again_and_again_is_left_alone_for_a_while(tmp_path: Path, pki: Pki) -> None:
    clock = MovableClock()
    server = site(pki, b"", b"", b"", http(b"well again"))
    with asking(tmp_path, server, pki, breaker=Breaker(2, 30.0, clock.monotonic)) as ask:
        assert refused(ask, "POST").slug == "EGRESS_BAD_ANSWER"
        assert refused(ask, "POST").slug == "EGRESS_BAD_ANSWER"
        error = refused(ask, "POST")
        assert isinstance(error, Unavailable)
        assert (error.slug, error.retry_after, len(server.requests)) == ("EGRESS_OPEN", 30.0, 2)
        clock.pass_by(30)
        assert refused(ask, "POST").slug == "EGRESS_BAD_ANSWER"  # One may try ...
        assert refused(ask, "POST").slug == "EGRESS_OPEN"  # ... and failed.
        clock.pass_by(30)
        assert ask("POST").body == b"well again"
        assert ask("POST").body == b"well again"


def test_while_one_tries_the_others_wait() -> None:
    clock = MovableClock()
    breaker = Breaker(1, 10.0, clock.monotonic)
    breaker.enter()
    breaker.note(good=False)
    clock.pass_by(10)
    breaker.enter()
    with pytest.raises(Unavailable):
        breaker.enter()
    breaker.note(good=True)
    breaker.enter()


def test_failures_that_are_not_in_a_row_do_not_add_up() -> None:
    breaker = Breaker(2, 10.0, MovableClock().monotonic)
    for good in (False, True, False, True, False):
        breaker.note(good=good)
        breaker.enter()


# -- what it is made with


@pytest.mark.parametrize("destination", ["vault.example", "https://vault.example:1", "VAULT:1", "10.1:1"])
def test_a_bad_destination_is_refused(destination: str) -> None:
    with pytest.raises(Misuse) as caught:
        Remote(destination)
    assert caught.value.slug == "BAD_DESTINATION"


@pytest.mark.parametrize("content", [None, b"", b"not a certificate"])
def test_a_bad_file_of_cas_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "ca").write_bytes(content)
    with pytest.raises(Misuse) as caught:
        Remote("a:1", ca_file=tmp_path / "ca")
    assert caught.value.slug == "BAD_CA_FILE"
