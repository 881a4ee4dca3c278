"""The agent's side of ``cgpu-egress``: HTTPS whose TLS ends in this process, through a proxy that sees bytes only.

The host, the network and the proxy may cut, hold back and alter what they carry: TLS finds what was altered, and an
answer that does not say how long it is counts as cut. ``httpcore`` alone, without ``httpx``, knows no redirects, no
proxies and credentials of the environment, no cookies and no compressed bodies, so nothing has to turn them off.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpcore

from cgpu_agent.errors import AgentError, DeviceFault, HostileInput, Misuse, Unavailable
from cgpu_agent.wire.egress import (
    CONNECTED,
    HEAD_END,
    MAX_HEAD,
    SOCKET,
    STATUS,
    Destination,
    encode_request,
    parse_answer,
    parse_destination,
)

MAX_BODY: Final = 1 << 20
ATTEMPTS: Final = 3
_IDEMPOTENT: Final = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
"""RFC 9110, 9.2.2."""
_WAIT: Final = 0.5
"""Longest wait in seconds before the second attempt; it doubles with each."""
_RETRY_AFTER: Final = 5.0
_AGAIN: Final = frozenset({"EGRESS_UNREACHABLE", "EGRESS_BAD_ANSWER"})
"""What may be gone with the next connection."""
_FAILURES: Final = _AGAIN | {"EGRESS_TLS", "EGRESS_TOO_LARGE"}
_WITHOUT_BODY: Final = frozenset({204, 304})


@dataclass(frozen=True, slots=True)
class Answer:
    """What the other side answered, of any status. Names of ``headers`` are in lower case, the last one wins."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Breaker:
    """Stops asking who failed several times in a row; then lets one request try, at most every so often.

    Args:
        failures: how many in a row.
        seconds: how long nobody asks.
        clock: seconds that only grow.
    """

    def __init__(self, failures: int = 5, seconds: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._most: Final = failures
        self._seconds: Final = seconds
        self._clock: Final = clock
        self._failed = 0
        self._until = 0.0

    def enter(self) -> None:
        """Call before asking. Raises ``Unavailable`` (``EGRESS_OPEN``)."""
        if self._failed < self._most:
            return
        now = self._clock()
        if now < self._until:
            raise Unavailable(
                "EGRESS_OPEN", "the other side failed several times just now", retry_after=self._until - now
            )
        self._until = now + self._seconds

    def note(self, good: bool) -> None:
        """How it went."""
        self._failed = 0 if good else self._failed + 1
        if self._failed == self._most:
            self._until = self._clock() + self._seconds


class Remote:
    """One HTTPS server in the world, and how to ask it. One event loop's.

    Each attempt has a connection of its own: a kept one may end just as a request leaves, and then nobody knows
    whether it was served.

    Args:
        destination: ``name:port`` or ``address:port``, as the operator allowed it in ``egress.toml``.
        ca_file: PEM file of the only CAs that may vouch for the server; ``None`` = the system's.
        socket: where ``cgpu-egress`` listens.
        max_body: bytes of an answer's body, at most.
        jitter: a number of [0, 1).

    Raises:
        Misuse: ``BAD_DESTINATION``, ``BAD_CA_FILE``.
    """

    def __init__(
        self,
        destination: str,
        *,
        ca_file: Path | None = None,
        socket: str = SOCKET,
        max_body: int = MAX_BODY,
        breaker: Breaker | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        try:
            self._to: Final = parse_destination(destination)
        except HostileInput as error:
            raise Misuse(error.slug, error.message) from None
        self._tls: Final = _tls(ca_file)
        self._socket: Final = socket
        self._max_body: Final = max_body
        self._breaker: Final = breaker or Breaker()
        self._sleep: Final = sleep
        self._jitter: Final = jitter

    async def request(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        timeout: float = 30.0,
    ) -> Answer:
        """The answer, of any status. Idempotent methods have up to ``ATTEMPTS`` attempts, all within ``timeout``.

        Raises:
            Misuse: ``EGRESS_BAD_REQUEST``: HTTP cannot say it.
            Unavailable: ``EGRESS_DENIED`` (by ``egress.toml``), ``EGRESS_UNREACHABLE``, ``EGRESS_OPEN``.
            DeviceFault: ``EGRESS_TIMEOUT``, ``EGRESS_TLS``, ``EGRESS_BAD_ANSWER``, ``EGRESS_TOO_LARGE``;
                ``outcome_unknown`` where a request that is not idempotent may have been served.
        """
        again = method in _IDEMPOTENT
        try:
            request = self._request(method, path, headers or {}, body)
            return await asyncio.wait_for(self._attempts(request, again=again), timeout)
        except asyncio.TimeoutError:
            self._breaker.note(good=False)
            raise _fault("EGRESS_TIMEOUT", "no answer in time", again=again) from None
        except (UnicodeEncodeError, httpcore.LocalProtocolError):
            raise Misuse("EGRESS_BAD_REQUEST", "this is no HTTP request") from None

    def _request(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> httpcore.Request:
        own = {"host": str(self._to), "content-length": str(len(body)), "connection": "close"}
        if {name.lower() for name in headers} & {*own, "transfer-encoding"}:
            raise Misuse("EGRESS_BAD_REQUEST", "how a request is framed is not the caller's to say")
        return httpcore.Request(
            method.encode("ascii"),
            httpcore.URL(
                scheme=b"https", host=self._to.host.encode(), port=self._to.port, target=path.encode("ascii")
            ),
            headers=[(name.encode("ascii"), value.encode("ascii")) for name, value in {**own, **headers}.items()],
            content=body,
        )

    async def _attempts(self, request: httpcore.Request, *, again: bool) -> Answer:
        wait, left = _WAIT, ATTEMPTS if again else 1
        while True:
            self._breaker.enter()
            left -= 1
            try:
                answer = await self._ask(request, again=again)
            except AgentError as error:
                if error.slug in _FAILURES:
                    self._breaker.note(good=False)
                if not left or error.slug not in _AGAIN:
                    raise
            else:
                self._breaker.note(good=True)
                return answer
            await self._sleep(wait * self._jitter())
            wait *= 2

    async def _ask(self, request: httpcore.Request, *, again: bool) -> Answer:
        tunnel = _Tunnel(self._socket, self._to)
        try:
            connection = httpcore.AsyncHTTPConnection(request.url.origin, self._tls, network_backend=tunnel)
            response = await connection.handle_async_request(request)
            return await self._read(request, response, again=again)
        except httpcore.ConnectError as error:
            if isinstance(error.__cause__, ssl.SSLError):
                raise DeviceFault("EGRESS_TLS", "the other side is not who it must be") from error
            raise _unreachable() from error
        except (httpcore.RemoteProtocolError, httpcore.ReadError, httpcore.WriteError) as error:
            raise _fault("EGRESS_BAD_ANSWER", "the answer is not whole, or not HTTP", again=again) from error
        except ssl.SSLError as error:
            raise DeviceFault("EGRESS_TLS", "the connection was tampered with", outcome_unknown=not again) from error
        finally:
            await tunnel.aclose()

    async def _read(self, request: httpcore.Request, response: httpcore.Response, *, again: bool) -> Answer:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
        bodiless = request.method == b"HEAD" or response.status in _WITHOUT_BODY
        if not bodiless and not headers.keys() & {"content-length", "transfer-encoding"}:
            raise _fault("EGRESS_BAD_ANSWER", "the answer does not say how long it is", again=again)
        body = bytearray()
        async for part in response.aiter_stream():
            body += part
            if len(body) > self._max_body:
                raise DeviceFault(
                    "EGRESS_TOO_LARGE", "the answer is larger than it may be", outcome_unknown=not again
                )
        return Answer(response.status, headers, bytes(body))


class _Tunnel(httpcore.AsyncNetworkBackend):
    """One connection through the proxy, whatever address ``httpcore`` asks for."""

    def __init__(self, path: str, to: Destination) -> None:
        self._path: Final = path
        self._to: Final = to
        self._stream: httpcore.AsyncNetworkStream | None = None

    async def connect_tcp(self, *_: object, **__: object) -> httpcore.AsyncNetworkStream:
        self._stream = stream = await httpcore.AnyIOBackend().connect_unix_socket(self._path)
        head = b""
        with suppress(httpcore.WriteError):  # It may have answered before it was asked, and left.
            await stream.write(encode_request(self._to))
        try:
            while not head.endswith(HEAD_END) and len(head) < MAX_HEAD:
                part = await stream.read(MAX_HEAD - len(head))
                head += part
                if not part:
                    break
            reason = parse_answer(head)
        except (httpcore.ReadError, HostileInput):
            raise _unreachable() from None
        if reason == CONNECTED:
            return stream
        if STATUS[reason] == 403:
            raise Unavailable("EGRESS_DENIED", f"cgpu-egress does not connect to {self._to}: {reason}")
        raise _unreachable()

    async def aclose(self) -> None:
        if self._stream is not None:
            await self._stream.aclose()


def _tls(ca_file: Path | None) -> ssl.SSLContext:
    # Not ssl.create_default_context(): it writes the keys of every session to the file that SSLKEYLOGFILE names.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        if ca_file is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(ca_file)
    except OSError:  # ssl.SSLError, too
        raise Misuse("BAD_CA_FILE", "the file of CAs cannot be read, or holds none") from None
    return context


def _unreachable() -> Unavailable:
    return Unavailable("EGRESS_UNREACHABLE", "the other side cannot be reached", retry_after=_RETRY_AFTER)


def _fault(slug: str, message: str, *, again: bool) -> DeviceFault:
    return DeviceFault(slug, message, retry_after=_RETRY_AFTER if again else None, outcome_unknown=not again)
