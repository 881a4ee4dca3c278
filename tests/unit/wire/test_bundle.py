"""The evidence format: bundle, statement and manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.bundle import MAX_BUNDLE, parse_bundle
from cgpu_agent.wire.extradata import (
    agent_ak_qualifying_data,
    caller_quote_extra_data,
    is_reserved_extra_data,
    manifest_extra_data,
)
from cgpu_agent.wire.manifest import MAX_MANIFEST, LogDigest, parse_manifest
from cgpu_agent.wire.statement import MAX_STATEMENT, check_audience, parse_statement
from fixtures.bundles import GENUINE, HONEST, bent_json, caller, statement

Change = Callable[[dict[str, Any]], object]


def refused(read: Callable[[bytes], object], data: bytes) -> str:
    with pytest.raises(HostileInput) as caught:
        read(data)
    return caught.value.slug


def with_fields(data: bytes, change: Change) -> bytes:
    document = strictjson.loads(data, "document", 1 << 20)
    change(document)
    return strictjson.dumps(document)


def put(value: object, *path: str) -> Change:
    """Set one value inside a document."""

    def change(document: dict[str, Any]) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


class TestExtraData:
    def test_of_a_manifest(self) -> None:
        assert manifest_extra_data(b"manifest") == b"\xc6\x01" + hashlib.sha256(b"manifest").digest()

    def test_of_a_plain_quote(self) -> None:
        expected = hashlib.sha256(b"cgpu/quote/2\0" + b"\0\0\0\2" + b"{}" + b"nonce").digest()
        assert caller_quote_extra_data(b"{}", b"nonce") == b"\xc6\x02" + expected

    def test_of_a_plain_quote_keeps_claims_and_nonce_apart(self) -> None:
        assert caller_quote_extra_data(b"ab", b"cd") != caller_quote_extra_data(b"abc", b"d")

    def test_of_the_certification_of_an_agent_ak(self) -> None:
        assert agent_ak_qualifying_data(b"name") == hashlib.sha256(b"cgpu/agent-ak/1\0name").digest()

    @pytest.mark.parametrize("form", [b"\xc6\x01", b"\xc6\x02", b"\xc6\x03", b"\xc6\xff"])
    def test_reserves_every_form_of_this_and_later_versions(self, form: bytes) -> None:
        assert is_reserved_extra_data(form + bytes(32))

    @pytest.mark.parametrize("data", [b"", b"\xc6", bytes(34), b"\xc6" + bytes(32), b"\xc6" + bytes(34)])
    def test_leaves_other_nonces_free(self, data: bytes) -> None:
        assert not is_reserved_extra_data(data)


class TestAudience:
    @pytest.mark.parametrize("audience", ["a", "https://rp.example/\u00fc", "with space", "x" * 255, "\u00fc" * 127])
    def test_is_a_line_of_text(self, audience: str) -> None:
        assert check_audience(audience)

    @pytest.mark.parametrize(
        "audience",
        ["", "x" * 256, "\u00fc" * 128, "a\0", "a\n", "\x1b[31m", "\x7f", "\x9b", "a\u2028b", "\u2029", "\ud800"],
    )
    def test_is_nothing_else(self, audience: str) -> None:
        assert not check_audience(audience)


class TestStatement:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"user_data": b"", "public_key": b"\x30\x00"},
            {"user_data": b"x" * 64, "nonce": b"8 bytes!", "time": 0},
            {"caller": caller(unit=None, container="ab" * 32, groups=None, identity_strength="pid")},
            {"audience": "\u00fc" * 127, "nonce": b"n" * 64},
        ],
    )
    def test_reads_back_what_it_writes(self, fields: dict[str, Any]) -> None:
        assert parse_statement(statement(**fields).encode()) == statement(**fields)

    @pytest.mark.parametrize(
        "fields",
        [
            {"purpose": "release"},
            {"audience": ""},
            {"audience": "a\nb"},
            {"audience": "x" * 256},
            {"nonce": b"7 bytes"},
            {"nonce": b"n" * 65},
            {"user_data": b"x" * 65},
            {"public_key": b"x" * 2049},
            {"lane": "all"},
            {"salt": b"short"},
            {"boot_id": "11111111-2222-3333-4444-55555555555"},
            {"boot_id": "11111111-2222-3333-4444-55555555555G"},
            {"time": -1},
            {"time": (1 << 40) + 1},
            {"caller": caller(uid=-1)},
            {"caller": caller(uid="0")},
            {"caller": caller(pid=1 << 32)},
            {"caller": caller(groups=[1, -1])},
            {"caller": caller(groups=[True])},
            {"caller": caller(unit=7)},
            {"caller": caller(cgroup="x" * 4097)},
            {"caller": caller(identity_strength="certain")},
            {"caller": {key: value for key, value in caller().items() if key != "unit"}},
        ],
    )
    def test_refuses_values_out_of_range(self, fields: dict[str, Any]) -> None:
        assert refused(parse_statement, statement(**fields).encode()) == "BAD_FIELD"

    @pytest.mark.parametrize("version", [0, 2, -1, "1", True, None])
    def test_refuses_another_version(self, version: object) -> None:
        assert refused(parse_statement, with_fields(statement().encode(), put(version, "version"))) == "BAD_FIELD"

    @pytest.mark.parametrize("path", [("note",), ("request", "note"), ("caller", "note")])
    def test_refuses_unknown_keys(self, path: tuple[str, ...]) -> None:
        assert refused(parse_statement, with_fields(statement().encode(), put("", *path))) == "UNKNOWN_KEY"

    @pytest.mark.parametrize("key", sorted(strictjson.loads(statement().encode(), "", 4096)))
    def test_needs_every_key(self, key: str) -> None:
        data = with_fields(statement().encode(), lambda document: document.pop(key))
        assert refused(parse_statement, data) in ("BAD_FIELD", "BAD_JSON")

    def test_refuses_more_bytes_than_a_statement_has(self) -> None:
        padded = statement().encode().ljust(MAX_STATEMENT, b" ")
        assert parse_statement(padded) == statement()
        assert refused(parse_statement, padded + b" ") == "TOO_LARGE"


class TestManifest:
    MANIFEST = HONEST.manifest()

    @pytest.mark.parametrize(
        "fields", [{}, {"boot_log": None, "systemd_log": None}, {"missing": (("boot-log", "why"), ("b", ""))}]
    )
    def test_reads_back_what_it_writes(self, fields: dict[str, Any]) -> None:
        manifest = replace(parse_manifest(self.MANIFEST), **fields)
        assert parse_manifest(manifest.encode()) == manifest

    @pytest.mark.parametrize(
        "fields",
        [
            {"root": bytes(31)},
            {"tree_size": 0},
            {"tree_size": 65537},
            {"agent_ak_name": bytes(33)},
            {"reset_count": -1},
            {"restart_count": 1 << 32},
            {"register": 24},
            {"agent": {"build": "aa" * 31, "config": "bb" * 32, "policy": "cc" * 32, "version": "0"}},
            {"agent": {"build": "aa" * 32, "config": "bb" * 32, "policy": "cc" * 32}},
            {"agent_log": LogDigest(bytes(31), 0)},
            {"boot_log": LogDigest(bytes(32), -1)},
            {"systemd_log": LogDigest(bytes(32), (4 << 20) + 1)},
            {"missing": (("part", "x" * 257),)},
            {"missing": (("part", "reason"),) * 33},
        ],
    )
    def test_refuses_values_out_of_range(self, fields: dict[str, Any]) -> None:
        assert refused(parse_manifest, replace(parse_manifest(self.MANIFEST), **fields).encode()) == "BAD_FIELD"

    def test_needs_a_digest_of_the_agent_log(self) -> None:
        assert refused(parse_manifest, with_fields(self.MANIFEST, put(None, "logs", "agent"))) == "BAD_JSON"

    @pytest.mark.parametrize("path", [("note",), ("agent", "note"), ("logs", "note"), ("logs", "boot", "note")])
    def test_refuses_unknown_keys(self, path: tuple[str, ...]) -> None:
        assert refused(parse_manifest, with_fields(self.MANIFEST, put("", *path))) == "UNKNOWN_KEY"

    @pytest.mark.parametrize("key", sorted(strictjson.loads(MANIFEST, "", MAX_MANIFEST)))
    def test_needs_every_key(self, key: str) -> None:
        data = with_fields(self.MANIFEST, lambda document: document.pop(key))
        assert refused(parse_manifest, data) in ("BAD_FIELD", "BAD_JSON")

    def test_refuses_more_bytes_than_a_manifest_has(self) -> None:
        assert refused(parse_manifest, self.MANIFEST.ljust(MAX_MANIFEST + 1, b" ")) == "TOO_LARGE"


class TestBundle:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"boot_log": None, "systemd_log": None, "platform_ak_certificate": None},
            {"ek_certificates": (b"one", b"two"), "leaf_index": 0, "inclusion_path": ()},
            {"pcrs": {index: bytes([index]) * 32 for index in range(24)}},
        ],
    )
    def test_reads_back_what_it_writes(self, fields: dict[str, Any]) -> None:
        bundle = replace(GENUINE, **fields)
        assert parse_bundle(bundle.encode()) == bundle

    def test_signed_parts_travel_as_their_exact_bytes(self) -> None:
        bundle = replace(GENUINE, statement=b"no { JSON", manifest=b"\xff\0")
        assert parse_bundle(bundle.encode()) == bundle

    @pytest.mark.parametrize("found", ["cgpu-evidence/0", "cgpu-evidence/1 ", "", None, 1])
    def test_refuses_another_format(self, found: object) -> None:
        assert refused(parse_bundle, bent_json(put(found, "format"))) == "BAD_FORMAT"

    @pytest.mark.parametrize(
        "path",
        [
            ("note",),
            ("agent_ak", "note"),
            ("agent_ak", "certify", "note"),
            ("logs", "note"),
            ("platform_ak", "note"),
            ("quote", "note"),
        ],
    )
    def test_refuses_unknown_keys(self, path: tuple[str, ...]) -> None:
        assert refused(parse_bundle, bent_json(put("", *path))) == "UNKNOWN_KEY"

    @pytest.mark.parametrize("key", sorted(strictjson.loads(GENUINE.encode(), "", MAX_BUNDLE)))
    def test_needs_every_key(self, key: str) -> None:
        data = bent_json(lambda document: document.pop(key))
        assert refused(parse_bundle, data) in ("BAD_FIELD", "BAD_JSON")

    @pytest.mark.parametrize("index", ["24", "00", "01", "-1", "+1", " 1", "1 ", "", "x", "\u0661", "1\n"])
    def test_refuses_a_key_that_is_no_pcr(self, index: str) -> None:
        assert refused(parse_bundle, bent_json(put("00" * 32, "pcrs", index))) == "BAD_FIELD"

    @pytest.mark.parametrize(
        ("value", "path"),
        [
            ("00" * 31, ("pcrs", "0")),
            ("00" * 33, ("pcrs", "0")),
            (65536, ("leaf_index",)),
            (-1, ("leaf_index",)),
            (True, ("leaf_index",)),
            (["00" * 32] * 17, ("inclusion_path",)),
            (["00" * 31], ("inclusion_path",)),
            ([None], ("inclusion_path",)),
            (["QQ=="] * 5, ("ek_certificates",)),
            (["QQ"], ("ek_certificates",)),
            (None, ("logs", "agent")),
            (None, ("statement",)),
            (strictjson.b64(bytes(1025)), ("quote", "attest")),
            (strictjson.b64(bytes(1025)), ("agent_ak", "public")),
            (strictjson.b64(bytes(8193)), ("platform_ak", "certificate")),
        ],
    )
    def test_refuses_values_out_of_range(self, value: object, path: tuple[str, ...]) -> None:
        assert refused(parse_bundle, bent_json(put(value, *path))) == "BAD_FIELD"

    def test_refuses_more_bytes_than_a_bundle_has(self) -> None:
        assert refused(parse_bundle, GENUINE.encode().ljust(MAX_BUNDLE + 1, b" ")) == "TOO_LARGE"
