"""The agent's log and systemd's, as JSON text sequences."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.cel import MAX_CONTENT, MAX_LOG, MAX_RECORDS, Record, parse_agent_log, parse_systemd_log

RECORDS = (
    Record(0, 13, "agent", b'{"event":"agent-ak"}'),
    Record(1, 13, "caller", b'{"data":"AA=="}'),
    Record(2, 13, "agent", b"{}"),
)
LOG = b"".join(record.encode() for record in RECORDS)
SYSTEMD = {
    "content": {"bootId": "aa" * 16, "eventType": "phase", "string": "sysinit", "timestamp": 12_345_678},
    "content_type": "systemd",
    "digests": [{"digest": "11" * 20, "hashAlg": "sha1"}, {"digest": "22" * 32, "hashAlg": "sha256"}],
    "pcr": 11,
}


def refused(read: Callable[[bytes], object], data: bytes) -> str:
    with pytest.raises(HostileInput) as caught:
        read(data)
    return caught.value.slug


def framed(*bodies: object) -> bytes:
    return b"".join(b"\x1e" + strictjson.dumps(body) + b"\n" for body in bodies)


def changed(**fields: Any) -> bytes:
    """A log of one record with other fields."""
    body = strictjson.loads(RECORDS[0].encode()[1:], "record", 4096)
    return framed({**body, **fields})


def test_reads_back_what_it_writes() -> None:
    assert parse_agent_log(LOG) == RECORDS
    assert parse_agent_log(b"") == ()


def test_a_digest_covers_author_and_content() -> None:
    agent, caller = Record(0, 13, "agent", b"{}"), Record(0, 13, "caller", b"{}")
    assert agent.digest == hashlib.sha256(b"cgpu/cel/agent/1\0{}").digest()
    assert caller.digest == hashlib.sha256(b"cgpu/cel/caller/1\0{}").digest()


def test_a_record_is_framed_and_in_the_canonical_form() -> None:
    digest = hashlib.sha256(b"cgpu/cel/agent/1\0{}").hexdigest()
    assert Record(7, 13, "agent", b"{}").encode() == (
        b'\x1e{"content":"e30=","content_type":"cgpu-agent",'
        b'"digests":[{"digest":"' + digest.encode() + b'","hashAlg":"sha256"}],"pcr":13,"recnum":7}\n'
    )


@pytest.mark.parametrize("read", [parse_agent_log, parse_systemd_log])
@pytest.mark.parametrize(
    "data", [b"\x1e", b"\n", b"{}", b"\x1e{}", b"{}\n", LOG[1:], LOG[:-1], LOG + b"\x1e", LOG.replace(b"\n", b"", 1)]
)
def test_refuses_what_is_not_whole(read: Callable[[bytes], object], data: bytes) -> None:
    assert refused(read, data) == "BAD_FRAMING"


@pytest.mark.parametrize("read", [parse_agent_log, parse_systemd_log])
@pytest.mark.parametrize(
    ("data", "slug"),
    [
        (b"\x1e\n", "BAD_JSON"),
        (b"\x1e{}\n{}\n", "BAD_JSON"),
        (b"\x1e[]\n", "BAD_JSON"),
        (b'\x1e{"a":1,"a":1}\n', "DUPLICATE_KEY"),
        (b"\x1e" + b" " * 4 * MAX_CONTENT + b"{}\n", "TOO_LARGE"),
        (b"\x1e{}\n" * (MAX_RECORDS + 1), "TOO_LARGE"),
        (b"\x1e" * MAX_LOG + b"\n", "TOO_LARGE"),
    ],
)
def test_refuses_what_is_no_sequence_of_json(read: Callable[[bytes], object], data: bytes, slug: str) -> None:
    assert refused(read, data) == slug


@pytest.mark.parametrize(
    ("data", "slug"),
    [
        (changed(recnum=1), "BAD_FIELD"),
        (changed(recnum=-1), "BAD_FIELD"),
        (changed(pcr=24), "BAD_FIELD"),
        (changed(content_type="systemd"), "BAD_FIELD"),
        (changed(content="AA"), "BAD_FIELD"),
        (changed(content=strictjson.b64(b" " * (MAX_CONTENT + 1))), "BAD_FIELD"),
        (changed(digests=[]), "BAD_FIELD"),
        (changed(digests=[{"digest": "00" * 32, "hashAlg": "sha256"}] * 2), "BAD_FIELD"),
        (changed(digests=[{"digest": "00" * 19, "hashAlg": "sha1"}]), "BAD_FIELD"),
        (changed(note="x"), "UNKNOWN_KEY"),
        (changed(digests=[{"digest": "00" * 32, "hashAlg": "sha256", "note": 1}]), "UNKNOWN_KEY"),
        (changed(digests=[{"digest": "00" * 32, "hashAlg": "sha256"}]), "DIGEST_MISMATCH"),
        (changed(content=strictjson.b64(b'{"event":"other"}')), "DIGEST_MISMATCH"),
        (changed(content_type="cgpu-caller"), "DIGEST_MISMATCH"),
        (RECORDS[0].encode() * 2, "BAD_FIELD"),
        (LOG.removeprefix(RECORDS[0].encode()), "BAD_FIELD"),
        (RECORDS[0].encode() + RECORDS[2].encode(), "BAD_FIELD"),
    ],
)
def test_refuses_a_record_that_an_agent_would_not_write(data: bytes, slug: str) -> None:
    assert refused(parse_agent_log, data) == slug


def test_refuses_a_second_digest_beside_the_right_one() -> None:
    right = {"digest": RECORDS[0].digest.hex(), "hashAlg": "sha256"}
    assert parse_agent_log(changed(digests=[right])) == RECORDS[:1]
    sha384 = {"digest": "00" * 48, "hashAlg": "sha384"}
    assert refused(parse_agent_log, changed(digests=[right, sha384])) == "DIGEST_MISMATCH"


@pytest.mark.parametrize(
    ("content", "slug"),
    [
        (b"", "BAD_JSON"),
        (b"text", "BAD_JSON"),
        (b"[]", "BAD_JSON"),
        (b'"a"', "BAD_JSON"),
        (b'{"event":"a","event":"b"}', "DUPLICATE_KEY"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "BAD_JSON"),
    ],
)
def test_refuses_content_that_two_readers_could_read_differently(content: bytes, slug: str) -> None:
    assert refused(parse_agent_log, replace(RECORDS[0], content=content).encode()) == slug


def test_reads_systemds_records() -> None:
    (record,) = parse_systemd_log(framed(SYSTEMD))
    assert (record.pcr, record.event_type, record.text) == (11, "phase", "sysinit")
    assert record.digests == {"sha1": b"\x11" * 20, "sha256": b"\x22" * 32}
    assert parse_systemd_log(b"") == ()


def test_reads_systemds_records_whatever_else_they_hold() -> None:
    (record,) = parse_systemd_log(framed({**SYSTEMD, "content": {"new": [1]}, "more": 1}))
    assert (record.event_type, record.text) == ("", "")
    (record,) = parse_systemd_log(framed({k: v for k, v in SYSTEMD.items() if k != "content"}))
    assert record.text == ""


def test_leaves_out_systemds_records_of_nv_indices() -> None:
    index = {key: value for key, value in SYSTEMD.items() if key != "pcr"}
    assert parse_systemd_log(framed({**index, "nv_index": 0x1D10200}, SYSTEMD))[0].pcr == 11


@pytest.mark.parametrize(
    "fields",
    [
        {"pcr": 24},
        {"pcr": "11"},
        {"pcr": True},
        {"digests": {}},
        {"digests": [{"digest": "zz" * 32, "hashAlg": "sha256"}]},
        {"digests": [SYSTEMD["digests"][0]] * 2},  # type: ignore[index]
        {"content": "text"},
        {"content": {"string": 1}},
        {"content": {"eventType": None}},
    ],
)
def test_refuses_systemds_records_of_another_shape(fields: dict[str, object]) -> None:
    assert refused(parse_systemd_log, framed({**SYSTEMD, **fields})) == "BAD_FIELD"
