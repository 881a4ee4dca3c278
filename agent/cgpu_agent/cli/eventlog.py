"""``cgpuctl eventlog``: read any raw TCG log, replay it and tell what it says."""

from __future__ import annotations

import argparse

from cgpu_agent.cli import output
from cgpu_agent.cli.inputs import read_file
from cgpu_agent.errors import HostileInput
from cgpu_agent.verifier.boot import boot_story
from cgpu_agent.verifier.explain_boot import best_bank, to_json
from cgpu_agent.verifier.replay import replay
from cgpu_agent.wire import eventlog
from cgpu_agent.wire.tpm import HASH_SIZES


def run(arguments: argparse.Namespace) -> int:
    data = read_file(arguments.log)
    try:
        log = eventlog.parse(data, kind=arguments.kind)
        if arguments.json:
            output.emit_json(to_json(log))
        else:
            show(log)
    except HostileInput as error:
        if arguments.json:
            output.emit_json({"result": "refused", "reason": {"slug": error.slug, "detail": error.message}})
        output.complain(error)
        return output.EXIT_REFUSED
    return output.EXIT_PASS


def show(log: eventlog.EventLog) -> None:
    """The log for people: PCRs, then the story."""
    kind = "TDX (CCEL)" if log.kind == "ccel" else "TPM"
    output.say(f"{kind} log, {log.format}, {len(log.events)} records, banks {', '.join(log.banks) or 'none'}")
    bank = best_bank(log)
    if bank is None or bank not in HASH_SIZES:
        output.say("no bank of this log can be replayed")
        return
    replayed = replay(log, bank)
    name = "RTMR" if log.kind == "ccel" else "PCR"
    shift = 1 if log.kind == "ccel" else 0
    output.say(f"{name}s after replay ({bank}):")
    output.pairs((f"{index - shift}", value.hex()) for index, value in sorted(replayed.pcrs.items()))
    tell(log, bank)


def tell(log: eventlog.EventLog, bank: str) -> None:
    """The story of a log, stage by stage; a star marks what no digest proves."""
    for stage in boot_story(log, bank).stages:
        output.say()
        output.say(f"{stage.title}{': ' + output.printable(stage.note) if stage.note else ''}")
        for statement in stage.statements:
            output.say(f"  {' ' if statement.digested else '*'} {output.printable(statement.text)}")
    output.say()
    output.say("* = described by the log, not under a digest")
