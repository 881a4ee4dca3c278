"""``cgpuctl gpu list|attest|watch``: the GPUs of this VM, as its agent sees them."""

from __future__ import annotations

import argparse

from google.protobuf.json_format import MessageToDict

from cgpu_agent.api.v1 import gpus_pb2
from cgpu_agent.cli import output
from cgpu_agent.client import Agent

pb = gpus_pb2

_KINDS = {"ready": "ok", "none": "warn", "not_ready": "fail"}
_PHASES = {"trusted": "ok", "rejected": "fail", "lost": "fail"}


def run(arguments: argparse.Namespace) -> int:
    with Agent(arguments.socket) as agent:
        if arguments.verb == "watch":
            for found in agent.watch_gpus():
                tell(found, json=arguments.json)
            return output.EXIT_PASS
        found = agent.attest_gpus() if arguments.verb == "attest" else agent.list_gpus()
    tell(found, json=arguments.json)
    return output.EXIT_PASS if found.state == pb.GPU_SET_STATE_READY else output.EXIT_REFUSED


def tell(found: pb.GpuSet, *, json: bool) -> None:
    """The GPUs, for programs or for people."""
    if json:
        output.emit_json(document(found))
        return
    state = _state(found)
    why = f": {output.printable(found.message)} [{output.printable(found.reason)}]" if found.reason else ""
    busy = ", attesting" if found.attesting else ""
    word = output.coloured(state.replace("_", " "), _KINDS.get(state, "warn"))
    output.say(f"{word}{why} (backend {output.printable(found.backend)}, epoch {found.trust_epoch}{busy})")
    for gpu in found.gpus:
        _show(gpu)


def document(found: pb.GpuSet) -> dict[str, object]:
    """The GPUs as JSON: names as in the protos, enums as short words."""
    made: dict[str, object] = MessageToDict(
        found, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    made["trust_epoch"] = found.trust_epoch
    made["state"] = _state(found)
    gpus = [
        MessageToDict(gpu, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        for gpu in found.gpus
    ]
    made["gpus"] = [{**each, "phase": _phase(gpu)} for each, gpu in zip(gpus, found.gpus, strict=True)]
    return made


def _state(found: pb.GpuSet) -> str:
    return pb.GpuSetState.Name(found.state).removeprefix("GPU_SET_STATE_").lower()


def _phase(gpu: pb.Gpu) -> str:
    return pb.GpuPhase.Name(gpu.phase).removeprefix("GPU_PHASE_").lower()


def _show(gpu: pb.Gpu) -> None:
    phase = _phase(gpu)
    output.say(f"{output.coloured(phase, _PHASES.get(phase, 'warn'))}  {output.printable(gpu.uuid)} at {gpu.bdf}")
    rows = [("device", f"{gpu.model}, driver {gpu.driver}, firmware {gpu.vbios}")]
    if gpu.reason:
        rows.append(("why", f"{gpu.message} [{gpu.reason}]"))
    if phase == "trusted":
        rows.append(("verdict", f"ueid {gpu.ueid}, valid for {int(gpu.valid_seconds)} s"))
    if gpu.simulated:
        rows.append(("simulated", "yes: it protects nothing"))
    words = [
        f"confidential computing {_word(gpu.cc if gpu.HasField('cc') else None)} ({gpu.cc_environment or 'unknown'})",
        f"developer tools {_word(gpu.dev_tools if gpu.HasField('dev_tools') else None)}",
        f"multi-GPU mode {gpu.multi_gpu}",
    ]
    rows.append(("mode", ", ".join(words)))
    output.pairs(rows)


def _word(flag: bool | None) -> str:
    return "unknown" if flag is None else "on" if flag else "off"
