"""The loaders' part of the story: images, shim's MOK state, GRUB, the UKI's sections, command line and initrd."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Final

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.bootscene import Scene, Seen, Stage, Statement, Value
from cgpu_agent.verifier.secureboot import register_of
from cgpu_agent.wire.devicepath import ImageLoad, parse_image_load
from cgpu_agent.wire.eventtypes import (
    EV_EFI_BOOT_SERVICES_APPLICATION,
    EV_EFI_BOOT_SERVICES_DRIVER,
    EV_EFI_RUNTIME_SERVICES_DRIVER,
)
from cgpu_agent.wire.text import printable, utf8_field, utf16_field
from cgpu_agent.wire.uefi import parse_tag

_DRIVERS: Final = (EV_EFI_BOOT_SERVICES_DRIVER, EV_EFI_RUNTIME_SERVICES_DRIVER)
_IMAGES: Final = (EV_EFI_BOOT_SERVICES_APPLICATION, *_DRIVERS)
_ACTIONS: Final = (
    b"Calling EFI Application from Boot Option",
    b"Returning from EFI Application from Boot Option",
)
_PATH_WORDS: Final = (
    ("shim", "shim"),
    ("grub", "grub"),
    ("vmlinuz", "kernel"),
    ("kernel", "kernel"),
    ("bootmgfw", "windows"),
)
_ROLES: Final[Mapping[str, str]] = {
    "shim": "shim",
    "grub": "GRUB",
    "kernel": "a kernel",
    "uki": "a unified kernel image",
    "windows": "the Windows Boot Manager",
    "driver": "a firmware driver",
    "unknown": "an image of unknown role",
}
_MOK: Final = ("MokList", "MokListX", "MokListTrusted", "MokSBState", "MokDBState", "SbatLevel")
_SECTIONS: Final = frozenset(
    f".{name}"
    for name in (
        *("linux", "osrel", "cmdline", "initrd", "ucode", "splash", "dtb", "dtbauto", "uname", "sbat"),
        *("pcrsig", "pcrpkey", "profile", "hwids", "efifw"),
    )
)
_CMDLINE_LABELS: Final = ("kernel_cmdline", "grub_kernel_cmdline")
_TAG_INITRD: Final = 0x8F3B22EC
_TAG_LOAD_OPTIONS: Final = 0x8F3B22ED
"""Tags of Linux's EFI stub."""


def loader_chain(scene: Scene) -> Stage:
    """Every image that was started, in order, with the role its path or what followed suggests."""
    told: list[Statement] = []
    images = [(seen, image) for seen in scene.waiting(2, 4) if (image := _image(seen)) is not None]
    roles = _roles(scene, images)
    for (seen, image), (role, named_by) in zip(images, roles, strict=True):
        path = printable(image.path.text, 512) if image.path is not None else None
        text = f"{_ROLES[role].capitalize() if role != 'grub' else 'GRUB'} ({named_by}) was started"
        text += f" from {path}" if path else ", its path not given"
        text += f"; image digest {seen.digest.hex()}."
        facts: dict[str, Value] = {
            "role": role,
            "named_by": named_by,
            "path": path,
            "digest": seen.digest.hex(),
        }
        told.append(Statement(text, scene.tell([seen.index]), digested=False, data=facts))
    actions = {hashlib.new(scene.bank, text).digest(): text.decode() for text in _ACTIONS}
    told += [
        Statement(f"{actions[seen.digest]}.", scene.tell([seen.index]), digested=True)
        for seen in scene.waiting(4)
        if seen.digest in actions
    ]
    told.sort(key=lambda statement: statement.events)
    note = "Digests are the images' Authenticode hashes and are measured; paths and roles are hints."
    return Stage("loader-chain", "Loader chain", note, tuple(told))


def _image(seen: Seen) -> ImageLoad | None:
    if seen.proof is not None or seen.event.claimed_type not in _IMAGES:
        return None
    try:
        return parse_image_load(seen.event.data)
    except HostileInput:
        return ImageLoad(0, 0, None)


def _roles(scene: Scene, images: Sequence[tuple[Seen, ImageLoad]]) -> list[tuple[str, str]]:
    starts = [seen.index for seen, _ in images]
    # One pass over the events: what was measured between one image and the next.
    traces: dict[int, set[str]] = {start: set() for start in starts}
    current: int | None = None
    for seen in scene.events:
        if seen.index in traces:
            current = seen.index
        elif current is not None and (trace := _trace(seen)) is not None:
            traces[current].add(trace)
    roles: list[tuple[str, str]] = []
    earlier: set[str] = set()
    for seen, image in images:
        roles.append(_role(seen, image, traces[seen.index], earlier))
        earlier.add(roles[-1][0])
    return roles


def _role(seen: Seen, image: ImageLoad, traces: set[str], earlier: set[str]) -> tuple[str, str]:
    if seen.event.claimed_type in _DRIVERS:
        return "driver", "by its event type"
    name = (image.path.file or "").rsplit("\\", 1)[-1].lower() if image.path is not None else ""
    for word, role in _PATH_WORDS:
        if word in name:
            return role, "named by its path"
    for role in ("uki", "shim", "grub"):
        if role in traces and role not in earlier:
            return role, "by what it measured next"
    if image.path is None and earlier & {"grub", "shim", "uki"}:
        return "kernel", "loaded from memory by the image before it"
    if "uki" in earlier:
        return "kernel", "loaded by the unified kernel image before it"
    return "unknown", "neither its path nor its measurements say"


def _trace(seen: Seen) -> str | None:
    if seen.text() is not None:
        return "grub"
    if _section(seen) is not None:
        return "uki"
    return "shim" if _mok_name(seen) is not None else None


def _section(seen: Seen) -> str | None:
    if seen.proof is None or seen.proof.form != "name":
        return None
    name = seen.proof.proven[:-1].decode()
    return name if name in _SECTIONS else None


def _mok_name(seen: Seen) -> str | None:
    try:
        name = utf8_field(seen.event.data, "MOK variable")
    except HostileInput:
        return None
    return name if name in _MOK else None


def mok(scene: Scene) -> Stage:
    """Shim's own key lists (Machine Owner Keys)."""
    told: list[Statement] = []
    for seen in scene.waiting(14):
        name = _mok_name(seen)
        if name is not None:
            text = f"shim measured {name}; digest of its content {seen.digest.hex()}."
            facts: dict[str, Value] = {"variable": name, "digest": seen.digest.hex()}
            told.append(Statement(text, scene.tell([seen.index]), digested=False, data=facts))
    return Stage("mok", "Machine Owner Keys", "The digests cover contents that the log does not hold.", tuple(told))


def kernel_command_line(scene: Scene) -> Stage:
    """The kernel's command line, from GRUB, from systemd-stub, or as the kernel's own stub measured it."""
    told: list[Statement] = []
    options = {seen.digest: seen for seen in scene.waiting(9) if _tag(seen) == _TAG_LOAD_OPTIONS}
    commands = {text for seen in scene.waiting(8) if (text := seen.text()) is not None}
    for seen in scene.waiting(8):
        text = seen.text()
        if text is None or seen.label() not in _CMDLINE_LABELS:
            continue
        # GRUB hands the kernel "BOOT_IMAGE=" and the same text; the kernel's stub digests that as UTF-16, no NUL.
        handed = hashlib.new(scene.bank, f"BOOT_IMAGE={text}".encode("utf-16-le")).digest()
        agreeing = [options[handed].index] if handed in options else []
        repeated = any(f"{word} {text}" in commands for word in ("linux", "linuxefi"))
        why = "so labelled by GRUB; no second digest agrees"
        if agreeing:
            why = "the kernel measured the same text as its load options"
        elif repeated:
            why = "the same text follows the word linux in a GRUB command"
        shown = printable(text)
        events = scene.tell([seen.index, *agreeing])
        sentence = f"Kernel command line: {shown} ({why})."
        told.append(Statement(sentence, events, bool(agreeing) or repeated, {"cmdline": shown}))
    for seen in scene.waiting(12):
        if seen.proof is not None and seen.proof.form == "data" and (line := _utf16(seen.proof.proven)):
            shown = printable(line)
            sentence = f"systemd-stub measured this text, as it does a command line: {shown}."
            told.append(Statement(sentence, scene.tell([seen.index]), digested=True, data={"cmdline": shown}))
    for seen in scene.waiting(9):
        if _tag(seen) == _TAG_LOAD_OPTIONS:
            sentence = f"The kernel measured its load options; digest {seen.digest.hex()}, text not in the log."
            facts: dict[str, Value] = {"digest": seen.digest.hex()}
            told.append(Statement(sentence, scene.tell([seen.index]), digested=False, data=facts))
    note = "GRUB's texts are under the digest, their labels are not: a second digest must agree on a command line."
    return Stage("command-line", "Kernel command line", note, tuple(told))


def _tag(seen: Seen) -> int | None:
    try:
        return parse_tag(seen.event.data).id
    except HostileInput:
        return None


def _utf16(data: bytes) -> str | None:
    try:
        return utf16_field(data, "command line")
    except HostileInput:
        return None


def grub(scene: Scene) -> Stage:
    """GRUB's commands, and the files it read."""
    told: list[Statement] = []
    for seen in scene.waiting(8, 9):
        text = seen.text()
        if text is not None:
            shown, label = printable(text, 1024), seen.label()
            data: dict[str, Value] = {"label": label, "text": shown}
            told.append(Statement(f"{label}: {shown}", scene.tell([seen.index]), digested=True, data=data))
        elif (name := _file_name(seen)) is not None:
            sentence = f"A file named {name} was read; digest of its content {seen.digest.hex()}."
            facts: dict[str, Value] = {"file": name, "digest": seen.digest.hex()}
            told.append(Statement(sentence, scene.tell([seen.index]), digested=False, data=facts))
    note = "Texts are under the digest, labels are not. File digests cover contents, not names."
    return Stage("grub", "GRUB: commands and files", note, tuple(told))


def _file_name(seen: Seen) -> str | None:
    if seen.proof is not None or seen.event.data[:1] not in (b"(", b"/"):
        return None
    try:
        return printable(utf8_field(seen.event.data, "file name"), 512)
    except HostileInput:
        return None


def uki(scene: Scene) -> Stage:
    """Sections of a unified kernel image: systemd-stub measures each one's name, then its content."""
    told: list[Statement] = []
    register = register_of(scene.kind, 11)
    events = [seen for seen in scene.events if seen.event.pcr == register]
    for seen, following in pairwise(events):
        section = _section(seen)
        if section is None or _section(following) is not None:
            continue
        digest = following.digest.hex()
        text = f"Section {section}; the next measurement is its content, digest {digest}."
        both = scene.tell([seen.index, following.index])
        told.append(Statement(text, both, digested=True, data={"section": section, "digest": digest}))
    note = "Names are under the digest; contents are not in the log, their digests stand in the same register."
    return Stage("uki", "Unified kernel image", note, tuple(told))


def initrd(scene: Scene) -> Stage:
    """The initrd as the kernel's EFI stub measured it."""
    told: list[Statement] = []
    first = {seen.digest: seen.index for seen in reversed(scene.events)}
    for seen in scene.waiting(9):
        if _tag(seen) != _TAG_INITRD:
            continue
        same = {first[seen.digest]} - {seen.index}
        agrees = f", the same content as in event {first[seen.digest]}" if same else ""
        text = f"The kernel loaded an initrd; digest of its content {seen.digest.hex()}{agrees}."
        events = scene.tell({seen.index} | same)
        told.append(Statement(text, events, digested=False, data={"digest": seen.digest.hex()}))
    return Stage("initrd", "Initial RAM disk", "The label is not under the digest.", tuple(told))
