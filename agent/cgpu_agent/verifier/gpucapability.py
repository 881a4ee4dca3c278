"""What each GPU generation protects, in words that a policy can test; and which chip belongs to which generation.

A verdict "pass" says that a device is what it says it is. What that is worth differs by generation, so the two never
stand for one another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Final, Literal

from cgpu_agent.errors import HostileInput

Word = Literal["yes", "no", "not-shown"]
"""``not-shown``: the hardware can, and nothing in a report tells whether it does."""


class Architecture(str, Enum):
    """Device generations; the values are those of verdicts and of ``--arch``."""

    AMPERE = "ampere"
    HOPPER = "hopper"
    BLACKWELL = "blackwell"
    LS10 = "ls10"

    @property
    def is_switch(self) -> bool:
        """Whether it is an NVSwitch and not a GPU."""
        return self is Architecture.LS10


@dataclass(frozen=True, slots=True)
class Capabilities:
    """One row of the table; see docs/gpu.md."""

    data_confidential: Word
    code_intact: Word
    results_trustworthy: Word
    report_verifiable: Word
    inline_link_encryption: Word

    def to_json(self) -> dict[str, str]:
        """As a verdict's JSON has it."""
        return asdict(self)


CAPABILITIES: Final[Mapping[Architecture, Capabilities]] = {
    Architecture.AMPERE: Capabilities("yes", "no", "no", "no", "no"),
    Architecture.HOPPER: Capabilities("yes", "yes", "yes", "yes", "no"),
    Architecture.BLACKWELL: Capabilities("yes", "yes", "yes", "yes", "not-shown"),
}
SIMULATED: Final = Capabilities("no", "no", "no", "yes", "no")
"""A device below any root but NVIDIA's: software, whatever it calls itself."""

NOT_COVERED: Final[tuple[tuple[str, str], ...]] = (
    ("cc-mode", "whether confidential-computing mode is on: no NVIDIA signature covers it"),
    ("devtools-mode", "whether developer-tools mode is on: no NVIDIA signature covers it"),
    ("ready-state", "whether the GPUs accept work, and since when: no NVIDIA signature covers it"),
    ("cpu-binding", "that the GPU is attached to the machine that sent the report, and not to another"),
)
"""What no report shows, as words and in plain text."""

_CHIPS: Final[tuple[tuple[re.Pattern[str], Architecture], ...]] = (
    (re.compile(r"GA10[0-9]"), Architecture.AMPERE),
    (re.compile(r"GH100"), Architecture.HOPPER),
    (re.compile(r"GB[12][0-9][0-9XB]"), Architecture.BLACKWELL),
    (re.compile(r"LS_10"), Architecture.LS10),
)


def architecture_of(chip: str) -> Architecture:
    """The generation of a chip, by its name in a certificate. Raises ``HostileInput`` (``UNKNOWN_CHIP``)."""
    for pattern, architecture in _CHIPS:
        if pattern.fullmatch(chip):
            return architecture
    raise HostileInput("UNKNOWN_CHIP", f"nothing is known here of chip {chip}")


def capabilities_of(architecture: Architecture, *, simulated: bool, measured: bool) -> Capabilities | None:
    """The row of a GPU; ``None`` for an NVSwitch, which holds no data of its own.

    Args:
        architecture: by the device's certificate.
        simulated: whether another root than NVIDIA's vouches for it.
        measured: whether its measurements were compared and fit. Where not, nothing says which firmware keeps the
            promises of its generation.
    """
    row = CAPABILITIES.get(architecture)
    if row is not None and simulated:
        return SIMULATED
    if row is None or measured:
        return row
    shown: dict[str, Word] = {"data_confidential": "not-shown", "code_intact": "not-shown"}
    return replace(row, **shown, results_trustworthy="not-shown")
