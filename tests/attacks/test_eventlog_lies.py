"""A host lies in the event log while the digests stay true. No lie may turn Secure Boot on, or look proven."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from cgpu_agent.verifier.boot import boot_story, secure_boot
from cgpu_agent.verifier.replay import compare, replay
from cgpu_agent.verifier.secureboot import SecureBoot, secure_boot_payload
from cgpu_agent.wire.eventlog import Event, EventLog, parse
from cgpu_agent.wire.uefi import GLOBAL_VARIABLE, IMAGE_SECURITY
from fixtures.eventlogs import (
    EV_ACTION,
    EV_AUTHORITY,
    EV_DRIVER_CONFIG,
    EV_IMAGE,
    EV_IPL,
    EV_SEPARATOR,
    again,
    firmware_part,
    header,
    pcr_values,
    record,
    secure_boot_variable,
    separator,
    variable,
)

ON = secure_boot_variable(b"\1")
OFF = secure_boot_variable(b"\0")


def conclude(*records: bytes) -> SecureBoot:
    return secure_boot(parse(header() + b"".join(records)), "sha256")


def measured(log: EventLog) -> dict[int, bytes]:
    return dict(replay(log, "sha256").pcrs)


@pytest.fixture(scope="module")
def uki(vectors: Path) -> EventLog:
    return parse((vectors / "vm-boot" / "uki-secboot-crb" / "binary_bios_measurements").read_bytes())


@pytest.fixture(scope="module")
def uki_pcrs(vectors: Path) -> dict[int, bytes]:
    return pcr_values(vectors / "vm-boot" / "uki-secboot-crb" / "pcrs.sha256.bin")


def retold(log: EventLog, change: Callable[[Event], bytes]) -> EventLog:
    return parse(header() + b"".join(change(event) for event in log.events[1:]))


def test_honest_logs_are_believed() -> None:
    for value, state in ((b"\1", "enabled"), (b"\0", "disabled"), (b"", "disabled")):
        assert conclude(*firmware_part(value), separator(7)).state == state


@pytest.mark.parametrize("claimed_type", [0, 1, EV_SEPARATOR, EV_IPL, EV_AUTHORITY, EV_ACTION, 0xDEADBEEF])
@pytest.mark.parametrize("value", [b"\0", b"\1"])
def test_a_claimed_type_never_changes_the_verdict(claimed_type: int, value: bytes) -> None:
    honest = conclude(*firmware_part(value), separator(7))
    first, *rest = parse(header() + b"".join([*firmware_part(value), separator(7)])).events[1:]
    lied = conclude(again(first, claimed_type=claimed_type), *(again(event) for event in rest))
    assert (lied.state, lied.reason, lied.event) == (honest.state, honest.reason, honest.event)


@pytest.mark.parametrize("claimed_type", [0, EV_IPL, EV_SEPARATOR, EV_AUTHORITY, EV_DRIVER_CONFIG])
def test_types_of_all_events_of_a_real_boot_may_lie(uki: EventLog, claimed_type: int) -> None:
    lied = retold(uki, lambda event: again(event, claimed_type=claimed_type))
    assert measured(lied) == measured(uki)
    assert secure_boot(lied, "sha256") == secure_boot(uki, "sha256")


def test_hiding_the_off_variable_behind_no_action_changes_the_register() -> None:
    off = [*firmware_part(b"\0"), separator(7)]
    log = parse(header() + b"".join(off))
    hidden = parse(header() + again(log.events[1], claimed_type=3) + record(7, 3, ON) + b"".join(off[1:]))
    assert secure_boot(hidden, "sha256").state == "unknown"
    assert compare(replay(hidden, "sha256"), measured(log))[7].status == "mismatch"


@pytest.mark.parametrize("place", [0, 1, 5, 6])
def test_a_no_action_decoy_is_never_read(place: int) -> None:
    records = [*firmware_part(b"\0"), separator(7)]
    records.insert(place, record(7, 3, ON))
    assert conclude(*records).state == "disabled"
    without = [*firmware_part(b"\1")[1:], separator(7)]
    without.insert(0, record(7, 3, ON))
    assert conclude(*without).state == "unknown"


@pytest.mark.parametrize("second", [ON, OFF, secure_boot_variable(b"")])
@pytest.mark.parametrize("value", [b"\0", b"\1"])
def test_a_second_variable_before_the_separator_makes_it_unknown(second: bytes, value: bytes) -> None:
    records = [*firmware_part(value), record(7, EV_DRIVER_CONFIG, second), separator(7)]
    assert conclude(*records).state == "unknown"


@pytest.mark.parametrize("second", [ON, OFF])
@pytest.mark.parametrize("value", [b"\0", b"\1"])
def test_a_variable_after_the_separator_makes_it_unknown(second: bytes, value: bytes) -> None:
    records = [*firmware_part(value), separator(7), record(7, EV_DRIVER_CONFIG, second)]
    found = conclude(*records)
    assert found.state == "unknown"
    assert "after the separator" in found.reason


def test_a_variable_only_after_the_separator_proves_nothing() -> None:
    found = conclude(*firmware_part()[1:], separator(7), record(7, EV_DRIVER_CONFIG, ON))
    assert found.state == "unknown"


@pytest.mark.parametrize("value", [bytes(4), b"\xff" * 4])
def test_duplicate_separators_make_it_unknown(value: bytes) -> None:
    found = conclude(*firmware_part(), separator(7), record(7, EV_SEPARATOR, value))
    assert found.state == "unknown"
    assert "duplicate separator" in found.reason


def test_a_second_separator_cannot_hide_behind_another_type_or_other_data() -> None:
    hidden = record(7, EV_IPL, b"harmless", payload=bytes(4))
    assert conclude(*firmware_part(), separator(7), hidden).state == "unknown"
    first = record(7, EV_IPL, b"harmless", payload=bytes(4))
    found = conclude(*firmware_part(b"\0"), first, record(7, EV_DRIVER_CONFIG, ON), separator(7))
    assert found.state == "unknown"


def test_a_claimed_separator_does_not_move_the_border() -> None:
    fake = record(7, EV_SEPARATOR, bytes(4), payload=b"something else")
    assert conclude(fake, *firmware_part(), separator(7)).state == "unknown"
    assert conclude(*firmware_part(), fake).state == "unknown"


def test_no_separator_makes_it_unknown() -> None:
    assert conclude(*firmware_part()).state == "unknown"


def test_data_that_do_not_match_their_digest_prove_nothing() -> None:
    lie = record(7, EV_DRIVER_CONFIG, ON, payload=OFF)
    found = conclude(lie, *firmware_part()[1:], separator(7))
    assert found.state == "unknown"
    assert "digest" in found.reason


def test_a_true_digest_cannot_be_hidden_by_garbled_data() -> None:
    garbled = record(7, EV_DRIVER_CONFIG, b"nothing to see", payload=OFF)
    records = [garbled, record(7, EV_DRIVER_CONFIG, ON), *firmware_part()[1:], separator(7)]
    found = conclude(*records)
    assert found.state == "unknown"
    assert "2 times" in found.reason


def test_an_unproven_event_before_the_separator_makes_it_unknown() -> None:
    opaque = record(7, EV_DRIVER_CONFIG, b"described", payload=b"measured")
    found = conclude(*firmware_part(), opaque, separator(7))
    assert found.state == "unknown"
    assert "not proven" in found.reason


def test_an_unknown_but_proven_event_before_the_separator_makes_it_unknown() -> None:
    assert conclude(record(7, EV_ACTION, b"Brand New Mode"), *firmware_part(), separator(7)).state == "unknown"


@pytest.mark.parametrize("claimed_type", [EV_ACTION, EV_IPL, EV_DRIVER_CONFIG])
@pytest.mark.parametrize("data", [b"UEFI Debug Mode", b"garbled"])
def test_debug_mode_makes_it_unknown_whatever_the_log_says(claimed_type: int, data: bytes) -> None:
    debug = record(7, claimed_type, data, payload=b"UEFI Debug Mode")
    found = conclude(debug, *firmware_part(), separator(7))
    assert found.state == "unknown"
    assert "debug" in found.reason


def test_missing_dma_protection_is_a_warning() -> None:
    found = conclude(record(7, EV_ACTION, b"DMA Protection Disabled"), *firmware_part(), separator(7))
    assert found.state == "enabled"
    assert any("DMA" in warning for warning in found.warnings)


@pytest.mark.parametrize("value", [b"\2", b"\1\0", b"\0\1", b"\xff"])
def test_an_odd_value_is_neither_on_nor_off(value: bytes) -> None:
    odd = record(7, EV_DRIVER_CONFIG, secure_boot_variable(value))
    assert conclude(odd, *firmware_part()[1:], separator(7)).state == "unknown"


@pytest.mark.parametrize(
    "name_and_guid",
    [("SecureBoot", IMAGE_SECURITY), ("secureboot", GLOBAL_VARIABLE), ("SecureBoot ", GLOBAL_VARIABLE)],
)
def test_a_lookalike_variable_is_not_secure_boot(name_and_guid: tuple[str, object]) -> None:
    name, guid = name_and_guid
    lookalike = variable(guid.bytes_le, name, b"\1")  # type: ignore[attr-defined]
    records = [record(7, EV_DRIVER_CONFIG, lookalike), *firmware_part(b"\0"), separator(7)]
    assert conclude(*records).state == "disabled"
    assert conclude(records[0], *firmware_part()[1:], separator(7)).state == "unknown"


def test_a_value_proven_without_its_name_is_not_secure_boot() -> None:
    # A digest over the value alone would let a host name any one-byte variable SecureBoot.
    renamed = record(7, EV_DRIVER_CONFIG, ON, payload=b"\1")
    assert conclude(renamed, *firmware_part()[1:], separator(7)).state == "unknown"


@pytest.mark.parametrize("pcr", [0, 1, 4, 6, 8, 14, 23])
def test_a_variable_in_another_register_counts_for_nothing(pcr: int) -> None:
    records = [*firmware_part(b"\0"), separator(7), record(pcr, EV_DRIVER_CONFIG, ON)]
    assert conclude(*records).state == "disabled"
    assert conclude(record(pcr, EV_DRIVER_CONFIG, ON), *firmware_part()[1:], separator(7)).state == "unknown"


def test_a_doubled_key_database_makes_it_unknown() -> None:
    extra = record(7, EV_DRIVER_CONFIG, variable(IMAGE_SECURITY.bytes_le, "db", b""))
    assert conclude(*firmware_part(), extra, separator(7)).state == "unknown"


def test_secure_boot_without_any_authority_is_marked() -> None:
    # A kernel given to the virtual machine directly: "on", yet nothing was checked.
    found = conclude(*firmware_part(), separator(7))
    assert found.state == "enabled"
    assert any("no use of an authority" in warning for warning in found.warnings)
    unproven = record(7, EV_AUTHORITY, variable(IMAGE_SECURITY.bytes_le, "db", b"x" * 40), payload=b"y")
    found = conclude(*firmware_part(), separator(7), unproven)
    assert any("no use of an authority" in warning for warning in found.warnings)
    assert [each.proven for each in found.authorities] == [False]


def test_the_digest_of_the_payload_is_what_firmware_measured(uki: EventLog) -> None:
    assert hashlib.sha256(secure_boot_payload(b"\1")).digest() == uki.events[4].digests[0][1]


def tdx(*records: bytes) -> SecureBoot:
    return secure_boot(parse(header(("sha384",), pcr=1) + b"".join(records)), "sha384")


def test_the_register_of_a_tdx_guest_follows_the_same_rules() -> None:
    bank = ("sha384",)
    part = firmware_part(register=1, banks=bank)
    volume = record(1, 0x8000000A, b"described", payload=b"measured", banks=bank)
    assert tdx(volume, *part, separator(1, bank)).state == "enabled"
    assert tdx(volume, *part, separator(1, bank), separator(1, bank)).state == "unknown"
    assert tdx(volume, *part, separator(1, bank), separator(2, bank)).state == "enabled"
    hidden = record(1, EV_IPL, b"ACPI DATA", payload=OFF, banks=bank)
    assert tdx(hidden, *part, separator(1, bank)).state == "unknown"
    debug = record(1, EV_IPL, b"ACPI DATA", payload=b"UEFI Debug Mode", banks=bank)
    assert tdx(debug, *part, separator(1, bank)).state == "unknown"


def test_a_renamed_image_stays_described_and_not_proven(uki: EventLog, uki_pcrs: dict[int, bytes]) -> None:
    def rename(event: Event) -> bytes:
        if event.claimed_type != EV_IMAGE:
            return again(event)
        old, new = "BOOTX64".encode("utf-16-le"), "SHIMX64".encode("utf-16-le")
        assert old in event.data
        return again(event, data=event.data.replace(old, new))

    lied = retold(uki, rename)
    assert compare(replay(lied, "sha256"), uki_pcrs)[4].status == "explained"
    story = boot_story(lied, "sha256")
    image = next(each for one in story.stages for each in one.statements if 24 in each.events)
    assert not image.digested
    assert 24 not in story.proven
    assert "named by its path" in image.text


def test_a_rewritten_boot_string_loses_its_proof(uki: EventLog) -> None:
    lied = retold(uki, lambda event: again(event, data=b"X" + event.data[1:]) if event.index == 14 else again(event))
    story = boot_story(lied, "sha256")
    assert 14 in boot_story(uki, "sha256").proven
    assert 14 not in story.proven


def test_events_appended_after_boot_show_in_the_comparison(uki: EventLog, uki_pcrs: dict[int, bytes]) -> None:
    extended = parse(header() + b"".join(again(event) for event in uki.events[1:]) + record(7, EV_IPL, b"late"))
    assert secure_boot(extended, "sha256").state == "enabled"
    assert compare(replay(extended, "sha256"), uki_pcrs)[7].status == "mismatch"


def test_odd_events_are_told_however_many_there_are() -> None:
    many = [record(7, EV_AUTHORITY, b"", payload=bytes([i % 256])) for i in range(2000)]
    story = boot_story(parse(header() + b"".join(many)), "sha256")
    told = [index for one in story.stages for each in one.statements for index in each.events]
    assert sorted(set(told)) == list(range(1, 2001))
