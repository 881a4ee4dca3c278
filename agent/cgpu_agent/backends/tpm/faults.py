"""The one table from TPM and TSS response codes to our slugs.

Source: TCG "TPM 2.0 Library", Part 2, 6.6 (TPM_RC); TSS 2.0 Overview for the layers above the TPM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cgpu_agent.errors import DeviceFault

RC_INITIALIZE: Final = 0x100
RC_INTEGRITY_P1: Final = 0x1DF
"""A blob that this TPM did not make, or made before it lost its state."""
ABSENT_HANDLE: Final = frozenset({0x184, 0x18B})
"""TPM_RC_VALUE and TPM_RC_HANDLE for the first handle: nothing lives there."""
RC_NV_UNINITIALIZED: Final = 0x14A
RC_POLICY: Final = 0x126
RC_PCR_CHANGED: Final = 0x128
RC_VALUE: Final = 0x084
RC_SIGNATURE: Final = 0x09B
RC_INTEGRITY: Final = 0x09F
SLOT_CODES: Final = frozenset({0x902, 0x903, 0x905})
"""TPM_RC_OBJECT_MEMORY, TPM_RC_SESSION_MEMORY, TPM_RC_SESSION_HANDLES."""

_LAYER: Final = 0xFFFF0000
_RESOURCE_MANAGER_LAYER: Final = 0x000B0000
"""The kernel's resource manager answers with TPM codes in a layer of its own."""
_FORMAT_ONE: Final = 0x080

_SLUGS: Final[Mapping[int, str]] = {
    RC_INITIALIZE: "TPM_RESET",
    **dict.fromkeys(range(0x910, 0x917), "TPM_RESET"),  # TPM_RC_REFERENCE_H0-H6: a handle that was there is gone
    **dict.fromkeys(range(0x918, 0x91F), "TPM_RESET"),  # TPM_RC_REFERENCE_S0-S6: a session that was there is gone
    **dict.fromkeys(SLOT_CODES, "TPM_BUSY"),
    0x920: "TPM_BUSY",  # TPM_RC_NV_RATE
    0x923: "TPM_BUSY",  # TPM_RC_NV_UNAVAILABLE
    0x14B: "TPM_NV_FULL",  # TPM_RC_NV_SPACE
    0x921: "TPM_AUTH",  # TPM_RC_LOCKOUT
    0x126: "TPM_AUTH",  # TPM_RC_POLICY
    0x12F: "TPM_AUTH",  # TPM_RC_AUTH_UNAVAILABLE
    0x149: "TPM_AUTH",  # TPM_RC_NV_AUTHORIZATION
    0x08E: "TPM_AUTH",  # TPM_RC_AUTH_FAIL
    0x09D: "TPM_AUTH",  # TPM_RC_POLICY_FAIL
    0x0A2: "TPM_AUTH",  # TPM_RC_BAD_AUTH
}

_WORDS: Final[Mapping[str, str]] = {
    "TPM_IO": "the TPM's answer could not be used",
    "TPM_RESET": "the TPM lost its state since this object was made",
    "TPM_BUSY": "the TPM has no free slot",
    "TPM_NV_FULL": "the TPM has no room left in its NV memory",
    "TPM_AUTH": "the TPM refused the authorisation",
    "TPM_ERROR": "the TPM refused the command",
}


class TpmFault(DeviceFault):
    """A command that the TPM, or the TSS above it, refused.

    Args:
        code: the full TSS2_RC.
        command: name of the command without ``TPM2_``.
        slug: where the command gives the code another meaning than the table.
    """

    def __init__(self, code: int, command: str, *, slug: str | None = None) -> None:
        slug = slug or slug_of(code)
        super().__init__(
            slug,
            f"{_WORDS[slug]} (TPM2_{command}: 0x{code:03x})",
            retry_after=1.0 if slug == "TPM_BUSY" else None,
        )
        self.code = code


def from_library(code: int) -> bool:
    """True when the code comes from the TSS, not from the TPM: after such an error its context is of no use."""
    return (code & _LAYER) not in (0, _RESOURCE_MANAGER_LAYER)


def slug_of(code: int) -> str:
    """Slug of a response code other than 0. Handle, parameter and session numbers do not matter."""
    if from_library(code):
        return "TPM_IO"
    return _SLUGS.get(plain(code), "TPM_ERROR")


def plain(code: int) -> int:
    """The code without layer, and without the number of the handle, parameter or session that it is about."""
    code &= ~_LAYER
    return code & 0x0BF if code & _FORMAT_ONE else code
