"""The firmware's part of the story: its version and volumes, Secure Boot, boot entries, the disk, the hand-over."""

from __future__ import annotations

import hashlib
import re
import uuid
from typing import Final

from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.bootscene import Scene, Seen, Stage, Statement, Value, readable
from cgpu_agent.verifier.replay import EXIT_BOOT_SERVICES
from cgpu_agent.verifier.secureboot import SEPARATORS, Authority, KeyDatabase, SecureBoot
from cgpu_agent.wire.devicepath import parse_load_option
from cgpu_agent.wire.eventtypes import (
    EV_EFI_PLATFORM_FIRMWARE_BLOB,
    EV_EFI_PLATFORM_FIRMWARE_BLOB2,
    EV_S_CRTM_VERSION,
    type_name,
)
from cgpu_agent.wire.text import printable
from cgpu_agent.wire.uefi import GLOBAL_VARIABLE, Variable, parse_firmware_blob, parse_gpt, parse_tag

_BOOT_ENTRY: Final = re.compile(r"Boot[0-9A-F]{4}")
_BLOBS: Final = (EV_EFI_PLATFORM_FIRMWARE_BLOB, EV_EFI_PLATFORM_FIRMWARE_BLOB2)


def firmware(scene: Scene) -> Stage:
    """CRTM version, firmware volumes, and the separators that close firmware's registers."""
    told: list[Statement] = []
    for seen in scene.waiting(0, 1):
        if seen.event.claimed_type == EV_S_CRTM_VERSION and seen.event.pcr == 0:
            told.append(_crtm(scene, seen))
        elif seen.event.claimed_type in _BLOBS:
            told.append(_volume(scene, seen))
    told += _separators(scene)
    note = "Volumes are hashed in memory: their addresses are the firmware's words, their digests are measured."
    return Stage("firmware", "Firmware", note, tuple(told))


def _crtm(scene: Scene, seen: Seen) -> Statement:
    data = seen.event.data
    if not any(data):
        version = "empty"
    elif len(data) == 16:
        version = str(uuid.UUID(bytes_le=data))
    else:
        version = readable(data) or data[:32].hex()
    text = f"Labelled as the version of the root of trust (CRTM): {version}."
    return Statement(text, scene.tell([seen.index]), seen.whole, {"crtm_version": version})


def _volume(scene: Scene, seen: Seen) -> Statement:
    facts: dict[str, Value] = {"digest": seen.digest.hex()}
    where = "at an unreadable place"
    try:
        blob = parse_firmware_blob(seen.event.data)
    except HostileInput:
        pass
    else:
        facts |= {"base": blob.base, "length": blob.length, "description": printable(blob.description, 128)}
        where = f"at 0x{blob.base:x}, {blob.length} bytes"
    text = f"A firmware volume {where}, was measured as {seen.digest.hex()}."
    return Statement(text, scene.tell([seen.index]), digested=False, data=facts)


def _separators(scene: Scene) -> list[Statement]:
    digests = {hashlib.new(scene.bank, value).digest() for value in SEPARATORS}
    found = [seen for seen in scene.waiting() if seen.digest in digests]
    if not found:
        return []
    names = ", ".join(dict.fromkeys(scene.register(seen.event) for seen in found))
    text = f"The firmware ended its own part in {names} with a separator."
    return [Statement(text, scene.tell(seen.index for seen in found), digested=True)]


def secure_boot_stage(scene: Scene, state: SecureBoot) -> Stage:
    """The verdict of ``secureboot`` in sentences."""
    rests_on = [index for index in (state.event, state.separator) if index is not None]
    text = f"Secure Boot is {state.state}: {state.reason}."
    data: dict[str, Value] = {"state": state.state, "reason": state.reason}
    told = [Statement(text, scene.tell(rests_on), state.state != "unknown", data)]
    for name, database in (("PK", state.pk), ("KEK", state.kek), ("db", state.db), ("dbx", state.dbx)):
        if database is not None:
            told.append(_database(scene, name, database))
    told += [_authority(scene, authority) for authority in state.authorities]
    # Some warn of what the log does not show; absence is never under a digest.
    told += [Statement(f"Mind: {warning}.", tuple(rests_on), digested=False) for warning in state.warnings]
    note = (
        "Holds where the register's quoted value equals the replay of this log. "
        "Any software may extend it after the separator: an authority named there may be an addition."
    )
    return Stage("secure-boot", "Secure Boot and its keys", note, tuple(told))


def _database(scene: Scene, name: str, database: KeyDatabase) -> Statement:
    subjects = "; ".join(each.subject or each.sha256 for each in database.certificates[:16])
    text = f"{name}: certificates {len(database.certificates)}{f' ({subjects})' if subjects else ''}"
    text += f", hashes {database.hashes}, other signatures {database.others}."
    facts: dict[str, Value] = {
        "variable": name,
        "certificates": len(database.certificates),
        "hashes": database.hashes,
    }
    return Statement(text, scene.tell([database.event]), digested=True, data=facts)


def _authority(scene: Scene, authority: Authority) -> Statement:
    what = "rule"
    if authority.certificate is not None:
        what = f"certificate {authority.certificate.subject or authority.certificate.sha256}"
    elif authority.text is not None:
        what = f"value {authority.text}"
    when = "a driver, before the hand-over" if authority.before_separator else "an image or rule"
    text = f"Authority used for {when}: {authority.variable}, {what}."
    facts: dict[str, Value] = {
        "variable": authority.variable,
        "certificate_sha256": None if authority.certificate is None else authority.certificate.sha256,
    }
    return Statement(text, scene.tell([authority.event]), authority.proven, facts)


def boot_order(scene: Scene) -> Stage:
    """BootOrder and the Boot#### entries."""
    told: list[Statement] = []
    for seen in scene.waiting(1, 5):
        variable = seen.variable()
        if variable is None or variable.guid != GLOBAL_VARIABLE:
            continue
        if variable.name == "BootOrder":
            text, facts = _order(variable)
        elif _BOOT_ENTRY.fullmatch(variable.name):
            text, facts = _entry(variable)
        else:
            continue
        value_proven = seen.proof is not None
        facts["value_proven"] = value_proven
        told.append(Statement(text, scene.tell([seen.index]), seen.whole, facts))
    note = "Firmware digests these values without their names: a value may be proven where its name is not."
    return Stage("boot-order", "Boot order and entries", note, tuple(told))


def _order(variable: Variable) -> tuple[str, dict[str, Value]]:
    numbers = [variable.data[i : i + 2] for i in range(0, len(variable.data), 2)]
    order = ", ".join(f"Boot{int.from_bytes(number, 'little'):04X}" for number in numbers[:64])
    return f"Boot order: {order or 'empty'}.", {"boot_order": order}


def _entry(variable: Variable) -> tuple[str, dict[str, Value]]:
    try:
        option = parse_load_option(variable.data)
    except HostileInput:
        return f"{variable.name} cannot be read.", {"entry": variable.name}
    description, path = printable(option.description, 128), printable(option.path.text, 512)
    state = "" if option.active else " (not active)"
    text = f"{variable.name}{state} is {description}, at {path or 'no path'}."
    return text, {"entry": variable.name, "description": description, "path": path, "active": option.active}


def disk(scene: Scene) -> Stage:
    """The partition table firmware booted from."""
    told: list[Statement] = []
    for seen in scene.waiting(5):
        if not seen.event.data.startswith(b"EFI PART"):
            continue
        facts: dict[str, Value] = {}
        try:
            table = parse_gpt(seen.event.data)
        except HostileInput:
            text = "A partition table was measured that cannot be read."
        else:
            names = "; ".join(
                f"{printable(part.name, 72) or 'unnamed'} {part.unique} (type {part.type})"
                for part in table.partitions[:32]
            )
            text = f"The boot disk {table.disk} has these partitions: {names or 'none'}."
            facts = {"disk": str(table.disk), "partitions": len(table.partitions)}
        told.append(Statement(text, scene.tell([seen.index]), seen.whole, facts))
    return Stage("disk", "Disk", "", tuple(told))


def exit_boot_services(scene: Scene) -> Stage:
    """Where firmware's services end and the kernel takes over."""
    texts = {hashlib.new(scene.bank, text).digest(): text.decode() for text in EXIT_BOOT_SERVICES}
    told = [
        Statement(f"{texts[seen.digest]}.", scene.tell([seen.index]), digested=True)
        for seen in scene.waiting(5)
        if seen.digest in texts
    ]
    if not told:
        told = [Statement("The log does not show that firmware handed over to a kernel.", (), digested=False)]
    return Stage("exit-boot-services", "Hand-over to the kernel", "", tuple(told))


def other(scene: Scene) -> Stage:
    """Every event no stage understood, so that nothing is left out."""
    told: list[Statement] = []
    for seen in scene.waiting():
        data = seen.event.data if seen.proof is None else seen.proof.proven
        content, name = _content(data), type_name(seen.event.claimed_type)
        shown = f"{len(data)} bytes" if content is None else f"“{content}”"
        text = f"{scene.register(seen.event)}: {shown}, labelled {name}, digest {seen.digest.hex()}."
        facts: dict[str, Value] = {"claimed_type": name, "content": content, "digest": seen.digest.hex()}
        told.append(Statement(text, scene.tell([seen.index]), seen.proof is not None, facts))
    note = "Measured, but not understood by any stage above."
    return Stage("other", "Other measurements", note, tuple(told))


def _content(data: bytes) -> str | None:
    try:
        return readable(parse_tag(data).data)
    except HostileInput:
        return readable(data)
