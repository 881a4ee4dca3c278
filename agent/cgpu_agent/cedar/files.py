"""The schemas and the default policy that come with the package."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

_HERE: Final = Path(__file__).parent

APPRAISAL_SCHEMA: Final = _HERE / "appraisal.cedarschema"
"""What a relying party's policy may speak of."""


@cache
def agent_schema() -> str:
    """What the agent's policy may speak of."""
    return (_HERE / "agent.cedarschema").read_text(encoding="utf-8")


@cache
def default_policy() -> str:
    """The agent's policy where none is configured."""
    return (_HERE / "default.cedar").read_text(encoding="utf-8")


@cache
def appraisal_schema() -> str:
    """The text of ``APPRAISAL_SCHEMA``."""
    return APPRAISAL_SCHEMA.read_text(encoding="utf-8")


@cache
def default_appraisal() -> str:
    """A relying party's policy where it names none."""
    return (_HERE / "default-appraisal.cedar").read_text(encoding="utf-8")
