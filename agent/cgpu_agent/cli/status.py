"""``cgpuctl status``: what the agent is doing, from its admin socket."""

from __future__ import annotations

import argparse

from google.protobuf.json_format import MessageToDict

from cgpu_agent.api.v1 import admin_pb2
from cgpu_agent.cli import output
from cgpu_agent.client import Admin

_STATE_KIND = {"serving": "ok", "degraded": "warn", "starting": "warn", "refusing": "fail", "stopping": "warn"}


def run(arguments: argparse.Namespace) -> int:
    admin = Admin(arguments.socket)
    try:
        found = admin.get_status()
    finally:
        admin.close()
    state = admin_pb2.State.Name(found.state).removeprefix("STATE_").lower()
    if arguments.json:
        document = MessageToDict(found, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        output.emit_json({**document, "state": state})
        return output.EXIT_PASS if state in ("serving", "degraded") else output.EXIT_REFUSED
    output.say(f"{output.coloured(state, _STATE_KIND.get(state, 'warn'))}: {output.printable(found.status_line)}")
    rows = [
        ("version", f"{found.version}, up {int(found.uptime_seconds)} s"),
        ("identity", f"callers identified by {found.identity_strength}"),
        ("agent log", f"{found.agent_log_records} records in PCR {found.agent_register}"),
        (
            "callers",
            (
                f"{found.door.open} connected, {found.door.accepted} accepted; "
                f"{found.door.refused_by_limit} over limits, {found.door.cut_dead} cut after their process died, "
                f"{found.door.unidentified} unidentified"
            ),
        ),
    ]
    if found.HasField("tpm"):
        rows += [
            ("TPM", f"{found.tpm.manufacturer}, reset {found.tpm.reset_count}, restart {found.tpm.restart_count}"),
            ("platform AK", f"{found.tpm.platform_ak_name} ({found.tpm.platform_ak_endorsement})"),
            ("agent AK", found.tpm.agent_ak_name),
        ]
    output.pairs(rows)
    for problem in found.problems:
        output.say(f"  {output.coloured('problem', 'warn')}  {output.printable(problem.message)} [{problem.reason}]")
        output.say(f"           -> {output.printable(problem.remedy)}")
    return output.EXIT_PASS if state in ("serving", "degraded") else output.EXIT_REFUSED
