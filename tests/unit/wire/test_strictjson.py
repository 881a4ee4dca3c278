"""Strict JSON: one meaning per byte string, or a refusal."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.strictjson import MAX_DEPTH, Fields, b64, dumps, loads


def load(data: bytes) -> Any:
    return loads(data, "thing", 1 << 24)


def refused(read: Callable[[], object]) -> str:
    with pytest.raises(HostileInput) as caught:
        read()
    assert caught.value.message.startswith("thing")
    return caught.value.slug


@pytest.mark.parametrize(
    "value", [None, True, 0, -1, 2**64 - 1, "", "text", "\u00fc\U0001f512", [], {}, {"a": [1, {"b": None}]}]
)
def test_reads_back_what_it_writes(value: object) -> None:
    assert load(dumps(value)) == value


def test_writes_one_form_whatever_the_order() -> None:
    assert dumps({"b": 1, "a": [True, "\u00fc"]}) == b'{"a":[true,"\xc3\xbc"],"b":1}'
    assert dumps({"b": 1, "a": 2}) == dumps({"a": 2, "b": 1})


@pytest.mark.parametrize(
    ("data", "slug"),
    [
        (b"", "BAD_JSON"),
        (b" ", "BAD_JSON"),
        (b"{", "BAD_JSON"),
        (b"{}{}", "BAD_JSON"),
        (b"{},", "BAD_JSON"),
        (b"{'a':1}", "BAD_JSON"),
        (b'{"a":1,}', "BAD_JSON"),
        (b'"\x01"', "BAD_JSON"),
        (b"\xff", "BAD_JSON"),
        (b'"\xed\xa0\x80"', "BAD_JSON"),
        (b"\xef\xbb\xbf{}", "BAD_JSON"),
        ("{}".encode("utf-16"), "BAD_JSON"),
        (b"1.0", "BAD_JSON"),
        (b"1e3", "BAD_JSON"),
        (b"NaN", "BAD_JSON"),
        (b"-Infinity", "BAD_JSON"),
        (b"9" * 21, "BAD_JSON"),
        (b"01", "BAD_JSON"),
        (b"/**/1", "BAD_JSON"),
        (b'{"a":1,"a":1}', "DUPLICATE_KEY"),
        (b'{"a":1,"\\u0061":2}', "DUPLICATE_KEY"),
        (b'[{"x":{"a":1,"b":2,"a":3}}]', "DUPLICATE_KEY"),
    ],
)
def test_refuses_what_two_readers_could_read_differently(data: bytes, slug: str) -> None:
    assert refused(lambda: load(data)) == slug


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_nesting_ends_at_a_fixed_depth(opening: bytes, closing: bytes) -> None:
    deepest = opening * (MAX_DEPTH - 1) + b"{}" + closing * (MAX_DEPTH - 1)
    load(deepest)
    for data in (opening + deepest + closing, opening * 5000 + b"1" + closing * 5000, opening * 60000):
        assert refused(lambda data=data: load(data)) == "BAD_JSON"  # type: ignore[misc]


def test_size_is_refused_before_parsing() -> None:
    assert loads(b"[1]", "thing", 3) == [1]
    assert refused(lambda: loads(b"[1] ", "thing", 3)) == "TOO_LARGE"


def test_many_small_objects_cost_no_memory() -> None:
    data = b"[" + b"{}," * (4 << 20) + b"1]"
    tracemalloc.start()
    try:
        assert refused(lambda: load(data)) == "TOO_LARGE"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_message_shows_only_the_beginning_of_a_strange_key() -> None:
    key = "\x1b[31m" + "x" * 5000
    with pytest.raises(HostileInput) as caught:
        load(f"{{{json.dumps(key)}:1,{json.dumps(key)}:2}}".encode())
    assert "\x1b" not in caught.value.message
    assert len(caught.value.message) < 200


def fields(**values: object) -> Fields:
    return Fields(values, "thing")


def test_gives_every_kind_of_value() -> None:
    found = fields(
        text="\u00fc", number=7, flag=False, hex="00ff", base64="AP8=", list=[1], object={"a": "b"}, none=None
    )
    assert found.text("text", 2) == "\u00fc"
    assert found.integer("number", 7, 7) == 7
    assert found.boolean("flag") is False
    assert found.hex("hex", 2, 2) == found.base64("base64", 2) == b"\x00\xff"
    assert found.items("list", 1) == [1]
    assert found.absent("none")
    inner = found.fields("object")
    assert inner.choice("a", frozenset({"b"})) == "b"
    inner.end()
    found.end()


def test_a_value_that_is_there_is_not_absent() -> None:
    found = fields(a=0, b="")
    assert not found.absent("a")
    assert not found.absent("b")
    assert found.keys() == ["a", "b"]


@pytest.mark.parametrize(
    "read",
    [
        lambda: fields().raw("a"),
        lambda: fields().absent("a") or fields().raw("a"),
        lambda: fields(a=1).text("a", 9),
        lambda: fields(a="\u00fc").text("a", 1),
        lambda: fields(a="\ud800").text("a", 9),
        lambda: fields(a="c").choice("a", frozenset("b")),
        lambda: fields(a=["b"]).choice("a", frozenset("b")),
        lambda: fields(a=True).integer("a", 0, 9),
        lambda: fields(a="1").integer("a", 0, 9),
        lambda: fields(a=10).integer("a", 0, 9),
        lambda: fields(a=-1).integer("a", 0, 9),
        lambda: fields(a=1).boolean("a"),
        lambda: fields(a={}).items("a", 9),
        lambda: fields(a=[1, 2]).items("a", 1),
    ],
)
def test_refuses_values_of_another_kind_or_range(read: Callable[[], object]) -> None:
    assert refused(read) == "BAD_FIELD"


@pytest.mark.parametrize("value", [None, 1, "0", "0g", "AB", "a b ", " ab", "ab\n", "\uff10\uff11", "00" * 3, ""])
def test_refuses_hex_that_is_not_in_its_one_form(value: object) -> None:
    assert refused(lambda: fields(a=value).hex("a", 1, 2)) == "BAD_FIELD"


@pytest.mark.parametrize(
    "value", [None, 1, "A", "AA", "AA=", "AP9=", "AP8=\n", " AP8=", "-_8=", "AP8=AP8=", "\uff21A==", "AAAA"]
)
def test_refuses_base64_that_is_not_in_its_one_form(value: object) -> None:
    assert refused(lambda: fields(a=value).base64("a", 2)) == "BAD_FIELD"


@pytest.mark.parametrize("size", range(7))
def test_reads_base64_up_to_the_limit_and_not_beyond(size: int) -> None:
    data = bytes(range(size))
    assert fields(a=b64(data)).base64("a", size) == data
    if size:
        assert refused(lambda: fields(a=b64(data)).base64("a", size - 1)) == "BAD_FIELD"


@pytest.mark.parametrize("value", [[], "a", 1, None])
def test_refuses_what_is_no_object(value: object) -> None:
    assert refused(lambda: Fields(value, "thing")) == "BAD_JSON"


def test_refuses_keys_that_nobody_asked_for() -> None:
    found = fields(a=1, b=2)
    found.raw("a")
    assert refused(found.end) == "UNKNOWN_KEY"
