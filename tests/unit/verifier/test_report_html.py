"""The page shows every part of a verdict, loads nothing, and shows hostile text as text."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from cgpu_agent.cedar.engine import Policies
from cgpu_agent.cedar.files import appraisal_schema, default_appraisal
from cgpu_agent.cli.verify import not_proven
from cgpu_agent.verifier.appraisal import appraise
from cgpu_agent.verifier.evidence import RelyingParty, verify_evidence
from cgpu_agent.verifier.html import Markup, escape, tag
from cgpu_agent.verifier.reference import make_reference, parse_reference
from cgpu_agent.verifier.report_html import report
from fixtures import boots
from fixtures.attest import rsa_key
from fixtures.bundles import GENUINE, PARTY, PLATFORM_AK, caller, made, name_of, statement
from fixtures.pki import NOW, Authority

POLICY = Policies.load(default_appraisal(), appraisal_schema(), "policy")
PINNING = replace(PARTY, pinned_names=frozenset({name_of(PLATFORM_AK)}))
ATTACK = "</style><script>alert(1)</script><img src=x onerror=x>\"'&"
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "main", "header", "section", "article", "footer"),
    *("div", "span", "h1", "h2", "h3", "p", "ul", "ol", "li", "dl", "dt", "dd"),
    *("table", "thead", "tbody", "tr", "th", "td", "code"),
}


class Page(HTMLParser):
    """A page as a browser would take it in: elements, attributes, text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.metas: dict[str, str] = {}
        self.text = ""
        self.style = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "meta":
            given = dict(attrs)
            self.metas[given.get("http-equiv") or given.get("name") or "charset"] = given.get("content") or ""
        else:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["style"]:
            self.style += data
        else:
            self.text += data + "\n"


def page(data: bytes | None = None, party: RelyingParty = PINNING, *, referenced: bool = False) -> Page:
    result = verify_evidence(GENUINE.encode() if data is None else data, party)
    reference = parse_reference(make_reference(result)) if referenced else None
    return Page(report(appraise(result, POLICY, reference), at=NOW, gaps=not_proven(result)))


def hostile() -> Iterator[tuple[str, bytes, RelyingParty]]:
    audience = f"https://{ATTACK}"[:255]
    party = replace(PARTY, audience=audience)
    yield "audience", made(statements=(statement(audience=audience),), index=0), party
    yield "unit", made(statements=(statement(caller=caller(unit=ATTACK, container=ATTACK)),), index=0), PARTY
    yield "command line", made(**boots.with_command_line(f"/vmlinuz {ATTACK}")), PARTY
    root = Authority.root(ATTACK)
    certificate = root.issue(rsa_key().public_key(), ATTACK).public_bytes(Encoding.DER)
    yield "authority", made(platform_certificate=certificate), replace(PARTY, roots=(root.certificate,))
    yield "missing", made(manifest_with={"missing": ((ATTACK[:64], ATTACK),)}), PARTY


@pytest.mark.parametrize(("name", "data", "party"), [pytest.param(*case, id=case[0]) for case in hostile()])
def test_hostile_text_stays_text(name: str, data: bytes, party: RelyingParty) -> None:
    shown = page(data, party)
    assert shown.elements <= ALLOWED
    assert not {each for each in shown.attributes if each.startswith("on")}
    if name != "missing":
        assert "alert(1)" in shown.text


def test_hostile_text_in_a_refusal_stays_text() -> None:
    shown = page(GENUINE.encode().replace(b'"format"', b'"<script>x</script>"'))
    assert shown.elements <= ALLOWED
    assert "Refused" in shown.text


def test_loads_nothing_and_its_policy_allows_only_its_own_style() -> None:
    shown = page()
    assert shown.elements <= ALLOWED
    assert {"src", "href", "style", "action", "srcset"}.isdisjoint(shown.attributes)
    assert not re.search(r"url\(|@import|expression", shown.style)
    digest = base64.b64encode(hashlib.sha256(shown.style.encode()).digest()).decode()
    policy = shown.metas["Content-Security-Policy"].split("; ")
    assert policy[:2] == ["default-src 'none'", f"style-src 'sha256-{digest}'"]


def test_shows_the_verdict_the_boot_the_registers_and_every_step() -> None:
    result = verify_evidence(GENUINE.encode(), PINNING)
    shown = page(referenced=True)
    assert "Accepted, with warnings" in shown.text
    for heading in ("Who asked", "What booted", "Who vouches for what", "What was not proven", "Every step", "GPUs"):
        assert heading in shown.text
    assert "This evidence says nothing of any GPU" in shown.text
    assert "model.service" in shown.text
    assert all(step.id in shown.text and step.title in shown.text for step in result.steps)
    assert all((found.actual or b"").hex() in shown.text for found in result.registers.values())
    assert all(gap in shown.text for gap in not_proven(result))


def test_a_refusal_shows_the_step_and_nothing_that_the_evidence_said() -> None:
    shown = page(party=replace(PINNING, nonce=bytes(32)))
    assert "Refused" in shown.text
    assert "NONCE_MISMATCH" in shown.text
    assert "model.service" not in shown.text
    assert "What booted" not in shown.text


def test_a_simulator_is_called_one_in_the_headline() -> None:
    shown = page(party=replace(PINNING, roots=(), simulated_roots=PARTY.roots))
    assert "Do not trust" in shown.text
    assert "Simulated: a simulator's root signed this." in shown.text


def test_marks_that_turn_text_around_are_shown_as_escapes() -> None:
    shown: Any = escape("a\N{RIGHT-TO-LEFT OVERRIDE}b\x07")
    assert shown == "a\\u202eb\\u0007"


def test_only_markup_is_markup() -> None:
    assert tag("p", "<b>", Markup("<i></i>"), class_='"x') == '<p class="&quot;x">&lt;b&gt;<i></i></p>'
    with pytest.raises(ValueError, match="literal"):
        tag("p onload=x")
