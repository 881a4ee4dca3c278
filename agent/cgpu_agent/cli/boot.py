"""``cgpuctl boot show``: the boot of this VM, told as a story and compared with its PCRs."""

from __future__ import annotations

import argparse
from pathlib import Path

from cgpu_agent.cli import output
from cgpu_agent.cli.eventlog import tell
from cgpu_agent.cli.inputs import read_file
from cgpu_agent.errors import Misuse, Unavailable
from cgpu_agent.verifier.boot import boot_story
from cgpu_agent.verifier.explain_boot import secure_boot_json, story_json
from cgpu_agent.verifier.logs import explain_registers
from cgpu_agent.wire import cel, eventlog
from cgpu_agent.wire.bundle import MAX_BUNDLE, parse_bundle

_BANK = "sha256"


def _from_bundle(path: Path) -> tuple[dict[int, bytes], bytes | None, bytes | None, bytes]:
    bundle = parse_bundle(read_file(path, MAX_BUNDLE + 1))
    return dict(bundle.pcrs), bundle.boot_log, bundle.systemd_log, bundle.agent_log


def _from_agent(socket: str | None) -> tuple[dict[int, bytes], bytes | None, bytes | None, bytes]:
    # Reading a bundle must not need grpc.
    from cgpu_agent.client import Agent  # noqa: PLC0415

    with Agent(socket) as agent:
        logs: list[bytes | None] = []
        for kind in ("boot", "systemd"):
            try:
                logs.append(agent.get_event_log(kind))
            except Unavailable as error:
                if error.slug != "LOG_ABSENT":
                    raise
                logs.append(None)
        return agent.read_pcrs(), logs[0], logs[1], agent.get_event_log("agent")


def run(arguments: argparse.Namespace) -> int:
    source = _from_agent(arguments.socket) if arguments.bundle is None else _from_bundle(arguments.bundle)
    pcrs, boot, systemd, agent = source
    if boot is None:
        raise Misuse("NO_BOOT_LOG", "this machine hands over no firmware log; cgpuctl doctor says what to check")
    log = eventlog.parse(boot, kind="tpm")
    registers = explain_registers(
        pcrs, log, cel.parse_systemd_log(systemd or b""), cel.parse_agent_log(agent)
    ).results
    bad = any(found.status in ("mismatch", "uncompared") for found in registers.values())
    code = output.EXIT_REFUSED if bad else output.EXIT_PASS
    if arguments.json:
        story = boot_story(log, _BANK)
        output.emit_json(
            {
                "secure_boot": story.secure_boot.state,
                "secure_boot_detail": secure_boot_json(story.secure_boot),
                "stages": story_json(story),
                "pcrs": {str(i): {"status": r.status, "note": r.note} for i, r in sorted(registers.items())},
            }
        )
        return code
    tell(log, _BANK)
    output.say()
    output.say("PCRs:")
    for index, found in sorted(registers.items()):
        if found.status != "untouched":
            kind = {"explained": "ok", "unexplained": "warn"}.get(found.status, "fail")
            note = f"  {output.printable(found.note)}" if found.note else ""
            output.say(f"  {index:>2}  {output.coloured(found.status.ljust(11), kind)}{note}")
    return code
