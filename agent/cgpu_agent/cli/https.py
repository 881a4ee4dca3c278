"""One HTTP request, by the standard library: bounded in size and in time as a whole, never redirected."""

from __future__ import annotations

import errno
import http.client
import ipaddress
import json
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Final, TypeVar

from cgpu_agent.errors import AgentError, HostileInput, Misuse, Unavailable
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.strictjson import Fields
from cgpu_agent.wire.text import printable

T = TypeVar("T")

MAX_ANSWER: Final = 64 << 10
SECONDS: Final = 30


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Who is asked is what the operator said, not what an answer says."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Service:
    """A verifier service, or another of which the operator said where it is.

    Args:
        url: ``https://HOST[:PORT][/PREFIX]``, or plain ``http`` to this machine alone.
        option: who said so, for messages.

    Raises:
        Misuse: ``BAD_URL``.
    """

    def __init__(self, url: str, option: str = "--url") -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            host = parts.hostname or ""
            _ = parts.port
        except ValueError:
            raise Misuse("BAD_URL", f"{option} is not a URL") from None
        if parts.scheme not in ("https", "http") or not host or parts.username is not None:
            raise Misuse("BAD_URL", f"{option} must be https://HOST[:PORT]")
        if parts.query or parts.fragment:
            raise Misuse("BAD_URL", f"{option} has more than scheme, host and path")
        if parts.scheme == "http" and not _is_loopback(host):
            raise Misuse("BAD_URL", f"{option} may be plain http to this machine only; elsewhere it must be https")
        self._url = url.rstrip("/")
        # Plain http stays on this machine, so a proxy has no part in it.
        proxies = [urllib.request.ProxyHandler({})] if parts.scheme == "http" else []
        self._opener = urllib.request.build_opener(NoRedirect, *proxies)

    def post(self, path: str, body: dict[str, Any]) -> Fields:
        """The answer's JSON object.

        Raises:
            Unavailable: ``NO_VERIFIER`` (nobody answers), ``VERIFIER_REFUSED`` (with its own reason).
            HostileInput: ``BAD_ANSWER``: not what such a service says.
        """
        status, data = self.exchange(path, json.dumps(body).encode(), "application/json", MAX_ANSWER)
        if status != http.HTTPStatus.OK:
            raise _refusal(status, data)
        return _fields(data)

    def exchange(self, path: str, body: bytes | None, media: str, limit: int) -> tuple[int, bytes]:
        """Status and body of the answer to a POST; without ``body``, to a GET. A redirect is an answer, too.

        Args:
            path: begins with a slash.
            body: what is sent.
            media: its type.
            limit: largest accepted answer in bytes.

        Raises:
            Unavailable: ``NO_VERIFIER``: nobody answers, or not within ``SECONDS``.
            HostileInput: ``BAD_ANSWER``: more than ``limit`` bytes.
        """
        headers = {} if body is None else {"content-type": media}
        request = urllib.request.Request(self._url + path, body, headers)  # noqa: S310 - the scheme was checked

        def ask() -> tuple[int, bytes]:
            try:
                with self._opener.open(request, timeout=SECONDS) as answer:
                    return answer.status, answer.read(limit + 1)
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read(limit + 1)

        try:
            status, data = _in_time(ask)
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            said = reason.strerror if isinstance(reason, OSError) and reason.strerror else type(reason).__name__
            raise Unavailable("NO_VERIFIER", f"{self._url} does not answer: {said}") from error
        if len(data) > limit:
            raise HostileInput("BAD_ANSWER", f"{self._url} answers with more than {limit} bytes")
        return status, data


def _in_time(ask: Callable[[], T]) -> T:
    """The timeout of a socket is for one piece, and a peer may send any number of pieces, so this one is for all."""
    found: Future[T] = Future()

    def work() -> None:
        try:
            found.set_result(ask())
        except BaseException as error:  # noqa: BLE001 - it is raised again, by whoever waits
            found.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # one that hangs ends with the program
    try:
        return found.result(SECONDS)
    except FutureTimeout:
        raise TimeoutError(errno.ETIMEDOUT, "the answer takes too long") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _fields(data: bytes) -> Fields:
    try:
        return Fields(strictjson.loads(data, "answer", MAX_ANSWER), "answer")
    except HostileInput as error:
        raise HostileInput("BAD_ANSWER", "the service's answer is not a JSON object") from error


def _refusal(status: int, data: bytes) -> AgentError:
    try:
        fields = Fields(strictjson.loads(data, "answer", MAX_ANSWER), "answer")
        detail, slug = printable(fields.text("detail", 1024), 1024), printable(fields.text("slug", 64), 64)
    except HostileInput:
        return Unavailable("VERIFIER_REFUSED", f"the service refused with HTTP status {status}")
    return Unavailable("VERIFIER_REFUSED", f"the service refused: {detail} [{slug}]")
