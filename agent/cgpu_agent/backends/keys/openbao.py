"""OpenBao as a key broker: a verifier service's token opens it for one key, by a client token that ends at once.

Sources: OpenBao's HTTP API (auth/jwt, secret/kv version 2, secret/transit, auth/token, eventual consistency). What
keeps other workloads out is OpenBao's role, which binds purpose, key and caller (attack 4, docs/keys-openbao.md).
Here nothing outlives a release: each has its own nonce, evidence and client token, revoked however the release ends.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, TypeVar
from urllib.parse import urlsplit

from cgpu_agent.backends.base import MAX_SECRET, Attester, BrokerKind, ReleasedKey
from cgpu_agent.backends.keys.https import Https
from cgpu_agent.errors import AgentError, Denied, HostileInput, Misuse, Unavailable
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.strictjson import Fields, b64

T = TypeVar("T")

MAX_ANSWER: Final = 64 << 10
"""Bytes of an answer's body, tokens and secrets included."""
REVOKE_SECONDS: Final = 3.0
_WAIT: Final = 0.25
"""Longest wait in seconds before all addresses are tried again; it doubles with each round."""
_RETRY_AFTER: Final = 5.0

_SEGMENT: Final = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
_PATH: Final = re.compile(rf"{_SEGMENT}(/{_SEGMENT})*")
"""No empty segments and none of dots: what is asked for is what is written."""
_MAX_PATH: Final = 256
_NAME: Final = re.compile(r"[\x21-\x7e]{1,128}")
_CLIENT_TOKEN: Final = re.compile(r"[A-Za-z0-9._+/=-]{8,4096}")
_HEADER: Final = re.compile(r"[\x21-\x7e]{1,1024}")
_EAR: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_SLUG: Final = re.compile(r"[A-Z][A-Z0-9_]{1,63}")
_NOT_NOW: Final = frozenset({412, 429, 472, 473})
"""Besides 5xx: a node that lags behind, is asked too often, or stands by."""


@dataclass(frozen=True, slots=True)
class OpenBaoConfig:
    """Where the key is, and who says what this VM is. Raises ``Misuse`` (``BAD_CONFIG``).

    Attributes:
        addresses: ``https://HOST[:PORT]`` of every node of one cluster, tried in this order.
        role: of the JWT auth method at ``auth_mount``.
        verifier: ``https://HOST[:PORT][/PREFIX]`` of the verifier service.
        audience: the verifier's own name. Evidence is made for it, whatever name the service answers with.
        kv_mount: of a KV version 2 engine.
        field: of the KV entry, which holds the key as ``encoding`` says.
        transit: e.g. ``transit/decrypt/models``: the field holds a ciphertext, which that key opens, and whose
            associated data are the entry's whole path (``kv/data/...``). Then ``encoding`` means nothing.
        namespace: sent with every request to OpenBao.
    """

    addresses: tuple[str, ...]
    role: str
    verifier: str
    audience: str
    auth_mount: str = "jwt"
    kv_mount: str = "kv"
    field: str = "key"
    encoding: Literal["base64", "text"] = "base64"
    transit: str | None = None
    namespace: str | None = None

    def __post_init__(self) -> None:
        if not self.addresses:
            raise _bad("addresses")
        for address in self.addresses:
            if _prefix(address) != "":
                raise _bad("addresses")
        if _prefix(self.verifier) is None:
            raise _bad("verifier")
        for name in ("auth_mount", "kv_mount", "transit", "namespace"):
            value = getattr(self, name)
            if value is not None and not _is_path(value):
                raise _bad(name)
        for name in ("role", "field", "audience"):
            if not _NAME.fullmatch(getattr(self, name)):
                raise _bad(name)
        if self.encoding not in ("base64", "text"):
            raise _bad("encoding")


class OpenBao:
    """A ``KeyBroker``. One event loop's.

    Args:
        config: see there.
        http: reaches verifier and OpenBao.
        jitter: a number of [0, 1).
    """

    kind: BrokerKind = "openbao"
    sees_gpus = True

    def __init__(self, config: OpenBaoConfig, http: Https, jitter: Callable[[], float] = random.random) -> None:
        self._config: Final = config
        self._http: Final = http
        self._jitter: Final = jitter
        self._origins: Final = frozenset(map(_origin, config.addresses))
        self._running: Final[set[asyncio.Task[ReleasedKey]]] = set()

    async def release(self, path: str, attester: Attester, *, timeout: float) -> ReleasedKey:
        """See ``KeyBroker``; ``path`` is the entry's below ``kv_mount``, the generation its version."""
        if not _is_path(path):
            raise Unavailable("KEY_ABSENT", "no key of OpenBao's can have this name")
        reserve = min(REVOKE_SECONDS, timeout / 4)
        task = asyncio.create_task(self._release(path, attester, time.monotonic() + timeout - reserve, reserve))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # whoever asked may be gone
        # Whoever stops waiting for the key leaves no client token behind.
        return await asyncio.shield(task)

    def close(self) -> None:
        """See ``KeyBroker``."""
        # There is nothing: what still runs ends within its time, and revokes.

    async def _release(self, path: str, attester: Attester, end: float, reserve: float) -> ReleasedKey:
        verifier = (self._config.verifier,)
        nonce = await self._at_one(verifier, self._nonce, end)
        try:
            bundle = await asyncio.wait_for(attester.bundle(nonce, self._config.audience), end - time.monotonic())
        except asyncio.TimeoutError:
            raise _unreachable("there was no time left to show what this VM is") from None
        ear = await self._at_one(verifier, partial(self._verify, bundle), end)
        return await self._at_one(self._config.addresses, partial(self._open, path, ear, reserve), end)

    async def _at_one(self, addresses: Sequence[str], work: Callable[[str, float], Awaitable[T]], end: float) -> T:
        """``work`` at the first address where it can be done, round after round. It may be done more than once."""
        wait = _WAIT
        while True:
            for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
                now = time.monotonic()
                try:
                    return await work(address, now + (end - now) / left)
                except Unavailable as error:
                    if error.slug != "BROKER_UNREACHABLE":
                        raise
                    last = error
            if time.monotonic() + wait > end:
                raise last
            await asyncio.sleep(wait * self._jitter())
            wait *= 2

    async def _nonce(self, url: str, end: float) -> bytes:
        status, _, body = await self._ask("POST", f"{url}/v1/nonce", {}, b"", end)
        if status != 200:
            raise _answer("the verifier service gives no nonce")

        def read(fields: Fields) -> bytes:
            if fields.text("audience", 256) != self._config.audience:
                raise fields.fail("another audience")
            return fields.hex("nonce", 8, 64)

        return _read(body, read, "the verifier service has another name than configured, or gives no nonce")

    async def _verify(self, bundle: bytes, url: str, end: float) -> str:
        status, _, body = await self._ask("POST", f"{url}/v1/verify", {}, bundle, end)
        if status == 422:
            slug = _read(
                body, lambda fields: fields.text("slug", 64), "the verifier service refuses without a reason"
            )
            known = slug if _SLUG.fullmatch(slug) else "UNKNOWN"
            raise Denied("KEY_REFUSED", f"the verifier service refused the evidence: {known}")
        ear = body.decode("ascii", "replace")
        if status != 200 or not _EAR.fullmatch(ear):
            raise _answer("the verifier service gives no token")
        return ear

    async def _open(self, path: str, ear: str, reserve: float, address: str, end: float) -> ReleasedKey:
        """All of it at one node: others may not know the client token yet. ``reserve``: seconds to revoke it in."""
        config = self._config
        headers = {"x-vault-request": "true"}
        if config.namespace is not None:
            headers["x-vault-namespace"] = config.namespace
        login = strictjson.dumps({"jwt": ear, "role": config.role})
        status, told, body = await self._ask(
            "POST", f"{address}/v1/auth/{config.auth_mount}/login", headers, login, end
        )
        if status in (400, 403):
            raise Denied("KEY_REFUSED", "OpenBao's role does not let this VM, or this caller, have the key")
        if status != 200:
            raise _answer(f"OpenBao answers a login with status {status}")
        token = _read(body, _client_token, "OpenBao answers a login without a client token")
        headers = {**headers, "x-vault-token": token}
        index = told.get("x-vault-index", "")
        if _HEADER.fullmatch(index):  # A standby that has not heard of the token yet has the active node asked.
            headers = {**headers, "x-vault-index": index, "x-vault-inconsistent": "forward-active-node"}
        try:
            return await self._fetch(path, address, headers, end)
        finally:
            with suppress(AgentError):  # It ends by itself, soon: the role's token_ttl.
                await self._http.request(
                    "POST",
                    f"{address}/v1/auth/token/revoke-self",
                    headers=headers,
                    body=b"",
                    timeout=reserve,
                    limit=MAX_ANSWER,
                )

    async def _fetch(self, path: str, address: str, headers: Mapping[str, str], end: float) -> ReleasedKey:
        config = self._config
        entry = f"{config.kv_mount}/data/{path}"
        status, _, body = await self._ask("GET", f"{address}/v1/{entry}", headers, b"", end)
        if status == 404:
            raise Unavailable("KEY_ABSENT", "OpenBao has no such key, or it was deleted")
        _require_ok(status)
        value, generation = _read(body, self._entry, "OpenBao has something else there than such a key")
        if config.transit is None:
            return ReleasedKey(value, generation)
        wrapped = {"associated_data": b64(entry.encode()), "ciphertext": value.decode()}
        status, _, body = await self._ask(
            "POST", f"{address}/v1/{config.transit}", headers, strictjson.dumps(wrapped), end
        )
        _require_ok(status)
        plain = _read(body, lambda fields: _decoded(fields.fields("data"), "plaintext"), "OpenBao opens no such key")
        return ReleasedKey(plain, generation)

    def _entry(self, fields: Fields) -> tuple[bytes, int]:
        data = fields.fields("data")
        values, name = data.fields("data"), self._config.field
        generation = data.fields("metadata").integer("version", 1, 1 << 53)
        if self._config.transit is None and self._config.encoding == "base64":
            return _decoded(values, name), generation
        limit = MAX_SECRET if self._config.transit is None else MAX_ANSWER
        text = values.text(name, limit).encode()
        if not text:
            raise values.fail(f"{name} is empty")
        return text, generation

    async def _ask(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes, end: float
    ) -> tuple[int, Mapping[str, str], bytes]:
        """One exchange; raises what makes ``_at_one`` try elsewhere."""
        left = end - time.monotonic()
        if left <= 0:
            raise _unreachable("there was no time left to ask for the key")
        try:
            status, told, answer = await self._http.request(
                method, url, headers=headers, body=body, timeout=left, limit=MAX_ANSWER
            )
        except AgentError as error:
            raise _unreachable(f"the verifier service or OpenBao cannot be reached ({error.slug})") from error
        if status == 307:
            # Not followed: a node that is configured has its turn, and any other gets neither evidence nor token.
            if _origin(told.get("location", "")) not in self._origins:
                raise _answer("OpenBao redirects to an address that is not configured")
            raise _unreachable("a node of OpenBao's stands by")
        if status >= 500 or status in _NOT_NOW:
            raise _unreachable(f"the verifier service or OpenBao answers with status {status}")
        return status, told, answer


def _read(body: bytes, read: Callable[[Fields], T], failure: str) -> T:
    """What ``read`` finds in a JSON object. The error holds nothing of the body, nor does its context."""
    found: T | None = None
    with suppress(HostileInput):
        found = read(Fields(strictjson.loads(body, "answer", MAX_ANSWER), "answer"))
    if found is None:
        raise _answer(failure)
    return found


def _client_token(fields: Fields) -> str:
    token = fields.fields("auth").text("client_token", 4096)
    if not _CLIENT_TOKEN.fullmatch(token):
        raise fields.fail("not a token")
    return token


def _decoded(fields: Fields, name: str) -> bytes:
    value = fields.base64(name, MAX_SECRET)
    if not value:
        raise fields.fail(f"{name} is empty")
    return value


def _require_ok(status: int) -> None:
    if status == 403:
        raise Denied("KEY_REFUSED", "OpenBao's policy does not let this role have the key")
    if status != 200:
        raise _answer(f"OpenBao answers with status {status}")


def _is_path(text: str) -> bool:
    return len(text) <= _MAX_PATH and _PATH.fullmatch(text) is not None


def _origin(url: str) -> tuple[str, int] | None:
    """Host and port of an ``https`` URL, or ``None``."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if parts.scheme != "https" or not host or "@" in parts.netloc or parts.query or parts.fragment:
        return None
    return host, 443 if port is None else port


def _prefix(url: str) -> str | None:
    """The path of a URL that names a service, without its slash at the front; ``None`` for any other URL."""
    if not _NAME.fullmatch(url) or _origin(url) is None:
        return None
    path = urlsplit(url).path
    return path if path == "" else path[1:] if _is_path(path[1:]) else None


def _bad(name: str) -> Misuse:
    return Misuse("BAD_CONFIG", f"openbao: {name} is not what it must be")


def _unreachable(message: str) -> Unavailable:
    return Unavailable("BROKER_UNREACHABLE", message, retry_after=_RETRY_AFTER)


def _answer(message: str) -> Unavailable:
    return Unavailable("BROKER_ANSWER", message)
