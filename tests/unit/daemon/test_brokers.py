"""The key brokers of a configuration are made as it says, or it is refused at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cgpu_agent.backends.logs import SystemLogs
from cgpu_agent.backends.tpm.owner import TpmOwner
from cgpu_agent.backends.tpm.transport import UnixPerCommand
from cgpu_agent.daemon.brokers import make_brokers
from cgpu_agent.daemon.config import parse
from cgpu_agent.errors import Misuse
from fixtures.egress import Pki
from fixtures.gpusessions import MovableClock


def tables(ca: Path) -> dict[str, dict[str, Any]]:
    return {
        "openbao": {
            "addresses": ["https://a:8200", "https://b:8200"],
            "role": "r",
            "verifier": "https://v/x",
            "audience": "v",
            "ca_file": str(ca),
        },
        "trustee": {"url": "https://t:8080", "ca_file": str(ca)},
        "azure": {
            "attestation": "https://a.example",
            "vault": "https://v.example",
            "access_token": "/nowhere",
            "ca_file": str(ca),
        },
    }


def made(document: dict[str, Any], folder: Path) -> set[str]:
    owner = TpmOwner(lambda: UnixPerCommand(folder / "tpm"))
    try:
        logs = SystemLogs([folder / "none"], folder / "none")
        return set(make_brokers(parse(document), owner, logs, MovableClock(), None))
    finally:
        owner.close()


def test_each_table_brings_its_broker_in(tmp_path: Path) -> None:
    known = tables(Pki(tmp_path).file)
    assert made({}, tmp_path) == {"credential"}
    for name, table in known.items():
        assert made({name: table}, tmp_path) == {"credential", name}
    assert made(dict(known), tmp_path) == {"credential", *known}


@pytest.mark.parametrize(
    ("broker", "key", "value"),
    [
        ("openbao", "addresses", ["http://a:8200"]),
        ("openbao", "addresses", ["https://a:8200/v1"]),
        ("openbao", "verifier", "http://v"),
        ("openbao", "transit", "../x"),
        ("trustee", "url", "http://t:8080"),
        ("trustee", "url", "https://t:8080/kbs"),
        ("azure", "vault", "https://v.example/keys"),
        ("azure", "mechanism", "RSA_OAEP"),
    ],
)
def test_what_a_broker_cannot_be_asked_by_is_refused(tmp_path: Path, broker: str, key: str, value: object) -> None:
    table = {**tables(Pki(tmp_path).file)[broker], key: value}
    with pytest.raises(Misuse) as caught:
        made({broker: table}, tmp_path)
    assert caught.value.slug == "BAD_CONFIG"


@pytest.mark.parametrize("broker", ["openbao", "trustee", "azure"])
@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_nobody_is_asked_without_a_ca(tmp_path: Path, broker: str, content: bytes | None) -> None:
    ca = tmp_path / "cas"
    if content is not None:
        ca.write_bytes(content)
    with pytest.raises(Misuse) as caught:
        made({broker: tables(ca)[broker]}, tmp_path)
    assert caught.value.slug == "BAD_CONFIG"
