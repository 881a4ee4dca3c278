"""What software GPUs are made of: identities from a seed, reference values that an XML library finds canonical."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from lxml import etree

from cgpu_agent.backends.gpu.software.board import Board
from cgpu_agent.backends.gpu.software.device import build_parser, export, load_seed
from cgpu_agent.backends.gpu.software.make import BLOCKS, DRIVER, VBIOS, Maker
from cgpu_agent.backends.gpu.software.pki import Seed
from cgpu_agent.backends.gpu.software.rims import DRIVER_INDICES, VBIOS_INDICES, collateral, rim
from cgpu_agent.errors import Misuse
from cgpu_agent.verifier.certificate import load_certificates
from cgpu_agent.verifier.gpuchain import PinnedRoots
from cgpu_agent.verifier.rim import verify_rim
from cgpu_agent.wire.spdm12 import parse_chain

NOW = datetime(2026, 6, 1, 12, tzinfo=timezone.utc)
MAKER = Maker(Seed(bytes(32)))


def test_a_seed_is_every_identity() -> None:
    again, other = Maker(Seed(bytes(32))), Maker(Seed(b"\1" * 32))
    for number in (1, 2):
        device = MAKER.device(number)
        assert again.device(number).pdi == device.pdi
        assert again.device(number).uuid == device.uuid
        same = [each.certificate.tbs_certificate_bytes for each in again.device(number).signers]
        assert same == [each.certificate.tbs_certificate_bytes for each in device.signers]
        assert other.device(number).pdi != device.pdi


def test_every_gpu_and_every_life_is_another() -> None:
    devices = [MAKER.device(number, life) for number in (1, 2) for life in (0, 1)]
    for what in (lambda device: device.pdi, lambda device: device.uuid, lambda device: device.chain):
        assert len({what(device) for device in devices}) == 4
    keys = {each.key.private_numbers().private_value for device in devices for each in device.signers[:2]}
    assert len(keys) == 8


def test_a_stranger_has_another_root() -> None:
    assert MAKER.stranger().device_root_pem != MAKER.device_root_pem


def test_the_slot_holds_five_certificates_root_first() -> None:
    found = parse_chain(MAKER.device(1).chain)
    assert len(found) == 5
    assert load_certificates(MAKER.device_root_pem)[0].subject == load_certificates(found[0])[0].subject


@pytest.mark.parametrize(("version", "indices"), [(DRIVER, DRIVER_INDICES), (VBIOS, VBIOS_INDICES)])
def test_a_manifest_verifies_and_is_canonical_as_written(version: str, indices: frozenset[int]) -> None:
    document = rim(MAKER, version, indices, NOW - timedelta(days=1), NOW + timedelta(days=1))
    assert etree.tostring(etree.fromstring(document), method="c14n") == document.rstrip(b"\n")
    found = verify_rim(document, roots=PinnedRoots.of(load_certificates(MAKER.rim_root_pem)), at=NOW)
    assert found.verified is not None, found.refusal
    assert found.verified.rim.version == version
    assert {golden.index for golden in found.verified.rim.active} == indices


def test_the_goldens_of_driver_and_firmware_do_not_meet() -> None:
    assert not DRIVER_INDICES & VBIOS_INDICES
    assert max(DRIVER_INDICES | VBIOS_INDICES) < BLOCKS


def test_collateral_is_the_same_names_whatever_is_wrong() -> None:
    good = collateral(MAKER, NOW)
    bad = collateral(MAKER, NOW, stale=True, revoked=[MAKER.device(1).signers[1].certificate])
    assert set(good) == set(bad)
    assert {Path(name).suffix for name in good} == {".pem", ".swidtag", ".crl"}


def test_exports_every_file(tmp_path: Path) -> None:
    board = Board(MAKER, 1)
    export(board, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(board.files())


def test_refuses_to_export_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Misuse) as caught:
        export(Board(MAKER, 1), tmp_path / "file")
    assert caught.value.slug == "BAD_EXPORT"


@pytest.mark.parametrize("count", [0, 65])
def test_refuses_another_number_of_gpus(count: int) -> None:
    with pytest.raises(Misuse) as caught:
        Board(MAKER, count)
    assert caught.value.slug == "GPU_COUNT"


def test_a_seed_is_kept_and_without_a_place_it_is_not(tmp_path: Path) -> None:
    assert load_seed(tmp_path / "state") == load_seed(tmp_path / "state")
    assert load_seed(None) != load_seed(None)


@pytest.mark.parametrize(("content", "mode"), [(bytes(31), 0o600), (bytes(33), 0o600), (bytes(32), 0o640)])
def test_refuses_a_seed_that_is_none_or_not_secret(tmp_path: Path, content: bytes, mode: int) -> None:
    (tmp_path / "seed").write_bytes(content)
    (tmp_path / "seed").chmod(mode)
    with pytest.raises(Misuse) as caught:
        load_seed(tmp_path)
    assert caught.value.slug == "BAD_STATE"


@pytest.mark.parametrize("word", ["", "kind", "hang:x", "hang:-1"])
def test_refuses_a_misbehaviour_that_does_not_exist(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--socket", "s", "--misbehave", word])
    assert "not one of" in capsys.readouterr().err
