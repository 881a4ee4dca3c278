"""Judges a TPM quote: these PCR values, at that nonce, signed by this AK. No TSS, no clock.

Whether the AK belongs to a TPM that anyone trusts is not judged here but in ``endorsement``; without that, a quote
proves nothing about any machine.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final, TypeVar

from cgpu_agent.errors import HostileInput, Misuse
from cgpu_agent.verifier.keys import AttestationKey, require_restricted
from cgpu_agent.verifier.signature import verify_signature
from cgpu_agent.verifier.verdict import Check, Outcome, Skip, Step, Steps
from cgpu_agent.wire.tpm import (
    ALG_ECDSA,
    ALG_RSAPSS,
    ALG_RSASSA,
    HASH_SIZES,
    Attest,
    ClockInfo,
    PcrSelection,
    Quoted,
    Signature,
    parse_attest,
    pcr_digest,
)

T = TypeVar("T")

_SCHEME_NAMES: Final = {ALG_RSASSA: "RSASSA", ALG_RSAPSS: "RSAPSS", ALG_ECDSA: "ECDSA"}


@dataclass(frozen=True, slots=True)
class QuoteResult:
    """What a quote showed. The facts of a refused quote are withheld: nobody shall lean on them.

    Attributes:
        accepted: no step refused. What was skipped (no nonce, no PCR values, unknown attributes) stands in ``steps``.
        steps: every step, in order.
        attributes: ``restricted``, ``unrestricted`` or ``unknown``, as the AK's TPMT_PUBLIC says it.
        attest: the parsed structure; its ``extra_data`` is the nonce, its ``clock_info`` the TPM's counters.
        selection: the one bank and the PCRs that are covered.
        pcrs: PCR index -> digest, the values that the quote confirmed; empty when none were given.
    """

    accepted: bool
    steps: tuple[Step, ...]
    attributes: str
    attest: Attest | None
    selection: PcrSelection | None
    pcrs: Mapping[int, bytes]

    @property
    def clock_info(self) -> ClockInfo | None:
        """TPM clock and counters. ``safe`` false: the clock may have gone back since the last orderly shutdown."""
        return None if self.attest is None else self.attest.clock_info

    @property
    def refusal(self) -> Step | None:
        """The step that refused."""
        return next((step for step in self.steps if step.outcome is Outcome.REFUSE), None)

    def passed(self, step_id: str) -> bool:
        """Whether that step passed; a skipped one did not."""
        return any(step.id == step_id and step.outcome is Outcome.PASS for step in self.steps)

    def to_json(self) -> dict[str, object]:
        """The result as JSON: bytes in lower-case hex, times in milliseconds."""
        return {
            "accepted": self.accepted,
            "attributes": self.attributes,
            "pcrs": {str(index): value.hex() for index, value in sorted(self.pcrs.items())},
            "quote": None if self.attest is None else _attest_json(self.attest),
            "steps": [step.to_json() for step in self.steps],
        }


def _attest_json(attest: Attest) -> dict[str, object]:
    clock = attest.clock_info
    return {
        "clock_ms": clock.clock,
        "clock_safe": clock.safe,
        "extra_data": attest.extra_data.hex(),
        "firmware_version": f"{attest.firmware_version:016x}",
        "qualified_signer": attest.qualified_signer.hex(),
        "reset_count": clock.reset_count,
        "restart_count": clock.restart_count,
    }


@dataclass(slots=True)
class QuoteCase:
    """One quote under judgement: what was given, then what the steps so far found out."""

    attest_bytes: bytes
    signature_bytes: bytes
    ak: AttestationKey
    nonce: bytes | None
    pcrs: Mapping[int, bytes] | None
    bank: str
    expected_pcrs: AbstractSet[int] | None
    allow_sha1_bank: bool
    signature: Signature | None = None
    attest: Attest | None = None
    quoted: Quoted | None = None
    selection: PcrSelection | None = None


def _found(value: T | None) -> T:
    if value is None:
        raise LookupError("the step that finds this did not run")
    return value


def _judge_signature(case: QuoteCase) -> str:
    case.signature = verify_signature(case.ak, case.attest_bytes, case.signature_bytes)
    return f"{_SCHEME_NAMES[case.signature.algorithm]} with {case.signature.hash}"


def _judge_format(case: QuoteCase) -> str:
    case.attest = parse_attest(case.attest_bytes)
    if not isinstance(case.attest.attested, Quoted):
        raise HostileInput("WRONG_TYPE", "TPMS_ATTEST: it certifies an object and quotes no PCR")
    case.quoted = case.attest.attested
    return f"a quote by a TPM with firmware version {case.attest.firmware_version:016x}"


def _judge_key(case: QuoteCase) -> str | Skip:
    if case.ak.public is None:
        return Skip("AK_ATTRIBUTES_UNKNOWN", "a bare key: an unrestricted one could sign a structure made up outside")
    require_restricted(case.ak)
    return "restricted, signs, made by and fixed to one TPM"


def _judge_nonce(case: QuoteCase) -> str | Skip:
    extra = _found(case.attest).extra_data
    if case.nonce is None:
        return Skip("NO_NONCE", "no nonce to compare with: the quote may be of any age")
    if not case.nonce:
        raise HostileInput("EMPTY_NONCE", "an empty nonce would accept a quote of any age")
    if not hmac.compare_digest(extra, case.nonce):
        raise HostileInput("NONCE_MISMATCH", "the quote is not an answer to this nonce")
    return f"extraData is the nonce, {len(extra)} bytes"


def _judge_bank(case: QuoteCase) -> str:
    selections = _found(case.quoted).selections
    if len(selections) != 1:
        raise HostileInput("WRONG_BANK", f"{len(selections)} PCR banks are selected, one is wanted")
    selection = selections[0]
    if selection.bank != case.bank:
        raise HostileInput("WRONG_BANK", f"the quote covers the {selection.bank} bank, not {case.bank}")
    if selection.bank == "sha1" and not case.allow_sha1_bank:
        raise HostileInput("WEAK_BANK", "the sha1 bank can be led to any value that someone prepared")
    if not selection.pcrs:
        raise HostileInput("NO_PCRS", "the quote covers no PCR")
    case.selection = selection
    return selection.bank


def _judge_pcr_set(case: QuoteCase) -> str | Skip:
    covered = set(_found(case.selection).pcrs)
    listed = _numbers(covered)
    if case.expected_pcrs is None:
        return Skip("NO_PCR_SET", f"no set of PCRs was demanded; covered: {listed}")
    missing, extra = set(case.expected_pcrs) - covered, covered - set(case.expected_pcrs)
    if missing:
        raise HostileInput("PCRS_MISSING", f"the quote does not cover PCR {_numbers(missing)}")
    if extra:
        raise HostileInput("PCRS_EXTRA", f"the quote covers PCR {_numbers(extra)} unasked")
    return f"PCR {listed}"


def _judge_values(case: QuoteCase) -> str | Skip:
    selection = _found(case.selection)
    if case.pcrs is None:
        return Skip("NO_PCR_VALUES", "no PCR values were given")
    missing, extra = set(selection.pcrs) - set(case.pcrs), set(case.pcrs) - set(selection.pcrs)
    if missing:
        raise HostileInput("MISSING_PCR", f"no value for PCR {_numbers(missing)}, which the quote covers")
    if extra:
        # Next to a signed value, a value that nothing signs looks signed.
        raise HostileInput("UNQUOTED_PCR", f"a value for PCR {_numbers(extra)}, which the quote does not cover")
    size = HASH_SIZES[selection.bank]
    if any(len(value) != size for value in case.pcrs.values()):
        raise HostileInput("BAD_VALUE", f"a PCR value of the {selection.bank} bank is not {size} bytes long")
    return f"{len(case.pcrs)} values of {size} bytes"


def _judge_digest(case: QuoteCase) -> str | Skip:
    if case.pcrs is None:
        return Skip("NO_PCR_VALUES", "no PCR values were given")
    quoted, hash_name = _found(case.quoted), _found(case.signature).hash
    expected = pcr_digest(case.pcrs, _found(case.selection).pcrs, hash_name)
    if not hmac.compare_digest(quoted.pcr_digest, expected):
        raise HostileInput("PCR_DIGEST_MISMATCH", "the quote was made over other PCR values than these")
    return f"{hash_name} over the values is pcrDigest"


def _numbers(pcrs: Iterable[int]) -> str:
    return ", ".join(str(index) for index in sorted(pcrs))


QUOTE_CHECKS: Final[Sequence[Check[QuoteCase]]] = (
    Check("quote.signature", "the AK signed exactly these bytes", _judge_signature),
    Check("quote.format", "they are a quote that a TPM generated", _judge_format),
    Check("quote.key", "the AK signs only what its TPM generated", _judge_key),
    Check("quote.nonce", "the quote answers this nonce", _judge_nonce),
    Check("quote.bank", "it covers one PCR bank, the expected one", _judge_bank),
    Check("quote.pcr-set", "it covers the demanded PCRs and no other", _judge_pcr_set),
    Check("quote.values", "there is one value of the right size for each covered PCR", _judge_values),
    Check("quote.digest", "the values are those that were quoted", _judge_digest),
)
"""The steps of ``verify_quote``, in order; the signature first, so that nothing unsigned is parsed."""


def verify_quote(
    attest: bytes,
    signature: bytes,
    ak: AttestationKey,
    *,
    nonce: bytes | None,
    pcrs: Mapping[int, bytes] | None,
    bank: str = "sha256",
    expected_pcrs: AbstractSet[int] | None,
    allow_sha1_bank: bool = False,
) -> QuoteResult:
    """Judge a quote by ``QUOTE_CHECKS``. What is passed as ``None`` is not compared, and the result says so.

    Args:
        attest: TPMS_ATTEST, no size prefix.
        signature: TPMT_SIGNATURE, or a bare PKCS#1 signature.
        ak: the key that is expected to have signed.
        nonce: expected extraData, 1-64 bytes.
        pcrs: PCR index -> value in ``bank``, for exactly the quoted PCRs.
        bank: hash name of the expected PCR bank.
        expected_pcrs: the exact PCR set that the quote must cover.
        allow_sha1_bank: accept the SHA-1 bank where ``bank`` names it.

    Raises:
        Misuse: ``UNKNOWN_BANK``. Never for the quote itself: whatever is wrong with that is in the result.
    """
    if bank not in HASH_SIZES:
        raise Misuse("UNKNOWN_BANK", "no such PCR bank")
    case = QuoteCase(attest, signature, ak, nonce, pcrs, bank, expected_pcrs, allow_sha1_bank)
    steps = Steps()
    accepted = steps.run(QUOTE_CHECKS, case)
    return QuoteResult(
        accepted=accepted,
        steps=steps.all,
        attributes=ak.attributes,
        attest=case.attest if accepted else None,
        selection=case.selection if accepted else None,
        pcrs=dict(pcrs) if accepted and pcrs is not None else {},
    )
