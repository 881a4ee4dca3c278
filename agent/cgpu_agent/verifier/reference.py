"""Reference values: what a relying party expects of its VMs, as a file it makes from one good bundle and keeps.

The file is the relying party's own word, so it is kept like a configuration; yet it is parsed as strictly as
evidence, since a value that was silently ignored would expect nothing. What a reference leaves out (``null``, or an
absent PCR) it does not compare, and ``pins`` says so to policies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.verifier.coverage import command_line
from cgpu_agent.verifier.evidence import EvidenceResult
from cgpu_agent.verifier.secureboot import Authority
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.strictjson import Fields

FORMAT: Final = "cgpu-reference/0"
MAX_REFERENCE: Final = 1 << 20

DEFAULT_PCRS: Final = (0, 2, 3, 4, 7)
"""Firmware, option ROMs and their configuration, boot loaders and kernel image, Secure Boot keys: what stays equal
from boot to boot of one image on one platform. Left out by default, since they differ between VMs of one image or
change with harmless updates: 1 (firmware settings), 5 (partition table), 8 and 9 (GRUB's commands and files, the
initrd: wanted before anything can rest on the command line), 11 (unified kernel image and boot phases)."""

_MAX_VALUES: Final = 64
_MAX_ITEMS: Final = 256
_MAX_COMMAND_LINE: Final = 4096
_NAME_SIZE: Final = 34


@dataclass(frozen=True, slots=True)
class Reference:
    """Expected values; in each set, any one is as good as another. ``None`` = not compared.

    Attributes:
        pcrs: PCR index -> allowed SHA-256 values.
        authorities: SHA-256 of the certificates that may have allowed an image to start under Secure Boot.
        command_lines: kernel command lines, as the loader measures them.
        agent_builds: SHA-256 of the agent's files, as the agent reports it.
        instances: Names of the platform AKs, and so the VMs, that are meant; ``None`` = any VM of this image.
    """

    pcrs: Mapping[int, frozenset[bytes]]
    authorities: frozenset[bytes] | None = None
    command_lines: frozenset[str] | None = None
    agent_builds: frozenset[bytes] | None = None
    instances: frozenset[bytes] | None = None

    @property
    def pins(self) -> frozenset[str]:
        """What it compares, besides PCRs: words that policies test."""
        named = {
            "agent-build": self.agent_builds,
            "command-line": self.command_lines,
            "instance": self.instances,
            "secure-boot-authorities": self.authorities,
        }
        return frozenset(name for name, value in named.items() if value is not None)

    def encode(self) -> bytes:
        """The file, for people to read and edit: one value a line, sorted."""

        def hexes(values: frozenset[bytes] | None) -> list[str] | None:
            return None if values is None else sorted(value.hex() for value in values)

        document = {
            "agent_builds": hexes(self.agent_builds),
            "command_lines": None if self.command_lines is None else sorted(self.command_lines),
            "format": FORMAT,
            "instances": hexes(self.instances),
            "pcrs": {str(index): hexes(values) for index, values in sorted(self.pcrs.items())},
            "secure_boot_authorities": hexes(self.authorities),
        }
        return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


@dataclass(frozen=True, slots=True)
class Difference:
    """One expectation that is not met.

    Attributes:
        what: stable word: ``pcr-4``, ``secure-boot-authority``, ``command-line``, ``agent-build``, ``instance``.
        detail: one sentence, safe to show.
    """

    what: str
    detail: str

    def to_json(self) -> dict[str, object]:
        """As a verdict's JSON has it."""
        return {"detail": self.detail, "what": self.what}


def parse_reference(data: bytes) -> Reference:
    """Parse a reference file.

    Raises:
        HostileInput: ``BAD_FORMAT``, ``TOO_LARGE``, ``BAD_JSON``, ``DUPLICATE_KEY``, ``UNKNOWN_KEY``, ``BAD_FIELD``.
    """
    fields = Fields(strictjson.loads(data, "reference", MAX_REFERENCE), "reference")
    if fields.raw("format") != FORMAT:
        raise HostileInput("BAD_FORMAT", f"reference: the format is not {FORMAT!r}; another version made this file")
    reference = Reference(
        pcrs=_pcrs(fields.fields("pcrs")),
        authorities=_hex_set(fields, "secure_boot_authorities", 32),
        command_lines=_texts(fields, "command_lines"),
        agent_builds=_hex_set(fields, "agent_builds", 32),
        instances=_hex_set(fields, "instances", _NAME_SIZE),
    )
    fields.end()
    if not reference.pcrs and not reference.pins:
        raise fields.fail("it expects nothing at all")
    return reference


def make_reference(
    result: EvidenceResult,
    *,
    pcrs: Iterable[int] = DEFAULT_PCRS,
    command_lines: Iterable[str] = (),
    any_instance: bool = False,
) -> bytes:
    """Make a reference file from evidence that is known to be good.

    Args:
        result: accepted, with a boot log: values that no log explains would not return at the next boot.
        pcrs: PCRs to expect.
        command_lines: what the kernel's command line is thought to be, where only its digest was measured.
        any_instance: expect this image on any VM, not this VM.

    Raises:
        Misuse: ``NOT_ACCEPTED``; ``PCR_UNEXPLAINED`` for a PCR that was not quoted or that no log explains.
    """
    if not result.accepted or result.manifest is None:
        raise Misuse("NOT_ACCEPTED", "the evidence was refused: nothing can be expected from it")
    values: dict[int, frozenset[bytes]] = {}
    for index in sorted(set(pcrs)):
        found = result.registers.get(index)
        if found is None or found.actual is None or found.status not in ("explained", "untouched"):
            raise Misuse("PCR_UNEXPLAINED", f"PCR {index} was not quoted, or no log explains its value")
        values[index] = frozenset({found.actual})
    line = command_line(result, command_lines).text
    authorities = frozenset(sha256 for each in _authorities(result) if (sha256 := _sha256(each)) is not None)
    name = None if result.endorsement is None else result.endorsement.ak_name
    return Reference(
        pcrs=values,
        authorities=authorities or None,
        command_lines=None if line is None else frozenset({line}),
        agent_builds=frozenset({bytes.fromhex(result.manifest.agent["build"])}),
        instances=None if any_instance or name is None else frozenset({name}),
    ).encode()


def compare(result: EvidenceResult, reference: Reference) -> tuple[Difference, ...]:
    """Everything in which accepted evidence differs from the reference; empty = it matches.

    What the evidence does not show differs too: an expectation that cannot be checked is not met.
    """
    found = [*_compare_pcrs(result, reference.pcrs)]
    if reference.authorities is not None:
        found += _compare_authorities(result, reference.authorities)
    if reference.command_lines is not None:
        line = command_line(result, reference.command_lines)
        if line.text is None:
            found.append(Difference("command-line", f"the command line is not proven: {line.detail}"))
        elif line.text not in reference.command_lines:
            found.append(Difference("command-line", "the kernel was started with another command line"))
    if reference.agent_builds is not None:
        build = None if result.manifest is None else bytes.fromhex(result.manifest.agent["build"])
        if build not in reference.agent_builds:
            found.append(Difference("agent-build", "the agent reports another build of itself"))
    if reference.instances is not None and not is_instance(result, reference.instances):
        found.append(Difference("instance", "the platform AK is not that of an expected VM"))
    return tuple(found)


def is_instance(result: EvidenceResult, names: frozenset[bytes]) -> bool:
    """Whether the platform AK's Name is one of these."""
    return result.endorsement is not None and result.endorsement.ak_name in names


def _compare_pcrs(result: EvidenceResult, expected: Mapping[int, frozenset[bytes]]) -> Iterable[Difference]:
    for index, values in sorted(expected.items()):
        found = result.registers.get(index)
        if found is None or found.actual is None:
            yield Difference(f"pcr-{index}", f"PCR {index} is expected, and was not quoted")
        elif found.actual not in values:
            yield Difference(f"pcr-{index}", f"PCR {index} is {found.actual.hex()}, not as expected")


def _authorities(result: EvidenceResult) -> tuple[Authority, ...]:
    """Authorities with a certificate, also an unreadable one; plain texts such as SBAT levels are none."""
    if result.secure_boot is None:
        return ()
    return tuple(each for each in result.secure_boot.authorities if each.certificate is not None or each.text is None)


def _sha256(authority: Authority) -> bytes | None:
    if not authority.proven or authority.certificate is None:
        return None
    return bytes.fromhex(authority.certificate.sha256)


def _compare_authorities(result: EvidenceResult, allowed: frozenset[bytes]) -> Iterable[Difference]:
    what = "secure-boot-authority"
    used = _authorities(result)
    if result.secure_boot is None or result.secure_boot.state != "enabled":
        yield Difference(what, "Secure Boot is not known to be on, so no authority was asked")
    if not used:
        yield Difference(what, "no use of an authority was measured")
    for each in used:
        sha256 = _sha256(each)
        if sha256 is None:
            yield Difference(what, f"event {each.event}: the digest proves no certificate")
        elif sha256 not in allowed:
            yield Difference(what, f"event {each.event}: certificate {sha256.hex()} is not an expected authority")


def _pcrs(fields: Fields) -> dict[int, frozenset[bytes]]:
    values: dict[int, frozenset[bytes]] = {}
    for name in fields.keys():  # noqa: SIM118 - a method of ours, not a dict's
        if not re.fullmatch(r"0|1[0-9]?|2[0-3]?|[3-9]", name):
            raise fields.fail("a key is not a PCR index of 0-23")
        values[int(name)] = _hexes(fields, name, 32, _MAX_VALUES)
    return values


def _hexes(fields: Fields, name: str, size: int, limit: int) -> frozenset[bytes]:
    items: list[Any] = fields.items(name, limit)
    if not items:
        raise fields.fail(f"{name} allows no value at all; null means that nothing is compared")
    return frozenset(fields.decode_hex(item, name, size, size) for item in items)


def _hex_set(fields: Fields, name: str, size: int) -> frozenset[bytes] | None:
    return None if fields.absent(name) else _hexes(fields, name, size, _MAX_ITEMS)


def _texts(fields: Fields, name: str) -> frozenset[str] | None:
    if fields.absent(name):
        return None
    items: list[Any] = fields.items(name, _MAX_ITEMS)
    if not items or not all(isinstance(item, str) and 0 < len(item) <= _MAX_COMMAND_LINE for item in items):
        raise fields.fail(f"{name} is not a list of texts of at most {_MAX_COMMAND_LINE} characters; null = any")
    return frozenset(items)
