"""Compares what a device measured with the golden values that NVIDIA signed for its driver and firmware.

The rules are those of NVIDIA's verifiers: golden index i belongs to SPDM block i + 1; only active goldens count; a
match with any alternative will do; an index active in two manifests is an error. What the indices stand for is not
published.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.rim import Golden, Rim
from cgpu_agent.wire.spdm import Measurement

Source = Literal["driver", "firmware"]

NVDEC_INDEX: Final = 35
"""Measures the video decoder; without meaning while that is disabled, as it is in confidential-computing mode."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A measurement that is none of its alternatives.

    Attributes:
        index: golden index, from 0.
        source: whose golden it is.
        measured: digest in the report.
        golden: the alternatives.
    """

    index: int
    source: Source
    measured: bytes
    golden: tuple[bytes, ...]

    def to_json(self) -> dict[str, object]:
        """As a verdict's JSON has it; digests in lower-case hex."""
        return {
            "golden": [each.hex() for each in self.golden],
            "index": self.index,
            "measured": self.measured.hex(),
            "source": self.source,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison found.

    Attributes:
        compared: golden indices that were compared, rising.
        skipped: active ones that were not, by rule.
        mismatched: those that differ.
    """

    compared: tuple[int, ...]
    skipped: tuple[int, ...]
    mismatched: tuple[Mismatch, ...]

    def to_json(self) -> dict[str, object]:
        """As a verdict's JSON has it."""
        return {
            "compared": len(self.compared),
            "mismatched": [each.to_json() for each in self.mismatched],
            "skipped": list(self.skipped),
        }


def compare(
    measurements: Mapping[int, Measurement], rims: Sequence[tuple[Source, Rim]], *, nvdec0: bool | None
) -> Comparison:
    """Compare every active golden of these verified manifests.

    Args:
        measurements: SPDM index -> block.
        rims: manifests whose signature and version were checked.
        nvdec0: whether the video decoder is enabled; only a plain "disabled" skips its measurement.

    Raises:
        HostileInput: ``NO_GOLDENS`` (a manifest without active ones), ``RIM_INDEX_CONFLICT``,
            ``MEASUREMENT_MISSING`` (an active golden without its block).
    """
    goldens = _merge(rims)
    skipped = tuple(index for index in goldens if index == NVDEC_INDEX and nvdec0 is False)
    compared = tuple(index for index in sorted(goldens) if index not in skipped)
    mismatched: list[Mismatch] = []
    for index in compared:
        source, golden = goldens[index]
        block = measurements.get(index + 1)
        if block is None:
            raise HostileInput("MEASUREMENT_MISSING", f"the report lacks block {index + 1}, which has a golden")
        if not any(hmac.compare_digest(block.value, each) for each in golden.alternatives):
            mismatched.append(Mismatch(index, source, block.value, golden.alternatives))
    return Comparison(compared, skipped, tuple(mismatched))


def _merge(rims: Sequence[tuple[Source, Rim]]) -> dict[int, tuple[Source, Golden]]:
    merged: dict[int, tuple[Source, Golden]] = {}
    for source, rim in rims:
        if not rim.active:
            raise HostileInput("NO_GOLDENS", f"the {source} RIM has no active measurement")
        for golden in rim.active:
            if golden.index in merged:
                raise HostileInput("RIM_INDEX_CONFLICT", f"index {golden.index} is active in both RIMs")
            merged[golden.index] = (source, golden)
    if not merged:
        raise HostileInput("NO_GOLDENS", "no golden measurement was given")
    return merged
