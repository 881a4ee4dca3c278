"""Lowest security versions of a processor's firmware as people write them: ``NAME=NUMBER``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from cgpu_agent.errors import Misuse
from cgpu_agent.verifier.platformcase import SnpFloor, TdxFloor

_SNP: Final = ("bootloader", "tee", "snp", "microcode", "fmc", "guest-svn")
_FLOOR: Final = re.compile(r"(?P<name>[a-z-]+)=(?P<value>[0-9A-Fa-f]{1,32})")


def parse_floors(texts: Sequence[str]) -> tuple[SnpFloor, TdxFloor]:
    """``tee-tcb-svn`` is hex, all else decimal. Raises ``Misuse`` (``BAD_FLOOR``)."""
    numbers: dict[str, int] = {}
    tee_tcb_svn = None
    for text in texts:
        match = _FLOOR.fullmatch(text)
        name, value = (match["name"], match["value"]) if match else ("", "")
        if name == "tee-tcb-svn" and len(value) % 2 == 0:
            tee_tcb_svn = bytes.fromhex(value)
        elif name in (*_SNP, "qe-svn") and value.isdecimal():
            numbers[name.replace("-", "_")] = int(value)
        else:
            names = ", ".join((*_SNP, "qe-svn", "tee-tcb-svn"))
            raise Misuse("BAD_FLOOR", f"a floor is NAME=NUMBER; the names are {names}")
    qe_svn = numbers.pop("qe_svn", None)
    return SnpFloor(**numbers), TdxFloor(tee_tcb_svn, qe_svn)
