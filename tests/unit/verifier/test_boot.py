"""The story of recorded boots: what is told, on which events it rests, and what is under a digest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.boot import BootStory, Statement, boot_story, secure_boot
from cgpu_agent.verifier.eventproof import prove
from cgpu_agent.verifier.explain_boot import best_bank, to_json
from cgpu_agent.wire.eventlog import EventLog, parse
from fixtures.eventlogs import EV_EVENT_TAG, EV_IPL, header, raw_record, record, separator, u32


def load(vectors: Path, name: str) -> EventLog:
    return parse((vectors / "vm-boot" / name / "binary_bios_measurements").read_bytes())


@pytest.fixture(scope="module")
def uki(vectors: Path) -> EventLog:
    return load(vectors, "uki-secboot-crb")


@pytest.fixture(scope="module")
def grub(vectors: Path) -> EventLog:
    return load(vectors, "shim-grub-ms-secboot")


def stage(story: BootStory, name: str) -> tuple[Statement, ...]:
    return next((each.statements for each in story.stages if each.name == name), ())


def test_concludes_secure_boot_of_the_uki(uki: EventLog) -> None:
    found = secure_boot(uki, "sha256")
    assert (found.state, found.event, found.separator) == ("enabled", 4, 9)
    for database, subject in ((found.pk, "PK"), (found.kek, "KEK"), (found.db, "db")):
        assert database is not None
        assert [each.subject for each in database.certificates] == [f"CN=cgpu test {subject}"]
    assert found.dbx is not None
    assert (found.dbx.certificates, found.dbx.hashes) == ((), 1)
    assert [(each.variable, each.event, each.proven) for each in found.authorities] == [("db", 22, True)]
    assert found.db is not None
    assert found.authorities[0].certificate == found.db.certificates[0]
    assert found.warnings == ()


def test_concludes_the_authorities_of_shim_and_grub(grub: EventLog) -> None:
    found = secure_boot(grub, "sha256")
    assert found.state == "enabled"
    names = [(each.variable, each.certificate and each.certificate.subject) for each in found.authorities]
    assert [name for name, _ in names] == ["db", "SbatLevel", "MokListRT"]
    assert "Microsoft Corporation UEFI CA 2011" in str(names[0][1])
    assert names[2][1] == "CN=Debian Secure Boot CA"
    assert found.authorities[1].text is not None
    assert found.authorities[1].text.startswith("sbat,1,2025021800")


def test_a_certificate_digest_is_that_of_the_der(grub: EventLog) -> None:
    found = secure_boot(grub, "sha256")
    assert found.db is not None
    event = grub.events[found.db.event]
    assert any(
        hashlib.sha256(event.data[start:]).hexdigest() == found.db.certificates[-1].sha256
        for start in range(len(event.data))
    )


@pytest.mark.parametrize("name", ["uki-secboot-crb", "shim-grub-ms-secboot"])
def test_tells_every_measured_event(vectors: Path, name: str) -> None:
    log = load(vectors, name)
    story = boot_story(log, "sha256")
    told = {index for each in story.stages for statement in each.statements for index in statement.events}
    assert told == {event.index for event in log.events if event.measured}
    assert stage(story, "other") == ()


def test_tells_the_stages_of_the_uki_in_the_order_of_a_boot(uki: EventLog) -> None:
    assert [each.name for each in boot_story(uki, "sha256").stages] == [
        "firmware",
        "secure-boot",
        "boot-order",
        "disk",
        "loader-chain",
        "uki",
        "command-line",
        "initrd",
        "exit-boot-services",
    ]


def test_names_the_loader_chain_of_the_uki(uki: EventLog) -> None:
    chain = stage(boot_story(uki, "sha256"), "loader-chain")
    assert [each.text for each in chain if each.digested] == ["Calling EFI Application from Boot Option."]
    (image,) = (each for each in chain if not each.digested)
    assert image.data["role"] == "uki"
    assert str(image.data["path"]).endswith("\\EFI\\BOOT\\BOOTX64.EFI")


def test_names_the_loader_chain_of_shim_and_grub(grub: EventLog) -> None:
    chain = stage(boot_story(grub, "sha256"), "loader-chain")
    images = [each for each in chain if "role" in each.data]
    assert [each.data["role"] for each in images] == ["shim", "grub", "kernel", "kernel"]
    assert images[1].data["named_by"] == "named by its path"
    assert images[2].data["digest"] == images[3].data["digest"]
    assert not any(each.digested for each in images)


def test_pairs_the_sections_of_the_uki_with_their_contents(uki: EventLog) -> None:
    sections = stage(boot_story(uki, "sha256"), "uki")
    assert [each.data["section"] for each in sections] == [".linux", ".osrel", ".cmdline", ".initrd"]
    assert sections[0].events == (25, 26)
    assert str(sections[3].data["digest"]).startswith("b1941ed9")


def test_ties_the_initrd_to_the_section_it_came_from(uki: EventLog) -> None:
    (found,) = stage(boot_story(uki, "sha256"), "initrd")
    assert found.events == (32, 34)
    assert not found.digested


def test_tells_grubs_ten_texts(grub: EventLog) -> None:
    story = boot_story(grub, "sha256")
    texts = [each for each in stage(story, "grub") if "label" in each.data]
    (line,) = stage(story, "command-line")
    assert len(texts) + 1 == 10
    assert all(each.digested for each in texts)
    assert line.digested
    assert str(line.data["cmdline"]).startswith("/vmlinuz root=LABEL=root rw")


def test_a_file_name_is_not_proven_by_its_contents_digest(grub: EventLog) -> None:
    files = [each for each in stage(boot_story(grub, "sha256"), "grub") if "file" in each.data]
    assert [each.data["file"] for each in files] == ["(hd0,gpt1)/EFI/debian/grub.cfg", "/vmlinuz", "/initrd.img"]
    assert not any(each.digested for each in files)


def test_a_boot_entry_is_not_proven_but_its_value_is(uki: EventLog) -> None:
    entries = stage(boot_story(uki, "sha256"), "boot-order")
    assert entries[0].data["boot_order"] == "Boot0001, Boot0000, Boot0002"
    assert all(each.data["value_proven"] and not each.digested for each in entries)


def test_tells_the_disk_and_the_hand_over(uki: EventLog) -> None:
    story = boot_story(uki, "sha256")
    (disk,) = stage(story, "disk")
    assert disk.digested
    assert disk.data == {"disk": "5bc4e1a4-0000-4000-8000-000000000001", "partitions": 2}
    assert [each.events for each in stage(story, "exit-boot-services")] == [(35,), (36,)]


def test_says_when_no_kernel_was_handed_over_to() -> None:
    (found,) = stage(boot_story(parse(header() + separator(5)), "sha256"), "exit-boot-services")
    assert not found.digested
    assert found.events == ()


LINE = "/vmlinuz root=/dev/sda1"


def command_line(*records: bytes) -> Statement:
    return stage(boot_story(parse(header() + b"".join(records)), "sha256"), "command-line")[0]


def labelled(label: str, text: str) -> bytes:
    return record(8, EV_IPL, f"{label}: {text}\0".encode(), payload=text.encode())


def test_a_command_line_needs_a_second_digest() -> None:
    alone = command_line(labelled("kernel_cmdline", LINE))
    assert not alone.digested
    assert command_line(labelled("grub_cmd", f"linux {LINE}"), labelled("kernel_cmdline", LINE)).digested


def test_the_kernels_own_load_options_prove_a_command_line() -> None:
    tag = u32(0x8F3B22ED) + u32(26) + b"LOADED_IMAGE::LoadOptions\0"
    options = record(9, EV_EVENT_TAG, tag, payload=f"BOOT_IMAGE={LINE}".encode("utf-16-le"))
    found = command_line(labelled("kernel_cmdline", LINE), options)
    assert (found.digested, found.events) == (True, (1, 2))
    other = record(9, EV_EVENT_TAG, tag, payload=f"BOOT_IMAGE={LINE} x".encode("utf-16-le"))
    assert not command_line(labelled("kernel_cmdline", LINE), other).digested


def test_escapes_what_could_steer_a_terminal() -> None:
    evil = "echo \x1b]0;owned\x07\u202e"
    story = boot_story(parse(header() + labelled("grub_cmd", evil)), "sha256")
    texts = [each.text for one in story.stages for each in one.statements]
    assert any("\\u001b]0;owned\\u0007\\u202e" in text for text in texts)
    assert all(text.isprintable() for text in texts)


@pytest.mark.parametrize(
    ("data", "payload", "form"),
    [
        (b"abc", b"abc", "data"),
        (b"abc\0", b"abc", "data-but-last-byte"),
        (b"grub_cmd: abc\0", b"abc", "labelled-text"),
        (b"grub_cmd abc\0x", b"abc\0", "labelled-text"),
        (".osrel\0".encode("utf-16-le"), b".osrel\0", "name"),
    ],
)
def test_finds_what_a_digest_covers(data: bytes, payload: bytes, form: str) -> None:
    event = parse(header() + record(8, EV_IPL, data, payload=payload)).events[1]
    proof = prove(event, "sha256")
    assert proof is not None
    assert (proof.form, proof.proven) == (form, payload)


def test_proves_nothing_of_other_data_or_in_another_bank() -> None:
    event = parse(header() + record(8, EV_IPL, b"abc", payload=b"abd")).events[1]
    assert prove(event, "sha256") is None
    assert prove(event, "sha1") is None


def test_refuses_a_story_from_a_bank_that_the_log_has_not_got(uki: EventLog) -> None:
    for tell in (boot_story, secure_boot):
        with pytest.raises(HostileInput, match="MISSING_BANK"):
            tell(uki, "sha1")


def test_writes_json_with_every_register_and_event(uki: EventLog) -> None:
    found = json.loads(json.dumps(to_json(uki)))
    assert found["pcrs"]["sha256"]["0"].startswith("3e3b7798")
    assert found["secure_boot"] == found["secure_boot_detail"]["state"] == "enabled"
    assert found["secure_boot_detail"]["db"]["certificates"][0]["subject"] == "CN=cgpu test db"
    assert len(found["events"]) == 37
    assert found["events"][4]["proof"] == "data"
    assert found["events"][24]["proof"] is None
    assert found["unreplayed_banks"] == []
    assert "rtmrs" not in found


def test_json_of_a_ccel_also_counts_registers_as_rtmrs() -> None:
    found = to_json(parse(header(("sha384",), pcr=1) + separator(2, ("sha384",)) + b"\xff" * 8))
    assert found["padding"] == 8
    assert list(found["rtmrs"]["sha384"]) == ["1"]  # type: ignore[index]
    assert list(found["pcrs"]["sha384"]) == ["2"]  # type: ignore[index]


def test_json_of_a_log_that_cannot_be_computed_says_so() -> None:
    data = header((), extra=[(0x12, 32)]) + raw_record(0, 4, [(0x12, bytes(32))], b"")
    log = parse(data)
    assert best_bank(log) is None
    found = to_json(log)
    assert (found["secure_boot"], found["secure_boot_detail"], found["stages"]) == ("unknown", None, None)
    assert found["unreplayed_banks"] == ["alg-0x0012"]
