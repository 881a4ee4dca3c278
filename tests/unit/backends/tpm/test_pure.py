"""Templates, answers and codes: the parts of the TPM backend that need no TPM."""

from __future__ import annotations

import pytest
from tpm2_pytss import TPM2B_PUBLIC, utils

from cgpu_agent.backends.base import AkAlgorithm
from cgpu_agent.backends.tpm import answers, keys
from cgpu_agent.backends.tpm.faults import TpmFault, from_library, slug_of
from cgpu_agent.errors import HostileInput

PROPERTY = bytes.fromhex("00000006 00000001 00000105 4d534654")


def no_index(index: int) -> bytes:
    raise utils.NoSuchIndex(index)


@pytest.mark.parametrize(("algorithm", "name"), [("rsa", "EK-RSA2048"), ("ecc", "EK-ECC256")])
def test_ek_template_equals_the_one_of_the_tss(algorithm: AkAlgorithm, name: str) -> None:
    _, expected = utils.create_ek_template(name, no_index)
    assert keys.sized(keys.endorsement_key(algorithm)) == expected.marshal()


@pytest.mark.parametrize("template", [keys.signing_key("rsa"), keys.signing_key("ecc"), keys.storage_parent()])
def test_template_is_one_public_area(template: bytes) -> None:
    parsed, used = TPM2B_PUBLIC.unmarshal(keys.sized(template))
    assert used == len(template) + 2
    assert parsed.marshal() == keys.sized(template)


@pytest.mark.parametrize(
    ("code", "slug"),
    [
        (0x100, "TPM_RESET"),
        (0x910, "TPM_RESET"),
        (0x918, "TPM_RESET"),
        (0x902, "TPM_BUSY"),
        (0x903, "TPM_BUSY"),
        (0x905, "TPM_BUSY"),
        (0x923, "TPM_BUSY"),
        (0x14B, "TPM_NV_FULL"),
        (0x98E, "TPM_AUTH"),
        (0x9A2, "TPM_AUTH"),
        (0xAA2, "TPM_AUTH"),
        (0x99D, "TPM_AUTH"),
        (0x921, "TPM_AUTH"),
        (0x12F, "TPM_AUTH"),
        (0x149, "TPM_AUTH"),
        (0x1DF, "TPM_ERROR"),
        (0x1D5, "TPM_ERROR"),
        (0x101, "TPM_ERROR"),
        (0xB0902, "TPM_BUSY"),
        (0xB0143, "TPM_ERROR"),
        (0x70007, "TPM_IO"),
        (0xA000A, "TPM_IO"),
        (0x9000B, "TPM_IO"),
    ],
)
def test_code_has_its_slug(code: int, slug: str) -> None:
    assert slug_of(code) == slug
    fault = TpmFault(code, "Quote")
    assert fault.slug == slug
    assert f"TPM2_Quote: 0x{code:03x}" in fault.message
    assert from_library(code) == (slug == "TPM_IO")


def test_property_list_is_read() -> None:
    assert answers.parse_properties(PROPERTY) == {0x105: 0x4D534654}


@pytest.mark.parametrize(
    "data",
    [b"", PROPERTY[:-1], PROPERTY + b"\0", b"\0\0\0\1" + PROPERTY[4:], PROPERTY[:4] + b"\xff" * 4 + PROPERTY[8:]],
)
def test_refuses_a_broken_property_list(data: bytes) -> None:
    with pytest.raises(HostileInput):
        answers.parse_properties(data)


@pytest.mark.parametrize(
    ("parse", "data"),
    [
        (answers.parse_handles, PROPERTY),
        (answers.parse_nv_public, b"\0\0"),
        (answers.parse_nv_public, b"\0\x0e" + bytes(14) + b"\0"),
        (answers.parse_digests, b"\0\0\0\x09" + b"\0\0" * 9),
        (answers.parse_digests, b"\0\0\0\1\0\x20" + bytes(31)),
        (answers.parse_time_info, bytes(24) + b"\2"),
        (answers.parse_time_info, bytes(26)),
    ],
)
def test_refuses_a_broken_answer(parse: object, data: bytes) -> None:
    with pytest.raises(HostileInput):
        parse(data)  # type: ignore[operator]


def test_text_of_a_tpm_holds_nothing_but_printable_ascii() -> None:
    assert answers.text_of(0x4D534654) == "MSFT"
    assert answers.text_of(0x49424D00) == "IBM"
    assert answers.text_of(0x1B5B324A, 0x0A202020, 0) == "?[2J?"
