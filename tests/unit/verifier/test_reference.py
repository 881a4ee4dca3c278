"""A reference says what was good, is read strictly, and names every way in which evidence differs from it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.verifier.evidence import EvidenceResult, verify_evidence
from cgpu_agent.verifier.reference import (
    DEFAULT_PCRS,
    MAX_REFERENCE,
    Reference,
    compare,
    make_reference,
    parse_reference,
)
from fixtures import boots
from fixtures.attest import Signer, ecc_key
from fixtures.bundles import GENUINE, PARTY, PLATFORM_AK, RECORDED_PCRS, ROOT, made, name_of


def judged(**changed: Any) -> EvidenceResult:
    result = verify_evidence(made(**changed), PARTY)
    assert result.accepted, result.refusal
    return result


GOOD = judged()


def whats(result: EvidenceResult, reference: Reference) -> list[str]:
    return [each.what for each in compare(result, reference)]


def test_is_made_of_what_a_good_bundle_showed() -> None:
    made_of = parse_reference(make_reference(GOOD))
    assert made_of.pcrs == {index: frozenset({RECORDED_PCRS[index]}) for index in DEFAULT_PCRS}
    assert made_of.instances == {name_of(PLATFORM_AK)}
    assert made_of.agent_builds == {b"\xaa" * 32}
    assert made_of.command_lines is not None
    assert next(iter(made_of.command_lines)).startswith("/vmlinuz root=LABEL=root rw ")
    assert made_of.authorities is not None
    assert len(made_of.authorities) == 2
    assert made_of.pins == {"agent-build", "command-line", "instance", "secure-boot-authorities"}


def test_matches_the_evidence_it_was_made_of() -> None:
    assert compare(GOOD, parse_reference(make_reference(GOOD, pcrs=range(10)))) == ()


def test_any_instance_is_expected_only_in_so_many_words() -> None:
    made_of = parse_reference(make_reference(GOOD, any_instance=True))
    assert made_of.instances is None
    assert "instance" not in made_of.pins


def test_is_not_made_of_refused_evidence() -> None:
    refused = verify_evidence(GENUINE.encode(), replace(PARTY, audience="somebody else"))
    with pytest.raises(Misuse) as caught:
        make_reference(refused)
    assert caught.value.slug == "NOT_ACCEPTED"


@pytest.mark.parametrize("pcr", [12, 15])
def test_does_not_expect_a_register_that_was_not_quoted(pcr: int) -> None:
    with pytest.raises(Misuse) as caught:
        make_reference(GOOD, pcrs=[pcr])
    assert caught.value.slug == "PCR_UNEXPLAINED"


def test_does_not_expect_values_that_no_log_explains() -> None:
    result = verify_evidence(made(boot_log=None), replace(PARTY, allow_no_boot_log=True))
    assert result.accepted
    with pytest.raises(Misuse) as caught:
        make_reference(result)
    assert caught.value.slug == "PCR_UNEXPLAINED"


def test_names_a_register_that_differs_and_one_that_was_not_quoted() -> None:
    expected = Reference({4: frozenset({bytes(32)}), 7: frozenset({RECORDED_PCRS[7]}), 12: frozenset({bytes(32)})})
    assert whats(GOOD, expected) == ["pcr-4", "pcr-12"]


def test_any_of_several_values_will_do() -> None:
    assert whats(GOOD, Reference({4: frozenset({bytes(32), RECORDED_PCRS[4]})})) == []


def test_names_another_command_line_and_one_that_is_not_proven() -> None:
    expected = Reference({}, command_lines=frozenset({boots.VERITY}))
    assert whats(judged(**boots.with_command_line(boots.VERITY)), expected) == []
    assert whats(GOOD, expected) == ["command-line"]
    assert whats(judged(**boots.with_shown_command_line(boots.VERITY)), expected) == ["command-line"]


def test_names_another_agent_build_and_another_instance() -> None:
    expected = Reference({}, agent_builds=frozenset({bytes(32)}), instances=frozenset({b"\0\x0b" + bytes(32)}))
    assert whats(GOOD, expected) == ["agent-build", "instance"]


def test_names_every_authority_that_is_not_expected() -> None:
    used = parse_reference(make_reference(GOOD)).authorities
    assert used is not None
    assert whats(GOOD, Reference({}, authorities=used)) == []
    assert whats(GOOD, Reference({}, authorities=frozenset(list(used)[:1]))) == ["secure-boot-authority"]


def test_authorities_mean_nothing_where_secure_boot_is_off() -> None:
    used = parse_reference(make_reference(GOOD)).authorities
    assert "secure-boot-authority" in whats(judged(**boots.with_secure_boot_off()), Reference({}, authorities=used))


def test_tells_instances_apart_by_the_platform_ak() -> None:
    other = Signer(ecc_key())
    certificate = ROOT.issue(other.key.public_key()).public_bytes(Encoding.DER)
    result = judged(platform=other, platform_certificate=certificate)
    assert whats(result, parse_reference(make_reference(GOOD))) == ["instance"]


def good_document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(make_reference(GOOD))
    return document


@pytest.mark.parametrize(
    ("slug", "change"),
    [
        ("BAD_FORMAT", {"format": "cgpu-reference/1"}),
        ("UNKNOWN_KEY", {"pcr": {}}),
        ("BAD_FIELD", {"pcrs": {"24": [64 * "0"]}}),
        ("BAD_FIELD", {"pcrs": {"04": [64 * "0"]}}),
        ("BAD_FIELD", {"pcrs": {"4": []}}),
        ("BAD_FIELD", {"pcrs": {"4": [64 * "A"]}}),
        ("BAD_FIELD", {"pcrs": {"4": [62 * "0"]}}),
        ("BAD_FIELD", {"pcrs": {"4": 64 * "0"}}),
        ("BAD_FIELD", {"pcrs": {"4": [64 * "0"] * 65}}),
        ("BAD_FIELD", {"instances": []}),
        ("BAD_FIELD", {"instances": [64 * "0"]}),
        ("BAD_FIELD", {"command_lines": []}),
        ("BAD_FIELD", {"command_lines": [""]}),
        ("BAD_FIELD", {"command_lines": [7]}),
        ("BAD_FIELD", {"command_lines": ["x" * 4097]}),
        ("BAD_FIELD", {"agent_builds": "aa"}),
    ],
)
def test_refuses_a_file_that_is_not_exactly_a_reference(slug: str, change: dict[str, Any]) -> None:
    with pytest.raises(HostileInput) as caught:
        parse_reference(json.dumps({**good_document(), **change}).encode())
    assert caught.value.slug == slug


@pytest.mark.parametrize("missing", ["pcrs", "instances", "command_lines", "agent_builds", "secure_boot_authorities"])
def test_refuses_a_file_that_leaves_open_what_it_compares(missing: str) -> None:
    document = good_document()
    del document[missing]
    with pytest.raises(HostileInput) as caught:
        parse_reference(json.dumps(document).encode())
    assert caught.value.slug in {"BAD_FIELD", "BAD_JSON"}


def test_refuses_a_file_that_expects_nothing() -> None:
    empty = Reference({}).encode()
    with pytest.raises(HostileInput) as caught:
        parse_reference(empty)
    assert caught.value.slug == "BAD_FIELD"


def test_refuses_a_value_that_is_given_twice() -> None:
    text = make_reference(GOOD).decode().replace('"pcrs": {', '"pcrs": {"0": ["' + 64 * "0" + '"],', 1)
    with pytest.raises(HostileInput) as caught:
        parse_reference(text.encode())
    assert caught.value.slug == "DUPLICATE_KEY"


def test_refuses_a_file_that_is_too_large() -> None:
    with pytest.raises(HostileInput) as caught:
        parse_reference(b" " * (MAX_REFERENCE + 1))
    assert caught.value.slug == "TOO_LARGE"


def test_compares_a_text_that_no_encoding_knows_without_failing() -> None:
    document = {**good_document(), "command_lines": ["\ud800"]}
    expected = parse_reference(json.dumps(document).encode())
    assert whats(GOOD, expected) == ["command-line"]
