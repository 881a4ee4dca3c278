"""The release by OpenBao where things fail: a stand-in answers as OpenBao does, or as a test wants."""

from __future__ import annotations

import asyncio
import gc
import json
import time
import traceback
from dataclasses import replace
from typing import Any

import pytest

from cgpu_agent.backends.base import MAX_SECRET, ReleasedKey
from cgpu_agent.backends.keys.openbao import OpenBao, OpenBaoConfig
from cgpu_agent.errors import AgentError, Denied, Misuse, Unavailable
from cgpu_agent.wire.strictjson import b64
from fixtures.openbaopeer import (
    AUDIENCE,
    CIPHERTEXT,
    CONFIG,
    FIRST,
    NONCE,
    PATH,
    SECOND,
    SECRET,
    VERIFIER,
    Asked,
    Bend,
    Peer,
    Reply,
    Shower,
    lost,
    reply,
)

WHOLE = ["nonce", "verify", "login", "read", "revoke"]


def release(
    peer: Peer, config: OpenBaoConfig = CONFIG, *, path: str = PATH, shower: Shower | None = None, timeout: float = 60
) -> ReleasedKey:
    broker = OpenBao(config, peer, jitter=lambda: 0.0)
    return asyncio.run(broker.release(path, shower or Shower(), timeout=timeout))


def refused(peer: Peer, config: OpenBaoConfig = CONFIG, **how: Any) -> AgentError:
    """The error, which tells no secret, after which no client token is left."""
    with pytest.raises(AgentError) as caught:
        release(peer, config, **how)
    assert not peer.alive
    told: BaseException | None = caught.value
    words = "".join(traceback.format_exception(told))
    while told is not None:
        words += repr(told.__dict__) + repr(told.args)
        told = told.__cause__ or told.__context__
    for secret in (SECRET.decode(), b64(SECRET), peer.ear, *peer.issued):
        assert not secret or secret not in words
    return caught.value


def always(answer: Reply) -> Bend:
    return lambda _honest, _asked: answer


def once(answer: Reply | Exception, *, effect: bool = False) -> Bend:
    """The first time this; the request had its effect all the same, or had none. Then honest."""
    left = [answer]

    def bend(honest: Any, _asked: Asked) -> Reply:
        if not left:
            return honest()  # type: ignore[no-any-return]
        if effect:
            honest()
        first = left.pop()
        if isinstance(first, Exception):
            raise first
        return first

    return bend


def entry(data: Any, version: Any = 3) -> Bend:
    """A KV answer, after the token was used."""

    def bend(honest: Any, _asked: Asked) -> Reply:
        honest()
        return reply(200, {"data": {"data": data, "metadata": {"version": version}}})

    return bend


class TestRelease:
    def test_the_key_comes_with_its_version_and_the_client_token_goes(self) -> None:
        peer, shower = Peer(), Shower()
        assert release(peer, shower=shower) == ReleasedKey(SECRET, 3)
        assert peer.operations == WHOLE
        assert shower.shown == [(NONCE, AUDIENCE)]
        assert not peer.alive
        (token,) = peer.issued
        assert [each.headers.get("x-vault-token") for each in peer.asked] == [None, None, None, token, token]

    def test_every_release_is_made_afresh(self) -> None:
        peer, shower = Peer(), Shower()
        broker = OpenBao(CONFIG, peer)
        for _ in range(2):
            asyncio.run(broker.release(PATH, shower, timeout=60))
        assert peer.operations == WHOLE * 2
        assert len(shower.shown) == len(set(peer.issued)) == 2

    def test_no_repr_shows_the_key(self) -> None:
        assert SECRET.decode() not in repr(release(Peer()))

    def test_a_key_of_text(self) -> None:
        peer = Peer(values={"passphrase": "zwölf Boxkämpfer"})
        found = release(peer, replace(CONFIG, field="passphrase", encoding="text"))
        assert found.secret.decode() == "zwölf Boxkämpfer"

    def test_a_wrapped_key_is_opened_by_transit(self) -> None:
        peer = Peer(values={"key": CIPHERTEXT}, uses=3)
        assert release(peer, replace(CONFIG, transit="transit/decrypt/models")) == ReleasedKey(SECRET, 3)
        assert peer.operations == [*WHOLE[:4], "decrypt", "revoke"]
        assert not peer.alive

    def test_another_entrys_ciphertext_opens_nothing(self) -> None:
        peer = Peer(values={"key": "vault:v1:b3RoZXI="}, uses=3)
        assert refused(peer, replace(CONFIG, transit="transit/decrypt/models")).slug == "BROKER_ANSWER"

    def test_openbao_hears_the_namespace_and_the_verifier_does_not(self) -> None:
        peer = Peer()
        release(peer, replace(CONFIG, namespace="team/a"))
        said = [each.headers.get("x-vault-namespace") for each in peer.asked]
        assert said == [None, None, "team/a", "team/a", "team/a"]

    def test_a_node_that_lags_behind_is_told_what_it_must_know(self) -> None:
        peer = Peer()
        release(peer)
        read = peer.asked[3].headers
        assert (read["x-vault-index"], read["x-vault-inconsistent"]) == ("index-7", "forward-active-node")

    @pytest.mark.parametrize(
        "path", ["", "/models", "models/", "a//b", "../sys", "a/../b", "a/.", "a b", "a?b", "a%2f"]
    )
    def test_a_path_that_could_mean_another_is_no_key(self, path: str) -> None:
        peer = Peer()
        assert refused(peer, path=path).slug == "KEY_ABSENT"
        assert not peer.asked


class TestVerifier:
    def test_its_reason_is_named(self) -> None:
        peer = Peer(bends={"verify": always(reply(422, {"slug": "UNENDORSED", "detail": "a\nb", "step": "ak"}))})
        error = refused(peer)
        assert isinstance(error, Denied)
        assert (error.slug, error.message) == ("KEY_REFUSED", "the verifier service refused the evidence: UNENDORSED")
        assert "login" not in peer.operations

    @pytest.mark.parametrize("slug", ["<b>x</b>", "lower", "A", "", "BAD\n"])
    def test_a_reason_that_is_none_is_not_repeated(self, slug: str) -> None:
        peer = Peer(bends={"verify": always(reply(422, {"slug": slug, "detail": "", "step": None}))})
        assert refused(peer).message == "the verifier service refused the evidence: UNKNOWN"

    @pytest.mark.parametrize(
        "answer",
        [
            reply(200, {"audience": "https://elsewhere.example", "expires": 1, "nonce": NONCE.hex()}),
            reply(200, {"audience": AUDIENCE, "expires": 1, "nonce": "00" * 7}),
            reply(200, {"audience": AUDIENCE, "expires": 1, "nonce": "00" * 65}),
            reply(200, {"audience": AUDIENCE, "expires": 1}),
            reply(403, {"audience": AUDIENCE, "expires": 1, "nonce": NONCE.hex()}),
            Reply(200, {}, b"<html>"),
        ],
    )
    def test_evidence_is_made_for_its_nonce_and_its_configured_name_alone(self, answer: Reply) -> None:
        peer, shower = Peer(bends={"nonce": always(answer)}), Shower()
        assert refused(peer, shower=shower).slug == "BROKER_ANSWER"
        assert not shower.shown

    @pytest.mark.parametrize("body", [b"", b"a.b", b"a.b.c.d", b"a.b.c\r\n", b"\xff.b.c", b'"a.b.c"'])
    def test_what_is_no_token_logs_nobody_in(self, body: bytes) -> None:
        peer = Peer(bends={"verify": always(Reply(200, {}, body))})
        assert refused(peer).slug == "BROKER_ANSWER"
        assert "login" not in peer.operations

    def test_a_busy_one_is_asked_again_with_the_same_evidence(self) -> None:
        peer, shower = Peer(bends={"verify": once(reply(503, {"slug": "BUSY"}))}), Shower()
        assert release(peer, shower=shower).secret == SECRET
        assert len(shower.shown) == 1
        assert peer.operations == ["nonce", "verify", *WHOLE[1:]]

    def test_evidence_that_never_comes(self) -> None:
        shower = Shower()
        shower.hangs = True
        assert refused(Peer(), shower=shower, timeout=0.2).slug == "BROKER_UNREACHABLE"

    def test_evidence_that_comes_too_late_is_not_sent(self) -> None:
        class Slow(Shower):
            async def bundle(self, nonce: bytes, audience: str) -> bytes:
                time.sleep(0.3)  # noqa: ASYNC251 - the whole loop stands still, its timers too
                return await super().bundle(nonce, audience)

        peer = Peer()
        assert refused(peer, shower=Slow(), timeout=0.2).slug == "BROKER_UNREACHABLE"
        assert peer.operations == ["nonce"]


class TestLogin:
    @pytest.mark.parametrize("status", [400, 403])
    def test_the_roles_refusal_is_final(self, status: int) -> None:
        peer = Peer(bends={"login": always(reply(status, {"errors": ["claim /cgpu.purpose does not match"]}))})
        error = refused(peer)
        assert isinstance(error, Denied)
        assert error.slug == "KEY_REFUSED"
        assert peer.operations == WHOLE[:3]

    @pytest.mark.parametrize(
        "answer",
        [
            reply(404, {"errors": ["no handler for route"]}),
            reply(200, {"auth": None}),
            reply(200, {"auth": {"client_token": ""}}),
            reply(200, {"auth": {"client_token": "s.abcdefgh\r\nX-Evil: 1"}}),
            reply(200, {"auth": {"client_token": ["s.abcdefgh"]}}),
            Reply(200, {}, b'{"auth":{"client_token":"s.abcdefgh","client_token":"s.ijklmnop"}}'),
            Reply(200, {}, b"[" * 100_000),
        ],
    )
    def test_what_is_no_client_token_is_sent_nowhere(self, answer: Reply) -> None:
        peer = Peer(bends={"login": always(answer)})
        assert refused(peer).slug in ("BROKER_ANSWER", "BROKER_UNREACHABLE")
        assert peer.operations[:3] == WHOLE[:3]
        assert "read" not in peer.operations

    def test_an_index_that_would_break_the_header_is_not_sent(self) -> None:
        def bend(honest: Any, _asked: Asked) -> Reply:
            return honest()._replace(headers={"x-vault-index": "a\r\nx: y"})  # type: ignore[no-any-return]

        peer = Peer(bends={"login": bend})
        release(peer)
        assert "x-vault-index" not in peer.asked[3].headers


class TestRead:
    @pytest.mark.parametrize(
        ("answer", "slug"),
        [
            (reply(403, {"errors": ["permission denied"]}), "KEY_REFUSED"),
            (reply(404, {"errors": []}), "KEY_ABSENT"),
            (reply(404, {"data": {"data": None, "metadata": {"version": 1}}}), "KEY_ABSENT"),
            (reply(400, {"errors": []}), "BROKER_ANSWER"),
            (reply(200, {"data": {"key": b64(SECRET)}}), "BROKER_ANSWER"),
            (reply(200), "BROKER_ANSWER"),
            (Reply(200, {}, f'{{"data":{{"data":{{"key":"{b64(SECRET)}"}}'.encode()), "BROKER_ANSWER"),
            (reply(204), "BROKER_ANSWER"),
        ],
    )
    def test_there_is_no_key(self, answer: Reply, slug: str) -> None:
        assert refused(Peer(bends={"read": always(answer)})).slug == slug

    @pytest.mark.parametrize(
        ("data", "version"),
        [
            ({}, 3),
            ({"other": b64(SECRET)}, 3),
            ({"key": ""}, 3),
            ({"key": SECRET.decode()}, 3),
            ({"key": b64(SECRET) + "\n"}, 3),
            ({"key": 5}, 3),
            ({"key": {"key": b64(SECRET)}}, 3),
            ({"key": b64(bytes(MAX_SECRET + 1))}, 3),
            ({"key": b64(SECRET), "other": 1.5}, 3),
            ({"key": b64(SECRET)}, 0),
            ({"key": b64(SECRET)}, "3"),
            ({"key": b64(SECRET)}, None),
        ],
    )
    def test_what_is_no_such_key_is_none(self, data: Any, version: Any) -> None:
        assert refused(Peer(bends={"read": entry(data, version)})).slug == "BROKER_ANSWER"

    @pytest.mark.parametrize("text", ["", "\ud800", "a" * (MAX_SECRET + 1)])
    def test_what_is_no_text_is_none(self, text: str) -> None:
        peer = Peer(bends={"read": entry({"key": text})})
        assert refused(peer, replace(CONFIG, encoding="text")).slug == "BROKER_ANSWER"

    def test_the_largest_key(self) -> None:
        assert release(Peer(values={"key": b64(bytes(MAX_SECRET))})).secret == bytes(MAX_SECRET)

    @pytest.mark.parametrize(
        "answer", [reply(200, {"data": {"plaintext": ""}}), reply(200, {"data": {}}), reply(400)]
    )
    def test_transit_opens_no_key(self, answer: Reply) -> None:
        peer = Peer(values={"key": CIPHERTEXT}, uses=3, bends={"decrypt": always(answer)})
        assert refused(peer, replace(CONFIG, transit="transit/decrypt/models")).slug == "BROKER_ANSWER"


class TestNodes:
    @pytest.mark.parametrize("status", [412, 429, 472, 473, 500, 502, 503])
    @pytest.mark.parametrize("operation", ["login", "read"])
    def test_one_that_cannot_now_leaves_it_to_the_next(self, status: int, operation: str) -> None:
        peer = Peer(bends={operation: once(reply(status, {"errors": ["Vault is sealed"]}))})
        assert release(peer).secret == SECRET
        assert [each.origin for each in peer.asked if each.operation == "login"] == [FIRST, SECOND]
        assert not peer.alive

    def test_one_that_is_gone_leaves_it_to_the_next(self) -> None:
        def gone(_honest: Any, _asked: Asked) -> Reply:
            raise lost()

        peer = Peer(bends={FIRST: gone})
        assert release(peer).secret == SECRET
        assert [each.origin for each in peer.asked[2:]] == [FIRST, SECOND, SECOND, SECOND]

    def test_one_that_hangs_takes_not_all_of_the_time(self) -> None:
        peer = Peer()

        def hang(_honest: Any, asked: Asked) -> Reply:
            peer.hangs = {"login"} if asked.origin == FIRST else set()
            return reply(200)

        peer.bends = {FIRST: hang, SECOND: lambda honest, asked: (hang(honest, asked), honest())[1]}
        assert release(peer, timeout=1).secret == SECRET

    def test_all_are_tried_again_while_there_is_time(self) -> None:
        failing = [2]

        def twice(honest: Any, _asked: Asked) -> Reply:
            if failing[0]:
                failing[0] -= 1
                raise lost()
            return honest()  # type: ignore[no-any-return]

        peer = Peer(bends={"login": twice})
        assert release(peer).secret == SECRET
        assert [each.origin for each in peer.asked if each.operation == "login"] == [FIRST, SECOND, FIRST]

    def test_when_there_is_no_more_time_the_caller_may_try_later(self) -> None:
        peer = Peer(bends={"login": always(reply(503))})
        error = refused(peer, timeout=1)
        assert (error.slug, error.retry_after) == ("BROKER_UNREACHABLE", 5.0)
        assert all(0 < each.timeout <= 1 for each in peer.asked)

    def test_a_lost_answer_is_asked_for_with_another_token_and_both_are_revoked(self) -> None:
        peer = Peer(bends={"read": once(lost(), effect=True)})
        assert release(peer).secret == SECRET
        assert peer.operations == [*WHOLE, *WHOLE[2:]]
        assert len(set(peer.issued)) == 2
        assert not peer.alive


class TestRedirects:
    def test_a_standby_that_names_a_configured_node_leaves_it_to_that(self) -> None:
        peer = Peer(bends={FIRST: always(reply(307, location=f"{SECOND}/v1/auth/jwt/login"))})
        assert release(peer).secret == SECRET
        assert [each.origin for each in peer.asked[2:]] == [FIRST, SECOND, SECOND, SECOND]

    @pytest.mark.parametrize(
        "location",
        [
            "https://evil.example:8200/v1/auth/jwt/login",
            "http://bao-2.example:8200/v1/auth/jwt/login",
            "https://bao-2.example/v1/auth/jwt/login",
            "https://bao-2.example:8200@evil.example/v1/auth/jwt/login",
            "https://evil.example/?https://bao-2.example:8200/",
            "//bao-2.example:8200/",
            "/v1/auth/jwt/login",
            "https://[::1",
            "",
        ],
    )
    @pytest.mark.parametrize("operation", ["login", "read"])
    def test_a_foreign_one_gets_neither_evidence_nor_token(self, location: str, operation: str) -> None:
        peer = Peer(bends={operation: always(reply(307, location=location))})
        assert refused(peer).slug == "BROKER_ANSWER"
        assert {each.origin for each in peer.asked} == {VERIFIER, FIRST}

    @pytest.mark.parametrize("status", [301, 302, 303, 308])
    def test_no_other_redirect_is_known(self, status: int) -> None:
        peer = Peer(bends={"login": always(reply(status, location=f"{SECOND}/v1/auth/jwt/login"))})
        assert refused(peer).slug == "BROKER_ANSWER"

    def test_the_verifier_does_not_redirect(self) -> None:
        peer, shower = Peer(bends={"nonce": always(reply(307, location="https://evil.example/v1/nonce"))}), Shower()
        assert refused(peer, shower=shower).slug == "BROKER_ANSWER"
        assert not shower.shown


class TestRevocation:
    @pytest.mark.parametrize("fault", [lost(), reply(503), reply(403)])
    def test_one_that_fails_keeps_nobody_from_the_key(self, fault: Any) -> None:
        peer = Peer(bends={"revoke": once(fault)})
        assert release(peer).secret == SECRET
        assert peer.operations == WHOLE

    def test_one_that_hangs_is_bounded(self) -> None:
        peer = Peer(hangs={"revoke"})
        assert release(peer, timeout=0.4).secret == SECRET
        assert sum(each.timeout for each in peer.asked if each.operation == "revoke") <= 0.4

    @pytest.mark.parametrize("operation", ["login", "read", "revoke"])
    def test_whoever_stops_waiting_leaves_no_client_token(self, operation: str) -> None:
        peer = Peer(hangs={operation} if operation != "login" else set())

        async def leave() -> None:
            broker = OpenBao(CONFIG, peer, jitter=lambda: 0.0)
            waiting = asyncio.create_task(broker.release(PATH, Shower(), timeout=1))
            await peer.arrived[operation].wait()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            peer.hangs = set()
            broker.close()
            while others := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(others)

        asyncio.run(leave())
        assert peer.issued
        assert not peer.alive

    def test_what_fails_when_nobody_waits_any_more_is_no_news(self) -> None:
        peer, told = Peer(hangs={"read"}), list[str]()

        async def leave() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["message"]))
            broker = OpenBao(CONFIG, peer, jitter=lambda: 0.0)
            waiting = asyncio.create_task(broker.release(PATH, Shower(), timeout=0.4))
            await peer.arrived["read"].wait()
            waiting.cancel()
            while others := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(others)
            del waiting, others
            gc.collect()

        asyncio.run(leave())
        assert told == []


class TestConfig:
    @pytest.mark.parametrize(
        "change",
        [
            {"addresses": ()},
            {"addresses": (FIRST, "http://bao-2.example:8200")},
            {"addresses": ("https://bao-1.example:8200/",)},
            {"addresses": ("https://bao-1.example:8200/prefix",)},
            {"addresses": ("https://user@bao-1.example",)},
            {"addresses": ("https://bao-1.example:port",)},
            {"addresses": ("bao-1.example:8200",)},
            {"addresses": ("https://bao-1.example\n",)},
            {"verifier": "http://verifier.example"},
            {"verifier": "https://verifier.example/"},
            {"verifier": "https://verifier.example/a/../b"},
            {"verifier": "https://verifier.example?x"},
            {"audience": ""},
            {"role": "a\r\nb"},
            {"field": ""},
            {"auth_mount": "jwt/"},
            {"auth_mount": "../sys"},
            {"kv_mount": ""},
            {"transit": "transit/decrypt/../keys"},
            {"namespace": "a\r\nx: y"},
            {"encoding": "hex"},
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, change: dict[str, Any]) -> None:
        with pytest.raises(Misuse) as caught:
            replace(CONFIG, **change)
        assert caught.value.slug == "BAD_CONFIG"

    def test_a_verifier_below_a_prefix(self) -> None:
        assert replace(CONFIG, verifier="https://gate.example/cgpu/verifier").verifier.endswith("/verifier")

    def test_nothing_is_sent_but_what_is_configured(self) -> None:
        peer = Peer()
        release(peer)
        assert json.loads(peer.asked[2].body).keys() == {"jwt", "role"}
        assert peer.asked[2].headers == {"x-vault-request": "true"}
        assert peer.asked[0].headers == peer.asked[1].headers == {}


def test_a_refusal_is_told_as_what_it_is() -> None:
    assert isinstance(refused(Peer(bends={"read": always(reply(404))})), Unavailable)
    assert isinstance(refused(Peer(bends={"read": always(reply(403))})), Denied)
