"""Attacks on a quote, one or more for each numbered step; each names the step that must stop it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from cgpu_agent.verifier import quote as quote_module
from cgpu_agent.verifier.keys import load_attestation_key
from cgpu_agent.verifier.quote import QUOTE_CHECKS, QuoteResult, verify_quote
from cgpu_agent.wire.tpm import ObjectAttributes
from fixtures.attest import (
    AK_ATTRIBUTES,
    Signer,
    attest,
    certify,
    digest_of,
    ecc_key,
    quote,
    rsa_key,
    selection,
    tpm2b,
    u16,
    u32,
    values,
)

HONEST = Signer(ecc_key())
PCRS = values((0, 4, 7))
NONCE = b"fresh nonce of this verifier"


@dataclass(frozen=True)
class Given:
    """Everything a verifier is handed; attacks bend one part and keep the rest honest."""

    attest: bytes
    signature: bytes
    ak: bytes = field(default_factory=HONEST.public)
    pcrs: dict[int, bytes] = field(default_factory=lambda: dict(PCRS))
    bank: str = "sha256"

    @classmethod
    def signed(cls, body: bytes, signer: Signer = HONEST, **changed: object) -> Given:
        return cls(body, signer.sign(body), ak=signer.public(), **changed)  # type: ignore[arg-type]

    def judge(self) -> QuoteResult:
        return verify_quote(
            self.attest,
            self.signature,
            load_attestation_key(self.ak),
            nonce=NONCE,
            pcrs=self.pcrs,
            bank=self.bank,
            expected_pcrs={0, 4, 7},
        )


def honest() -> Given:
    return Given.signed(quote(PCRS, extra=NONCE))


def forged_by_a_stranger() -> Given:
    """Another key signed, under the honest key's name."""
    return replace(Given.signed(quote(PCRS, extra=NONCE), Signer(ecc_key())), ak=HONEST.public())


def altered_after_signing() -> Given:
    """The values of another boot, with the signature of the honest one."""
    other = values((0, 4, 7), "sha384")
    return replace(honest(), attest=quote({index: value[:32] for index, value in other.items()}, extra=NONCE))


def signed_over_sha1() -> Given:
    return Given.signed(quote(PCRS, hash_name="sha1", extra=NONCE), Signer(rsa_key(), hash_name="sha1"))


def signed_by_a_scheme_the_key_may_not_use() -> Given:
    body = quote(PCRS, hash_name="sha384", extra=NONCE)
    return Given(body, HONEST.sign(body, "sha384"))


def certify_as_quote() -> Given:
    """A certify of an object, by the same AK and for the same nonce."""
    return Given.signed(certify(b"\0\x0b" + bytes(32), extra=NONCE))


def not_made_by_a_tpm() -> Given:
    return Given.signed(quote(PCRS, extra=NONCE, magic=0xFF544346))


def other_attestation_type() -> Given:
    """TPM_ST_ATTEST_NV with the body of a quote."""
    return Given.signed(quote(PCRS, extra=NONCE, kind=0x8014))


def more_after_the_quote() -> Given:
    return Given.signed(quote(PCRS, extra=NONCE) + bytes(8))


def forged_attest_by_an_unrestricted_key() -> Given:
    """A key in the same TPM that signs what it is told: root wrote the attest by hand."""
    liar = Signer(ecc_key(), attributes=AK_ATTRIBUTES & ~ObjectAttributes.RESTRICTED)
    return Given.signed(quote(PCRS, extra=NONCE), liar)


def forged_attest_by_an_imported_key() -> Given:
    """Restricted in the TPM, but its owner has a copy outside."""
    liar = Signer(ecc_key(), attributes=AK_ATTRIBUTES & ~ObjectAttributes.SENSITIVE_DATA_ORIGIN)
    return Given.signed(quote(PCRS, extra=NONCE), liar)


def forged_attest_by_a_movable_key() -> Given:
    liar = Signer(ecc_key(), attributes=AK_ATTRIBUTES & ~ObjectAttributes.FIXED_TPM)
    return Given.signed(quote(PCRS, extra=NONCE), liar)


def replayed_quote() -> Given:
    return Given.signed(quote(PCRS, extra=b"nonce of yesterday's verifier"))


def quote_without_nonce() -> Given:
    return Given.signed(quote(PCRS, extra=b""))


def nonce_with_a_tail() -> Given:
    return Given.signed(quote(PCRS, extra=NONCE + b"\0"))


def nonce_prefix() -> Given:
    return Given.signed(quote(PCRS, extra=NONCE[:-1]))


def other_bank() -> Given:
    """The sha384 bank, whose values the verifier has no reference for."""
    return Given.signed(quote(values((0, 4, 7), "sha384"), bank="sha384", extra=NONCE))


def sha1_bank_by_name() -> Given:
    pcrs = values((0, 4, 7), "sha1")
    return Given.signed(quote(pcrs, bank="sha1", extra=NONCE), pcrs=pcrs, bank="sha1")


def second_bank_beside_the_expected_one() -> Given:
    """Two banks: one digest covers both, so the values of one could hide in the other."""
    both = selection([("sha256", PCRS), ("sha384", (0,))])
    return Given.signed(attest(both + tpm2b(digest_of(PCRS)), extra=NONCE))


def empty_second_bank() -> Given:
    both = selection([("sha256", PCRS), ("sha1", ())])
    return Given.signed(attest(both + tpm2b(digest_of(PCRS)), extra=NONCE))


def no_bank() -> Given:
    return Given.signed(attest(u32(0) + tpm2b(digest_of({})), extra=NONCE), pcrs={})


def no_pcr() -> Given:
    return Given.signed(attest(selection([("sha256", ())]) + tpm2b(digest_of({})), extra=NONCE), pcrs={})


def missing_pcr() -> Given:
    """PCR 7 is left out: Secure Boot was off."""
    fewer = values((0, 4))
    return Given.signed(quote(fewer, extra=NONCE), pcrs=fewer)


def extra_pcr() -> Given:
    more = values((0, 4, 7, 16))
    return Given.signed(quote(more, extra=NONCE), pcrs=more)


def swapped_pcr_index() -> Given:
    """PCR 23, which anyone can reset, in place of PCR 7."""
    fake = {0: PCRS[0], 4: PCRS[4], 23: PCRS[7]}
    return Given.signed(quote(fake, extra=NONCE), pcrs=fake)


def value_left_out() -> Given:
    return replace(honest(), pcrs=values((0, 4)))


def unsigned_value_slipped_in() -> Given:
    """A value for PCR 11, which the quote does not cover."""
    return replace(honest(), pcrs=values((0, 4, 7, 11)))


def bytes_moved_between_values() -> Given:
    """The same concatenation and so the same digest, cut elsewhere."""
    joined = b"".join(PCRS[index] for index in (0, 4, 7))
    return replace(honest(), pcrs={0: joined[:16], 4: joined[16:64], 7: joined[64:]})


def longer_values_over_fewer_bytes() -> Given:
    """Values of the sha512 size for a quote of the sha256 bank."""
    pcrs = values((0, 4, 7), "sha512")
    return Given.signed(quote(pcrs, extra=NONCE), pcrs=pcrs)


def values_of_another_boot() -> Given:
    return replace(honest(), pcrs=PCRS | {4: bytes(32)})


def values_swapped() -> Given:
    return replace(honest(), pcrs={0: PCRS[4], 4: PCRS[0], 7: PCRS[7]})


def digest_by_another_hash() -> Given:
    return Given.signed(quote(PCRS, hash_name="sha384", extra=NONCE))


def truncated_digest() -> Given:
    return Given.signed(attest(selection([("sha256", PCRS)]) + tpm2b(digest_of(PCRS)[:31]), extra=NONCE))


def empty_digest() -> Given:
    return Given.signed(attest(selection([("sha256", PCRS)]) + u16(0), extra=NONCE))


ATTACKS: dict[Callable[[], Given], tuple[str, str]] = {
    forged_by_a_stranger: ("quote.signature", "BAD_SIGNATURE"),
    altered_after_signing: ("quote.signature", "BAD_SIGNATURE"),
    signed_over_sha1: ("quote.signature", "WEAK_HASH"),
    signed_by_a_scheme_the_key_may_not_use: ("quote.signature", "BAD_SIGNATURE"),
    certify_as_quote: ("quote.format", "WRONG_TYPE"),
    not_made_by_a_tpm: ("quote.format", "NOT_TPM_GENERATED"),
    other_attestation_type: ("quote.format", "WRONG_TYPE"),
    more_after_the_quote: ("quote.format", "TRAILING_BYTES"),
    forged_attest_by_an_unrestricted_key: ("quote.key", "AK_NOT_RESTRICTED"),
    forged_attest_by_an_imported_key: ("quote.key", "AK_NOT_RESTRICTED"),
    forged_attest_by_a_movable_key: ("quote.key", "AK_NOT_RESTRICTED"),
    replayed_quote: ("quote.nonce", "NONCE_MISMATCH"),
    quote_without_nonce: ("quote.nonce", "NONCE_MISMATCH"),
    nonce_with_a_tail: ("quote.nonce", "NONCE_MISMATCH"),
    nonce_prefix: ("quote.nonce", "NONCE_MISMATCH"),
    other_bank: ("quote.bank", "WRONG_BANK"),
    sha1_bank_by_name: ("quote.bank", "WEAK_BANK"),
    second_bank_beside_the_expected_one: ("quote.bank", "WRONG_BANK"),
    empty_second_bank: ("quote.bank", "WRONG_BANK"),
    no_bank: ("quote.bank", "WRONG_BANK"),
    no_pcr: ("quote.bank", "NO_PCRS"),
    missing_pcr: ("quote.pcr-set", "PCRS_MISSING"),
    extra_pcr: ("quote.pcr-set", "PCRS_EXTRA"),
    swapped_pcr_index: ("quote.pcr-set", "PCRS_MISSING"),
    value_left_out: ("quote.values", "MISSING_PCR"),
    unsigned_value_slipped_in: ("quote.values", "UNQUOTED_PCR"),
    bytes_moved_between_values: ("quote.values", "BAD_VALUE"),
    longer_values_over_fewer_bytes: ("quote.values", "BAD_VALUE"),
    values_of_another_boot: ("quote.digest", "PCR_DIGEST_MISMATCH"),
    values_swapped: ("quote.digest", "PCR_DIGEST_MISMATCH"),
    digest_by_another_hash: ("quote.digest", "PCR_DIGEST_MISMATCH"),
    truncated_digest: ("quote.digest", "PCR_DIGEST_MISMATCH"),
    empty_digest: ("quote.digest", "PCR_DIGEST_MISMATCH"),
}


def test_the_honest_quote_passes_every_step() -> None:
    result = honest().judge()
    assert result.accepted
    assert all(result.passed(check.id) for check in QUOTE_CHECKS)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_refuses(attack: Callable[[], Given]) -> None:
    result = attack().judge()
    assert not result.accepted
    assert result.refusal is not None
    assert (result.refusal.id, result.refusal.slug) == ATTACKS[attack]
    assert result.attest is None


def test_every_step_has_an_attack_that_it_stops() -> None:
    assert {step for step, _ in ATTACKS.values()} == {check.id for check in QUOTE_CHECKS}


@pytest.mark.parametrize(
    "attack",
    [
        forged_attest_by_an_unrestricted_key,
        replayed_quote,
        swapped_pcr_index,
        unsigned_value_slipped_in,
        longer_values_over_fewer_bytes,
        values_of_another_boot,
    ],
    ids=lambda attack: attack.__name__,
)
def test_without_its_step_the_attack_would_succeed(
    attack: Callable[[], Given], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, _ = ATTACKS[attack]
    remaining = tuple(check for check in QUOTE_CHECKS if check.id != step)
    monkeypatch.setattr(quote_module, "QUOTE_CHECKS", remaining)
    assert attack().judge().accepted


def test_an_empty_nonce_is_refused_even_where_the_quote_has_none() -> None:
    body = quote(PCRS, extra=b"")
    ak = load_attestation_key(HONEST.public())
    result = verify_quote(body, HONEST.sign(body), ak, nonce=b"", pcrs=PCRS, expected_pcrs=None)
    assert result.refusal is not None
    assert (result.refusal.id, result.refusal.slug) == ("quote.nonce", "EMPTY_NONCE")
