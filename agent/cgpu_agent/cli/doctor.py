"""``cgpuctl doctor``: what an operator of a confidential GPU VM must know, each line with its remedy."""

from __future__ import annotations

import argparse
import asyncio
import grp
import platform
import pwd
import re
import ssl
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cgpu_agent.cli import output

if TYPE_CHECKING:
    from cgpu_agent.backends.base import GpuInfo

Level = Literal["ok", "warn", "fail"]

_TPM = Path("/dev/tpmrm0")
_BOOT_LOG = Path("/sys/kernel/security/tpm0/binary_bios_measurements")
_SYSTEMD_LOG = Path("/run/log/systemd/tpm2-measure.log")
_SECURE_BOOT = Path("/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c")
_SERVICE_USER = "cgpu-agent"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's."""

    check: str
    level: Level
    finding: str
    remedy: str = ""


def run(arguments: argparse.Namespace) -> int:
    findings = [finding for check in CHECKS for finding in check(arguments)]
    if arguments.json:
        output.emit_json([asdict(finding) for finding in findings])
    else:
        width = max(len(finding.check) for finding in findings)
        for finding in findings:
            mark = output.coloured(finding.level.ljust(4), finding.level)
            output.say(f"  {mark}  {finding.check.ljust(width)}  {output.printable(finding.finding)}")
            if finding.remedy:
                output.say(f"        {' ' * width}  -> {output.printable(finding.remedy)}")
    return output.EXIT_REFUSED if any(finding.level == "fail" for finding in findings) else output.EXIT_PASS


def _tpm_device(_arguments: argparse.Namespace) -> list[Finding]:
    if not _TPM.exists():
        return [
            Finding(
                "vTPM",
                "fail",
                f"there is no {_TPM}",
                "give the VM a vTPM (Azure: Trusted Launch or Confidential VM); modprobe tpm_crb tpm_tis",
            )
        ]
    info = _TPM.stat()
    owner = f"{_name(pwd.getpwuid, info.st_uid)}:{_name(grp.getgrgid, info.st_gid)} {info.st_mode & 0o777:04o}"
    if info.st_mode & 0o006:
        return [
            Finding("vTPM", "fail", f"{_TPM} is open to every user ({owner})", f"chmod o= {_TPM}; mend the udev rule")
        ]
    return [Finding("vTPM", "ok", f"{_TPM} ({owner})")]


def _name(look_up: Callable[[int], object], number: int) -> str:
    try:
        return str(look_up(number)[0])  # type: ignore[index]
    except KeyError:
        return str(number)


def _tpm_group(_arguments: argparse.Namespace) -> list[Finding]:
    try:
        tss = grp.getgrnam("tss")
    except KeyError:
        return [
            Finding(
                "TPM group", "warn", "there is no group tss", "install the package tpm-udev, or your own udev rule"
            )
        ]
    members = set(tss.gr_mem) | {user.pw_name for user in pwd.getpwall() if user.pw_gid == tss.gr_gid}
    found: list[Finding] = []
    if _SERVICE_USER not in members:
        found.append(
            Finding(
                "TPM group",
                "warn",
                f"user {_SERVICE_USER} is not in group tss",
                f"usermod -aG tss {_SERVICE_USER} (the unit's SupplementaryGroups=tss does the same)",
            )
        )
    others = sorted(members - {_SERVICE_USER, "tss"})
    if others:
        found.append(
            Finding(
                "TPM group",
                "warn",
                f"others may use the TPM directly: {', '.join(others)}",
                "they can quote as this VM and extend PCRs: take them out of group tss unless you trust them so",
            )
        )
    return found or [Finding("TPM group", "ok", f"only {_SERVICE_USER} is in group tss")]


def _secure_boot(_arguments: argparse.Namespace) -> list[Finding]:
    try:
        value = _SECURE_BOOT.read_bytes()
    except OSError:
        return [
            Finding(
                "Secure Boot", "warn", "no SecureBoot variable: not booted by UEFI, or efivarfs is not mounted", ""
            )
        ]
    if value[-1:] == b"\1":
        return [Finding("Secure Boot", "ok", "on, says the variable; only a quote proves it")]
    return [Finding("Secure Boot", "warn", "off", "turn it on in the VM's security settings")]


def _boot_log(_arguments: argparse.Namespace) -> list[Finding]:
    try:
        with _BOOT_LOG.open("rb") as file:
            size = len(file.read(4 << 20))
    except PermissionError:
        return [Finding("boot log", "ok", f"{_BOOT_LOG} is there, for root (the unit reads it by LoadCredential=)")]
    except OSError:
        return [
            Finding(
                "boot log",
                "fail",
                f"there is no {_BOOT_LOG}",
                "without it nobody can tell what the PCRs mean: boot with UEFI and a TPM; mount securityfs",
            )
        ]
    if size == 0:
        return [Finding("boot log", "fail", "the firmware's log is empty", "boot through the kernel's EFI stub")]
    return [Finding("boot log", "ok", f"{size} bytes")]


def _systemd_log(_arguments: argparse.Namespace) -> list[Finding]:
    if _SYSTEMD_LOG.exists():
        return [Finding("systemd log", "ok", str(_SYSTEMD_LOG))]
    return [
        Finding(
            "systemd log",
            "warn",
            f"no {_SYSTEMD_LOG}",
            "systemd 255 or newer writes it; without it PCR 15 stays unexplained",
        )
    ]


def _identity(_arguments: argparse.Namespace) -> list[Finding]:
    try:
        from cgpu_agent.rpc.environment import self_check_environment  # noqa: PLC0415 - not in a verifier's install
    except ModuleNotFoundError:
        return [Finding("caller identity", "warn", "not checked: the daemon is not installed here")]
    from cgpu_agent.errors import AgentError  # noqa: PLC0415

    try:
        capabilities = self_check_environment()
    except AgentError as error:
        return [Finding("caller identity", "fail", error.message, "run the agent in the initial user namespace")]
    missing = capabilities.shortcomings()
    if not missing:
        return [
            Finding(
                "caller identity", "ok", f"kernel {platform.release()} names callers by pidfd, unit and container"
            )
        ]
    return [Finding("caller identity", "warn", text) for text in missing]


def _openssl(_arguments: argparse.Namespace) -> list[Finding]:
    if ssl.OPENSSL_VERSION_INFO >= (3, 1):
        return [Finding("OpenSSL", "ok", ssl.OPENSSL_VERSION)]
    return [
        Finding(
            "OpenSSL",
            "warn",
            f"{ssl.OPENSSL_VERSION}: no AVX-512 AES-GCM",
            "CUDA's bounce buffer uses it: with OpenSSL 3.1 or newer confidential transfers are about twice as fast",
        )
    ]


def _driver(_arguments: argparse.Namespace) -> list[Finding]:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return [Finding("GPU driver", "warn", "no NVIDIA driver is loaded", "modprobe nvidia, if this VM has a GPU")]
    version = re.search(r"\d{3}\.\d+(\.\d+)?", text)
    found = [Finding("GPU driver", "ok", version.group(0) if version else text.splitlines()[0][:80])]
    if "Open Kernel Module" not in text:
        found.append(
            Finding(
                "GPU driver", "warn", "not the open kernel module", "confidential computing needs nvidia-open drivers"
            )
        )
    return found + _gpus()


def _gpus() -> list[Finding]:
    try:
        from cgpu_agent.backends.gpu.nvmlgpus import NvmlGpus  # noqa: PLC0415 - not in a verifier's install
    except ModuleNotFoundError:
        return [Finding("GPUs", "warn", "not checked: the daemon is not installed here")]
    from cgpu_agent.errors import AgentError  # noqa: PLC0415

    async def ask() -> tuple[tuple[str, ...], tuple[GpuInfo, ...], bool | None]:
        gpus = NvmlGpus()
        try:
            return await gpus.pci(timeout=5), await gpus.list(timeout=30), await gpus.ready(timeout=10)
        finally:
            gpus.close()

    try:
        plugged, found, ready = asyncio.run(ask())
    except AgentError as error:
        return [Finding("GPUs", "fail", error.message, "see dmesg for NVRM messages")]
    if plugged and not found:
        return [
            Finding("GPUs", "fail", f"the driver lists none of {', '.join(plugged)}", "see dmesg for NVRM messages")
        ]
    state = {None: "there is none here", True: "the GPUs accept work", False: "the GPUs accept no work (yet)"}[ready]
    return [*(_mode(gpu) for gpu in found), Finding("GPU ready state", "ok", state)]


def _mode(gpu: GpuInfo) -> Finding:
    name = f"{gpu.bdf} {gpu.model}"
    if not gpu.cc:
        remedy = "have the host turn it on and reset the GPU"
        return Finding("GPUs", "warn", f"{name}: confidential computing is not on", remedy)
    if gpu.dev_tools is not False:
        remedy = "whoever debugs it sees everything: have the host turn developer tools off"
        return Finding("GPUs", "fail", f"{name}: confidential computing, but with developer tools", remedy)
    return Finding("GPUs", "ok", f"{name}: confidential computing is on, says the driver; no signature covers that")


def _agent(arguments: argparse.Namespace) -> list[Finding]:
    try:
        from cgpu_agent.client import Agent  # noqa: PLC0415 - not in a verifier's install
    except ModuleNotFoundError:
        return [Finding("agent", "warn", "not checked: the client is not installed here", "pip install cgpu-agent")]
    from cgpu_agent.errors import AgentError  # noqa: PLC0415

    with Agent(arguments.socket, timeout=10.0) as agent:
        try:
            identity = agent.get_identity()
        except AgentError as error:
            return [Finding("agent", "fail", error.message, "systemctl status cgpu-agent; journalctl -u cgpu-agent")]
    found = [Finding("agent", "ok", f"answers; TPM {identity.manufacturer}, reset count {identity.reset_count}")]
    if identity.platform_ak_certificate is None:
        found.append(
            Finding(
                "AK certificate",
                "warn",
                "the platform AK has no certificate in NV",
                "relying parties must enrol its Name (cgpuctl status), or have it certified",
            )
        )
    else:
        found.append(Finding("AK certificate", "ok", f"{len(identity.platform_ak_certificate)} bytes of DER in NV"))
    return found


def _swap(_arguments: argparse.Namespace) -> list[Finding]:
    try:
        lines = Path("/proc/swaps").read_text(encoding="ascii", errors="replace").splitlines()[1:]
    except OSError:
        lines = []
    if not lines:
        return [Finding("swap", "ok", "off")]
    devices = ", ".join(line.split()[0] for line in lines)
    return [Finding("swap", "warn", f"on: {devices}", "secrets may reach the host's disk: swapoff -a, or encrypt it")]


CHECKS: tuple[Callable[[argparse.Namespace], list[Finding]], ...] = (
    _tpm_device,
    _tpm_group,
    _secure_boot,
    _boot_log,
    _systemd_log,
    _identity,
    _openssl,
    _driver,
    _swap,
    _agent,
)
