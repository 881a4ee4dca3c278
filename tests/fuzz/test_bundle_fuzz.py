"""Hostile bytes in place of evidence: refused with our own error, and never accepted with another meaning."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.evidence import EvidenceResult, verify_evidence
from cgpu_agent.verifier.keys import load_attestation_key
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.bundle import Bundle, parse_bundle
from cgpu_agent.wire.cel import parse_agent_log, parse_systemd_log
from cgpu_agent.wire.manifest import parse_manifest
from cgpu_agent.wire.merkle import Tree
from cgpu_agent.wire.statement import parse_statement
from cgpu_agent.wire.tpm import ALG_ECDSA, parse_signature
from fixtures.attest import tpm2b, u16
from fixtures.bundles import (
    AGENT_AK,
    PLATFORM_AK,
    ROOT,
    SYSTEMD_LOG,
    name_of,
    statement,
)
from fixtures.lanes import AZURE_LOG, FULL_PARTY, FULL_RECIPE, full, full_elsewhere
from fixtures.platform import AMD

GENUINE = full()


def load(data: bytes) -> object:
    return strictjson.loads(data, "fuzzed", 1 << 16)


SEEDS: dict[Callable[[bytes], object], tuple[bytes, ...]] = {
    load: (b'{"a":[1,"\\u00fc",null,true],"b":{"c":""}}', GENUINE.manifest),
    parse_statement: (GENUINE.statement, statement(user_data=b"data", public_key=b"key").encode()),
    parse_manifest: (GENUINE.manifest, replace(FULL_RECIPE, boot_log=None, systemd_log=None).manifest()),
    parse_bundle: (replace(GENUINE, boot_log=None, systemd_log=None).encode(),),
    parse_agent_log: (GENUINE.agent_log,),
    parse_systemd_log: (SYSTEMD_LOG,),
}
PARSERS = pytest.mark.parametrize("parse", SEEDS, ids=lambda parse: parse.__name__)

GENUINE_FILE = GENUINE.encode()
OTHER = full_elsewhere()
_TREE = Tree(FULL_RECIPE.leaves)
SAME_BATCH = replace(GENUINE, statement=FULL_RECIPE.leaves[0], leaf_index=0, inclusion_path=_TREE.path(0))
"""The bundle of the neighbour in the genuine one's batch, who was given the same nonce."""


def meaning(bundle: Bundle) -> dict[str, object]:
    """Everything in a bundle but what nothing signs and nothing rests on; see ``TestUnsigned``."""
    return {
        "statement": bundle.statement,
        "manifest": bundle.manifest,
        "place": (bundle.leaf_index, bundle.inclusion_path),
        "quote": bundle.quote.attest,
        "agent AK": load_attestation_key(bundle.agent_ak).name,
        "certification": bundle.agent_ak_certify.attest,
        "platform AK": load_attestation_key(bundle.platform_ak).spki,
        "PCRs": dict(bundle.pcrs),
        "logs": (bundle.boot_log, bundle.systemd_log, bundle.agent_log),
        "GPUs": bundle.gpus,
        "hardware": None if bundle.platform is None else bundle.platform.digest(),
    }


MEANINGS = [meaning(bundle) for bundle in (GENUINE, SAME_BATCH, OTHER)]


def refused_or_genuine(data: bytes) -> EvidenceResult:
    result = verify_evidence(data, FULL_PARTY)
    if result.accepted:
        assert meaning(parse_bundle(data)) in MEANINGS
    else:
        assert result.refusal is not None
        assert result.refusal.slug not in (None, "INTERNAL")
        assert (result.statement, result.manifest, result.records) == (None, None, ())
    return result


def refused_or_read(parse: Callable[[bytes], object], data: bytes) -> None:
    try:
        parse(data)
    except HostileInput as error:
        assert error.slug.isupper()  # noqa: PT017 - most inputs raise, some do not; both are fine
        assert error.message.isprintable()  # noqa: PT017


@st.composite
def mutated(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """Real documents with bytes replaced, cut out, doubled or inserted."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 4))
        piece = st.sampled_from([b'"', b"\\", b",", b"[", b"{", b"}", b"null", b"1", b"\x1e", b"\n", b"0" * 64])
        data[at : at + length] = draw(st.binary(max_size=4) | piece)
    return bytes(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@PARSERS
def test_random_bytes_never_escape_the_error_tree(parse: Callable[[bytes], object]) -> None:
    @settings(max_examples=150, deadline=None)
    @given(st.binary(max_size=300) | st.binary(max_size=100).map(lambda tail: b"\x1e" + tail + b"\n"))
    def run(data: bytes) -> None:
        refused_or_read(parse, data)

    run()


@PARSERS
def test_other_json_never_escapes_the_error_tree(parse: Callable[[bytes], object]) -> None:
    @settings(max_examples=150, deadline=None)
    @given(JSON)
    def run(value: object) -> None:
        data = json.dumps(value).encode()
        refused_or_read(parse, data)
        refused_or_read(parse, b"\x1e" + data + b"\n")

    run()


@PARSERS
def test_mutated_documents_never_escape_the_error_tree(parse: Callable[[bytes], object]) -> None:
    @settings(max_examples=300, deadline=None)
    @given(mutated(SEEDS[parse]))
    def run(data: bytes) -> None:
        refused_or_read(parse, data)

    run()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=500) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_make_the_verifier_raise(data: bytes) -> None:
    assert not refused_or_genuine(data).accepted


@settings(max_examples=300, deadline=None)
@given(mutated((GENUINE_FILE,)))
def test_altered_bytes_are_never_accepted_with_another_meaning(data: bytes) -> None:
    refused_or_genuine(data)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(GENUINE_FILE) - 1))
def test_no_beginning_of_a_bundle_is_accepted(size: int) -> None:
    assert not refused_or_genuine(GENUINE_FILE[:size]).accepted


Path = tuple[str | int, ...]


def places(value: object, path: Path = ()) -> list[Path]:
    """Paths of all values inside a JSON document."""
    found = [path] if path else []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in entries:
        found += places(child, (*path, key))
    return found


DOCUMENT = json.loads(GENUINE_FILE)
OTHER_DOCUMENT = json.loads(OTHER.encode())
PLACES = places(DOCUMENT)


def parent(document: Any, path: Path) -> Any:
    for key in path[:-1]:
        document = document[key]
    return document


@st.composite
def mutated_document(draw: st.DrawFn) -> bytes:
    """The genuine document with one or two values removed, retyped, edited inside or taken from elsewhere."""
    document = json.loads(GENUINE_FILE)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(PLACES))
        try:
            holder = parent(document, path)
            value = holder[path[-1]]
        except (KeyError, IndexError, TypeError):
            continue  # the first change took it away
        if not isinstance(holder, dict | list):
            continue
        how = draw(st.sampled_from(["remove", "retype", "unknown", "edit", "elsewhere", "other"]))
        if how == "remove":
            del holder[path[-1]]
        elif how == "retype":
            holder[path[-1]] = draw(JSON)
        elif how == "unknown" and isinstance(value, dict):
            value[draw(st.text(max_size=8))] = draw(JSON)
        elif how == "edit" and isinstance(value, str):
            holder[path[-1]] = draw(edited(value))
        elif how == "elsewhere":
            source = draw(st.sampled_from(PLACES))
            holder[path[-1]] = deepcopy(parent(DOCUMENT, source)[source[-1]])
        else:
            try:
                holder[path[-1]] = deepcopy(parent(OTHER_DOCUMENT, path)[path[-1]])
            except (KeyError, IndexError):
                del holder[path[-1]]
    return json.dumps(document).encode()


@st.composite
def edited(draw: st.DrawFn, value: str) -> str:
    """Other bytes under the same encoding, hex or base64."""
    is_hex = len(value) % 2 == 0 and all(char in "0123456789abcdef" for char in value)
    try:
        data = bytes.fromhex(value) if is_hex else base64.b64decode(value, validate=True)
    except ValueError:
        return value + "x"
    changed = draw(mutated((data,)))
    return changed.hex() if is_hex else strictjson.b64(changed)


@settings(max_examples=500, deadline=None)
@given(mutated_document())
def test_an_altered_document_is_never_accepted_with_another_meaning(data: bytes) -> None:
    refused_or_genuine(data)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(PLACES), st.data())
def test_a_key_given_twice_is_never_accepted(path: Path, data: st.DataObject) -> None:
    """Written twice with the same value, with another, or with that of the other bundle."""
    key = path[-1]
    if not isinstance(key, str):
        return
    value = parent(DOCUMENT, path)[key]
    second = data.draw(st.sampled_from([value, None, "", 0]))
    head = f"{json.dumps(key)}:{json.dumps(value, sort_keys=True, separators=(',', ':'))}".encode()
    assert head in GENUINE_FILE
    doubled = GENUINE_FILE.replace(head, head + f",{json.dumps(key)}:{json.dumps(second)}".encode(), 1)
    result = verify_evidence(doubled, FULL_PARTY)
    assert result.refusal is not None
    assert result.refusal.slug == "DUPLICATE_KEY"


PARTS = [field.name for field in fields(Bundle)]


@pytest.mark.parametrize("other", [OTHER, SAME_BATCH], ids=["another VM", "same batch"])
def test_parts_of_two_genuine_bundles_make_no_third(other: Bundle) -> None:
    assert verify_evidence(other.encode(), FULL_PARTY).accepted

    @settings(max_examples=300, deadline=None)
    @given(st.sets(st.sampled_from(PARTS)))
    def run(taken: set[str]) -> None:
        mixed = replace(GENUINE, **{name: getattr(other, name) for name in taken})
        refused_or_genuine(mixed.encode())

    run()


@pytest.mark.parametrize("part", PARTS)
def test_every_part_belongs_to_its_bundle(part: str) -> None:
    """One part of another VM's evidence: refused, unless both VMs share it or nothing rests on it."""
    mixed = replace(GENUINE, **{part: getattr(OTHER, part)})
    shared = getattr(OTHER, part) == getattr(GENUINE, part)
    assert verify_evidence(mixed.encode(), FULL_PARTY).accepted == shared
    assert not shared or part in {"ek_certificates", "boot_log", "systemd_log"}


def facts(result: EvidenceResult) -> tuple[object, ...]:
    return (
        result.statement,
        result.manifest,
        dict(result.registers),
        result.secure_boot,
        result.boot_log,
        result.records,
        result.endorsement.kind if result.endorsement else None,
        None if result.gpus is None else [device.facts for device in result.gpus.devices],
        result.simulated,
    )


def _bent(**changed: Any) -> bytes:
    """The genuine bundle file with parts exchanged and nothing signed anew."""
    return replace(GENUINE, **changed).encode()


class TestUnsigned:
    """All that can change in an accepted bundle; none of it changes what the verdict says of the machine."""

    FACTS = facts(verify_evidence(GENUINE_FILE, FULL_PARTY))

    def accepted(self, data: bytes) -> None:
        result = verify_evidence(data, FULL_PARTY)
        assert result.accepted, result.refusal
        assert facts(result) == self.FACTS

    def test_white_space_and_the_order_of_keys(self) -> None:
        document = {key: DOCUMENT[key] for key in reversed(DOCUMENT)}
        self.accepted(json.dumps(document, indent=3).encode())

    @pytest.mark.parametrize("certificates", [(b"",), (b"not even DER",), (GENUINE.platform_ak_certificate,) * 4])
    def test_ek_certificates_are_for_information(self, certificates: tuple[bytes, ...]) -> None:
        self.accepted(_bent(ek_certificates=certificates))

    def test_a_platform_ak_is_certified_by_its_key_and_not_by_its_description(self) -> None:
        self.accepted(_bent(platform_ak=replace(PLATFORM_AK, policy=b"p" * 32).public()))
        self.accepted(_bent(platform_ak=PLATFORM_AK.public(pinned=False)))

    def test_another_good_certificate_of_the_same_key_is_as_good(self) -> None:
        again = ROOT.issue(PLATFORM_AK.key.public_key(), "platform AK").public_bytes(Encoding.DER)
        self.accepted(_bent(platform_ak_certificate=again + bytes(8)))

    def test_a_certificate_can_be_left_out_where_the_name_is_pinned(self) -> None:
        party = replace(FULL_PARTY, pinned_names=frozenset({name_of(PLATFORM_AK)}))
        result = verify_evidence(_bent(platform_ak_certificate=None), party)
        assert result.endorsement is not None
        assert result.endorsement.pinned

    def test_the_certificates_beside_a_hardware_report_speak_for_themselves(self) -> None:
        assert GENUINE.platform is not None
        leaf, *others = GENUINE.platform.certificates
        again = AMD.leaf().vcek.certificate.public_bytes(Encoding.DER)
        assert again != leaf
        for certificates in ((*others, leaf), (leaf, *others, leaf), (again, *others)):
            self.accepted(_bent(platform=replace(GENUINE.platform, certificates=certificates)))

    def test_keys_in_either_of_their_tpm_forms(self) -> None:
        self.accepted(_bent(agent_ak=tpm2b(AGENT_AK.public()), platform_ak=tpm2b(PLATFORM_AK.public())))

    def test_signatures_in_another_form(self) -> None:
        """ECDSA has two signatures for each, and a bare PKCS#1 signature says the same as a framed one."""
        quote, certification = GENUINE.quote, GENUINE.agent_ak_certify
        r, s = decode_dss_signature(parse_signature(quote.signature).signature)
        order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
        twin = u16(ALG_ECDSA) + u16(0x000B) + tpm2b(r.to_bytes(32, "big")) + tpm2b((order - s).to_bytes(32, "big"))
        assert isinstance(PLATFORM_AK.key, rsa.RSAPrivateKey)
        self.accepted(_bent(quote=replace(quote, signature=twin)))
        self.accepted(_bent(agent_ak_certify=replace(certification, signature=certification.signature[6:])))

    def test_nothing_else(self) -> None:
        """What ``meaning`` leaves out is exactly what the tests above change."""
        kept = {"statement", "manifest", "leaf_index", "inclusion_path", "pcrs", "agent_ak", "platform_ak"}
        kept |= {"boot_log", "systemd_log", "agent_log", "quote", "agent_ak_certify", "gpus"}
        assert set(PARTS) - kept == {"ek_certificates", "platform_ak_certificate", "platform"}
        assert parse_bundle(GENUINE_FILE).boot_log == AZURE_LOG
