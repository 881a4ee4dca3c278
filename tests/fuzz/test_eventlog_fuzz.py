"""Arbitrary and mutated logs: a typed refusal or a result, and no changed byte of a real log goes unnoticed."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.boot import BootStory, boot_story
from cgpu_agent.verifier.explain_boot import to_json
from cgpu_agent.verifier.replay import replay
from cgpu_agent.wire.devicepath import parse_device_path, parse_image_load, parse_load_option
from cgpu_agent.wire.eventlog import EventLog, parse
from cgpu_agent.wire.uefi import (
    parse_firmware_blob,
    parse_gpt,
    parse_signature_lists,
    parse_startup_locality,
    parse_tag,
    parse_variable,
)
from fixtures.eventlogs import header, record

ROOT = Path(__file__).resolve().parents[2]
RECORDINGS = tuple(
    (ROOT / "tests" / "vectors" / "vm-boot" / name / "binary_bios_measurements").read_bytes()
    for name in ("uki-secboot-crb", "shim-grub-ms-secboot")
)
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def everything(data: bytes) -> str:
    """Run the whole road from bytes to JSON; only a typed refusal may stop it, and its message may be shown."""
    try:
        return json.dumps(to_json(parse(data)))
    except HostileInput as refusal:
        return f"{refusal.slug} {refusal.message}"


@FUZZ
@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused_or_understood(data: bytes) -> None:
    assert everything(data).isprintable()


@FUZZ
@given(st.binary(max_size=300), st.sampled_from([("sha256",), ("sha1", "sha256"), ("sha384",)]))
def test_arbitrary_bytes_after_a_header_are_refused_or_understood(data: bytes, banks: tuple[str, ...]) -> None:
    assert everything(header(banks) + data).isprintable()
    assert everything(header(("sha384",), pcr=1) + data).isprintable()


@FUZZ
@given(
    st.sampled_from(RECORDINGS),
    st.lists(st.tuples(st.integers(0, 14065), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, 14066),
)
def test_mutated_recordings_are_refused_or_understood(
    recording: bytes, changes: list[tuple[int, int]], end: int
) -> None:
    data = bytearray(recording)
    for place, value in changes:
        data[place % len(data)] = value
    assert everything(bytes(data[:end]) if end % 3 == 0 else bytes(data)).isprintable()


CONTENT = st.one_of(
    st.binary(max_size=120),
    st.text(max_size=40).map(lambda text: text.encode("utf-16-le", "surrogatepass")),
    st.text(max_size=40).map(lambda text: f"grub_cmd: {text}\0".encode("utf-8", "surrogatepass")),
)


@FUZZ
@given(st.lists(st.tuples(st.integers(0, 23), st.sampled_from([0, 3, 4, 6, 8, 13, 0x80000003]), CONTENT), max_size=8))
def test_well_formed_records_with_odd_contents_are_all_told(events: list[tuple[int, int, bytes]]) -> None:
    data = header() + b"".join(record(pcr, kind, content) for pcr, kind, content in events)
    log = parse(data)
    try:
        replay(log, "sha256")
    except HostileInput:
        return  # a start-up locality out of place
    story = boot_story(log, "sha256")
    told = {index for one in story.stages for each in one.statements for index in each.events}
    assert told == {event.index for event in log.events if event.measured}
    assert all(each.text.isprintable() for one in story.stages for each in one.statements)


@pytest.mark.parametrize(
    "parser",
    [
        parse_device_path,
        parse_image_load,
        parse_load_option,
        parse_firmware_blob,
        parse_gpt,
        parse_signature_lists,
        parse_startup_locality,
        parse_tag,
        parse_variable,
    ],
)
@FUZZ
@given(st.binary(max_size=200))
def test_inner_parsers_refuse_or_understand(parser, data: bytes) -> None:  # type: ignore[no-untyped-def]
    with contextlib.suppress(HostileInput):
        parser(data)


def differing(log: EventLog, other: EventLog) -> list[int]:
    """Indices of events that differ; the two logs have equally many."""
    assert len(log.events) == len(other.events)
    return [a.index for a, b in zip(log.events, other.events, strict=True) if a != b]


def proven_sentences(story: BootStory) -> set[str]:
    """Sentences a digest is said to prove, but for the stage that quotes whatever was not understood."""
    return {each.text for one in story.stages for each in one.statements if each.digested and one.name != "other"}


@pytest.mark.parametrize(
    ("recording", "flip", "stride"),
    [(RECORDINGS[0], 0x01, 1), (RECORDINGS[0], 0x80, 5), (RECORDINGS[1], 0x01, 11)],
    ids=["uki-every-byte", "uki-top-bit", "grub"],
)
def test_no_flipped_byte_of_a_recording_goes_unnoticed(recording: bytes, flip: int, stride: int) -> None:
    log = parse(recording)
    honest, honest_pcrs = boot_story(log, "sha256"), replay(log, "sha256").pcrs
    honest_sentences = proven_sentences(honest)
    outcomes = {"refused": 0, "register": 0, "header": 0, "type": 0, "data": 0}
    for place in range(0, len(recording), stride):
        changed = bytearray(recording)
        changed[place] ^= flip
        try:
            lied = parse(bytes(changed))
            pcrs = replay(lied, "sha256").pcrs
        except HostileInput:
            outcomes["refused"] += 1
            continue
        if pcrs != honest_pcrs:
            outcomes["register"] += 1
            continue
        (index,) = differing(log, lied)
        before, after = log.events[index], lied.events[index]
        assert (before.digests, before.pcr) == (after.digests, after.pcr)
        if index == 0:
            # The Spec ID record is never measured: it says how to read the log, and that changed visibly.
            assert lied.spec != log.spec
            outcomes["header"] += 1
            continue
        story = boot_story(lied, "sha256")
        if before.claimed_type != after.claimed_type:
            assert before.data == after.data
            assert story.secure_boot == honest.secure_boot
            outcomes["type"] += 1
        else:
            assert story.proven == honest.proven - {index}
            assert story.secure_boot.state in (honest.secure_boot.state, "unknown")
            outcomes["data"] += 1
        assert proven_sentences(story) <= honest_sentences
    assert sum(outcomes.values()) == len(range(0, len(recording), stride))
    assert stride > 1 or all(outcomes.values()), outcomes
