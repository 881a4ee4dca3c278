"""Replay against PCRs read in recorded VMs, and every status a comparison can give."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.replay import EXIT_BOOT_SERVICES, PHASE_WORDS, PcrResult, compare, replay, startup_locality
from cgpu_agent.wire.eventlog import EventLog, parse
from cgpu_agent.wire.tpm import extend
from fixtures.eventlogs import (
    EV_ACTION,
    EV_IPL,
    again,
    header,
    legacy_record,
    pcr_values,
    raw_record,
    record,
    separator,
    u32,
)

EXITS = [record(5, EV_ACTION, text) for text in EXIT_BOOT_SERVICES]


class Recording:
    def __init__(self, folder: Path) -> None:
        self.data = (folder / "binary_bios_measurements").read_bytes()
        self.log = parse(self.data)
        self.pcrs = pcr_values(folder / "pcrs.sha256.bin")


@pytest.fixture(scope="module")
def uki(vectors: Path) -> Recording:
    return Recording(vectors / "vm-boot" / "uki-secboot-crb")


@pytest.fixture(scope="module")
def grub(vectors: Path) -> Recording:
    return Recording(vectors / "vm-boot" / "shim-grub-ms-secboot")


def rewrite(log: EventLog, order: list[int]) -> bytes:
    return header() + b"".join(again(log.events[index]) for index in order)


def after(value: bytes, *texts: bytes) -> bytes:
    for text in texts:
        value = extend("sha256", value, hashlib.sha256(text).digest())
    return value


def check(data: bytes, actual: dict[int, bytes]) -> dict[int, PcrResult]:
    return compare(replay(parse(data), "sha256"), actual)


def slug_of(data: bytes, bank: str = "sha256") -> str:
    with pytest.raises(HostileInput) as refusal:
        replay(parse(data), bank)
    return refusal.value.slug


def test_replays_the_uki_boot(uki: Recording) -> None:
    found = replay(uki.log, "sha256").pcrs
    assert found[0].hex().startswith("3e3b7798")
    assert found[4].hex().startswith("ba4634d6")
    assert found[7].hex().startswith("d7958b64")
    assert found[11].hex().startswith("96df6a12")
    assert sorted(found) == [*range(8), 9, 11]


def test_explains_the_uki_boot_but_not_ima(uki: Recording) -> None:
    result = compare(replay(uki.log, "sha256"), uki.pcrs)
    by_status: dict[str, list[int]] = {}
    for index, each in result.items():
        by_status.setdefault(each.status, []).append(index)
    assert by_status == {
        "explained": [*range(8), 9, 11],
        "unexplained": [10],
        "untouched": [8, *range(12, 24)],
    }
    assert result[11].exception == "systemd-phases"
    assert result[11].note.endswith("sysinit, ready")
    assert "IMA" in result[10].note
    assert all(result[index].exception is None for index in result if index != 11)


def test_explains_the_grub_boot_but_not_ima(grub: Recording) -> None:
    result = compare(replay(grub.log, "sha256"), grub.pcrs)
    assert [index for index, each in result.items() if each.status == "unexplained"] == [10]
    assert [index for index, each in result.items() if each.status == "explained"] == [*range(10), 14]
    assert result[11].status == "untouched"
    assert all(each.status != "mismatch" for each in result.values())


def test_refuses_a_flipped_digest_byte(uki: Recording) -> None:
    data = bytearray(uki.data)
    at = uki.data.index(uki.log.events[24].digests[0][1])
    data[at] ^= 1
    result = check(bytes(data), uki.pcrs)
    assert [index for index, each in result.items() if each.status == "mismatch"] == [4]


def test_refuses_a_log_without_its_last_record(uki: Recording) -> None:
    result = check(rewrite(uki.log, list(range(1, 36))), uki.pcrs)
    assert [index for index, each in result.items() if each.status == "mismatch"] == [5]


def test_refuses_two_swapped_records(uki: Recording) -> None:
    order = list(range(1, 37))
    order[4], order[5] = order[5], order[4]
    result = check(rewrite(uki.log, order), uki.pcrs)
    assert [index for index, each in result.items() if each.status == "mismatch"] == [7]


def test_refuses_the_pcrs_of_another_boot(uki: Recording, grub: Recording) -> None:
    result = compare(replay(uki.log, "sha256"), grub.pcrs)
    assert {index for index, each in result.items() if each.status == "mismatch"} >= {0, 4, 7, 9, 11}


def test_never_extends_a_no_action_record(uki: Recording) -> None:
    data = uki.data + record(0, 3, b"note") + record(7, 3, b"\1")
    assert replay(parse(data), "sha256").pcrs == replay(uki.log, "sha256").pcrs


@pytest.mark.parametrize("locality", [0, 3, 4])
def test_starts_pcr_0_at_the_startup_locality(locality: int) -> None:
    data = header() + record(0, 3, b"StartupLocality\0" + bytes([locality])) + separator(0) + separator(1)
    found = replay(parse(data), "sha256")
    assert found.locality == locality
    assert found.pcrs == {0: after(bytes(31) + bytes([locality]), bytes(4)), 1: after(bytes(32), bytes(4))}


def test_a_locality_without_events_leaves_pcr_0_untouched() -> None:
    log = parse(legacy_record(0, 3, b"StartupLocality\0\3", bytes(20)))
    found = replay(log, "sha1")
    assert found.pcrs == {}
    assert compare(found, {0: bytes(19) + b"\3"})[0].status == "untouched"
    assert compare(found, {0: bytes(20)})[0].status == "mismatch"


LOCALITY = b"StartupLocality\0\3"


@pytest.mark.parametrize(
    "records",
    [
        [separator(0), record(0, 3, LOCALITY)],
        [record(0, 3, LOCALITY), record(0, 3, LOCALITY)],
        [record(0, 3, LOCALITY), record(0, 3, b"StartupLocality\0\0")],
        [record(1, 3, LOCALITY)],
        [record(0, 3, b"StartupLocality\0\1")],
    ],
    ids=["late", "twice", "contradicted", "in PCR 1", "no such locality"],
)
def test_refuses_a_startup_locality_out_of_place(records: list[bytes]) -> None:
    assert slug_of(header() + b"".join(records)) == "BAD_LOCALITY"


def test_a_measured_event_cannot_state_a_locality() -> None:
    assert startup_locality(parse(header() + record(0, 8, LOCALITY) + separator(0))) == 0


def test_refuses_a_bank_that_an_event_lacks_or_nobody_can_compute() -> None:
    data = header(("sha1", "sha256")) + record(0, 4, banks=("sha256",))
    assert slug_of(data, "sha1") == "MISSING_BANK"
    assert slug_of(data, "sha512") == "MISSING_BANK"
    odd = header(extra=[(0x12, 32)]) + raw_record(0, 4, [(0x0B, bytes(32)), (0x12, bytes(32))], b"")
    assert slug_of(odd, "alg-0x0012") == "UNKNOWN_ALGORITHM"


@pytest.mark.parametrize(
    "words", [PHASE_WORDS[:n] for n in range(1, 7)] + [PHASE_WORDS[2 : 2 + n] for n in range(1, 5)]
)
def test_explains_pcr_11_by_any_known_prefix_of_phase_words(words: tuple[str, ...]) -> None:
    data = header() + record(11, EV_IPL, b"x")
    result = check(data, {11: after(bytes(32), b"x", *(word.encode() for word in words))})[11]
    assert (result.status, result.exception) == ("explained", "systemd-phases")
    assert result.note.endswith(", ".join(words))


@pytest.mark.parametrize(
    "words",
    [
        [b"ready"],
        [b"sysinit", b"final"],
        [b"leave-initrd", b"sysinit"],
        [b"sysinit", b"ready", b"anything"],
        [b"enter-initrd", b"sysinit"],
    ],
)
def test_refuses_other_words_in_pcr_11(words: list[bytes]) -> None:
    data = header() + record(11, EV_IPL, b"x")
    result = check(data, {11: after(bytes(32), b"x", *words)})[11]
    assert (result.status, result.exception) == ("mismatch", None)


def test_does_not_bless_phase_words_without_a_stub() -> None:
    result = check(header() + separator(0), {11: after(bytes(32), b"sysinit", b"ready")})[11]
    assert result.status == "unexplained"


def test_allows_exactly_the_two_exit_events_that_a_log_lacks() -> None:
    data = header() + separator(5)
    result = check(data, {5: after(bytes(32), bytes(4), *EXIT_BOOT_SERVICES)})[5]
    assert (result.status, result.exception) == ("explained", "exit-boot-services-not-logged")
    for texts in ([EXIT_BOOT_SERVICES[0]], EXIT_BOOT_SERVICES[::-1], [*EXIT_BOOT_SERVICES, b"more"]):
        assert check(data, {5: after(bytes(32), bytes(4), *texts)})[5].status == "mismatch"


def test_does_not_add_exit_events_to_a_log_that_has_one() -> None:
    data = header() + separator(5) + EXITS[0]
    actual = after(bytes(32), bytes(4), EXIT_BOOT_SERVICES[0], *EXIT_BOOT_SERVICES)
    assert check(data, {5: actual})[5].status == "mismatch"


@pytest.mark.parametrize("index", [*range(10), 12, 14])
def test_a_firmware_pcr_that_differs_is_a_mismatch_with_and_without_events(index: int) -> None:
    other = b"\x55" * 32
    assert check(header() + separator(index), {index: other})[index].status == "mismatch"
    assert check(header(), {index: other})[index].status == "mismatch"


@pytest.mark.parametrize("index", [10, 13, 15, 16, 23])
def test_a_pcr_that_user_space_extends_is_unexplained_with_a_note(index: int) -> None:
    result = check(header(), {index: b"\x55" * 32})[index]
    assert result.status == "unexplained"
    assert result.note


@pytest.mark.parametrize("index", range(17, 23))
def test_pcrs_of_a_dynamic_launch_are_untouched_only_when_all_ones(index: int) -> None:
    assert check(header(), {index: b"\xff" * 32})[index].status == "untouched"
    assert check(header(), {index: bytes(32)})[index].status == "unexplained"


def test_says_so_when_no_value_was_given() -> None:
    result = check(header() + separator(0) + separator(7), {0: after(bytes(32), bytes(4))})
    assert {index: each.status for index, each in result.items()} == {0: "explained", 7: "uncompared"}


@pytest.mark.parametrize("actual", [{24: bytes(32)}, {-1: bytes(32)}, {0: bytes(20)}, {0: b""}])
def test_refuses_values_that_are_no_pcrs(actual: dict[int, bytes]) -> None:
    with pytest.raises(HostileInput, match="BAD_VALUE"):
        check(header(), actual)


def test_compares_the_registers_of_a_tdx_guest() -> None:
    bank = ("sha384",)
    log = parse(header(bank, pcr=1) + separator(1, bank) + separator(3, bank) + b"\xff" * 9)
    found = replay(log, "sha384")
    value = extend("sha384", bytes(48), hashlib.sha384(bytes(4)).digest())
    result = compare(found, {1: value, 2: bytes(48), 3: bytes(48), 4: value})
    assert [result[index].status for index in (1, 2, 3, 4)] == [
        "explained",
        "untouched",
        "unexplained",
        "unexplained",
    ]
    assert compare(found, {1: bytes(48)})[1].status == "mismatch"
    assert "RTMR0" in compare(found, {1: bytes(48)})[1].note
    with pytest.raises(HostileInput, match="BAD_VALUE"):
        compare(found, {0: bytes(48)})


def test_refuses_a_startup_locality_in_a_ccel() -> None:
    data = header(("sha384",), pcr=1) + record(1, 3, LOCALITY, banks=("sha384",))
    assert slug_of(data, "sha384") == "BAD_LOCALITY"


def test_a_bounded_event_size_is_refused_before_anything_is_replayed(uki: Recording) -> None:
    with pytest.raises(HostileInput, match="TRUNCATED"):
        parse(uki.data[:-4] + u32(0xFFFFFFFF) + b"tail")
