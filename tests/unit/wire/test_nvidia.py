"""The opaque fields of NVIDIA's reports: typed, of exact length, each once; unknown ones kept by number."""

from __future__ import annotations

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.nvidia import Field, encode_fields, parse_gpu, parse_switch
from fixtures.gpu import DRIVER, FWID, OFF, ON, SWITCH_BIOS, VBIOS, Vendor

GPU, BLACKWELL, SWITCH = (Vendor().device(chip) for chip in ("GH100", "GB20X", "LS_10"))


def refused(opaque: bytes, *, switch: bool = False) -> str:
    with pytest.raises(HostileInput) as caught:
        (parse_switch if switch else parse_gpu)(opaque)
    return caught.value.slug


def gpu(**changed: bytes | None) -> bytes:
    return encode_fields(GPU.fields(**changed))


def switch(**changed: bytes | None) -> bytes:
    return encode_fields(SWITCH.fields(**changed))


def test_reads_what_a_gpu_says() -> None:
    fields = parse_gpu(gpu())
    assert (fields.driver, fields.vbios, fields.fwid) == (DRIVER, VBIOS, FWID)
    assert (fields.project, fields.project_sku, fields.chip_sku, fields.chip) == ("1010", "0200", "882", None)
    assert (fields.nvdec0, fields.protected_pcie, fields.mode, fields.opaque_version) == (False, False, "spt", 1)
    assert fields.switch_pdis == ()
    assert fields.unknown == {}
    assert parse_gpu(encode_fields(BLACKWELL.fields())).chip == "GB202"


def test_reads_what_a_switch_says() -> None:
    gpus = bytes(range(64))
    fields = parse_switch(switch(SWITCH_GPU_PDIS=gpus + b"\xff" * 64, POSITION_ID=b"\2\0"))
    assert (fields.bios, fields.pdi, fields.position, fields.locked) == (SWITCH_BIOS, SWITCH.pdi, 2, True)
    assert fields.gpu_pdis == tuple(gpus[at : at + 8] for at in range(0, 64, 8))
    assert fields.fwid is None


def test_an_absent_field_is_none_and_not_a_default() -> None:
    fields = parse_gpu(b"")
    assert {fields.driver, fields.vbios, fields.fwid, fields.nvdec0, fields.protected_pcie, fields.mode} == {None}
    assert fields.opaque_version == 0
    assert parse_switch(b"").locked is None


@pytest.mark.parametrize(
    ("raw", "text"),
    [("009f009601000000", "96.00.9F.00.01"), ("0074009620000000", "96.00.74.00.20"), ("0f8800970f000000", None)],
)
def test_firmware_version_is_read_as_nvidia_writes_it(raw: str, text: str | None) -> None:
    found = parse_gpu(gpu(VBIOS_VERSION=bytes.fromhex(raw))).vbios
    assert found == (text or "97.00.88.0F.0F")


def test_padding_of_text_is_dropped() -> None:
    fields = parse_gpu(gpu(CHIP_SKU=b"862\0\0\0\0\0\0", PROJECT_SKU_MOD=b"\0\0"))
    assert fields.chip_sku == "862"


def test_unknown_fields_are_kept_by_number() -> None:
    assert parse_gpu(gpu(field_200=b"x", field_24=b"y")).unknown == {200: b"x", 24: b"y"}
    assert parse_switch(switch(field_3=b"550.90.07\0")).unknown == {3: b"550.90.07\0"}


@pytest.mark.parametrize("field", sorted(GPU.fields()))
def test_refuses_a_gpu_field_that_is_longer_than_it_can_be(field: int) -> None:
    too_long = GPU.fields()[field] + bytes(34 if field in (Field.DRIVER_VERSION, Field.CHIP_INFO) else 1)
    assert refused(gpu(**{Field(field).name: too_long})) == "BAD_FIELD"


@pytest.mark.parametrize("field", sorted(SWITCH.fields()))
def test_refuses_a_switch_field_of_another_length(field: int) -> None:
    name = Field(field).name
    assert refused(switch(**{name: SWITCH.fields()[field][:-1]}), switch=True) == "BAD_FIELD"


@pytest.mark.parametrize(
    "changed",
    [
        {"NVDEC0_STATUS": b"\0"},
        {"PROTECTED_PCIE_STATUS": b"\x01"},
        {"FEATURE_FLAG": b"\3\0"},
        {"FEATURE_FLAG": b"\0\1"},
        {"DRIVER_VERSION": b"550.90.07\0\x1b"},
        {"DRIVER_VERSION": b"550\0"},
        {"DRIVER_VERSION": b"550.90\x2f07\0"},
        {"DRIVER_VERSION": "550.9\u0660".encode() + b"\0"},
        {"DRIVER_VERSION": b"\0\0"},
        {"PROJECT": b"1\x0010\0"},
        {"CHIP_SKU": b"\xff\xff\xff\xff"},
    ],
)
def test_refuses_a_value_that_a_gpu_field_cannot_have(changed: dict[str, bytes]) -> None:
    assert refused(gpu(**changed)) == "BAD_FIELD"


@pytest.mark.parametrize(
    "changed", [{"LOCK_STATUS": b"\2\0"}, {"POSITION_ID": b"\4\0"}, {"VBIOS_VERSION": b"96.10.55.00.0g"}]
)
def test_refuses_a_value_that_a_switch_field_cannot_have(changed: dict[str, bytes]) -> None:
    assert refused(switch(**changed), switch=True) == "BAD_FIELD"


def test_refuses_a_field_that_occurs_twice() -> None:
    assert refused(gpu() + encode_fields({Field.PROTECTED_PCIE_STATUS: ON})) == "DUPLICATE_FIELD"
    assert refused(gpu(field_99=b"") + encode_fields({99: b""})) == "DUPLICATE_FIELD"


def test_refuses_a_cut_field() -> None:
    assert refused(gpu()[:-1]) == "TRUNCATED"
    assert refused(gpu() + b"\1") == "TRUNCATED"


def test_on_and_off_are_two_values_of_many() -> None:
    assert parse_gpu(gpu(NVDEC0_STATUS=ON)).nvdec0 is True
    assert parse_gpu(gpu(NVDEC0_STATUS=OFF)).nvdec0 is False
