"""The boot as a story: ordered stages, each sentence with the events that carry it and whether a digest proves it.

Concluded from bytes under a digest wherever there are any; where there are none, a sentence says so by ``digested``
being false. The story holds only for a log whose replay equals the quoted registers (see ``replay.compare``).
"""

from __future__ import annotations

from cgpu_agent.verifier import bootfirmware, bootloader
from cgpu_agent.verifier.bootscene import BootStory, Scene, Stage, Statement
from cgpu_agent.verifier.secureboot import SecureBoot, secure_boot
from cgpu_agent.wire.eventlog import EventLog

__all__ = ["BootStory", "SecureBoot", "Stage", "Statement", "boot_story", "secure_boot"]


def boot_story(log: EventLog, bank: str) -> BootStory:
    """Tell the boot from one bank of a log. Every measured event appears in at least one statement.

    Raises:
        HostileInput: ``MISSING_BANK`` when the log has not got ``bank`` for every measured event, or it cannot be
            computed. Events that cannot be read never raise; they are told as such.
    """
    state = secure_boot(log, bank)
    scene = Scene(log, bank)
    # The order of a boot, but the command line is taken before GRUB's other texts, and the rest comes last.
    firmware = bootfirmware.firmware(scene)
    keys = bootfirmware.secure_boot_stage(scene, state)
    order = bootfirmware.boot_order(scene)
    disk = bootfirmware.disk(scene)
    chain = bootloader.loader_chain(scene)
    mok = bootloader.mok(scene)
    line = bootloader.kernel_command_line(scene)
    grub = bootloader.grub(scene)
    stages = (
        *(firmware, keys, order, disk, chain, mok, grub),
        *(bootloader.uki(scene), line, bootloader.initrd(scene), bootfirmware.exit_boot_services(scene)),
        bootfirmware.other(scene),
    )
    proven = frozenset(seen.index for seen in scene.events if seen.whole)
    return BootStory(log.kind, bank, state, tuple(stage for stage in stages if stage.statements), proven)
