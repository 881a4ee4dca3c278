"""What NVIDIA's RIM service answers: a JSON object around a manifest, of which the manifest alone is signed.

As NVIDIA's verifiers read it (nvtrust 2.7.3, attestation-sdk 2026-06): ``id`` and ``rim``, base64 of the XML. What
else it says is not looked at, and may change.
"""

from __future__ import annotations

import re
from typing import Final

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.rim import MAX_RIM, Rim
from cgpu_agent.wire.strictjson import Fields

MAX_ENVELOPE: Final = 2 * MAX_RIM
_RIM_ID = re.compile(r"NV_(?P<device>GPU|SWITCH)_[0-9A-Za-z_.]{1,120}_(?P<version>[0-9A-Za-z.]{1,32})")
_DRIVER_ID = re.compile(r"NV_GPU_(CC_)?DRIVER_(?P<chip>[0-9A-Z]{2,16})_[^_]+")


def is_rim_id(text: str) -> bool:
    """Whether a manifest could be published under this name; such a name needs no escaping in a URL."""
    return _RIM_ID.fullmatch(text) is not None


def parse_envelope(data: bytes) -> tuple[str, bytes]:
    """The name and the bytes of the manifest.

    Raises ``HostileInput``: ``TOO_LARGE``, ``BAD_JSON``, ``DUPLICATE_KEY``, ``BAD_FIELD``.
    """
    fields = Fields(strictjson.loads(data, "RIM envelope", MAX_ENVELOPE), "RIM envelope")
    rim_id = fields.text("id", 160)
    if not is_rim_id(rim_id):
        raise fields.fail("id is not the name of a RIM")
    return rim_id, fields.base64("rim", MAX_RIM)


def require_named(rim_id: str, rim: Rim) -> None:
    """Refuse a manifest that is about something else than its name says, as far as the name says it.

    The name of a driver's manifest has chip and version, that of a firmware's the version without dots. (The board,
    which the latter has too, is not in the manifest.) Raises ``HostileInput`` (``WRONG_RIM``).
    """
    named, driver = _RIM_ID.fullmatch(rim_id), _DRIVER_ID.fullmatch(rim_id)
    version = rim.version if driver else rim.version.replace(".", "")
    if (
        named is None
        or rim.edition != named["device"]
        or version.upper() != named["version"].upper()
        or (driver is not None and not same_chip(driver["chip"], rim.product))
    ):
        raise HostileInput(
            "WRONG_RIM", f"a RIM for {rim.product} {rim.edition} {rim.version} in the name of {rim_id}"
        )


def same_chip(chip: str, family: str) -> bool:
    """Whether ``family`` names the chip: GB202 is certified as GB20X."""
    return len(chip) == len(family) and all(b in (a, "X") for a, b in zip(chip, family, strict=True))
