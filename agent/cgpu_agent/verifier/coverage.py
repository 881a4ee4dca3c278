"""What measures the agent itself. With nothing, whatever the agent says of callers and of itself is hearsay.

A boot measures firmware, loader, kernel and initrd. The agent lies on a root file system, which is measured only
where the kernel was told to demand one by its hash: dm-verity. So the question becomes: which command line did the
kernel get, by a digest in a register that the logs explain? A text that no digest covers answers nothing, and two
different answers are none. The Integrity Measurement Architecture (IMA) would be another way; its list is not
collected yet.

Even then the answer is only as good as what acted on the command line: whoever relies on it pins loader, kernel and
initrd in reference values.

Sources: systemd-veritysetup-generator(8), kernel-command-line(7), systemd-stub(7).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from cgpu_agent.verifier.boot import boot_story
from cgpu_agent.verifier.bootscene import Statement
from cgpu_agent.verifier.evidence import EvidenceResult
from cgpu_agent.wire.eventlog import EventLog

CoverageKind = Literal["verity-root", "verity-usr", "nothing"]

_BANK: Final = "sha256"
_ROOT_HASH: Final = re.compile(r"[0-9a-fA-F]{64}|[0-9a-fA-F]{96}|[0-9a-fA-F]{128}")
_OFF: Final = frozenset({"0", "no", "n", "false", "f", "off"})
# Kernel, and older and newer systemd, take single quotes and such escapes differently.
_AMBIGUOUS: Final = re.compile(r"""'|\\(?:[\s"\\]|$)""")
_NO_IMA: Final = "IMA's list, which could show the agent's files too, is not collected yet"


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The kernel's command line as digests prove it.

    Attributes:
        text: in the form in which the loader measured it; ``None`` when it is not proven.
        detail: one sentence that says why.
    """

    text: str | None
    detail: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """The answer.

    Attributes:
        kind: ``verity-root`` (the whole root file system), ``verity-usr`` (only ``/usr``: programs, not
            configuration), or ``nothing``.
        root_hash: of dm-verity, lower-case hex; ``None`` with ``nothing``.
        detail: one sentence, safe to show.
    """

    kind: CoverageKind
    root_hash: str | None
    detail: str

    def to_json(self) -> dict[str, object]:
        """As a verdict's JSON has it."""
        return {"detail": self.detail, "kind": self.kind, "root_hash": self.root_hash}


def command_line(result: EvidenceResult, candidates: Iterable[str] = ()) -> CommandLine:
    """Conclude the command line of the kernel that booted.

    Args:
        result: of the evidence.
        candidates: texts that are expected, without a closing newline. A unified kernel image measures its own
            command line without logging it: only who knows the text can recognise its digest.
    """
    if result.boot_log is None:
        return CommandLine(None, "there is no boot log")
    story = boot_story(result.boot_log, _BANK)
    told = [
        statement
        for stage in story.stages
        for statement in stage.statements
        if stage.name == "command-line" or (stage.name == "uki" and statement.data.get("section") == ".cmdline")
    ]
    if not told:
        return CommandLine(None, "the boot log names no kernel command line")
    known = {text for statement in told if (text := _proven_text(statement)) is not None}
    pool = {digest: text for text in (*known, *candidates) for digest in _digests(text)}
    texts = {_proven_text(statement) or pool.get(str(statement.data.get("digest"))) for statement in told}
    if None in texts or len(texts) != 1:
        return CommandLine(
            None,
            "a command line was measured whose text no digest proves" if None in texts else "several were measured",
        )
    unexplained = sorted({pcr for pcr in _registers(result.boot_log, told) if not _explained(result, pcr)})
    if unexplained:
        return CommandLine(None, f"the logs do not explain PCR {unexplained[0]}, which should prove it")
    return CommandLine(texts.pop(), "measured by the loader, under a digest that the quoted registers confirm")


def agent_coverage(result: EvidenceResult, candidates: Iterable[str] = ()) -> Coverage:
    """Say what measures the agent's files. Arguments as for ``command_line``."""
    line = command_line(result, candidates)
    if line.text is None:
        return _nothing(f"the kernel command line is not proven: {line.detail}")
    return coverage_by(line.text)


def coverage_by(text: str) -> Coverage:
    """Say what a kernel that starts with this command line measures of the agent's files."""
    if _AMBIGUOUS.search(text):
        return _nothing("the kernel command line has quotes or escapes that its readers read differently")
    if "\\u" in text or "\N{HORIZONTAL ELLIPSIS}" in text:
        return _nothing("the kernel command line is too long, or has characters that hide text")
    words = list(_words(text))
    if any(name == "systemd.verity" and value.lower() in _OFF for name, value in words):
        return _nothing("the kernel command line turns dm-verity off")
    if any(name.endswith("_options") and "ignore-corruption" in value for name, value in words):
        return _nothing("the kernel command line tells dm-verity to ignore corruption")
    root = _sole_hash(words, "roothash", mount="root", device="/dev/mapper/root")
    if root is not None:
        return Coverage(
            "verity-root",
            root,
            "the measured kernel command line demands a root file system with the dm-verity hash "
            f"{root}: the agent's files are those of that image, if kernel and initrd are the expected ones",
        )
    usr = _sole_hash(words, "usrhash", mount="mount.usr", device="/dev/mapper/usr")
    if usr is not None:
        return Coverage(
            "verity-usr",
            usr,
            f"the measured kernel command line demands /usr with the dm-verity hash {usr}: the agent's programs are "
            "those of that image, if kernel and initrd are the expected ones; /etc (units, configuration, policy) is "
            "covered by nothing",
        )
    return _nothing("the measured kernel command line demands no dm-verity root hash")


def _nothing(why: str) -> Coverage:
    return Coverage("nothing", None, f"nothing measures the agent's files: {why}; {_NO_IMA}")


def _proven_text(statement: Statement) -> str | None:
    text = statement.data.get("cmdline")
    return text if statement.digested and isinstance(text, str) else None


def _digests(text: str) -> Iterator[str]:
    """Digests under which a loader, a stub or the kernel would have measured a text."""
    for form in (text, f"{text}\n", f"{text}\0"):
        yield hashlib.sha256(form.encode("utf-8", "surrogatepass")).hexdigest()
    for form in (text, f"{text}\0", f"BOOT_IMAGE={text}"):
        yield hashlib.sha256(form.encode("utf-16-le", "surrogatepass")).hexdigest()


def _registers(log: EventLog, told: Iterable[Statement]) -> Iterator[int]:
    of_event = {event.index: event.pcr for event in log.events}
    for statement in told:
        yield from (of_event[index] for index in statement.events)


def _explained(result: EvidenceResult, pcr: int) -> bool:
    found = result.registers.get(pcr)
    return found is not None and found.status == "explained"


def _words(text: str) -> Iterator[tuple[str, str]]:
    """Name and value of each parameter, as systemd's generators understand them (``proc-cmdline.c``).

    Double quotes protect spaces and are no part of it; ``rd.`` says the same to the initrd, where the root is set up;
    ``-`` and ``_`` are one; and a backslash within a name may be dropped.
    """
    for match in re.finditer(r'(?:[^ \t\n\r"]|"[^"]*"?)+', text):
        name, _, value = match.group().replace('"', "").partition("=")
        yield name.replace("\\", "").removeprefix("rd.").replace("-", "_"), value


def _sole_hash(words: Iterable[tuple[str, str]], parameter: str, *, mount: str, device: str) -> str | None:
    """The one hash that a parameter demands; ``None`` when there are several, or another device is mounted."""
    words = list(words)
    hashes = [value for name, value in words if name == parameter]
    mounts = {value for name, value in words if name == mount}
    if len(hashes) != 1 or not mounts <= {device} or not _ROOT_HASH.fullmatch(hashes[0]):
        return None
    return hashes[0].lower()
