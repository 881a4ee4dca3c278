"""Keys from Trustee's key broker (KBS): request, challenge, attestation, response, anew for every key.

Nothing is kept from one release to the next but what kind of VM this is: each has a session, a key for the answer and
evidence of its own, so no answer fits another request. Which of its errors the broker means is told by their type: it
has one status for nearly all of them.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from cgpu_agent.backends.base import MAX_SECRET, Attester, BrokerKind, PlatformKind, ReleasedKey
from cgpu_agent.backends.keys.https import Https
from cgpu_agent.backends.keys.jwe import AnswerKey
from cgpu_agent.backends.keys.trusteeevidence import additional_evidence, primary_evidence, tee_of
from cgpu_agent.errors import AgentError, Denied, HostileInput, Misuse, Unavailable
from cgpu_agent.wire.kbs import (
    MAX_CHALLENGE,
    MAX_ERROR,
    MAX_RESPONSE,
    MAX_TOKEN,
    binding,
    encode_attestation,
    encode_request,
    parse_challenge,
    parse_error,
    parse_response,
    parse_token,
)

T = TypeVar("T")

_BASE: Final = "/kbs/v0/"
_ORIGIN = re.compile(r"https://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
_PATH = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*){2}")
_MAX_PATH: Final = 512
_COOKIE = re.compile(r"(kbs-session-id=[0-9a-f]{32})(;.*)?")
_OK: Final = 200
_RETRY_AFTER: Final = 5.0
_ABSENT: Final = frozenset({"InvalidRequestPath", "PluginInternalError", "PluginNotFound"})
"""The broker says of a secret that is not there only that the plugin which keeps secrets failed."""


class TrusteeKbs:
    """``KeyBroker`` of kind ``trustee``, protocol 0.4.0. The protocol counts no generations: each key is its first.

    Args:
        url: ``https://name`` or ``https://name:port``, no more.
        https: reaches it.

    Raises:
        Misuse: ``BAD_BROKER_URL``; there is no way to say plain HTTP.
    """

    kind: BrokerKind = "trustee"
    sees_gpus = True

    def __init__(self, url: str, https: Https) -> None:
        if _ORIGIN.fullmatch(url) is None:
            raise Misuse("BAD_BROKER_URL", "the broker's address is not of the form https://name:port")
        self._url: Final = url + _BASE
        self._https: Final = https
        self._platform: PlatformKind | None = None

    async def release(self, path: str, attester: Attester, *, timeout: float) -> ReleasedKey:
        """As ``KeyBroker.release``.

        Args:
            path: ``repository/type/tag``.

        Raises:
            Misuse: ``BAD_KEY_PATH``.
            Unavailable: also ``PLATFORM_UNSUPPORTED``, ``GPU_UNSUPPORTED``, ``NO_REPORT``, ``NO_CERTIFICATES``,
                ``NO_TD_QUOTE``: this VM has no evidence that Trustee reads.
        """
        if len(path) > _MAX_PATH or _PATH.fullmatch(path) is None:
            raise Misuse("BAD_KEY_PATH", "Trustee names a key repository/type/tag")
        session = _Session(self._url, self._https, time.monotonic() + timeout)
        try:
            return ReleasedKey(await asyncio.wait_for(self._release(path, attester, session), timeout), generation=1)
        except asyncio.TimeoutError:
            raise _unreachable("no key in time") from None

    def close(self) -> None:
        """It holds nothing."""

    async def _release(self, path: str, attester: Attester, session: _Session) -> bytes:
        if self._platform is None:
            self._platform = (await attester.platform(None)).kind
        nonce = await session.open(encode_request(tee_of(self._platform)))
        key = AnswerKey()
        devices = await additional_evidence(attester, binding(nonce, key.jwk))
        primary = await primary_evidence(attester, self._platform, binding(nonce, key.jwk, devices))
        await session.attest(encode_attestation(nonce, key.jwk, primary, devices))
        return await session.secret(path, key)


class _Session:
    """One handshake and what it opens; its cookie goes to nobody but who set it, and nowhere after that."""

    def __init__(self, url: str, https: Https, deadline: float) -> None:
        self._url: Final = url
        self._https: Final = https
        self._deadline: Final = deadline
        self._cookie: str | None = None

    async def open(self, request: bytes) -> str:
        """The challenge's nonce."""
        headers, body = await self._ask("POST", "auth", request, MAX_CHALLENGE)
        set_cookie = _COOKIE.fullmatch(headers.get("set-cookie", ""))
        if set_cookie is None:
            raise _unreadable("a challenge without the session's cookie")
        self._cookie = set_cookie[1]
        return _read(parse_challenge, body)

    async def attest(self, attestation: bytes) -> None:
        """Show the evidence. The token stays unused: the session stands for it."""
        _, body = await self._ask("POST", "attest", attestation, MAX_TOKEN)
        _read(parse_token, body)

    async def secret(self, path: str, key: AnswerKey) -> bytes:
        _, body = await self._ask("GET", f"resource/{path}", b"", MAX_RESPONSE)
        secret = _read(lambda data: key.open(parse_response(data)), body)
        if not 1 <= len(secret) <= MAX_SECRET:
            raise _unreadable(f"a secret of {len(secret)} bytes")
        return secret

    async def _ask(self, method: str, path: str, body: bytes, limit: int) -> tuple[Mapping[str, str], bytes]:
        headers = {"Accept": "application/json"}
        if body:
            headers["Content-Type"] = "application/json"
        if self._cookie is not None:
            headers["Cookie"] = self._cookie
        try:
            status, answered, content = await self._https.request(
                method,
                self._url + path,
                headers=headers,
                body=body,
                timeout=max(0.0, self._deadline - time.monotonic()),
                limit=max(limit, MAX_ERROR),
            )
        except HostileInput as error:
            raise _unreadable("what is no answer, or too long") from error
        except AgentError as error:
            raise _unreachable(f"it cannot be reached ({error.slug})") from error
        if status == _OK:
            return answered, content
        raise _refusal(path, status, content)


def _refusal(path: str, status: int, content: bytes) -> AgentError:
    try:
        variant = parse_error(content)
    except HostileInput:
        if status == 429 or status >= 500:  # Trustee has no such status: whoever stands before it has
            return _unreachable("something before it answers that it cannot")
        return _unreadable("neither what was asked for nor one of its errors")
    if variant == "PolicyDeny":
        return Denied("KEY_REFUSED", "Trustee's policy does not let this VM have the key")
    if variant == "AttestationError" and path == "attest":
        return Denied("KEY_REFUSED", "Trustee does not accept this VM's evidence")
    if variant in _ABSENT and path.startswith("resource/"):
        return Unavailable("KEY_ABSENT", "Trustee has no such key, or cannot get at it")
    if variant == "TokenNotFound":
        return _unreachable("it forgot the session")
    return _unreadable(f"the error {variant}")


def _read(parse: Callable[[bytes], T], body: bytes) -> T:
    try:
        return parse(body)
    except HostileInput as error:
        raise _unreadable("what nobody can read") from error


def _unreadable(what: str) -> Unavailable:
    return Unavailable("BROKER_ANSWER", f"Trustee answered with {what}")


def _unreachable(what: str) -> Unavailable:
    return Unavailable("BROKER_UNREACHABLE", f"Trustee: {what}", retry_after=_RETRY_AFTER)
