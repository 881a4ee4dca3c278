"""Which bytes of an event its digest proves: the one place that decides what of a boot log may be believed.

Writers digest different things: the whole data, the value of a variable without its name, a GRUB command without its
label. ``prove`` finds the form by hashing, never by the event type, and returns the proven bytes themselves; whoever
draws conclusions reads those and nothing else. Where no form fits, the digest covers something the log does not hold
(a file, an image, a firmware volume): the data are then "described by firmware, not proven".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.eventlog import Event
from cgpu_agent.wire.text import utf16_field
from cgpu_agent.wire.tpm import HASH_SIZES
from cgpu_agent.wire.uefi import parse_variable

Form = Literal["data", "data-but-last-byte", "labelled-text", "variable-value", "name"]

TEXT_LABELS: Final = (
    b"grub_cmd: ",
    b"kernel_cmdline: ",
    b"module_cmdline: ",
    b"grub_kernel_cmdline ",
    b"grub_cmd ",
)
"""What GRUB (and a fork's older form) writes before a text it measures. The label is not under the digest."""


@dataclass(frozen=True, slots=True)
class Proof:
    """``proven`` is the preimage of the event's digest, found in its data.

    ``form`` says which part of the data that is:

    * ``data``: all of it.
    * ``data-but-last-byte``: a closing NUL, or the surplus byte old versions of shim log.
    * ``labelled-text``: what follows one of ``TEXT_LABELS``. The label itself is not proven.
    * ``variable-value``: the value of a UEFI variable. GUID and name are not proven.
    * ``name``: the UTF-8 form, with NUL, of a UTF-16 name (systemd-stub).
    """

    form: Form
    proven: bytes


def prove(event: Event, bank: str) -> Proof | None:
    """Find what the digest of ``bank`` proves of this event's data, or ``None``.

    A bank that cannot be computed, or that the event lacks, proves nothing.
    """
    digest = event.digest(bank)
    if digest is None or bank not in HASH_SIZES or not event.measured:
        return None
    for form, candidate in _candidates(event.data):
        if hashlib.new(bank, candidate).digest() == digest:
            return Proof(form, candidate)
    return None


def _candidates(data: bytes) -> Iterator[tuple[Form, bytes]]:
    yield "data", data
    if data:
        yield "data-but-last-byte", data[:-1]
    for label in TEXT_LABELS:
        if data.startswith(label):
            text = data[len(label) :].split(b"\0", 1)[0]
            yield "labelled-text", text
            yield "labelled-text", text + b"\0"
            return
    try:
        yield "variable-value", parse_variable(data).data
    except HostileInput:
        pass
    else:
        return
    try:
        name = utf16_field(data, "name")
    except HostileInput:
        return
    yield "name", name.encode() + b"\0"
