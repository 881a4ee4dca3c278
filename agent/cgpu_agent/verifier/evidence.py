"""Judges an evidence bundle offline, as a list of numbered steps; each has a refusal test that fails without it.

The order is that of trust: what is this file, is it for me and fresh, is it in the signed tree, who signed, who
vouches for the signer, and only then what the logs say booted.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Final

from cryptography import x509

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.verifier import gpulane
from cgpu_agent.verifier.endorsement import Endorsement, endorse
from cgpu_agent.verifier.hardware import combine, judge_hardware
from cgpu_agent.verifier.keys import AttestationKey, load_attestation_key, require_restricted
from cgpu_agent.verifier.logs import RegisterStory, explain_registers
from cgpu_agent.verifier.platform import PlatformEndorsement
from cgpu_agent.verifier.platformcase import PlatformParty
from cgpu_agent.verifier.quote import verify_quote
from cgpu_agent.verifier.replay import PcrResult
from cgpu_agent.verifier.secureboot import SecureBoot, secure_boot
from cgpu_agent.verifier.signature import verify_signature
from cgpu_agent.verifier.verdict import Check, Outcome, Skip, Step, Steps
from cgpu_agent.wire import cel, eventlog, merkle, strictjson
from cgpu_agent.wire.bundle import Bundle, parse_bundle
from cgpu_agent.wire.extradata import agent_ak_qualifying_data, manifest_extra_data
from cgpu_agent.wire.manifest import LogDigest, Manifest, parse_manifest
from cgpu_agent.wire.statement import Statement, parse_statement
from cgpu_agent.wire.tpm import Attest, Certified, parse_attest

if TYPE_CHECKING:  # who judges no GPUs needs no packages for it
    from cgpu_agent.verifier.gpucase import GpuParty
    from cgpu_agent.verifier.gpuset import SetResult

FIRMWARE_PCRS: Final = frozenset(range(10))
"""PCRs that a quote must cover for its boot log to mean something."""

AGENT_REGISTER: Final = 13
"""PCR that an agent measures into unless it is configured otherwise."""

_LAST_LASTING_PCR: Final = 15
"""From PCR 16 on, some process or a dynamic launch can reset a PCR: what came first in it shows nothing."""


@dataclass(frozen=True, slots=True)
class RelyingParty:
    """Who judges, and what it demands.

    Attributes:
        audience: its own name; a bundle made for another is refused.
        nonce: the challenge it sent.
        at: the moment of judgement, with a time zone; certificates must be valid then.
        roots: trust anchors for AK certificates.
        simulated_roots: roots of simulators: what they certify is judged like the rest, and marked ``simulated``.
        intermediates: CA certificates that a bundle does not carry.
        pinned_names: AK Names it enrolled itself.
        allow_unendorsed: go on although nobody vouches for the AK; the verdict still says so.
        allow_no_boot_log: go on although nothing tells what booted; the verdict still says so.
        required_pcrs: PCRs that the quote must cover, besides the agent register.
        register: the agent register of its VMs, 0-15. Its own choice and never the bundle's: whoever could choose
            the register would choose one in which no agent came before him.
        user_data, public_key: what the caller must have bound; ``None`` = not compared.
        purposes: of statements that it takes; what was made to release a key is no evidence for anything else.
        platform_party: what is demanded of the hardware below the vTPM, at this ``at``; ``None`` = as shipped.
        gpu_count: how many GPUs there must be; ``None`` = not said, and evidence without any will do.
        gpu_party: what is demanded of each, at this ``at`` and for the nonce of the evidence; ``None`` = all that
            NVIDIA signs, reference values among it, of which there are none then.
    """

    audience: str
    nonce: bytes
    at: datetime
    roots: Sequence[x509.Certificate] = ()
    intermediates: Sequence[x509.Certificate] = ()
    pinned_names: frozenset[bytes] = frozenset()
    allow_unendorsed: bool = False
    allow_no_boot_log: bool = False
    required_pcrs: frozenset[int] = FIRMWARE_PCRS
    register: int = AGENT_REGISTER
    user_data: bytes | None = None
    public_key: bytes | None = None
    simulated_roots: Sequence[x509.Certificate] = ()
    purposes: frozenset[str] = frozenset({"evidence"})
    platform_party: PlatformParty | None = None
    gpu_count: int | None = None
    gpu_party: GpuParty | None = None

    def __post_init__(self) -> None:
        """Raises ``Misuse`` (``BAD_REGISTER``)."""
        if not 0 <= self.register <= _LAST_LASTING_PCR:
            raise Misuse("BAD_REGISTER", "the agent register must be a PCR that cannot be reset: 0-15")


@dataclass(slots=True)
class Case:
    """One bundle under judgement: what was given, then what the steps so far found out."""

    data: bytes
    party: RelyingParty
    bundle: Bundle | None = None
    statement: Statement | None = None
    manifest: Manifest | None = None
    agent_ak: AttestationKey | None = None
    platform_ak: AttestationKey | None = None
    quote: Attest | None = None
    certify: Attest | None = None
    hardware: PlatformEndorsement | None = None
    endorsement: Endorsement | None = None
    boot_log: eventlog.EventLog | None = None
    systemd: tuple[cel.SystemdRecord, ...] = ()
    records: tuple[cel.Record, ...] = ()
    registers: RegisterStory | None = None
    secure_boot: SecureBoot | None = None
    gpus: SetResult | None = None
    quote_steps: tuple[Step, ...] = field(default=())

    @property
    def parts(self) -> tuple[Bundle, Statement, Manifest]:
        if self.bundle is None or self.statement is None or self.manifest is None:
            raise HostileInput("INTERNAL", "a step ran before the bundle was parsed")
        return self.bundle, self.statement, self.manifest


def _judge_format(case: Case) -> str:
    case.bundle = parse_bundle(case.data)
    case.statement = parse_statement(case.bundle.statement)
    case.manifest = parse_manifest(case.bundle.manifest)
    return f"{len(case.data)} bytes, statement and manifest well-formed"


def _judge_audience(case: Case) -> str:
    _, statement, _ = case.parts
    if not hmac.compare_digest(statement.audience.encode(), case.party.audience.encode()):
        raise HostileInput("WRONG_AUDIENCE", "the evidence was made for another relying party")
    if statement.purpose not in case.party.purposes:
        raise HostileInput("WRONG_PURPOSE", f"the evidence was made for another purpose: {statement.purpose}")
    return f"purpose {statement.purpose}, audience {statement.audience!r}"


def _judge_nonce(case: Case) -> str:
    _, statement, _ = case.parts
    if not hmac.compare_digest(statement.nonce, case.party.nonce):
        raise HostileInput("NONCE_MISMATCH", "the evidence answers another nonce: it is stale or was relayed")
    return "the statement holds the nonce"


def _judge_binding(case: Case) -> str | Skip:
    _, statement, _ = case.parts
    party = case.party
    if party.user_data is None and party.public_key is None:
        return Skip("NOT_ASKED", "no user data or key was expected")
    for wanted, found in ((party.user_data, statement.user_data), (party.public_key, statement.public_key)):
        if wanted is not None and (found is None or not hmac.compare_digest(wanted, found)):
            raise HostileInput("BINDING_MISMATCH", "the statement binds other user data or another key")
    return "bound as expected; a key is bound as claimed, its possession is for you to see"


def _judge_inclusion(case: Case) -> str:
    bundle, _, manifest = case.parts
    root = merkle.root_from_path(bundle.statement, bundle.leaf_index, manifest.tree_size, bundle.inclusion_path)
    if not hmac.compare_digest(root, manifest.root):
        raise HostileInput("NOT_INCLUDED", "the statement is not in the tree that the manifest signs")
    return f"leaf {bundle.leaf_index} of {manifest.tree_size}"


def _judge_quote(case: Case) -> str:
    bundle, _, _ = case.parts
    case.agent_ak = load_attestation_key(bundle.agent_ak)
    result = verify_quote(
        bundle.quote.attest,
        bundle.quote.signature,
        case.agent_ak,
        nonce=manifest_extra_data(bundle.manifest),
        pcrs=bundle.pcrs,
        expected_pcrs=frozenset(bundle.pcrs),
    )
    case.quote_steps, case.quote = result.steps, result.attest
    if result.refusal is not None:
        raise HostileInput(result.refusal.slug or "QUOTE_REFUSED", result.refusal.detail)
    required_steps = ("quote.signature", "quote.key", "quote.nonce", "quote.bank", "quote.pcr-set", "quote.digest")
    if case.quote is None or not all(result.passed(step) for step in required_steps):
        raise HostileInput("QUOTE_REFUSED", "a step of the quote's verification did not pass")
    return "signed by the agent's AK over this manifest and these PCR values"


def _judge_register(case: Case) -> str:
    _, _, manifest = case.parts
    if manifest.register != case.party.register:
        raise HostileInput(
            "WRONG_REGISTER", f"the agent register is PCR {manifest.register}, not {case.party.register} as expected"
        )
    return f"PCR {manifest.register}"


def _judge_pcr_set(case: Case) -> str:
    bundle, _, manifest = case.parts
    missing = (case.party.required_pcrs | {manifest.register}) - bundle.pcrs.keys()
    if missing:
        raise HostileInput("MISSING_PCR", f"the quote leaves out PCR {', '.join(map(str, sorted(missing)))}")
    return f"{len(bundle.pcrs)} PCRs, the required ones and the agent register {manifest.register} among them"


def _judge_agent_ak_name(case: Case) -> str:
    _, _, manifest = case.parts
    name = case.agent_ak.name if case.agent_ak is not None else None
    if name is None or not hmac.compare_digest(name, manifest.agent_ak_name):
        raise HostileInput("AGENT_AK_MISMATCH", "the manifest names another agent AK than the one that signed")
    return name.hex()


def _judge_certify(case: Case) -> str:
    bundle, _, manifest = case.parts
    case.platform_ak = load_attestation_key(bundle.platform_ak)
    require_restricted(case.platform_ak)
    pair = bundle.agent_ak_certify
    verify_signature(case.platform_ak, pair.attest, pair.signature)
    attest = parse_attest(pair.attest)
    if not isinstance(attest.attested, Certified):
        raise HostileInput("WRONG_TYPE", "the platform AK signed something other than a certification")
    if not hmac.compare_digest(attest.attested.name, manifest.agent_ak_name):
        raise HostileInput("AGENT_AK_MISMATCH", "the platform AK certified another key than the agent's AK")
    if not hmac.compare_digest(attest.extra_data, agent_ak_qualifying_data(manifest.agent_ak_name)):
        raise HostileInput("AGENT_AK_MISMATCH", "the certification was not made for an agent AK")
    case.certify = attest
    return "TPM2_Certify by the platform AK"


def _judge_same_boot(case: Case) -> str:
    _, _, manifest = case.parts
    if case.quote is None or case.certify is None:
        raise HostileInput("INTERNAL", "a step ran before the quote was judged")
    counters = {
        (attest.clock_info.reset_count, attest.clock_info.restart_count, attest.firmware_version)
        for attest in (case.quote, case.certify)
    }
    stated = (manifest.reset_count, manifest.restart_count, case.quote.firmware_version)
    if counters != {stated}:
        raise HostileInput("RESET_COUNT_MISMATCH", "quote, certification and manifest are not of one TPM boot")
    return f"reset count {manifest.reset_count}, restart count {manifest.restart_count} in all three"


def _judge_hardware(case: Case) -> str | Skip:
    bundle, _, manifest = case.parts
    party = case.party
    if case.platform_ak is None:
        raise HostileInput("INTERNAL", "a step ran before the platform AK was read")
    found = judge_hardware(
        bundle, manifest, party.platform_party, at=party.at, ak=case.platform_ak.key, pcrs=bundle.pcrs
    )
    if found is None:
        return Skip("NO_HARDWARE_REPORT", "no hardware report: nothing here is out of the reach of the vTPM's host")
    case.hardware = found
    if found.endorsed_by != "none":
        return f"{found.endorsed_by}: {found.trusted}; report of {found.platform_freshness}"
    refusal = found.refusal
    detail = found.reason if refusal is None else f"{refusal.id}: {refusal.detail}"
    if party.allow_unendorsed:
        return Skip("UNENDORSED", f"the hardware report endorses nothing, {detail}; allowed by the relying party")
    raise HostileInput((refusal.slug if refusal else None) or "UNENDORSED", detail)


def _judge_endorsement(case: Case) -> str | Skip:
    bundle, _, _ = case.parts
    party = case.party
    if case.platform_ak is None:
        raise HostileInput("INTERNAL", "a step ran before the platform AK was read")
    endorsement = endorse(
        case.platform_ak,
        certificate=bundle.platform_ak_certificate,
        intermediates=party.intermediates,
        roots=party.roots,
        pinned_names=party.pinned_names,
        at=party.at,
        simulated_roots=party.simulated_roots,
    )
    case.endorsement = combine(endorsement, case.hardware, party.roots, party.platform_party)
    if case.endorsement.kind != "none":
        return case.endorsement.detail
    if party.allow_unendorsed:
        return Skip("UNENDORSED", f"{case.endorsement.detail}; allowed by the relying party")
    raise HostileInput("UNENDORSED", case.endorsement.detail)


def _judge_log_digests(case: Case) -> str:
    bundle, _, manifest = case.parts
    pairs = (
        ("boot", bundle.boot_log, manifest.boot_log),
        ("systemd", bundle.systemd_log, manifest.systemd_log),
        ("agent", bundle.agent_log, manifest.agent_log),
    )
    for name, log, digest in pairs:
        if (None if log is None else LogDigest.of(log)) != digest:
            raise HostileInput("LOG_MISMATCH", f"the {name} log is not the one that the manifest signs")
    return ", ".join(f"{name} {len(log)} bytes" for name, log, _ in pairs if log is not None)


def _judge_boot_log(case: Case) -> str | Skip:
    bundle, _, manifest = case.parts
    if bundle.boot_log is not None:
        case.boot_log = eventlog.parse(bundle.boot_log, kind="tpm")
    case.systemd = cel.parse_systemd_log(bundle.systemd_log or b"")
    case.records = cel.parse_agent_log(bundle.agent_log)
    if any(record.pcr != manifest.register for record in case.records):
        raise HostileInput("AGENT_LOG_MISMATCH", "the agent log speaks of another PCR than the agent register")
    case.registers = explain_registers(bundle.pcrs, case.boot_log, case.systemd, case.records)
    if case.boot_log is None:
        if case.party.allow_no_boot_log:
            return Skip("NO_BOOT_LOG", "no firmware log: what booted is not known; allowed by the relying party")
        raise HostileInput("NO_BOOT_LOG", "the machine handed over no firmware log: what booted is not known")
    wrong = case.registers.wrong()
    if wrong:
        raise HostileInput("LOG_REPLAY_MISMATCH", f"PCR {wrong[0].index}: {wrong[0].note}")
    explained = [result.index for result in case.registers.results.values() if result.status == "explained"]
    return f"{len(case.boot_log.events)} events explain PCR {', '.join(map(str, explained))}"


def _judge_register_alone(case: Case) -> str:
    # Other logs hold bare digests, those of an earlier agent's records perhaps: its AK would then not come first.
    _, _, manifest = case.parts
    extended = {record.pcr for record in case.systemd}
    if case.boot_log is not None:
        extended |= {event.pcr for event in case.boot_log.events if event.measured}
    if manifest.register in extended:
        raise HostileInput("REGISTER_SHARED", f"another log has records in the agent register {manifest.register}")
    return f"no other log has anything in PCR {manifest.register}"


def _judge_agent_log(case: Case) -> str:
    _, _, manifest = case.parts
    if case.registers is None:
        raise HostileInput("INTERNAL", "a step ran before the logs were replayed")
    if case.registers.results[manifest.register].status != "explained":
        raise HostileInput("AGENT_LOG_MISMATCH", f"PCR {manifest.register} is not what the logs lead to")
    return f"{len(case.records)} records lead to PCR {manifest.register}"


def _judge_first_record(case: Case) -> str:
    _, _, manifest = case.parts
    expected = strictjson.dumps({"agent_ak_name": manifest.agent_ak_name.hex(), "event": "agent-ak"})
    first = case.records[0] if case.records else None
    if first is None or first.author != "agent" or first.content != expected:
        raise HostileInput("AGENT_AK_NOT_FIRST", "the agent log does not begin with this agent AK")
    return "the agent AK was measured before anything else in its register"


def _judge_secure_boot(case: Case) -> str | Skip:
    if case.boot_log is None:
        return Skip("NO_BOOT_LOG", "no firmware log, so Secure Boot is unknown")
    case.secure_boot = secure_boot(case.boot_log, "sha256")
    if case.secure_boot.state == "unknown":
        return Skip("SECURE_BOOT_UNKNOWN", f"Secure Boot unknown: {case.secure_boot.reason}")
    return f"Secure Boot {case.secure_boot.state}: {case.secure_boot.reason}"


def _judge_lane(case: Case) -> str | Skip:
    return gpulane.judge_lane(*case.parts, case.party.gpu_count)


def _judge_inventory(case: Case) -> str | Skip:
    bundle, _, manifest = case.parts
    return gpulane.judge_inventory(bundle, manifest)


def _judge_gpus(case: Case) -> str | Skip:
    bundle, _, manifest = case.parts
    party = case.party
    case.gpus = gpulane.judge_devices(bundle, manifest, party.gpu_party, party.at, party.gpu_count)
    if case.gpus is None:
        return gpulane.NOT_ASKED
    return "; ".join(step.detail for step in case.gpus.steps if step.outcome is Outcome.PASS)


EVIDENCE_CHECKS: Final[Sequence[Check[Case]]] = (
    Check("bundle.format", "the file is one well-formed bundle", _judge_format),
    Check("statement.audience", "it was made for this relying party, and for what it asks", _judge_audience),
    Check("statement.nonce", "it answers this nonce", _judge_nonce),
    Check("statement.binding", "it binds what the relying party expects", _judge_binding),
    Check("manifest.inclusion", "the manifest covers this statement", _judge_inclusion),
    Check("manifest.quote", "the agent's AK signed the manifest and the PCRs", _judge_quote),
    Check("manifest.register", "the agent register is the expected one", _judge_register),
    Check("manifest.pcr-set", "the quote covers the required PCRs", _judge_pcr_set),
    Check("agent-ak.name", "the manifest names the key that signed it", _judge_agent_ak_name),
    Check("agent-ak.certify", "the platform AK certified the agent's AK", _judge_certify),
    Check("agent-ak.boot", "both were signed in one boot of the TPM", _judge_same_boot),
    Check("platform.report", "the processor vouches for the platform AK, under known code", _judge_hardware),
    Check(
        "platform-ak.endorsement", "somebody the relying party trusts vouches for the platform AK", _judge_endorsement
    ),
    Check("logs.digest", "the logs are those that the manifest signs", _judge_log_digests),
    Check("logs.boot", "the logs explain the PCRs", _judge_boot_log),
    Check("logs.agent-register", "only the agent's records are in its register", _judge_register_alone),
    Check("logs.agent", "the agent log explains the agent register", _judge_agent_log),
    Check("logs.agent-ak-first", "the agent's AK is the register's first record", _judge_first_record),
    Check("boot.secure-boot", "the firmware's Secure Boot state is known", _judge_secure_boot),
    Check("gpus.lane", "it holds the GPUs exactly where they were asked for", _judge_lane),
    Check(
        "gpus.inventory",
        "everybody saw the same GPUs, and their reports are those that the manifest signs",
        _judge_inventory,
    ),
    Check("gpus.devices", "each GPU proves itself to this batch, and all of them together", _judge_gpus),
)
"""The steps of ``verify_evidence``, in order."""


@dataclass(frozen=True, slots=True)
class EvidenceResult:
    """The verdict. The facts of refused evidence are withheld: nobody shall lean on them.

    Attributes:
        accepted: no step refused.
        steps: every step, in order; ``quote_steps`` are those inside ``manifest.quote``.
        statement, manifest: what was signed; ``None`` when refused.
        hardware: what the processor says of the platform AK; ``None`` when refused, and where no report came along.
        endorsement, registers, secure_boot, boot_log, records: what the steps found; ``None`` or empty when refused.
        gpus: the devices; ``None`` when refused, and where the evidence was asked of the boot alone.
    """

    accepted: bool
    steps: tuple[Step, ...]
    quote_steps: tuple[Step, ...]
    statement: Statement | None
    manifest: Manifest | None
    endorsement: Endorsement | None
    registers: Mapping[int, PcrResult]
    secure_boot: SecureBoot | None
    boot_log: eventlog.EventLog | None
    records: tuple[cel.Record, ...]
    gpus: SetResult | None = None
    hardware: PlatformEndorsement | None = None

    @property
    def refusal(self) -> Step | None:
        """The step that refused."""
        return next((step for step in self.steps if step.outcome.value == "refuse"), None)

    @property
    def simulated(self) -> bool:
        """Whether a simulator's root vouches for platform AK or GPUs: its owner may have made up what they say."""
        return self.simulated_gpus or (self.endorsement is not None and self.endorsement.simulated)

    @property
    def simulated_gpus(self) -> bool:
        """The same of the GPUs alone."""
        facts = [] if self.gpus is None else [device.facts for device in self.gpus.devices]
        return any(each is None or each.simulated for each in facts)


def verify_evidence(data: bytes, party: RelyingParty) -> EvidenceResult:
    """Judge a bundle by ``EVIDENCE_CHECKS``. Never raises for the evidence: what is wrong with it is in the result.

    Args:
        data: the bundle file, as received.
        party: who judges, and what it demands.
    """
    case = Case(data, party)
    steps = Steps()
    accepted = steps.run(EVIDENCE_CHECKS, case)
    if not accepted:
        return EvidenceResult(False, steps.all, case.quote_steps, None, None, None, {}, None, None, ())
    return EvidenceResult(
        accepted=True,
        steps=steps.all,
        quote_steps=case.quote_steps,
        statement=case.statement,
        manifest=case.manifest,
        endorsement=case.endorsement,
        registers={} if case.registers is None else case.registers.results,
        secure_boot=case.secure_boot,
        boot_log=case.boot_log,
        records=case.records,
        gpus=case.gpus,
        hardware=case.hardware,
    )
