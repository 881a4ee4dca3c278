"""Every key of the configuration file is taken or refused by name; whatever the file holds, nothing else happens."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgpu_agent.configfile import MAX_FILE
from cgpu_agent.daemon.config import DEFAULT_POLICY, Config, KeyConfig, load, parse
from cgpu_agent.errors import Misuse

EVERYTHING: dict[str, Any] = {
    "log_level": "debug",
    "runtime_dir": "/run/x/private",
    "state_dir": "/var/lib/x",
    "policy": "/etc/x/policy.cedar",
    "sockets": {
        "api": "/run/x/a.sock",
        "admin": "/run/x/b.sock",
        "lease": "/run/x/c.sock",
        "metrics": "/run/x/d.sock",
    },
    "tpm": {
        "device": "swtpm:/run/x/tpm",
        "platform_ak_handle": 0x81010001,
        "create_platform_ak": "no",
        "ak_certificate": "/run/x/ak.der",
        "register": 12,
        "evidence_pcrs": [12, 0, 7, 7],
        "command_seconds": 3,
        "request_seconds": 9,
    },
    "logs": {"boot": "/run/x/boot", "systemd": "/run/x/systemd"},
    "platform": {"collateral": "/run/x/platform"},
    "gpu": {
        "backend": "software:/run/x/gpu",
        "ready_helper": "/run/x/ready.sock",
        "device_roots": ["/run/x/root.pem", "ab" * 32],
        "rim_roots": ["/run/x/rim.pem"],
        "collateral": "/run/x/collateral",
        "allow_simulated": True,
        "allow_no_rim": True,
        "require_revocation": True,
        "count": 8,
        "min_driver": "550.90.07",
        "min_vbios": "96.00.9F.00.01",
        "reattest_seconds": 600,
        "report_seconds": 20,
    },
    "limits": {
        "connections": 1,
        "connections_per_uid": 2,
        "calls": 3,
        "calls_per_uid": 4,
        "tpm_seconds_per_minute": 6,
        "keys_per_minute": 5,
        "leases": 6,
        "leases_per_uid": 7,
        "lease_mib": 8,
        "lease_mib_per_uid": 9,
        "lease_mib_in_all": 10,
        "channels": 11,
        "channels_per_uid": 12,
        "transfers_per_uid": 13,
        "gpu_mib_per_uid": 14,
    },
    "sealed": {"approvals": "/run/x/approvals"},
    "egress": {"socket": "/run/x/egress.sock"},
    "openbao": {
        "addresses": ["https://a:8200", "https://b:8200"],
        "role": "r",
        "verifier": "https://v/x",
        "audience": "v",
        "ca_file": "/run/x/ca.pem",
        "auth_mount": "j",
        "kv_mount": "k",
        "field": "f",
        "encoding": "text",
        "transit": "transit/decrypt/m",
        "namespace": "n",
    },
    "trustee": {"url": "https://t", "ca_file": "/run/x/ca.pem"},
    "azure": {
        "attestation": "https://a",
        "vault": "https://v",
        "access_token": "/run/x/token",
        "ca_file": "/run/x/ca.pem",
        "mechanism": "CKM_RSA_AES_KEY_WRAP",
    },
    "key": [{"id": "models/llama", "broker": "credential", "path": "llama.key", "group": "models", "seconds": 9}],
}


def refusal(document: dict[str, Any]) -> str:
    with pytest.raises(Misuse) as caught:
        parse(document)
    assert caught.value.slug == "BAD_CONFIG"
    return caught.value.message


def with_value(table: str, key: str, value: object) -> dict[str, Any]:
    return {table: {key: value}} if table else {key: value}


def test_every_key_is_taken() -> None:
    config = parse(EVERYTHING)
    tables = EVERYTHING.keys() - {"log_level", "runtime_dir", "state_dir", "policy", "key"}
    for field in dataclasses.fields(Config):
        if field.name in tables:
            for inner in dataclasses.fields(getattr(config, field.name)):
                wanted = EVERYTHING[field.name][inner.name]
                found = getattr(getattr(config, field.name), inner.name)
                wanted = tuple(wanted) if isinstance(wanted, list) else wanted
                assert found == ((0, 7, 12) if inner.name == "evidence_pcrs" else wanted)
    assert (config.log_level, config.runtime_dir) == ("debug", "/run/x/private")
    assert config.policy == "/etc/x/policy.cedar"
    assert config.create_platform_ak is None
    assert config.key == (KeyConfig("models/llama", "credential", "llama.key", "models", 9),)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"id": "a", "broker": "credential"}, "[[key]]"),
        ([{"broker": "credential"}], "key[0].id is missing"),
        ([{"id": "a"}], "key[0].broker is missing"),
        ([{"id": "a", "broker": "nobody"}], "key[0].broker must be one of credential"),
        ([{"id": "../a", "broker": "credential"}], "key[0].id"),
        ([{"id": "a b", "broker": "credential"}], "key[0].id"),
        ([{"id": "a" * 129, "broker": "credential"}], "key[0].id"),
        ([{"id": "a", "broker": "credential", "seconds": 0}], "key[0].seconds"),
        ([{"id": "a", "broker": "credential", "secret": "s3cr3t"}], "unknown key 'key[0].secret'"),
        ([{"id": "a", "broker": "openbao"}], "no table [openbao]"),
        ([{"id": "a", "broker": "azure"}], "no table [azure]"),
        ([{"id": "a", "broker": "trustee"}], "no table [trustee]"),
        ([{"id": "a", "broker": "credential"}] * 2, "each id once"),
        ([{"id": f"a{number}", "broker": "credential"} for number in range(257)], "at most 256"),
    ],
)
def test_a_bad_key_is_refused_and_named(keys: object, named: str) -> None:
    assert named in refusal({"key": keys})


@pytest.mark.parametrize(
    ("broker", "missing"), [("openbao", "ca_file"), ("openbao", "addresses"), ("trustee", "url")]
)
def test_what_a_broker_needs_is_asked_for(broker: str, missing: str) -> None:
    table = {name: value for name, value in EVERYTHING[broker].items() if name != missing}
    assert refusal({broker: table}) == f"{broker}.{missing} is missing"


def test_example_names_every_key_there_is() -> None:
    known = {field.name for field in dataclasses.fields(Config)} - {"source"}
    assert EVERYTHING.keys() == known


def test_defaults_are_good_and_the_example_file_holds_them() -> None:
    assert parse({}) == Config() == load(None)
    example = Path(__file__).resolve().parents[3] / "systemd" / "config.toml"
    assert dataclasses.replace(load(example), source=b"") == Config()
    uncommented = "\n".join(
        line[1:] for line in example.read_text().splitlines() if line.startswith("#") and line[1:2] not in (" ", "")
    )
    assert "platform_ak_handle" in uncommented


@pytest.mark.parametrize("key", ["", "loglevel", "grant", "grants", "source", "tpm2", "a\nb"])
def test_unknown_key_is_named(key: str) -> None:
    assert repr(key) in refusal({key: 1})


@pytest.mark.parametrize("table", ["sockets", "tpm", "logs", "limits"])
def test_unknown_key_of_a_table_is_named_with_its_table(table: str) -> None:
    assert f"{table}.nonsense" in refusal({table: {"nonsense": 1}})
    assert f"{table} must be a table" in refusal({table: 1})


@pytest.mark.parametrize(
    ("table", "key", "values"),
    [
        ("", "log_level", ["loud", 1, [], {}, "INFO"]),
        ("", "runtime_dir", ["", 1, "relative", "/nul\0", [], True]),
        ("gpu", "ready_helper", ["", 1, "relative", "/nul\0", "None", [], True]),
        ("", "state_dir", ["", 1, "relative", "/nul\0", [], True]),
        ("", "policy", ["", "policy.cedar", 1, [], "/nul\0", "Default"]),
        ("sockets", "api", ["", "agent.sock", 3, "/a\0b"]),
        ("sockets", "admin", ["", "agent.sock", 3.5]),
        ("sockets", "lease", ["", "lease.sock", 3.5]),
        ("sockets", "metrics", ["", "metrics.sock", "None", 3.5]),
        ("tpm", "device", ["", "/dev/tpmrm0", "device:/dev/tpm0", "device:tpmrm0", "tcp:host", 1, "swtpm:/a\0"]),
        ("tpm", "platform_ak_handle", [0x80000000, 0x82000000, -1, 1 << 40, "0x81000003", True, 1.0]),
        ("tpm", "create_platform_ak", ["", "yes", True, ["rsa"]]),
        ("tpm", "ak_certificate", ["", "ak.der", "NV", 1, "/a\0"]),
        ("tpm", "register", [0, 9, 16, 17, 23, 24, -1, True, "13", [13]]),
        ("tpm", "evidence_pcrs", [[], [24], [-1], [True], ["0"], 13, "0-15", [[0]], list(range(13))]),
        ("tpm", "command_seconds", [0, -1, "1", 31, 0.5]),
        ("tpm", "request_seconds", [0, 9, True]),
        ("logs", "boot", ["", "log", 1]),
        ("logs", "systemd", ["", "log", None]),
        ("platform", "collateral", ["", "collateral", 1]),
        ("limits", "connections", [0, -1, True, 1 << 32]),
        ("limits", "connections_per_uid", [0, "64"]),
        ("limits", "lease_mib", [0, "1024", -1]),
        ("limits", "calls", [0, 1.5]),
        ("limits", "calls_per_uid", [0, []]),
    ],
)
def test_bad_value_is_refused_and_its_key_named(table: str, key: str, values: list[object]) -> None:
    for value in values:
        message = refusal(with_value(table, key, value))
        assert key in message or f"{table} must be at least 1" in message, (value, message)


def test_sockets_of_workloads_and_operators_must_differ() -> None:
    for pair in itertools.combinations(("api", "admin", "lease", "metrics"), 2):
        assert "differ" in refusal({"sockets": dict.fromkeys(pair, "/run/a")})


def test_file_is_read_whole_and_its_digest_is_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("# a comment\nlog_level = 'error'\n")
    config = load(path)
    assert config.log_level == "error"
    assert config.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert Config().digest == hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b"log_level = ",
        b"a = 1\na = 2\n",
        b"[tpm]\n[tpm]\n",
        b"x = " + b"[" * 100_000,
        b"x = " + b"9" * 10_000,
        b"#" * (MAX_FILE + 1),
        "log_level = 'info' \u0000".encode(),
    ],
)
def test_file_that_is_no_good_toml_is_refused_with_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(Misuse) as caught:
        load(path)
    assert caught.value.slug == "BAD_CONFIG"
    assert str(path) in caught.value.message


def test_file_that_cannot_be_read_is_refused_with_its_path(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(Misuse, match=str(path)):
            load(path)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.sampled_from(["rsa", "info", "boot.measure", "/run/x", "swtpm:/x", 13, 0x81000003])
)
KEYS = st.text(max_size=8) | st.sampled_from(
    [
        *EVERYTHING,
        *EVERYTHING["tpm"],
        *EVERYTHING["limits"],
        "api",
        "admin",
        "boot",
        "systemd",
        "action",
        "uid",
        "unit",
    ]
)
DOCUMENTS = st.dictionaries(
    KEYS,
    st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4)),
    max_size=5,
)


@given(DOCUMENTS)
def test_whatever_a_document_holds_it_is_taken_or_refused(document: dict[str, Any]) -> None:
    before = repr(document)
    try:
        config = parse(document)
    except Misuse as error:
        assert error.slug == "BAD_CONFIG"  # noqa: PT017 - either outcome is good
    else:
        assert config.tpm.register in config.tpm.evidence_pcrs
        assert config.policy == DEFAULT_POLICY or config.policy.startswith("/")
    assert repr(document) == before
