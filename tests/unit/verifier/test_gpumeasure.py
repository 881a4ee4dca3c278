"""Golden values: index i is block i + 1, active ones count, any alternative will do."""

from __future__ import annotations

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.gpumeasure import NVDEC_INDEX, Comparison, compare
from cgpu_agent.wire.rim import Golden, Rim
from cgpu_agent.wire.spdm import Measurement
from fixtures.gpupki import digest

BLOCKS = {index: Measurement(index, 1, digest(f"block {index}")) for index in range(1, 65)}


def golden(index: int, *values: bytes, active: bool = True) -> Golden:
    return Golden(index, active, f"Measurement_{index}", values or (digest(f"block {index + 1}"),))


def rim(*goldens: Golden) -> Rim:
    return Rim("GH100", "GPU", "550.90.07", "00" * 48, "5703", goldens)


def judged(*goldens: Golden, nvdec0: bool | None = None) -> Comparison:
    return compare(BLOCKS, [("driver", rim(*goldens))], nvdec0=nvdec0)


def refused(*rims: Rim, blocks: dict[int, Measurement] | None = None) -> str:
    given = [("driver", rims[0]), *(("firmware", each) for each in rims[1:])] if rims else []
    with pytest.raises(HostileInput) as caught:
        compare(BLOCKS if blocks is None else blocks, given, nvdec0=None)  # type: ignore[arg-type]
    return caught.value.slug


def test_an_index_belongs_to_the_block_after_it() -> None:
    assert judged(golden(0), golden(63)).compared == (0, 63)
    assert judged(golden(0)).mismatched == ()
    shifted = judged(golden(0, digest("block 2")))
    assert [each.index for each in shifted.mismatched] == [0]
    assert shifted.mismatched[0].measured == digest("block 1")


def test_any_alternative_will_do_and_no_other() -> None:
    right = digest("block 8")
    assert judged(golden(7, digest("x"), right, digest("y"))).mismatched == ()
    mismatch = judged(golden(7, digest("x"), digest("y"))).mismatched[0]
    assert mismatch.golden == (digest("x"), digest("y"))
    assert mismatch.to_json()["measured"] == right.hex()


def test_inactive_goldens_are_not_compared() -> None:
    found = judged(golden(1), golden(2, digest("x"), active=False))
    assert found.compared == (1,)
    assert found.mismatched == ()


@pytest.mark.parametrize(("nvdec0", "compared"), [(False, ()), (True, (NVDEC_INDEX,)), (None, (NVDEC_INDEX,))])
def test_the_video_decoder_is_skipped_only_where_it_is_said_to_be_disabled(
    nvdec0: bool | None, compared: tuple[int, ...]
) -> None:
    found = judged(golden(NVDEC_INDEX, digest("x")), golden(1), nvdec0=nvdec0)
    assert found.compared == (1, *compared)
    assert found.skipped == (() if compared else (NVDEC_INDEX,))
    assert len(found.mismatched) == len(compared)


def test_every_mismatch_is_listed_with_its_source() -> None:
    bad = digest("x")
    rims = [("driver", rim(golden(7, bad))), ("firmware", rim(golden(0), golden(9, bad)))]
    found = compare(BLOCKS, rims, nvdec0=None)  # type: ignore[arg-type]
    assert [(each.index, each.source) for each in found.mismatched] == [(7, "driver"), (9, "firmware")]


def test_refuses_an_index_that_two_manifests_claim() -> None:
    assert refused(rim(golden(1)), rim(golden(1))) == "RIM_INDEX_CONFLICT"
    compare(BLOCKS, [("driver", rim(golden(1))), ("firmware", rim(golden(2), golden(1, active=False)))], nvdec0=None)


def test_refuses_a_golden_without_its_block() -> None:
    assert refused(rim(golden(1)), blocks={}) == "MEASUREMENT_MISSING"
    assert refused(rim(golden(64))) == "MEASUREMENT_MISSING"


def test_nothing_compared_is_no_match() -> None:
    assert refused() == "NO_GOLDENS"
    assert refused(rim(golden(1)), rim(golden(2, active=False))) == "NO_GOLDENS"


def test_a_prefix_of_a_golden_is_no_match() -> None:
    short = {2: Measurement(2, 1, digest("block 2")[:47])}
    found = compare(short, [("driver", rim(golden(1)))], nvdec0=None)
    assert [each.index for each in found.mismatched] == [1]
