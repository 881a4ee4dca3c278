"""``cgpuctl key policy-sign`` writes what a VM's TPM takes, and says why where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from cgpu_agent.cli.main import main
from cgpu_agent.verifier.reference import Reference
from cgpu_agent.wire.approval import parse_approval
from fixtures.owner import FLEET, GROUP, Owner

PCRS = {4: bytes(32), 11: b"\1" * 32}
VERITY = "root=/dev/mapper/root roothash=" + "ab" * 32


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "owner.pem").write_bytes(Owner().pem)
    write_reference(tmp_path, VERITY)
    files = ["--key", str(tmp_path / "owner.pem"), "--reference", str(tmp_path / "reference.json")]
    names = ["--fleet", FLEET, "--group", GROUP, "--epoch", "2"]
    return ["key", "policy-sign", *files, *names, "-o", str(tmp_path / "approval.json")]


def write_reference(folder: Path, command_line: str) -> None:
    pcrs = {index: frozenset({value}) for index, value in PCRS.items()}
    (folder / "reference.json").write_bytes(Reference(pcrs, command_lines=frozenset({command_line})).encode())


def test_approval_is_of_the_referenced_boot(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    approval = parse_approval((tmp_path / "approval.json").read_bytes())
    assert (approval.pcrs, approval.fleet, approval.epoch) == (PCRS, FLEET, 2)
    assert set(approval.signatures) == {GROUP, "latch"}
    assert "approves PCR 4, 11 up to epoch 2, for latch, prod of fleet-a" in capsys.readouterr().out
    assert main([*arguments, "--pcr", "11"]) == 0
    assert parse_approval((tmp_path / "approval.json").read_bytes()).pcrs == {11: PCRS[11]}


def test_boot_that_does_not_measure_the_root_takes_a_word_more(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_reference(tmp_path, "root=/dev/vda1")
    assert main(arguments) == 2
    assert "[ROOT_NOT_COVERED]" in capsys.readouterr().err
    assert not (tmp_path / "approval.json").exists()
    assert main([*arguments, "--i-know"]) == 0


def test_key_of_another_kind_is_named(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "owner.pem").write_bytes(b"no key")
    assert main(arguments) == 2
    assert "[BAD_APPROVAL_KEY]" in capsys.readouterr().err
