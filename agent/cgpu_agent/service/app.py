"""The HTTP interface: what is asked, in which words it is answered, and what it may cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Final, TypeVar

from cryptography.hazmat.primitives.serialization import Encoding
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from cgpu_agent.errors import AgentError, Exhausted, HostileInput, Misuse, Unavailable
from cgpu_agent.service import enrol, nonces
from cgpu_agent.service.admission import Budget, body_of
from cgpu_agent.service.guard import Guard
from cgpu_agent.service.issuer import issue
from cgpu_agent.service.judge import Refusal
from cgpu_agent.service.log import event
from cgpu_agent.service.material import Material
from cgpu_agent.service.metrics import Metrics
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.bundle import MAX_CERTIFICATE
from cgpu_agent.wire.der import trim_der
from cgpu_agent.wire.metrics import CONTENT_TYPE
from cgpu_agent.wire.strictjson import Fields, b64

R = TypeVar("R")

MAX_ENROLMENT: Final = 64 << 10
TOKEN_TYPE: Final = "application/eat+jwt"  # noqa: S105 - a media type (RFC 9782, 5)
_STATUS: Final[dict[type[AgentError], int]] = {Misuse: 400, HostileInput: 422, Exhausted: 413, Unavailable: 503}
_SLOW: Final = 408


def refusal_response(
    slug: str, detail: str, status: int, *, step: str | None = None, retry_after: float | None = None
) -> JSONResponse:
    """Every refusal: ``slug`` is stable, ``detail`` for people, ``step`` names the check of a verification."""
    headers = {} if retry_after is None else {"retry-after": f"{max(1, round(retry_after))}"}
    return JSONResponse({"detail": detail, "slug": slug, "step": step}, status, headers)


class Service:
    """One replica.

    Args:
        material: everything that was read at the start; nothing is read later, and nothing is kept.
        clock: seconds since the epoch.
    """

    def __init__(self, material: Material, clock: Callable[[], float] = time.time) -> None:
        self._material: Final = material
        self._clock: Final = clock
        limits = material.config.limits
        self._buffered: Final = Budget(limits.buffered_bytes)
        self._verifications: Final = Budget(limits.verifications)
        self._pool: Final = ThreadPoolExecutor(limits.workers, thread_name_prefix="judge")
        self._metrics: Final = Metrics(
            {
                "cgpu_verifier_buffered_bytes": ("Bytes of bodies held now.", lambda: self._buffered.used),
                "cgpu_verifier_verifications": ("Verifications that run or wait.", lambda: self._verifications.used),
            }
        )
        self._routes: Final = self._make_routes()
        self.paths: Final = frozenset(route.path for route in self._routes)

    def application(self) -> ASGIApp:
        """The ASGI application."""
        handlers: dict[Any, Any] = {AgentError: _refuse, HTTPException: _no_such, Exception: _failed}
        app = Starlette(routes=self._routes, exception_handlers=handlers, lifespan=self._lifespan)
        return Guard(app, self._count)

    def _make_routes(self) -> list[Route]:
        routes = [
            Route("/v1/nonce", self._nonce, methods=["POST"]),
            Route("/v1/verify", self._verify, methods=["POST"]),
            Route("/.well-known/jwks.json", self._jwks, methods=["GET"]),
            Route("/healthz", self._health, methods=["GET"]),
            Route("/metrics", self._show_metrics, methods=["GET"]),
        ]
        if self._material.config.enrol.enabled:
            routes += [
                Route("/v1/enrol/challenge", self._challenge, methods=["POST"]),
                Route("/v1/enrol/complete", self._complete, methods=["POST"]),
            ]
        return routes

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        yield
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _count(self, path: str, status: int) -> None:
        known = path if path in self.paths else "other"
        self._metrics.add("cgpu_verifier_requests_total", path=known, status=str(status))

    def _body(self, request: Request, limit: int) -> AbstractAsyncContextManager[bytes]:
        seconds = self._material.config.limits.body_seconds
        return body_of(request, limit=limit, seconds=seconds, budget=self._buffered)

    async def _in_pool(self, work: Callable[[], R]) -> R:
        """Run what takes more than a moment beside the event loop. Raises ``Unavailable`` (``BUSY``)."""
        self._verifications.take(1)
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        # When it ends, and not when somebody stops waiting for it: until then it costs.
        future.add_done_callback(lambda _: self._verifications.give_back(1))
        return await future

    async def _nonce(self, request: Request) -> Response:
        async with self._body(request, 2) as body:
            if body not in (b"", b"{}"):
                raise Misuse("BAD_REQUEST", "a nonce is asked for without a body")
        config, now = self._material.config, int(self._clock())
        nonce = nonces.issue(self._material.replica_keys, config.audience, now=now)
        return JSONResponse(
            {"audience": config.audience, "expires": now + config.token.nonce_seconds, "nonce": nonce.hex()}
        )

    async def _verify(self, request: Request) -> Response:
        async with self._body(request, self._material.config.limits.bundle_bytes) as bundle:
            found, seconds = await self._in_pool(partial(self._judge, bundle))
        self._metrics.add("cgpu_verifier_verification_seconds_total", seconds)
        if isinstance(found, Refusal):
            self._metrics.add("cgpu_verifier_verdicts_total", result="refused", slug=found.slug)
            return refusal_response(found.slug, found.detail, 422, step=found.step)
        self._metrics.add("cgpu_verifier_verdicts_total", result="judged", slug="")
        return Response(found, media_type=TOKEN_TYPE)

    def _judge(self, bundle: bytes) -> tuple[str | Refusal, float]:
        begun = time.perf_counter()
        found = self._material.judge.judge(bundle, now=int(self._clock()))
        answer = found if isinstance(found, Refusal) else self._material.sign(found)
        return answer, time.perf_counter() - begun

    async def _jwks(self, _request: Request) -> Response:
        return JSONResponse(self._material.jwks())

    async def _health(self, _request: Request) -> Response:
        return JSONResponse({"status": "serving"})

    async def _show_metrics(self, _request: Request) -> Response:
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def _challenge(self, request: Request) -> Response:
        async with self._body(request, MAX_ENROLMENT) as body:
            found = await self._in_pool(partial(self._make_challenge, body))
        return JSONResponse(
            {
                "credential_blob": b64(found.credential_blob),
                "expires": found.expires,
                "secret": b64(found.encrypted_secret),
                "ticket": b64(found.ticket),
            }
        )

    def _make_challenge(self, body: bytes) -> enrol.Challenge:
        fields = Fields(strictjson.loads(body, "enrolment", MAX_ENROLMENT), "enrolment")
        asked = enrol.Request(
            ak_public=fields.base64("ak_public", 1024),
            ek_public=fields.base64("ek_public", 1024),
            ek_certificate=trim_der(fields.base64("ek_certificate", MAX_CERTIFICATE)),
            intermediates=tuple(
                fields.decode_base64(each, "ek_intermediates", MAX_CERTIFICATE)
                for each in fields.items("ek_intermediates", enrol.MAX_INTERMEDIATES)
            ),
        )
        fields.end()
        material = self._material
        return enrol.challenge(
            asked,
            material.ek_trust,
            material.ek_intermediates,
            material.replica_keys,
            material.config.audience,
            now=int(self._clock()),
        )

    async def _complete(self, request: Request) -> Response:
        async with self._body(request, MAX_ENROLMENT) as body:
            found, certificate = await self._in_pool(partial(self._issue, body))
        self._metrics.add("cgpu_verifier_enrolments_total", ek_class=found.ek_class.text)
        ak_name, ek = (found.ak.name or b"").hex(), found.ek_certificate_sha256.hex()
        event(
            "enrolled", ak_name=ak_name, ek_class=found.ek_class.text, ek_certificate=ek, serial=f"{found.serial:x}"
        )
        return JSONResponse({"certificate": b64(certificate), "ek_class": found.ek_class.text})

    def _issue(self, body: bytes) -> tuple[enrol.Enrolment, bytes]:
        fields = Fields(strictjson.loads(body, "enrolment", MAX_ENROLMENT), "enrolment")
        ticket, secret = fields.base64("ticket", enrol.MAX_TICKET), fields.base64("secret", 64)
        fields.end()
        material = self._material
        now = int(self._clock())
        found = enrol.complete(ticket, secret, material.replica_keys, material.config.audience, now=now)
        lifetime = timedelta(days=material.config.enrol.days)
        certificate = issue(found, material.issuers.of(found), lifetime=lifetime)
        return found, certificate.public_bytes(Encoding.DER)


async def _refuse(_request: Request, error: AgentError) -> Response:
    status = _SLOW if error.slug == "BODY_TOO_SLOW" else _STATUS.get(type(error), 500)
    return refusal_response(error.slug, error.message, status, retry_after=error.retry_after)


async def _no_such(_request: Request, error: HTTPException) -> Response:
    slug = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}.get(error.status_code, "BAD_REQUEST")
    return refusal_response(slug, "there is nothing of that kind here", error.status_code)


async def _failed(_request: Request, _error: Exception) -> Response:
    return refusal_response("INTERNAL", "the service failed in a way that it does not know", 500)
