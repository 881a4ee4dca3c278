"""``cgpuctl gpu verify``: judge the attestation of GPUs and NVSwitches offline."""

from __future__ import annotations

import argparse
import re

from cgpu_agent.cli import output
from cgpu_agent.cli.gpudemands import party_of
from cgpu_agent.cli.inputs import parse_hex, parse_time, read_file
from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.verifier.gpucapability import NOT_COVERED, Architecture
from cgpu_agent.verifier.gpucase import DeviceEvidence, DeviceResult
from cgpu_agent.verifier.gpueat import eat
from cgpu_agent.verifier.gpureport import set_json, warnings
from cgpu_agent.verifier.gpuset import SetResult, verify_devices
from cgpu_agent.wire.gpuevidence import MAX_EVIDENCE, EvidenceItem, parse_evidence

_HEX = re.compile(rb"\s*[0-9A-Fa-f\s]+")


def run(arguments: argparse.Namespace) -> int:
    party = party_of(
        arguments,
        at=parse_time(arguments.at),
        nonce=None if arguments.nonce is None else parse_hex(arguments.nonce, "--nonce"),
        architecture=None if arguments.arch is None else Architecture(arguments.arch),
    )
    try:
        evidence = evidence_of(arguments)
        result = verify_devices(evidence, party, expected_gpus=arguments.gpus)
    except HostileInput as error:
        if arguments.json:
            reason = {"detail": error.message, "slug": error.slug, "step": None}
            output.emit_json({"devices": [], "reason": reason, "result": "refused", "steps": []})
        output.complain(error)
        return output.EXIT_REFUSED
    if arguments.eat:
        output.emit_json(eat(result, party.at))
    elif arguments.json:
        output.emit_json(set_json(result))
    else:
        show(result)
    return output.EXIT_PASS if result.accepted else output.EXIT_REFUSED


def evidence_of(arguments: argparse.Namespace) -> list[DeviceEvidence]:
    """What ``--report`` and ``--chain``, or ``--evidence`` hold. Raises ``Misuse``, and as ``parse_evidence``."""
    if arguments.evidence:
        if arguments.report is not None or arguments.chain is not None:
            raise Misuse("BAD_ARGUMENT", "--evidence holds reports and chains: give no others")
        lists = [parse_evidence(read_file(path, MAX_EVIDENCE + 1)) for path in arguments.evidence]
        return [_item(item) for items in lists for item in items]
    if arguments.report is None or arguments.chain is None:
        raise Misuse("BAD_ARGUMENT", "give --report and --chain, or --evidence")
    report = _report(read_file(arguments.report, 1 << 20))
    return [DeviceEvidence(report, read_file(arguments.chain, 1 << 20))]


def _item(item: EvidenceItem) -> DeviceEvidence:
    claims = {"nonce": item.nonce, "driver": item.driver, "vbios": item.vbios}
    return DeviceEvidence(
        item.report,
        item.chain,
        Architecture(item.arch.lower()),
        {name: value for name, value in claims.items() if value is not None},
    )


def _report(data: bytes) -> bytes:
    """Hex or raw bytes: a raw report has bytes that hex does not, its header among them."""
    return bytes.fromhex(data.decode("ascii")) if _is_hex(data) else data


def _is_hex(data: bytes) -> bool:
    return _HEX.fullmatch(data) is not None and len(b"".join(data.split())) % 2 == 0


def show(result: SetResult) -> None:
    """The verdict for people."""
    for number, device in enumerate(result.devices):
        output.say(f"device {number}")
        output.steps(device.steps)
    output.say("all together")
    output.steps(result.steps)
    output.say()
    refusal = result.refusal
    if refusal is not None:
        word = output.coloured(result.result.upper(), "fail")
        output.say(f"{word}: {output.printable(refusal.detail)} [{refusal.slug}]")
        if refusal.slug == "NO_RIM":
            output.say("  bring NVIDIA's reference values (--rim, --collateral), or say --allow-no-rim")
        return
    output.say(output.coloured("PASS", "ok"))
    for device in result.devices:
        _show_device(device)
    output.say("  not proven:")
    for text in [*(step.detail for step in warnings(result)), *(text for _, text in NOT_COVERED)]:
        output.say(f"    - {output.printable(text)}")


def _show_device(device: DeviceResult) -> None:
    facts = device.facts
    if facts is None:
        return
    rows = [("device", f"{facts.identity.hwmodel}, {facts.identity.device_id}, ueid {facts.identity.ueid}")]
    rows.append(("versions", f"driver {facts.driver or 'none'}, firmware {facts.vbios or 'unknown'}"))
    if device.capabilities is not None:
        words = device.capabilities.to_json().items()
        rows.append(("can protect", ", ".join(f"{name.replace('_', ' ')}: {word}" for name, word in words)))
    if facts.simulated:
        rows.append(("simulated", "yes: not NVIDIA's root, so not an NVIDIA device"))
    output.pairs(rows)
