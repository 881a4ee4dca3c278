"""Structures inside boot events: variables, signature lists, device paths, GPT, tags, and text made safe."""

from __future__ import annotations

import struct
import uuid

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.devicepath import parse_device_path, parse_image_load, parse_load_option
from cgpu_agent.wire.eventtypes import type_name
from cgpu_agent.wire.text import printable, utf8_field, utf16_field
from cgpu_agent.wire.uefi import (
    GLOBAL_VARIABLE,
    SIGNATURE_KINDS,
    parse_firmware_blob,
    parse_gpt,
    parse_signature_lists,
    parse_startup_locality,
    parse_tag,
    parse_variable,
)
from fixtures.eventlogs import u16, u32, u64, variable

END = b"\x7f\xff\x04\x00"
OWNER = uuid.UUID(int=7)
KIND = {name: guid for guid, name in SIGNATURE_KINDS.items()}


def slug_of(parser, data: bytes) -> str:  # type: ignore[no-untyped-def]
    with pytest.raises(HostileInput) as refusal:
        parser(data)
    return refusal.value.slug


def node(kind: int, subtype: int, body: bytes) -> bytes:
    return bytes([kind, subtype]) + u16(len(body) + 4) + body


def file_node(name: str) -> bytes:
    return node(4, 4, name.encode("utf-16-le") + b"\0\0")


def test_reads_a_variable() -> None:
    found = parse_variable(variable(GLOBAL_VARIABLE.bytes_le, "SecureBoot", b"\1"))
    assert (found.guid, found.name, found.data, found.slack) == (GLOBAL_VARIABLE, "SecureBoot", b"\1", 0)


def test_refuses_a_variable_with_wrong_lengths() -> None:
    data = variable(GLOBAL_VARIABLE.bytes_le, "db", b"xy")
    assert slug_of(parse_variable, data[:-1]) == "TRUNCATED"
    assert slug_of(parse_variable, data + b"\0") == "TRAILING_BYTES"
    assert slug_of(parse_variable, data[:16] + b"\xff" * 16) == "TRUNCATED"


def test_allows_only_as_much_slack_as_asked() -> None:
    data = variable(GLOBAL_VARIABLE.bytes_le, "db", b"xy")
    assert parse_variable(data + bytes(6), slack=6).slack == 6
    with pytest.raises(HostileInput):
        parse_variable(data + bytes(7), slack=6)


def test_refuses_a_name_that_hides_something_behind_a_nul() -> None:
    assert slug_of(parse_variable, variable(GLOBAL_VARIABLE.bytes_le, "db\0x", b"")) == "BAD_TEXT"
    lone = GLOBAL_VARIABLE.bytes_le + u64(1) + u64(0) + b"\x00\xd8"
    assert slug_of(parse_variable, lone) == "BAD_TEXT"


def signature_list(kind: str, entries: list[bytes]) -> bytes:
    size = 16 + len(entries[0])
    body = b"".join(OWNER.bytes_le + entry for entry in entries)
    return KIND[kind].bytes_le + u32(28 + len(body)) + u32(0) + u32(size) + body


def test_reads_signature_lists() -> None:
    data = signature_list("x509", [b"DER"]) + signature_list("sha256", [b"\1" * 32, b"\2" * 32])
    found = parse_signature_lists(data)
    assert [(each.kind, each.data) for each in found] == [
        ("x509", b"DER"),
        ("sha256", b"\1" * 32),
        ("sha256", b"\2" * 32),
    ]
    assert {each.owner for each in found} == {OWNER}
    assert parse_signature_lists(b"") == ()


@pytest.mark.parametrize(
    ("list_size", "header_size", "entry_size"),
    [(27, 0, 48), (28 + 48, 0, 0), (28 + 48, 0, 15), (28 + 48, 0, 47), (28 + 48, 49, 48), (0xFFFFFFFF, 0, 16)],
)
def test_refuses_signature_lists_that_do_not_add_up(list_size: int, header_size: int, entry_size: int) -> None:
    data = KIND["sha256"].bytes_le + u32(list_size) + u32(header_size) + u32(entry_size) + bytes(48)
    assert slug_of(parse_signature_lists, data) in ("BAD_VALUE", "TRUNCATED", "TOO_LARGE")


def test_writes_a_device_path_as_uefi_does() -> None:
    guid = uuid.UUID("5bc4e1a4-0000-4000-8000-000000000002")
    disk = node(4, 1, struct.pack("<IQQ16sBB", 1, 0x800, 0x20000, guid.bytes_le, 2, 2))
    pci = node(2, 1, struct.pack("<II", 0x0A0341D0, 0)) + node(1, 1, b"\x00\x02")
    found = parse_device_path(pci + disk + file_node("\\EFI\\BOOT\\BOOTX64.EFI") + END)
    assert found.text == f"PciRoot(0x0)/Pci(0x2,0x0)/HD(1,GPT,{guid},0x800,0x20000)/\\EFI\\BOOT\\BOOTX64.EFI"
    assert found.file == "\\EFI\\BOOT\\BOOTX64.EFI"


def test_joins_a_file_name_split_over_nodes() -> None:
    assert parse_device_path(file_node("\\EFI\\centos") + file_node("grubx64.efi") + END).file == (
        "\\EFI\\centos\\grubx64.efi"
    )


def test_names_nodes_it_does_not_understand() -> None:
    assert parse_device_path(node(9, 9, b"abc") + END).text == "Node(0x09,0x09,3 bytes)"
    assert parse_device_path(node(1, 1, b"abc") + END).text == "Node(0x01,0x01,3 bytes)"


def test_refuses_device_paths_that_are_not_whole() -> None:
    assert slug_of(parse_device_path, b"") == "TRUNCATED"
    assert slug_of(parse_device_path, file_node("a")) == "TRUNCATED"
    assert slug_of(parse_device_path, END + b"\0") == "TRAILING_BYTES"
    assert slug_of(parse_device_path, b"\x01\x01\x03\x00" + END) == "BAD_VALUE"
    assert slug_of(parse_device_path, node(4, 4, b"\0") + END) == "BAD_TEXT"
    assert slug_of(parse_device_path, node(1, 1, b"\0\0") * 65 + END) == "TOO_LARGE"


def test_reads_an_image_load_with_and_without_a_path() -> None:
    path = file_node("\\x") + END
    found = parse_image_load(u64(1) + u64(2) + u64(0) + u64(len(path)) + path)
    assert (found.address, found.length) == (1, 2)
    assert found.path is not None
    assert found.path.file == "\\x"
    assert parse_image_load(u64(1) + u64(2) + u64(0) + u64(0)).path is None
    assert slug_of(parse_image_load, u64(1) + u64(2) + u64(0) + u64(0) + b"stray") == "TRAILING_BYTES"


def test_reads_a_load_option() -> None:
    path = file_node("\\x") + END
    data = u32(1) + u16(len(path)) + "Linux\u0100".encode("utf-16-le") + b"\0\0" + path + b"extra"
    found = parse_load_option(data)
    assert (found.active, found.description, found.optional) == (True, "Linux\u0100", b"extra")
    assert found.path.file == "\\x"
    assert slug_of(parse_load_option, data[:20]) == "TRUNCATED"


def test_reads_both_forms_of_a_firmware_blob() -> None:
    assert parse_firmware_blob(u64(5) + u64(6)).description == ""
    found = parse_firmware_blob(b"\2Fv" + u64(5) + u64(6))
    assert (found.base, found.length, found.description) == (5, 6, "Fv")
    assert slug_of(parse_firmware_blob, b"\2Fv" + u64(5) + u64(6) + b"\0") == "TRAILING_BYTES"


def gpt(count: int, entry_size: int = 128, name: str = "root") -> bytes:
    head = b"EFI PART" + bytes(48) + OWNER.bytes_le + bytes(12) + u32(entry_size) + bytes(4)
    entry = OWNER.bytes_le * 2 + u64(1) + u64(2) + u64(0) + name.encode("utf-16-le").ljust(72, b"\0")
    return head + u64(count) + entry.ljust(entry_size, b"\0") * count


def test_reads_a_partition_table() -> None:
    found = parse_gpt(gpt(2))
    assert found.disk == OWNER
    assert [(part.first, part.last, part.name) for part in found.partitions] == [(1, 2, "root")] * 2


def test_refuses_partition_tables_that_do_not_add_up() -> None:
    assert slug_of(parse_gpt, gpt(1)[:-1]) == "TRUNCATED"
    assert slug_of(parse_gpt, gpt(1) + b"\0") == "TRAILING_BYTES"
    assert slug_of(parse_gpt, b"EFI PARX" + gpt(1)[8:]) == "BAD_VALUE"
    assert slug_of(parse_gpt, gpt(0)[:92] + u64(1 << 60)) == "BAD_VALUE"


def test_reads_one_tag_and_refuses_more() -> None:
    found = parse_tag(u32(9) + u32(2) + b"ab")
    assert (found.id, found.data) == (9, b"ab")
    assert slug_of(parse_tag, u32(9) + u32(3) + b"ab") == "TRUNCATED"
    assert slug_of(parse_tag, u32(9) + u32(1) + b"ab") == "TRAILING_BYTES"


def test_reads_a_startup_locality() -> None:
    assert parse_startup_locality(b"StartupLocality\0\3") == 3
    assert parse_startup_locality(b"SP800-155 Event3") is None
    assert slug_of(parse_startup_locality, b"StartupLocality\0\1") == "BAD_LOCALITY"
    assert slug_of(parse_startup_locality, b"StartupLocality\0") == "TRUNCATED"
    assert slug_of(parse_startup_locality, b"StartupLocality\0\3\3") == "TRAILING_BYTES"


def test_decodes_text_strictly() -> None:
    assert utf16_field("a\0".encode("utf-16-le"), "x") == "a"
    assert utf8_field(b"a\0", "x") == "a"
    for parser, data in ((utf16_field, b"a"), (utf8_field, b"\xff"), (utf8_field, b"a\0b"), (utf8_field, b"\0\0")):
        with pytest.raises(HostileInput, match="BAD_TEXT"):
            parser(data, "x")


def test_makes_text_safe_for_a_terminal() -> None:
    assert printable("a\x1b[31m\u202eb\n") == "a\\u001b[31m\\u202eb\\u000a"
    assert printable("x" * 10, 4) == "xxxx… (10 characters)"


def test_names_event_types_or_gives_the_number() -> None:
    assert type_name(4) == "EV_SEPARATOR"
    assert type_name(0xABCD) == "0x0000abcd"
