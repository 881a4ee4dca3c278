"""``cgpuctl verify``: judge an evidence bundle offline."""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509

from cgpu_agent.cli import appraise, output
from cgpu_agent.cli.inputs import parse_hex, parse_time, read_file
from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.verifier.certificate import load_trusted
from cgpu_agent.verifier.coverage import Coverage
from cgpu_agent.verifier.evidence import EvidenceResult, RelyingParty, verify_evidence
from cgpu_agent.verifier.gpucapability import NOT_COVERED
from cgpu_agent.verifier.gpufacts import gpu_claims
from cgpu_agent.verifier.platformcase import PlatformParty
from cgpu_agent.verifier.platformfloor import parse_floors
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.bundle import MAX_BUNDLE

if TYPE_CHECKING:
    from cgpu_agent.verifier.gpucase import DeviceResult, GpuParty

_GPU_OPTIONS: Final = (
    *("collateral", "rim", "crl", "ocsp", "max_age", "device_root", "rim_root"),
    *("min_driver", "min_vbios", "min_switch_bios"),
    *("require_revocation", "require_fwid", "allow_no_rim", "allow_rim_hold"),
)


def run(arguments: argparse.Namespace) -> int:
    party = party_of(arguments)
    judge = appraise.Judge.of(arguments)
    result = verify_evidence(read_file(arguments.bundle, MAX_BUNDLE + 1), party)
    appraisal = judge.appraise(result)
    if arguments.json:
        output.emit_json({**to_json(result, appraisal.coverage), "appraisal": appraisal.to_json()})
    else:
        show(result, appraisal.coverage)
        judge.show(appraisal, explain=arguments.explain)
    judge.write(appraisal, arguments, at=party.at, gaps=not_proven(result, appraisal.coverage))
    return output.EXIT_PASS if result.accepted and judge.lets_pass(appraisal) else output.EXIT_REFUSED


def party_of(arguments: argparse.Namespace) -> RelyingParty:
    """The relying party that a command line describes."""
    at = parse_time(arguments.at)
    snp_floor, tdx_floor = parse_floors(arguments.floor)
    return RelyingParty(
        audience=arguments.audience,
        nonce=parse_hex(arguments.nonce, "--nonce"),
        at=at,
        roots=_certificates(arguments.ak_root),
        simulated_roots=_certificates(arguments.simulated_ak_root),
        intermediates=_certificates(arguments.ak_intermediate),
        pinned_names=frozenset(parse_hex(name, "--ak-name") for name in arguments.ak_name),
        allow_unendorsed=arguments.allow_unendorsed,
        allow_no_boot_log=arguments.allow_no_boot_log,
        register=arguments.register,
        user_data=None if arguments.user_data is None else parse_hex(arguments.user_data, "--user-data"),
        public_key=None if arguments.public_key is None else read_file(arguments.public_key, 8192),
        platform_party=PlatformParty(at=at, snp_floor=snp_floor, tdx_floor=tdx_floor),
        gpu_count=arguments.gpus,
        gpu_party=_gpu_party(arguments, at),
    )


def _gpu_party(arguments: argparse.Namespace, at: datetime) -> GpuParty | None:
    """What is demanded of GPUs; ``None`` where no option speaks of it: then nothing for GPUs need be installed."""
    options = [getattr(arguments, name) for name in _GPU_OPTIONS]
    if not any(option is not None and option is not False and option != [] for option in options):
        return None
    from cgpu_agent.cli import gpudemands  # noqa: PLC0415

    return gpudemands.party_of(arguments, at=at)


def _certificates(paths: list[Path]) -> list[x509.Certificate]:
    found: list[x509.Certificate] = []
    for path in paths:
        try:
            found += load_trusted(read_file(path, 1 << 20))
        except HostileInput as error:
            raise Misuse("BAD_CERTIFICATE", f"{path}: {error.message}") from error
    return found


def to_json(result: EvidenceResult, coverage: Coverage | None = None) -> dict[str, object]:
    """The verdict for programs: claims that are *signed* apart from what the agent merely *reports*."""
    statement, manifest = result.statement, result.manifest
    refusal = result.refusal
    return {
        "result": "pass" if result.accepted else "refused",
        "reason": None if refusal is None else {"step": refusal.id, "slug": refusal.slug, "detail": refusal.detail},
        "steps": [step.to_json() for step in result.steps],
        "quote_steps": [step.to_json() for step in result.quote_steps],
        "endorsement": None if result.endorsement is None else result.endorsement.to_json(),
        "hardware": None if result.hardware is None else result.hardware.to_json(),
        "pcrs": {
            str(index): {"status": found.status, "note": found.note, "value": (found.actual or b"").hex()}
            for index, found in sorted(result.registers.items())
        },
        "signed": {"secure_boot": None if result.secure_boot is None else result.secure_boot.state},
        "gpus": _gpus_json(result),
        "simulated": result.simulated,
        "reported": None
        if statement is None or manifest is None
        else {
            "agent": dict(manifest.agent),
            "audience": statement.audience,
            "boot_id": statement.boot_id,
            "caller": dict(statement.caller),
            "missing": [{"part": part, "reason": reason} for part, reason in manifest.missing],
            "purpose": statement.purpose,
            "release": None if statement.release is None else statement.release.to_json(),
            "time": statement.time,
            "vm_generation": manifest.vm_generation,
            "gpus": None if manifest.gpus is None else manifest.gpus.to_json(),
        },
        "agent_log": [
            {"author": record.author, "content": strictjson.loads(record.content, "record", 4096)}
            for record in result.records
        ],
        "not_proven": not_proven(result, coverage),
    }


def not_proven(result: EvidenceResult, coverage: Coverage | None = None) -> list[str]:
    """What an accepted bundle does not show, in words. ``coverage`` is what measures the agent, where it is known."""
    if not result.accepted:
        return []
    gaps = []
    if result.endorsement is not None and result.endorsement.simulated:
        gaps.append("that this is a real TPM: a simulator's root vouches for it")
    if result.simulated_gpus:
        gaps.append("that these are real GPUs: a root other than NVIDIA's vouches for them")
    hardware = () if result.hardware is None else result.hardware.warnings
    gaps += [
        f"hardware: {step.detail}" for step in hardware if step.slug not in ("NO_AK_CERTIFICATE", "NO_PCR_VALUES")
    ]
    gaps += [step.detail for step in result.steps if step.outcome.value == "skip" and step.slug != "NOT_ASKED"]
    gaps += _gpu_gaps(result)
    gaps += [
        f"PCR {index}: {found.note}"
        for index, found in sorted(result.registers.items())
        if found.status == "unexplained"
    ]
    if result.secure_boot is not None and result.secure_boot.state == "disabled":
        gaps.append(f"Secure Boot disabled: {result.secure_boot.reason}")
    kind = "nothing" if coverage is None else coverage.kind
    if kind != "verity-root":
        measured = "nothing here measures that" if kind == "nothing" else "only its programs in /usr are measured"
        gaps.append(
            "what the agent itself says (caller, configuration, time) is as good as the file system it runs from; "
            f"{measured}"
        )
    return gaps


def _gpu_line(device: DeviceResult) -> str:
    claims = gpu_claims(device)
    names = ("hwmodel", "device_id", "driver", "vbios")
    return ", ".join(f"{name.replace('_', ' ')} {claims.get(name) or 'unknown'}" for name in names)


def _gpus_json(result: EvidenceResult) -> dict[str, object] | None:
    if result.gpus is None:
        return None
    from cgpu_agent.verifier.gpureport import set_json  # noqa: PLC0415

    return set_json(result.gpus)


def _gpu_gaps(result: EvidenceResult) -> list[str]:
    if result.gpus is None:
        return []
    from cgpu_agent.verifier.gpureport import warnings  # noqa: PLC0415

    return [*(f"GPUs: {step.detail}" for step in warnings(result.gpus)), *(text for _, text in NOT_COVERED)]


def show(result: EvidenceResult, coverage: Coverage | None = None) -> None:
    """The verdict for people."""
    output.steps(result.steps)
    output.say()
    refusal = result.refusal
    if refusal is not None:
        output.say(
            f"{output.coloured('REFUSED', 'fail')} at step {refusal.number}, {refusal.title}: "
            f"{output.printable(refusal.detail)} [{refusal.slug}]"
        )
        if refusal.slug == "UNENDORSED":
            output.say("  name a trusted root (--ak-root; a simulator's: --simulated-ak-root), an AK you enrolled")
            output.say("  (--ak-name), or accept it all the same (--allow-unendorsed)")
        return
    output.say(output.coloured("ACCEPTED", "ok"))
    rows: list[tuple[str, str]] = []
    if result.statement is not None:
        caller = result.statement.caller
        unit = caller["unit"] or caller["container"] or "no unit"
        who = f"uid {caller['uid']}, pid {caller['pid']}, {unit} (identified by {caller['identity_strength']})"
        rows += [("caller", who), ("audience", result.statement.audience)]
    if result.endorsement is not None:
        rows.append(("AK", result.endorsement.detail))
    if result.gpus is not None:
        rows += [("GPU", _gpu_line(device)) for device in result.gpus.devices]
    if result.simulated:
        rows.append(("simulated", "true"))
    output.pairs(rows)
    output.say("  not proven:")
    for gap in not_proven(result, coverage):
        output.say(f"    - {output.printable(gap)}")
