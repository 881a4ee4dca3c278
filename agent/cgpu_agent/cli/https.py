"""One JSON request to a verifier service, by the standard library: bounded in size and time, never redirected."""

from __future__ import annotations

import ipaddress
import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Final

from cgpu_agent.errors import AgentError, HostileInput, Misuse, Unavailable
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.strictjson import Fields
from cgpu_agent.wire.text import printable

MAX_ANSWER: Final = 64 << 10
SECONDS: Final = 30


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Who is asked is what the operator said, not what an answer says."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Service:
    """A verifier service.

    Args:
        url: ``https://HOST[:PORT][/PREFIX]``, or plain ``http`` to this machine alone.

    Raises:
        Misuse: ``BAD_URL``.
    """

    def __init__(self, url: str) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            host = parts.hostname or ""
            _ = parts.port
        except ValueError:
            raise Misuse("BAD_URL", "--url is not a URL") from None
        if parts.scheme not in ("https", "http") or not host or parts.username is not None:
            raise Misuse("BAD_URL", "--url must be https://HOST[:PORT]")
        if parts.query or parts.fragment:
            raise Misuse("BAD_URL", "--url has more than scheme, host and path")
        if parts.scheme == "http" and not _is_loopback(host):
            raise Misuse("BAD_URL", "--url may be plain http to this machine only; elsewhere it must be https")
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
        request = urllib.request.Request(  # noqa: S310 - the scheme was checked
            self._url + path, json.dumps(body).encode(), {"content-type": "application/json"}, method="POST"
        )
        try:
            with self._opener.open(request, timeout=SECONDS) as answer:
                return _fields(answer.read(MAX_ANSWER + 1))
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error.code, error.read(MAX_ANSWER + 1)) from None
        except (urllib.error.URLError, OSError, ValueError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            said = reason.strerror if isinstance(reason, OSError) and reason.strerror else type(reason).__name__
            raise Unavailable("NO_VERIFIER", f"{self._url} does not answer: {said}") from error


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
