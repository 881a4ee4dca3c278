"""``--floor NAME=NUMBER``: lowest security versions of a processor's firmware."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from cgpu_agent.cli.inputs import parse_hex
from cgpu_agent.errors import Misuse
from cgpu_agent.verifier.platformcase import SnpFloor, TdxFloor

_SNP: Final = ("bootloader", "tee", "snp", "microcode", "fmc", "guest-svn")
_FLOOR: Final = re.compile(r"(?P<name>[a-z-]+)=(?P<value>[0-9A-Fa-f]{1,32})")


def parse_floors(texts: Sequence[str]) -> tuple[SnpFloor, TdxFloor]:
    """``tee-tcb-svn`` is hex, all else decimal. Raises ``Misuse`` (``BAD_ARGUMENT``)."""
    numbers: dict[str, int] = {}
    tee_tcb_svn = None
    for text in texts:
        match = _FLOOR.fullmatch(text)
        name, value = (match["name"], match["value"]) if match else ("", "")
        if name == "tee-tcb-svn":
            tee_tcb_svn = parse_hex(value, "--floor tee-tcb-svn")
        elif name in (*_SNP, "qe-svn") and value.isdecimal():
            numbers[name.replace("-", "_")] = int(value)
        else:
            names = ", ".join((*_SNP, "qe-svn", "tee-tcb-svn"))
            raise Misuse("BAD_ARGUMENT", f"--floor needs NAME=NUMBER; the names are {names}")
    qe_svn = numbers.pop("qe_svn", None)
    return SnpFloor(**numbers), TdxFloor(tee_tcb_svn, qe_svn)
