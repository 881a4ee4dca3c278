"""Only a root hash in a command line that digests prove measures the agent's files; everything else is nothing."""

from __future__ import annotations

from typing import Any

import pytest

from cgpu_agent.verifier.coverage import Coverage, agent_coverage, command_line
from cgpu_agent.verifier.evidence import EvidenceResult, RelyingParty, verify_evidence
from cgpu_agent.wire import eventlog
from fixtures import boots
from fixtures.bundles import BOOT, PARTY, REGISTER, agent_records, extended, made, systemd_record
from fixtures.eventlogs import pcr_values

UKI = BOOT.parent / "uki-secboot-crb"
UKI_LOG = (UKI / "binary_bios_measurements").read_bytes()
UKI_TEXT = (
    "root=LABEL=root rw console=ttyS0 quiet systemd.show_status=0 systemd.default_standard_output=journal "
    "loglevel=4 random.trust_cpu=on"
)
"""What that image was built with. Its log holds the digest alone."""


def judged(party: RelyingParty = PARTY, **changed: Any) -> EvidenceResult:
    result = verify_evidence(made(**changed), party)
    assert result.accepted, result.refusal
    return result


def uki(systemd_log: bytes | None = None) -> EvidenceResult:
    """Evidence of a unified kernel image's boot."""
    values = pcr_values(UKI / "pcrs.sha256.bin")
    for index in (9, 11):
        digests = [e.digest("sha256") for e in eventlog.parse(UKI_LOG, kind="tpm").events if e.pcr == index]
        values[index] = extended([digest for digest in digests if digest is not None])
    values[REGISTER] = extended([record.digest for record in agent_records()])
    return judged(boot_log=UKI_LOG, systemd_log=systemd_log, pcrs=values)


def coverage_of(text: str) -> Coverage:
    return agent_coverage(judged(**boots.with_command_line(text)))


def test_a_root_hash_in_the_measured_command_line_covers_the_agent() -> None:
    found = coverage_of(boots.VERITY)
    assert (found.kind, found.root_hash) == ("verity-root", boots.ROOT_HASH)
    assert boots.ROOT_HASH in found.detail


def test_a_loaders_path_with_backslashes_is_no_doubt() -> None:
    assert coverage_of(rf"{boots.VERITY} initrd=\EFI\debian\initrd").root_hash == boots.ROOT_HASH


def test_a_usr_hash_covers_programs_and_says_that_etc_is_not_covered() -> None:
    found = coverage_of(f"/vmlinuz root=/dev/sda2 mount.usr=/dev/mapper/usr usrhash={boots.ROOT_HASH}")
    assert (found.kind, found.root_hash) == ("verity-usr", boots.ROOT_HASH)
    assert "/etc" in found.detail


@pytest.mark.parametrize(
    "text",
    [
        "/vmlinuz root=LABEL=root rw",
        f"/vmlinuz root=/dev/sda1 roothash={boots.ROOT_HASH}",
        f"/vmlinuz roothash={boots.ROOT_HASH} roothash={'f' * 64}",
        f"/vmlinuz roothash={boots.ROOT_HASH} roothash={boots.ROOT_HASH}",
        f"/vmlinuz roothash={boots.ROOT_HASH} rd.roothash={'f' * 64}",
        f"/vmlinuz roothash={boots.ROOT_HASH} rd.root=/dev/sda1",
        f"/vmlinuz roothash={boots.ROOT_HASH} 'roothash={'f' * 64}'",
        f"/vmlinuz roothash={boots.ROOT_HASH} r'oo'thash={'f' * 64}",
        f"/vmlinuz roothash={boots.ROOT_HASH} root\\hash={'f' * 64}",
        f'/vmlinuz roothash={boots.ROOT_HASH} a=\\" roothash={"f" * 64} b=\\"',
        f"/vmlinuz x\\ roothash={boots.ROOT_HASH}",
        f"/vmlinuz x\vroothash={boots.ROOT_HASH}",
        f"/vmlinuz roothash={boots.ROOT_HASH} systemd.verity-root-options=ignore-corruption",
        f"/vmlinuz roothash={boots.ROOT_HASH[:-1]}",
        f"/vmlinuz roothash={boots.ROOT_HASH[:-1]}g",
        f'/vmlinuz init="/bin/sh roothash={boots.ROOT_HASH}"',
        f"/vmlinuz xroothash={boots.ROOT_HASH}",
        f"/vmlinuz roothash={boots.ROOT_HASH} systemd.verity=no",
        f"/vmlinuz roothash={boots.ROOT_HASH} rd.systemd.verity=0",
        f"/vmlinuz roothash={boots.ROOT_HASH} systemd.verity_root_options=ignore-corruption,panic-on-corruption",
        f"/vmlinuz roothash={boots.ROOT_HASH} a=\N{NO-BREAK SPACE}root=/dev/sda1",
        f"/vmlinuz roothash={boots.ROOT_HASH} {'x' * 2100} root=/dev/sda1",
        f"/vmlinuz usrhash={boots.ROOT_HASH} mount.usr=/dev/sda3",
    ],
)
def test_nothing_covers_the_agent_where_the_command_line_leaves_a_way_around(text: str) -> None:
    found = coverage_of(text)
    assert (found.kind, found.root_hash) == ("nothing", None)
    assert "IMA" in found.detail


def test_a_quoted_parameter_is_read_as_the_kernel_reads_it() -> None:
    assert coverage_of(f'/vmlinuz "roothash={boots.ROOT_HASH}" x="a b"').kind == "verity-root"


def test_a_text_that_the_log_shows_but_no_digest_covers_is_not_believed() -> None:
    result = judged(**boots.with_shown_command_line(boots.VERITY))
    assert command_line(result).text is None
    assert agent_coverage(result).kind == "nothing"


def test_a_label_alone_makes_no_command_line() -> None:
    result = judged(**boots.with_command_line(boots.VERITY, command="/vmlinuz root=/dev/sda1"))
    assert command_line(result).text is None
    assert agent_coverage(result).kind == "nothing"


def test_of_two_command_lines_nobody_knows_which_kernel_ran() -> None:
    result = judged(**boots.with_two_command_lines(boots.VERITY, "/vmlinuz root=/dev/sda1"))
    assert command_line(result).text is None
    assert agent_coverage(result).kind == "nothing"


def test_a_second_command_line_that_no_digest_proves_leaves_the_first_in_doubt() -> None:
    result = judged(**boots.with_unproven_second(boots.VERITY, "/vmlinuz root=/dev/sda1"))
    assert command_line(result).text is None
    assert agent_coverage(result).kind == "nothing"


def test_without_a_boot_log_there_is_no_command_line() -> None:
    party = RelyingParty(PARTY.audience, PARTY.nonce, PARTY.at, roots=PARTY.roots, allow_no_boot_log=True)
    result = judged(party, boot_log=None)
    assert command_line(result).text is None
    assert agent_coverage(result).kind == "nothing"


def test_a_unified_kernel_image_is_recognised_by_whoever_knows_its_command_line() -> None:
    result = uki()
    assert command_line(result).text is None
    assert command_line(result, [UKI_TEXT]).text == UKI_TEXT
    assert command_line(result, [UKI_TEXT + " quiet", "x"]).text is None
    assert agent_coverage(result, [UKI_TEXT]).kind == "nothing"


def test_a_command_line_in_a_register_that_no_log_explains_is_not_proven() -> None:
    found = command_line(uki(systemd_record(11, bytes(32), "a phase that was never measured")), [UKI_TEXT])
    assert found.text is None
    assert "PCR 11" in found.detail
