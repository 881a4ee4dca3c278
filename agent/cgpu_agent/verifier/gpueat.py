"""The verdict in the claims of NVIDIA's attestation tokens (version 3.0), so that policies written for those apply.

Claims sets only: nothing is signed here, and ``iss`` does not pretend to be NVIDIA. Each true claim stands for a step
that passed. ``secboot`` and ``dbgstat`` are there because NVIDIA sends them; like there, they only repeat ``measres``
and say nothing of confidential-computing or developer-tools mode.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import Final

from cgpu_agent.verifier.gpucapability import NOT_COVERED
from cgpu_agent.verifier.gpucase import DeviceResult
from cgpu_agent.verifier.gpumeasure import Source
from cgpu_agent.verifier.gpuset import SetResult
from cgpu_agent.verifier.revocation import CertificateStatus
from cgpu_agent.wire import strictjson

ISSUER: Final = "cgpu-verifier"
LIFETIME: Final = timedelta(hours=1)
VERSION: Final = "3.0"


def eat(result: SetResult, at: datetime, issuer: str = ISSUER) -> list[object]:
    """The shape of a detached EAT: overall claims, then the claims of each device by name (``GPU-0``, ``SWITCH-0``).

    A submodule's digest is SHA-256 over its claims as compact JSON with sorted keys.

    Args:
        result: the verdict.
        at: the moment of judgement, which becomes ``iat``.
        issuer: who judged.
    """
    devices = {name: _device(device, at, issuer) for name, device in _named(result.devices)}
    digests = {name: hashlib.sha256(strictjson.dumps(claims)).hexdigest() for name, claims in devices.items()}
    overall: dict[str, object] = {
        **_token(issuer, at, "".join(digests.values())),
        "eat_nonce": _nonce(result.devices),
        "sub": "NVIDIA-PLATFORM-ATTESTATION",
        "submods": {name: ["DIGEST", ["SHA-256", digest]] for name, digest in digests.items()},
        "x-cgpu-not-covered": [word for word, _ in NOT_COVERED],
        "x-nvidia-overall-att-result": result.accepted,
        "x-nvidia-ver": VERSION,
    }
    return [overall, devices]


def _named(devices: Sequence[DeviceResult]) -> list[tuple[str, DeviceResult]]:
    counts = {"GPU": 0, "SWITCH": 0}
    named: list[tuple[str, DeviceResult]] = []
    for device in devices:
        kind = "SWITCH" if device.facts is not None and device.facts.architecture.is_switch else "GPU"
        named.append((f"{kind}-{counts[kind]}", device))
        counts[kind] += 1
    return named


def _nonce(devices: Sequence[DeviceResult]) -> str | None:
    nonces = {None if device.facts is None else device.facts.nonce.hex() for device in devices}
    return nonces.pop() if len(nonces) == 1 else None


def _token(issuer: str, at: datetime, content: str) -> dict[str, object]:
    issued = int(at.timestamp())
    identifier = hashlib.sha256(f"cgpu/eat/1\0{issued}\0{content}".encode()).hexdigest()
    return {
        "exp": issued + int(LIFETIME.total_seconds()),
        "iat": issued,
        "iss": issuer,
        "jti": identifier[:32],
        "nbf": issued,
    }


def _device(device: DeviceResult, at: datetime, issuer: str) -> dict[str, object]:
    facts = device.facts
    compared = device.comparison is not None
    measured = device.passed("gpu.measurements") and device.accepted
    claims: dict[str, object] = {
        **_token(issuer, at, "" if facts is None else facts.identity.ueid + facts.nonce.hex()),
        "eat_nonce": None if facts is None else facts.nonce.hex(),
        "hwmodel": None if facts is None else facts.identity.hwmodel,
        "measres": "success" if measured else ("fail" if compared or not device.accepted else "not-run"),
        "oemid": _oemid(device),
        "ueid": None if facts is None else facts.identity.ueid,
        "x-cgpu-simulated": None if facts is None else facts.simulated,
        "x-nvidia-attestation-warning": _warning(device),
    }
    if measured:
        claims |= {"dbgstat": "disabled", "secboot": True}
    return claims | (_switch(device) if facts is not None and facts.architecture.is_switch else _gpu(device))


def _oemid(device: DeviceResult) -> str | None:
    verified = [judged.verified.rim.manufacturer for judged in device.rims.values() if judged.verified is not None]
    return verified[0] if verified else None


def _warning(device: DeviceResult) -> str | None:
    held = [each.subject for found in device.revocation.values() for each in found if each.on_hold]
    return f"certificate on hold: {held[0]}" if held else None


def _gpu(device: DeviceResult) -> dict[str, object]:
    prefix = "x-nvidia-gpu-"
    facts = device.facts
    conflict = device.refusal is not None and device.refusal.slug == "RIM_INDEX_CONFLICT"
    return {
        **_report(device, prefix),
        f"{prefix}driver-version": None if facts is None else facts.driver,
        f"{prefix}vbios-version": None if facts is None else facts.vbios,
        f"{prefix}vbios-index-no-conflict": device.comparison is not None and not conflict,
        **_rim(device, "driver", f"{prefix}driver-rim-", "gpu.driver-rim"),
        **_rim(device, "firmware", f"{prefix}vbios-rim-", "gpu.firmware-rim"),
    }


def _switch(device: DeviceResult) -> dict[str, object]:
    prefix = "x-nvidia-switch-"
    return {
        **_report(device, prefix),
        f"{prefix}bios-version": None if device.facts is None else device.facts.vbios,
        **_rim(device, "firmware", f"{prefix}bios-rim-", "gpu.firmware-rim"),
    }


def _report(device: DeviceResult, prefix: str) -> dict[str, object]:
    facts = device.facts
    return {
        f"{prefix}arch-check": device.passed("gpu.architecture"),
        f"{prefix}attestation-report-cert-chain": _chain(
            device.passed("gpu.chain"),
            None if facts is None else facts.path.path.not_after,
            device.revocation.get("device", ()),
        ),
        # Where firmware does not report it there is nothing to match: NVIDIA says true, this says what is the case.
        f"{prefix}attestation-report-cert-chain-fwid-match": device.passed("gpu.fwid"),
        f"{prefix}attestation-report-nonce-match": device.passed("gpu.nonce"),
        f"{prefix}attestation-report-parsed": device.passed("gpu.format") and device.passed("gpu.fields"),
        f"{prefix}attestation-report-signature-verified": device.passed("gpu.signature"),
    }


def _rim(device: DeviceResult, source: Source, prefix: str, step: str) -> dict[str, object]:
    judged = device.rims.get(source)
    verified = None if judged is None else judged.verified
    return {
        f"{prefix}cert-chain": _chain(
            judged is not None and judged.passed("rim.chain"),
            None if verified is None else verified.path.path.not_after,
            device.revocation.get(source, ()),
        ),
        f"{prefix}fetched": judged is not None,
        f"{prefix}measurements-available": verified is not None and bool(verified.rim.active),
        f"{prefix}schema-validated": judged is not None and judged.passed("rim.format"),
        f"{prefix}signature-verified": judged is not None and judged.passed("rim.digest"),
        f"{prefix}version-match": device.passed(step),
    }


def _chain(verified: bool, expires: datetime | None, statuses: Sequence[CertificateStatus]) -> dict[str, object]:
    revoked = [each for each in statuses if each.status == "revoked"]
    good = bool(statuses) and all(each.status == "good" for each in statuses)
    by_ocsp = good and all(each.source == "ocsp" for each in statuses)
    status = "revoked" if revoked else ("valid" if verified else "invalid")
    return {
        "x-cgpu-revocation-checked": good,
        "x-nvidia-cert-expiration-date": None
        if expires is None
        else expires.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "x-nvidia-cert-ocsp-status": "revoked" if revoked else ("good" if by_ocsp else "unknown"),
        "x-nvidia-cert-revocation-reason": revoked[0].reason if revoked else None,
        "x-nvidia-cert-status": status,
    }
