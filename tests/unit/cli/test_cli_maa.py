"""``cgpuctl platform token``: exit status, words and JSON."""

from __future__ import annotations

import pytest

from fixtures.ctl import PASS, REFUSED, USAGE, Ctl, Ran
from fixtures.maa import CLAIMS as TOKEN_CLAIMS
from fixtures.maa import ISSUER, NONCE, changed, jwks, token
from fixtures.platform import VM_ID

AT = "2026-06-01T13:00:00Z"


def run(ctl: Ctl, *more: str, data: bytes | None = None, issuer: str = ISSUER) -> Ran:
    given = ctl.write("token.jwt", token() + b"\n" if data is None else data)
    keys = ctl.write("keys.json", jwks())
    return ctl("platform", "token", "--token", given, "--jwks", keys, "--issuer", issuer, "--at", AT, *more)


def test_a_good_token(ctl: Ctl) -> None:
    ran = run(ctl, "--nonce", NONCE.hex())
    assert ran.code == PASS, ran.out
    assert "endorsed by amd-sev-snp, by the word of its issuer" in ran.out
    assert VM_ID.lower() in ran.out


def test_json(ctl: Ctl) -> None:
    made = run(ctl, "--json").json
    assert (made["result"], made["endorsed_by"], made["tee"]) == ("pass", "amd-sev-snp", "sev-snp")
    assert list(made["warnings"]) == ["NO_NONCE"]


@pytest.mark.parametrize(
    ("data", "more"),
    [
        (token(claims=changed(TOKEN_CLAIMS, iss="https://other.example")), []),
        (b"none", []),
        (None, ["--nonce", "00"]),
    ],
)
def test_a_refused_token(ctl: Ctl, data: bytes | None, more: list[str]) -> None:
    ran = run(ctl, *more, data=data)
    assert ran.code == REFUSED
    assert "REFUSED" in ran.out
    assert run(ctl, *more, "--json", data=data).json["result"] == "refused"


@pytest.mark.parametrize("issuer", ["http://sharedweu.weu.attest.azure.net", "sharedweu.weu.attest.azure.net"])
def test_an_issuer_is_a_whole_url(ctl: Ctl, issuer: str) -> None:
    assert run(ctl, issuer=issuer).code == USAGE
