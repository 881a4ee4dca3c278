"""The words between agent and way out: one form each, and every other one is refused."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.egress import (
    MAX_HEAD,
    STATUS,
    Destination,
    encode_answer,
    encode_request,
    parse_answer,
    parse_destination,
    parse_request,
)

GOOD = ["vault.example:8200", "a:1", "x-1.y:65535", "192.0.2.1:443", "[2001:db8::1]:443", "[::1]:65535"]
LONG = ".".join(["a" * 63] * 4)[:253]
PLAIN = encode_request(Destination("vault.example", 8200))


@pytest.mark.parametrize("text", [*GOOD, f"{LONG}:1"])
def test_a_destination_has_one_spelling(text: str) -> None:
    destination = parse_destination(text)
    assert str(destination) == text
    assert parse_request(encode_request(destination)) == destination


@pytest.mark.parametrize(
    "text",
    [
        *("", ":1", "a", "a:", "a:0", "a:01", "a:65536", "a:+1", "a:\uff11", "a:1 ", " a:1", "a:1\n", "a:1:1"),
        *("A.example:1", "a_b:1", "*.example:1", "a..b:1", ".a:1", "a.:1", "-a:1", "a-:1", "a/b:1", "u@a:1"),
        *("bücher.example:1", "xn--bcher-kva.example:1", "a.xn--p1ai:1", "a%2e:1", "a\0:1"),
        *("127.1:1", "2130706433:1", "0x7f000001:1", "0x7f.0x1:1", "127.0.0.01:1", "127.0.0.1.:1", "1.2.3.256:1"),
        *("::1:443", "[::1]:0", "[::1%eth0]:1", "[0:0:0:0:0:0:0:1]:1", "[2001:DB8::1]:1", "[192.0.2.1]:1", "[a]:1"),
        *("[::ffff:c000:201]:1", "[::ffff:192.0.2.1]:1", "[::1]:1x", "[]:1", f"{'a' * 64}:1", f"{LONG}a:1"),
    ],
)
def test_no_other_spelling_is_one(text: str) -> None:
    with pytest.raises(HostileInput) as caught:
        parse_destination(text)
    assert caught.value.slug == "BAD_DESTINATION"


@pytest.mark.parametrize(
    "head",
    [
        b"",
        PLAIN.replace(b"\r\n", b"\n"),
        PLAIN.replace(b"\r\n\r\n", b"\r\n\n"),
        PLAIN.replace(b"HTTP/1.1", b"HTTP/1.0"),
        PLAIN.replace(b"HTTP/1.1", b"HTTP/1.1 "),
        PLAIN.replace(b"CONNECT", b"connect"),
        PLAIN.replace(b"CONNECT", b"GET"),
        PLAIN.replace(b"CONNECT ", b"CONNECT  "),
        PLAIN.replace(b"CONNECT ", b"CONNECT\t"),
        PLAIN.replace(b"Host", b"host"),
        PLAIN.replace(b"Host: ", b"Host:"),
        PLAIN.replace(b"Host: vault", b"Host: other"),
        PLAIN.replace(b"CONNECT vault", b"CONNECT other"),
        PLAIN.replace(b"Host:", b"Host :"),
        PLAIN.replace(b"\r\nHost", b"\r\n Host"),
        PLAIN[:-2] + b"Host: vault.example:8200\r\n\r\n",
        PLAIN[:-2] + b"Content-Length: 1\r\n\r\n",
        PLAIN[:-2] + b"Transfer-Encoding: chunked\r\n\r\n",
        PLAIN[:-2] + b"X: y\r\n\r\n",
        PLAIN + b"x",
        PLAIN + PLAIN,
        b"\r\n" + PLAIN,
        b"CONNECT vault.example:8200 HTTP/1.1\r\n\r\n",
        PLAIN.replace(b"vault", b"v\xc3\xa4ult"),
        PLAIN.replace(b"vault", b"v\rault"),
    ],
)
def test_no_other_request_is_one(head: bytes) -> None:
    with pytest.raises(HostileInput) as caught:
        parse_request(head)
    assert caught.value.slug == "BAD_REQUEST"


@given(st.one_of(st.binary(max_size=MAX_HEAD), st.text().map(lambda text: PLAIN.replace(b"vault", text.encode()))))
@example(PLAIN)
def test_whatever_is_taken_for_a_request_is_written_just_so(head: bytes) -> None:
    try:
        destination = parse_request(head)
    except HostileInput:
        return
    assert encode_request(destination) == head
    assert parse_destination(str(destination)) == destination


@given(st.integers(0, len(PLAIN) - 1), st.integers(0, 255))
def test_a_request_with_another_byte_goes_elsewhere_or_nowhere(place: int, byte: int) -> None:
    changed = PLAIN[:place] + bytes([byte]) + PLAIN[place + 1 :]
    if changed != PLAIN:
        with pytest.raises(HostileInput):  # The destination is there twice, so one byte never makes another one.
            parse_request(changed)


@pytest.mark.parametrize("reason", STATUS)
def test_an_answer_comes_through(reason: str) -> None:
    assert parse_answer(encode_answer(reason)) == reason
    assert len(encode_answer(reason)) < MAX_HEAD


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"HTTP/1.1 200 CONNECTED\r\n",
        b"HTTP/1.1 200 CONNECTED\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 NOT_ALLOWED\r\n\r\n",
        b"HTTP/1.1 403 CONNECTED\r\n\r\n",
        b"HTTP/1.1 200 CONNECTED\r\nX: y\r\n\r\n",
    ],
)
def test_any_other_answer_is_refused(head: bytes) -> None:
    with pytest.raises(HostileInput) as caught:
        parse_answer(head)
    assert caught.value.slug == "BAD_EGRESS_ANSWER"


def test_the_longest_request_is_within_the_bound() -> None:
    assert len(encode_request(parse_destination(f"{LONG}:65535"))) < MAX_HEAD
