"""The whole command line of cgpuctl in one place, importing nothing heavy: commands load when they run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cgpu_agent import __version__

DEFAULT_AUDIENCE = "local"
DEFAULT_COLLATERAL = "/etc/cgpu-agent/collateral"
"""As ``gpu.collateral`` in the agent's configuration."""
_ARCHITECTURES = ("hopper", "blackwell", "ls10", "ampere")
_BROKERS = ("credential", "sealed", "openbao", "trustee", "azure")
_GPU_STATES = ("ready", "not-ready", "none", "not-asked")
_BANKS = ("sha1", "sha256", "sha384", "sha512")
_SEGMENT_SIZES = ("1MiB", "4KiB")
_LOG_LEVELS = ("debug", "info", "warning", "error")

_ONE_EACH: Mapping[str, Any] = {"type": Path, "action": "append", "default": [], "metavar": "FILE"}
_SEVERAL: Mapping[str, Any] = {"type": Path, "nargs": "+", "action": "extend", "default": [], "metavar": "FILE"}
"""For commands without a file of their own, which this would swallow."""

_Commands = argparse._SubParsersAction  # noqa: SLF001 - argparse has no public name for it


def build_parser() -> argparse.ArgumentParser:
    """Every command sets ``module``: the module of ``cgpu_agent.cli`` whose ``run`` carries it out."""
    parser = argparse.ArgumentParser(
        prog="cgpuctl",
        description="Evidence of a confidential GPU VM: get it, read it, verify it.",
        epilog="Exit status: 0 pass, 1 refused (with the reason), 2 usage. See cgpuctl(1).",
    )
    parser.add_argument("--version", action="version", version=f"cgpuctl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _status(commands)
    _doctor(commands)
    _metrics(commands)
    _log_level(commands)
    _boot(commands)
    _evidence(commands)
    _verify(commands)
    _reference(commands)
    _eventlog(commands)
    _quote(commands)
    _gpu(commands)
    _collateral(commands)
    _platform(commands)
    _ak(commands)
    _key(commands)
    _policy(commands)
    _audit(commands)
    _object(commands)
    _completion(commands)
    return parser


def _json(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _socket(parser: argparse.ArgumentParser, what: str, variable: str) -> None:
    parser.add_argument("--socket", metavar="PATH", help=f"{what} (default: {variable}, else /run/cgpu-agent)")


def _status(commands: _Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "status",
        help="what the agent is doing",
        description="What the agent is doing, for root and the agent's user. Exit status: 0 serving, 1 otherwise.",
    )
    _socket(parser, "the agent's admin socket", "CGPU_AGENT_ADMIN_SOCKET")
    _json(parser)
    parser.set_defaults(module="status")


def _doctor(commands: _Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what stands in the way on this machine",
        description="Check what an operator of a confidential GPU VM must know; each finding comes with its remedy. "
        "Best as root. Exit status: 0 nothing failed, 1 otherwise.",
    )
    _socket(parser, "the agent's socket", "CGPU_AGENT_SOCKET")
    _json(parser)
    parser.set_defaults(module="doctor")


def _metrics(commands: _Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "metrics",
        help="the agent's numbers, for Prometheus",
        description="Print the agent's numbers in Prometheus' text format, for root and the agent's user.",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to write it (default: stdout)")
    _socket(parser, "the agent's admin socket", "CGPU_AGENT_ADMIN_SOCKET")
    parser.set_defaults(module="metrics")


def _log_level(commands: _Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "log-level",
        help="how much the agent writes to the journal",
        description="Show how much the agent writes to the journal, or set it until the next reload or start.",
    )
    parser.add_argument("level", nargs="?", choices=_LOG_LEVELS, metavar="LEVEL", help=", ".join(_LOG_LEVELS))
    _socket(parser, "the agent's admin socket", "CGPU_AGENT_ADMIN_SOCKET")
    parser.set_defaults(module="loglevel")


def _boot(commands: _Commands[argparse.ArgumentParser]) -> None:
    group = commands.add_parser("boot", help="what booted here", description="What booted here.")
    verbs = group.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    parser = verbs.add_parser(
        "show",
        help="tell the boot as a story",
        description="Tell the boot: firmware, keys, loader, kernel, command line, and which PCRs the logs explain. "
        "Live values are not signed: for evidence use cgpuctl evidence get and cgpuctl verify.",
    )
    parser.add_argument("--bundle", type=Path, metavar="FILE", help="a bundle's boot instead (told, not judged)")
    _socket(parser, "the agent's socket", "CGPU_AGENT_SOCKET")
    _json(parser)
    parser.set_defaults(module="boot")


def _evidence(commands: _Commands[argparse.ArgumentParser]) -> None:
    group = commands.add_parser("evidence", help="get evidence from the agent", description="Evidence of this VM.")
    verbs = group.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    parser = verbs.add_parser(
        "get",
        help="get a bundle",
        description="Get an evidence bundle that names you, nonce and audience. Judge it with cgpuctl verify.",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to write it (default: stdout)")
    parser.add_argument("--nonce", metavar="HEX", help="the relying party's nonce (default: a random one, printed)")
    parser.add_argument(
        "--audience",
        default=DEFAULT_AUDIENCE,
        metavar="NAME",
        help=f"the relying party it is for (default: {DEFAULT_AUDIENCE})",
    )
    parser.add_argument("--gpus", action="store_true", help="the GPUs too, not the boot alone")
    binding = parser.add_mutually_exclusive_group()
    binding.add_argument("--user-data", metavar="HEX", help="up to 64 bytes to bind")
    binding.add_argument("--public-key", type=Path, metavar="FILE", help="key to bind (DER SubjectPublicKeyInfo)")
    _socket(parser, "the agent's socket", "CGPU_AGENT_SOCKET")
    parser.set_defaults(module="evidence")


def _relying_party(parser: argparse.ArgumentParser) -> None:
    """Who judges, and what it demands."""
    parser.add_argument("bundle", type=Path, metavar="FILE", help="the bundle; - for standard input")
    parser.add_argument("--nonce", required=True, metavar="HEX", help="the nonce you sent")
    parser.add_argument(
        "--audience",
        default=DEFAULT_AUDIENCE,
        metavar="NAME",
        help=f"your name, as the evidence must hold it (default: {DEFAULT_AUDIENCE})",
    )
    parser.add_argument("--at", metavar="RFC3339", help="judge certificates at this time (default: now)")
    parser.add_argument("--ak-root", help="trusted root for AK certificates (PEM or DER)", **_ONE_EACH)
    parser.add_argument(
        "--simulated-ak-root",
        help="root of a simulator's AK certificates; the verdict says so",
        **_ONE_EACH,
    )
    parser.add_argument("--ak-intermediate", help="CA certificates below it (PEM or DER)", **_ONE_EACH)
    parser.add_argument(
        "--ak-name", action="append", default=[], metavar="HEX", help="Name of a platform AK that you enrolled"
    )
    parser.add_argument(
        "--register", type=int, default=13, metavar="PCR", help="agent register of your VMs, 0-15 (default: 13)"
    )
    parser.add_argument("--user-data", metavar="HEX", help="user data the evidence must bind")
    parser.add_argument("--public-key", type=Path, metavar="FILE", help="key the evidence must bind (DER SPKI)")
    parser.add_argument(
        "--allow-unendorsed", action="store_true", help="accept an AK nobody vouches for; the verdict says so"
    )
    parser.add_argument(
        "--allow-no-boot-log", action="store_true", help="accept a missing firmware log; the verdict says so"
    )
    _floor(parser)
    _gpu_demands(parser.add_argument_group("GPUs"), _ONE_EACH)


def _verify(commands: _Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "verify",
        help="judge an evidence bundle offline",
        description="Judge an evidence bundle. Needs no agent, no TPM and no network. Exit status: 0 accepted, "
        "1 refused; with --policy or --appraise, 0 only where the policy affirms or accepts it too.",
    )
    _relying_party(parser)
    group = parser.add_argument_group("appraisal")
    group.add_argument(
        "--policy", type=Path, metavar="FILE", help="your appraisal policy (Cedar), which then decides"
    )
    group.add_argument("--appraise", action="store_true", help="let the default appraisal policy decide")
    group.add_argument("--reference", type=Path, metavar="FILE", help="expected values (cgpuctl reference make)")
    group.add_argument("--explain", action="store_true", help="for each part: the rule, and what would change it")
    group = parser.add_argument_group("output")
    _json(group)
    group.add_argument("--html", type=Path, metavar="FILE", help="write the verdict as a page")
    group.add_argument("--jwt", type=Path, metavar="FILE", help="write the verdict as a signed EAR (JWT)")
    group.add_argument("--jwt-key", type=Path, metavar="FILE", help="your key to sign it (PEM)")
    group.add_argument("--jwt-audience", metavar="NAME", help="who may rely on it (default: your own name)")
    parser.set_defaults(module="verify")


def _reference(commands: _Commands[argparse.ArgumentParser]) -> None:
    group = commands.add_parser("reference", help="values to expect of a VM", description="Values to expect of a VM.")
    verbs = group.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    parser = verbs.add_parser(
        "make",
        help="make reference values from a good bundle",
        description="Verify a bundle of a VM that you know to be good, and write down what it showed, for "
        "cgpuctl verify --reference. Look at the file before you rely on it.",
    )
    _relying_party(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to write it (default: stdout)")
    parser.add_argument(
        "--pcr",
        type=int,
        action="append",
        default=[],
        metavar="PCR",
        help="expect this PCR too, besides 0, 2, 3, 4 and 7",
    )
    parser.add_argument(
        "--command-line",
        action="append",
        default=[],
        metavar="TEXT",
        help="the kernel command line of a unified kernel image, whose log holds only its digest",
    )
    parser.add_argument("--any-instance", action="store_true", help="expect this image on any VM, not this VM")
    parser.set_defaults(module="reference")


def _eventlog(commands: _Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "eventlog",
        help="parse and replay a raw TCG event log",
        description="Parse a TCG event log (legacy, crypto-agile or CCEL), replay every bank and tell the boot. "
        "A log alone proves nothing: compare its PCRs with a quote's.",
    )
    parser.add_argument("log", type=Path, metavar="FILE", help="the raw log; - for standard input")
    parser.add_argument("--kind", choices=("tpm", "ccel"), help="whose log it is (default: recognised)")
    _json(parser)
    parser.set_defaults(module="eventlog")


def _quote(commands: _Commands[argparse.ArgumentParser]) -> None:
    group = commands.add_parser("quote", help="judge bare TPM quotes", description="Judge bare TPM quotes.")
    verbs = group.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    parser = verbs.add_parser(
        "verify",
        help="judge a quote offline",
        description="Judge a TPM2_Quote by its AK. What is not given is not compared, and the verdict says so. "
        "Whether the AK is a real TPM's is not judged here (see cgpuctl verify).",
    )
    parser.add_argument("--attest", type=Path, required=True, metavar="FILE", help="TPMS_ATTEST")
    parser.add_argument("--signature", type=Path, required=True, metavar="FILE", help="TPMT_SIGNATURE or raw RSA")
    parser.add_argument(
        "--ak", type=Path, required=True, metavar="FILE", help="PEM, DER, certificate, TPMT_PUBLIC or TPM2B_PUBLIC"
    )
    parser.add_argument("--pcrs", type=Path, metavar="FILE", help='PCR values as JSON {"index": "hex"}')
    parser.add_argument("--nonce", metavar="HEX", help="expected extraData")
    parser.add_argument("--bank", choices=_BANKS, default="sha256", help="PCR bank (default: sha256)")
    parser.add_argument("--allow-sha1-bank", action="store_true", help="accept PCR values of the SHA-1 bank")
    _json(parser)
    parser.set_defaults(module="quote")


def _floor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--floor",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="lowest security version of the processor's firmware to accept",
    )


def _gpu_demands(parser: argparse._ActionsContainer, files: Mapping[str, Any]) -> None:
    """What a judge demands of GPUs, and brings along."""
    parser.add_argument("--gpus", type=int, metavar="COUNT", help="how many GPUs there must be")
    parser.add_argument("--collateral", type=Path, metavar="DIR", help="use this store (cgpuctl collateral)")
    parser.add_argument("--rim", help="NVIDIA's reference values: signed XML", **files)
    parser.add_argument("--crl", help="certificate revocation list (DER or PEM)", **files)
    parser.add_argument("--ocsp", help="OCSP response (DER)", **files)
    parser.add_argument("--max-age", type=int, metavar="DAYS", help="oldest acceptable CRL or OCSP response")
    parser.add_argument("--device-root", type=Path, metavar="FILE", help="trust this root instead of NVIDIA's")
    parser.add_argument("--rim-root", type=Path, metavar="FILE", help="the same for reference values")
    parser.add_argument("--min-driver", metavar="VERSION", help="lowest driver to accept")
    parser.add_argument("--min-vbios", metavar="VERSION", help="lowest GPU firmware to accept")
    parser.add_argument("--min-switch-bios", metavar="VERSION", help="lowest NVSwitch firmware to accept")
    parser.add_argument("--require-revocation", action="store_true", help="refuse an unknown revocation status")
    parser.add_argument("--require-fwid", action="store_true", help="refuse firmware that does not report its FWID")
    parser.add_argument("--allow-no-rim", action="store_true", help="accept unmeasured devices; the verdict says so")
    parser.add_argument(
        "--allow-rim-hold", action="store_true", help="accept a RIM signer whose certificate is on hold"
    )


def _gpu_sessions(verbs: _Commands[argparse.ArgumentParser]) -> None:
    told = {
        "list": ("list the GPUs of this VM", "Say whether the GPUs are trusted, and why not. Not evidence."),
        "attest": ("have the GPUs attested now", "Attest all GPUs now, or join the attestation that is running."),
        "watch": ("tell every change of the GPUs", "Print the GPUs now and after each change, until interrupted."),
    }
    for verb, (short, long) in told.items():
        status = "" if verb == "watch" else " Exit status: 0 all trusted and ready, 1 otherwise."
        parser = verbs.add_parser(verb, help=short, description=long + status)
        _socket(parser, "the agent's socket", "CGPU_AGENT_SOCKET")
        _json(parser)
        parser.set_defaults(module="gpusession")


def _gpu(commands: _Commands[argparse.ArgumentParser]) -> None:
    group = commands.add_parser("gpu", help="the GPUs, and their attestation", description="Attestation of GPUs.")
    verbs = group.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    _gpu_sessions(verbs)
    parser = verbs.add_parser(
        "verify",
        help="judge GPU and NVSwitch reports offline",
        description="Judge the attestation reports of NVIDIA GPUs and NVSwitches. Needs no GPU and no network. "
        "Exit status: 0 pass, 1 refused or unverifiable.",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="one report, hex or raw bytes")
    parser.add_argument("--chain", type=Path, metavar="FILE", help="its five certificates (PEM, leaf first)")
    parser.add_argument("--evidence", help="NVIDIA's JSON list of devices, all of one machine", **_SEVERAL)
    parser.add_argument("--nonce", metavar="HEX", help="the 32 bytes that you sent")
    parser.add_argument("--arch", choices=_ARCHITECTURES, help="what every device must be")
    parser.add_argument("--at", metavar="RFC3339", help="judge at this time (default: now)")
    _gpu_demands(parser, _SEVERAL)
    form = parser.add_mutually_exclusive_group()
    _json(form)
    form.add_argument("--eat", action="store_true", help="print claims as in NVIDIA's tokens, unsigned")
    parser.set_defaults(module="gpu")


def _collateral(commands: _Commands[argparse.ArgumentParser]) -> None:
    group = commands.add_parser(
        "collateral",
        help="an offline store of reference values and revocation data",
        description="A directory of reference values (RIM), CRLs and OCSP responses, as the agent and "
        "cgpuctl gpu verify --collateral read it.",
    )
    verbs = group.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    fetch = verbs.add_parser(
        "fetch",
        help="get what GPUs need from NVIDIA's services",
        description="Get the reference values that devices name, or those named here, and the OCSP status of all "
        "certificates involved. Only what verifies is kept. Exit status: 0 all there, 1 otherwise.",
    )
    fetch.add_argument("--report", type=Path, metavar="FILE", help="one device's report, hex or raw bytes")
    fetch.add_argument("--chain", type=Path, metavar="FILE", help="its five certificates (PEM, leaf first)")
    fetch.add_argument("--evidence", help="NVIDIA's JSON list of devices", **_ONE_EACH)
    fetch.add_argument("--rim-id", action="append", default=[], metavar="ID", help="a RIM, by NVIDIA's name for it")
    fetch.add_argument(
        "--rim-url",
        default="https://rim.attestation.nvidia.com",
        metavar="URL",
        help="the RIM service (default: NVIDIA's)",
    )
    fetch.add_argument(
        "--ocsp-url",
        default="https://ocsp.ndis.nvidia.com",
        metavar="URL",
        help="the OCSP responder (default: NVIDIA's)",
    )
    fetch.add_argument("--device-root", type=Path, metavar="FILE", help="trust this root instead of NVIDIA's")
    bring = verbs.add_parser(
        "import",
        help="put files into the store",
        description="Put RIMs (XML, or the RIM service's JSON), CRLs and OCSP responses into the store. A RIM must "
        "verify, and be no older issue than one that is there. Exit status: 0 all there, 1 otherwise.",
    )
    bring.add_argument("file", type=Path, nargs="+", metavar="FILE", help="a file; its content says what it is")
    shown = verbs.add_parser(
        "list",
        help="say what is in the store",
        description="Say what is in the store, until when it is good, and which files the agent would refuse. "
        "Exit status: 0 no file is broken or refused, 1 otherwise.",
    )
    for parser in (fetch, bring, shown):
        parser.add_argument(
            "--store",
            type=Path,
            default=Path(DEFAULT_COLLATERAL),
            metavar="DIR",
            help=f"the store (default: {DEFAULT_COLLATERAL})",
        )
        parser.add_argument("--rim-root", type=Path, metavar="FILE", help="trust this root for RIMs, not NVIDIA's")
        parser.add_argument("--at", metavar="RFC3339", help="judge at this time (default: now)")
        _json(parser)
        parser.set_defaults(module="collateral")


def _platform(commands: _Commands[argparse.ArgumentParser]) -> None:
    group = commands.add_parser("platform", help="who vouches for a vTPM", description="Who vouches for a vTPM.")
    verbs = group.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    parser = verbs.add_parser(
        "verify",
        help="judge the platform below a vTPM offline",
        description="Say who vouches for the vTPM of an Azure VM: AMD or Intel under a known paravisor, the cloud, "
        "or nobody. Needs no network. Exit status: 0 somebody does, 1 nobody or refused.",
    )
    report = "HCL report, bare SNP report or bare TD quote"
    parser.add_argument("--hcl", "--report", type=Path, metavar="FILE", help=report)
    parser.add_argument("--claims", type=Path, metavar="FILE", help="runtime claims beside a bare report")
    parser.add_argument("--td-quote", type=Path, metavar="FILE", help="TD quote over the report's TDREPORT")
    parser.add_argument("--vcek", help="VCEK or VLEK, also with its CA and AMD's root (PEM or DER)", **_SEVERAL)
    parser.add_argument("--chain", help="CA certificates above VCEK or AK certificate, roots among them", **_SEVERAL)
    parser.add_argument("--ak", type=Path, metavar="FILE", help="the platform AK in question, as for quote verify")
    parser.add_argument("--ak-cert", type=Path, metavar="FILE", help="its certificate (PEM or DER)")
    parser.add_argument("--quote", type=Path, metavar="FILE", help="a quote by that AK: TPMS_ATTEST")
    parser.add_argument("--signature", type=Path, metavar="FILE", help="its signature: TPMT_SIGNATURE or raw RSA")
    parser.add_argument("--pcrs", type=Path, metavar="FILE", help='the PCR values it covers: JSON {"index": "hex"}')
    parser.add_argument("--nonce", metavar="HEX", help="its expected extraData")
    _floor(parser)
    parser.add_argument("--at", metavar="RFC3339", help="judge certificates at this time (default: now)")
    _json(parser)
    parser.set_defaults(module="platform")
    _platform_token(verbs)
    _this_platform(verbs)


def _platform_token(verbs: _Commands[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "token",
        help="judge a token of Microsoft's attestation service",
        description="Judge a token of Azure Attestation (MAA) offline, by the key set of the service that you trust. "
        "Exit status: 0 somebody vouches for the vTPM, by that service's word; 1 nobody or refused.",
    )
    parser.add_argument("--token", type=Path, required=True, metavar="FILE", help="the token; - for standard input")
    parser.add_argument(
        "--jwks", type=Path, required=True, metavar="FILE", help="the service's key set, of URL/certs"
    )
    parser.add_argument(
        "--issuer", action="append", required=True, metavar="URL", help="a service that you trust, as a whole URL"
    )
    parser.add_argument("--nonce", metavar="HEX", help="the nonce of the client payload")
    parser.add_argument("--at", metavar="RFC3339", help="judge at this time (default: now)")
    _json(parser)
    parser.set_defaults(module="maa")


def _this_platform(verbs: _Commands[argparse.ArgumentParser]) -> None:
    show = verbs.add_parser(
        "show",
        help="what this VM says of its platform",
        description="Show what the platform below this VM's vTPM says of itself, by the agent. Not evidence: have it "
        "judged by cgpuctl platform verify.",
    )
    show.add_argument("--out", type=Path, metavar="DIR", help="write the files that platform verify takes")
    _socket(show, "the agent's socket", "CGPU_AGENT_SOCKET")
    _json(show)
    show.set_defaults(module="thisplatform")
    fetch = verbs.add_parser(
        "fetch",
        help="get AMD's certificates, or a TD quote, for the agent",
        description="Get what the agent, which has no network, needs of Azure's metadata service: AMD's certificates "
        "of this processor, or a TD quote over its report. Run it in the VM, as root.",
    )
    fetch.add_argument(
        "--store",
        type=Path,
        default=Path("/etc/cgpu-agent/platform"),
        metavar="DIR",
        help="where the agent looks (platform.collateral; default: /etc/cgpu-agent/platform)",
    )
    fetch.add_argument(
        "--metadata-service",
        default="http://169.254.169.254",
        metavar="URL",
        help="the service (default: http://169.254.169.254)",
    )
    _socket(fetch, "the agent's socket", "CGPU_AGENT_SOCKET")
    fetch.set_defaults(module="thisplatform")


def _ak(commands: _Commands[argparse.ArgumentParser]) -> None:
    group = commands.add_parser("ak", help="have the platform AK certified", description="This VM's platform AK.")
    verbs = group.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    parser = verbs.add_parser(
        "enrol",
        help="get an AK certificate from a verifier service",
        description="Show a verifier service that the platform AK is in one TPM with an EK that it trusts, and get a "
        "short-lived certificate. The agent must permit you boot.activate_credential.",
    )
    parser.add_argument("--url", required=True, metavar="URL", help="the service: https, or http to this machine")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where to write it (DER)")
    parser.add_argument("--ek", choices=("rsa", "ecc"), help="which EK (default: the first with a certificate)")
    parser.add_argument(
        "--ek-certificate", type=Path, metavar="FILE", help="its certificate (default: the one in the TPM's NV)"
    )
    parser.add_argument(
        "--ek-intermediate",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="CA certificate above it (PEM or DER)",
    )
    _socket(parser, "the agent's socket", "CGPU_AGENT_SOCKET")
    parser.set_defaults(module="ak")


def _key(commands: _Commands[argparse.ArgumentParser]) -> None:
    group = commands.add_parser("key", help="the keys that you may have", description="Keys that the agent releases.")
    verbs = group.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    parser = verbs.add_parser(
        "list",
        help="say which keys you may have now",
        description="Say which keys you may have now, and in which way.",
    )
    _socket(parser, "the agent's socket", "CGPU_AGENT_SOCKET")
    _json(parser)
    parser.set_defaults(module="key")
    parser = verbs.add_parser(
        "get",
        help="get a key",
        description="Get a key, if the operator's policy lets you have it: wrapped to a key pair made for this call, "
        "and opened here.",
    )
    parser.add_argument("key", metavar="KEY", help="its id, as key list gives it")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to write it (mode 0600)")
    parser.add_argument("--plain", action="store_true", help="in plain over the socket, which policy permits apart")
    _socket(parser, "the agent's socket", "CGPU_AGENT_SOCKET")
    parser.set_defaults(module="key")
    parser = verbs.add_parser(
        "policy-sign",
        help="approve a boot in which sealed keys may be opened",
        description="Approve the boot that a reference describes: the TPMs of the fleet open keys of these groups in "
        "it, without resealing. Needs your key, and neither a VM nor a TPM.",
    )
    for name, what in (("--key", "your P-256 key (PEM)"), ("--reference", "the boot (cgpuctl reference make)")):
        parser.add_argument(name, type=Path, required=True, metavar="FILE", help=what)
    parser.add_argument("--fleet", required=True, metavar="NAME", help="the VMs, as their keys were created for")
    parser.add_argument("--group", action="append", required=True, metavar="NAME", help="a group of keys; repeatable")
    parser.add_argument(
        "--epoch", type=int, required=True, metavar="N", help="good while the TPM's epoch counter is at most this"
    )
    parser.add_argument(
        "--pcr", type=int, action="append", metavar="PCR", help="approve this PCR (default: all of the reference)"
    )
    parser.add_argument(
        "--i-know",
        action="store_true",
        help="approve a boot that does not measure the root file system, all the same",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where to write it")
    parser.set_defaults(module="keysign")
    _sealed_keys(verbs)


def _sealed_keys(verbs: _Commands[argparse.ArgumentParser]) -> None:
    """The operator's verbs; what a key is called is the store's name of it, not the agent's id."""

    def verb(name: str, text: str, description: str, *, json: bool = False) -> argparse.ArgumentParser:
        parser = verbs.add_parser(name, help=text, description=f"{description} For the operator, as root.")
        _socket(parser, "the agent's admin socket", "CGPU_AGENT_ADMIN_SOCKET")
        if json:
            _json(parser)
        parser.set_defaults(module="keystore")
        return parser

    def key(parser: argparse.ArgumentParser, *, group: bool = False) -> None:
        parser.add_argument("key", metavar="KEY", help="its name in the store")
        if group:
            parser.add_argument("--group", required=True, metavar="NAME", help="by which boots are approved for it")

    owned = ("--authority", "public half of the owner's P-256 key (PEM)")
    password = ("--owner-auth", "file with the password of the TPM's owner hierarchy (default: it has none)")
    parser = verb(
        "init", "make the store of sealed keys", "Make what keys sealed to this VM's TPM need, and no key yet."
    )
    parser.add_argument(owned[0], type=Path, required=True, metavar="FILE", help=owned[1])
    parser.add_argument("--fleet", required=True, metavar="NAME", help="the VMs, as the owner's approvals name them")
    parser.add_argument(password[0], type=Path, metavar="FILE", help=password[1])
    parser.add_argument("--replace-lost", action="store_true", help="give up keys whose store is gone")
    parser = verb(
        "adopt",
        "take the store on disk for the right one",
        "Take the store on disk for the right one: you know that it is no old one, since nothing else tells.",
    )
    parser.add_argument(owned[0], type=Path, required=True, metavar="FILE", help=owned[1])
    parser.add_argument(password[0], type=Path, metavar="FILE", help=password[1])
    verb("show", "show the sealed keys", "Show the sealed keys, and whether the TPM would open them now.", json=True)
    key(verb("create", "seal a new random key", "Seal 32 random bytes.", json=True), group=True)
    parser = verb("import", "seal a key of yours", "Seal 1 to 128 bytes of yours; keep a copy elsewhere.", json=True)
    key(parser, group=True)
    parser.add_argument("--secret", type=Path, required=True, metavar="FILE", help="the key, mode 0600; - = stdin")
    parser = verb("rotate", "seal a key's next generation", "Seal the next generation of a key.", json=True)
    key(parser)
    parser.add_argument("--secret", type=Path, metavar="FILE", help="the key, mode 0600; - = stdin (default: random)")
    parser = verb("remove", "remove a key", "Remove a key from the store: what it protected must be encrypted anew.")
    key(parser)
    parser.add_argument("--generation", type=int, default=0, metavar="N", help="this one alone (default: all)")
    parser = verb("epoch", "end earlier approvals", "Count the TPM's epoch up: approvals of earlier ones are over.")
    parser.add_argument("minimum", type=int, metavar="N", help="at least to this value; it never goes back")


def _policy(commands: _Commands[argparse.ArgumentParser]) -> None:
    group = commands.add_parser("policy", help="check and explain policies", description="Cedar policies.")
    verbs = group.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    parser = verbs.add_parser(
        "check",
        help="say what is wrong with a policy",
        description="Check a policy as its reader would, and the agent's for permits that name nobody in particular. "
        "Exit status: 0 nothing to say, 1 otherwise.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the policy; - for standard input")
    parser.add_argument("--kind", choices=("agent", "verifier"), default="agent", help="whose it is (default: agent)")
    _json(parser)
    parser.set_defaults(module="policy")
    parser = verbs.add_parser(
        "explain",
        help="say who may do what",
        description="Say what a caller may do, and which policy decides it; by default for a few typical callers.",
    )
    parser.add_argument("--policy", type=Path, metavar="FILE", help="the agent's policy (default: the one built in)")
    parser.add_argument("--uid", type=int, metavar="N", help="the caller's uid (default: 1000)")
    parser.add_argument("--unit", metavar="NAME", help="its systemd unit (default: none)")
    parser.add_argument("--container", metavar="ID", help="its container (default: none)")
    parser.add_argument("--groups", type=int, nargs="+", metavar="N", help="its supplementary groups")
    parser.add_argument("--key", metavar="ID", help="say what it may do with this key, too")
    parser.add_argument("--broker", choices=_BROKERS, default="sealed", help="who keeps the key (default: sealed)")
    parser.add_argument("--key-group", default="", metavar="NAME", help="the key's group (default: none)")
    parser.add_argument(
        "--gpus",
        choices=_GPU_STATES,
        default="not-asked",
        help="what the agent makes of the GPUs (default: not-asked)",
    )
    _json(parser)
    parser.set_defaults(module="policy")


def _audit(commands: _Commands[argparse.ArgumentParser]) -> None:
    group = commands.add_parser("audit", help="read and check the audit log", description="The agent's audit log.")
    verbs = group.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    log = {"type": Path, "nargs": "+", "metavar": "FILE", "help": "files of the log, oldest first"}
    show = verbs.add_parser("show", help="print the records", description="Print the audit log, a line a record.")
    show.add_argument("log", **log)  # type: ignore[arg-type]
    _json(show)
    show.set_defaults(module="audit")
    verify = verbs.add_parser(
        "verify",
        help="check that the log is whole",
        description="Check that the audit log is one unbroken chain and, with --since, that it holds what bundles "
        "said of it: then nothing before them was altered or dropped.",
    )
    verify.add_argument("log", **log)  # type: ignore[arg-type]
    verify.add_argument(
        "--since", type=Path, action="append", default=[], metavar="BUNDLE", help="a bundle you kept (verified)"
    )
    _json(verify)
    verify.set_defaults(module="audit")
    follow = verbs.add_parser(
        "follow",
        help="print records as they come",
        description="Print the last records of the audit log and then each one as it comes, checked against the one "
        "before, until interrupted or until one does not follow.",
    )
    follow.add_argument(
        "log",
        type=Path,
        nargs="?",
        default=Path("/var/lib/cgpu-agent/audit.jsonl"),
        metavar="FILE",
        help="the file that grows (default: %(default)s)",
    )
    _json(follow)
    follow.set_defaults(module="auditfollow")


def _object(commands: _Commands[argparse.ArgumentParser]) -> None:
    group = commands.add_parser("object", help="seal and open objects", description="Sealed objects, such as models.")
    verbs = group.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    told = {
        "seal": ("encrypt a file under a key and a name", "Seal a file: nobody reads, alters, cuts or swaps it."),
        "open": ("decrypt it, if it is the one named", "Open a sealed object, if it is whole and the one named."),
    }
    for verb, (short, long) in told.items():
        parser = verbs.add_parser(
            verb, help=short, description=f"{long} Needs no agent and no network. Exit status: 0 done, 1 refused."
        )
        parser.add_argument("--key-file", type=Path, required=True, metavar="FILE", help="32 random bytes, mode 0600")
        parser.add_argument("--key-id", required=True, metavar="ID", help="the key's name")
        parser.add_argument("--object-id", required=True, metavar="ID", help="the object's name")
        parser.add_argument(
            "--object-version", type=int, required=True, metavar="N", help="its version, from 1 up: one per content"
        )
        _segment_size(parser)
        parser.add_argument("source", type=Path, metavar="IN", help="what to read; - for standard input")
        parser.add_argument("target", type=Path, metavar="OUT", help="where to write; - for standard output")
        _json(parser)
        parser.set_defaults(module="object")
    parser = verbs.add_parser(
        "inspect",
        help="say how an object is cut",
        description="Print an object's header and the sizes that follow from its own. Nothing is verified.",
    )
    parser.add_argument("source", type=Path, metavar="FILE", help="the sealed object")
    _segment_size(parser)
    _json(parser)
    parser.set_defaults(module="object")


def _segment_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--segment-size",
        choices=_SEGMENT_SIZES,
        default=_SEGMENT_SIZES[0],
        help=f"how it is cut, which no object says of itself (default: {_SEGMENT_SIZES[0]})",
    )


def _completion(commands: _Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "completion",
        help="print a shell completion script",
        description="Print a completion script, e.g. for bash: cgpuctl completion bash > "
        "/usr/share/bash-completion/completions/cgpuctl",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell")
    parser.set_defaults(module="completion")
