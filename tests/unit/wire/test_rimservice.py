"""The RIM service's answer, and whether a manifest is what its name promises."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.rim import MAX_RIM, parse_rim
from cgpu_agent.wire.rimservice import MAX_ENVELOPE, is_rim_id, parse_envelope, require_named, same_chip
from cgpu_agent.wire.strictjson import b64
from fixtures.gpujudge import VENDOR

DRIVER_ID = "NV_GPU_DRIVER_GH100_550.90.07"
RIM = parse_rim(VENDOR.rims()[0]).claimed
GOOD = {"id": DRIVER_ID, "rim": b64(b"<x/>")}


def refused(data: bytes) -> str:
    with pytest.raises(HostileInput) as caught:
        parse_envelope(data)
    return caught.value.slug


def test_name_and_manifest_are_read_and_the_rest_is_not_looked_at() -> None:
    more = {**GOOD, "sha256": "0", "request_id": "1", "rim_format": "SWID", "new": {"x": [1]}}
    for fields in (GOOD, more):
        assert parse_envelope(json.dumps(fields).encode()) == (DRIVER_ID, b"<x/>")


@pytest.mark.parametrize(
    ("change", "slug"),
    [
        ({"id": None}, "BAD_FIELD"),
        ({"id": "../x"}, "BAD_FIELD"),
        ({"id": f"{DRIVER_ID}/.."}, "BAD_FIELD"),
        ({"id": "NV_GPU_" + "A" * 200}, "BAD_FIELD"),
        ({"rim": None}, "BAD_FIELD"),
        ({"rim": "PHgvPg"}, "BAD_FIELD"),
        ({"rim": b64(bytes(MAX_RIM + 1))}, "BAD_FIELD"),
        ({"new": "x" * MAX_ENVELOPE}, "TOO_LARGE"),
    ],
)
def test_refuses_what_is_not_of_the_form(change: dict[str, object], slug: str) -> None:
    assert refused(json.dumps({**GOOD, **change}).encode()) == slug


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b'{"id": 1.5}', json.dumps(GOOD).encode()[:-1]])
def test_refuses_what_is_no_object(data: bytes) -> None:
    assert refused(data) == "BAD_JSON"


def test_a_key_that_appears_twice_is_refused() -> None:
    assert refused(json.dumps(GOOD)[:-1].encode() + b', "id": "x"}') == "DUPLICATE_KEY"


NAMES = [
    ("NV_GPU_DRIVER_GH100_550.90.07", {}),
    ("NV_GPU_CC_DRIVER_GB100_575.32", {"product": "GB100", "version": "575.32"}),
    ("NV_GPU_CC_DRIVER_GB202_590.12", {"product": "GB20X", "version": "590.12"}),
    ("NV_GPU_VBIOS_1010_0200_882_96009F0001", {"version": "96.00.9f.00.01"}),
    ("NV_SWITCH_BIOS_5612_0002_890_9610550001", {"edition": "SWITCH", "version": "96.10.55.00.01"}),
]


@pytest.mark.parametrize(("name", "change"), NAMES)
def test_a_manifest_fits_its_own_name_and_no_other(name: str, change: dict[str, str]) -> None:
    rim = replace(RIM, **change)  # type: ignore[arg-type]
    assert is_rim_id(name)
    require_named(name, rim)
    for other, _ in NAMES:
        if other != name:
            with pytest.raises(HostileInput) as caught:
                require_named(other, rim)
            assert caught.value.slug == "WRONG_RIM"


def test_a_hopper_manifest_does_not_pass_for_a_blackwell_of_the_same_driver() -> None:
    with pytest.raises(HostileInput):
        require_named("NV_GPU_CC_DRIVER_GB100_550.90.07", RIM)


def test_an_x_stands_for_any_digit_in_a_familys_name_alone() -> None:
    assert same_chip("GB202", "GB20X")
    assert not same_chip("GB20X", "GB202")
    assert not same_chip("GB202", "GB20")
    assert not same_chip("GH100", "GB20X")


@pytest.mark.parametrize(
    "text", ["", "NV_GPU_DRIVER_GH100_?", "NV_GPU_DRIVER_GH100_1/..", "nv_gpu_driver_gh100_1", f"{DRIVER_ID}\n"]
)
def test_what_needs_escaping_is_no_name(text: str) -> None:
    assert not is_rim_id(text)
