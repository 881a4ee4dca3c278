"""What the agent trusts about GPUs is what the named files hold, and a file that is not what it should be is said."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cgpu_agent.backends.gpu.nvmlgpus import NvmlGpus
from cgpu_agent.daemon.config import GpuConfig, parse
from cgpu_agent.daemon.gpus import load_judge, load_rules
from cgpu_agent.daemon.parts import _open_gpus
from cgpu_agent.domain.gpurules import GpuRules
from cgpu_agent.errors import Misuse
from cgpu_agent.verifier.gpuchain import NVIDIA_DEVICE_ROOTS, NVIDIA_RIM_ROOTS
from fixtures.gpujudge import RIMS, VENDOR
from fixtures.gpupki import pem


def config(folder: Path, **changed: object) -> GpuConfig:
    return replace(GpuConfig(collateral=str(folder)), **changed)  # type: ignore[arg-type]


def spki() -> str:
    key = VENDOR.root.certificate.public_key()
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def refusal(given: GpuConfig) -> str:
    with pytest.raises(Misuse) as caught:
        load_judge(given)
    assert caught.value.slug == "BAD_CONFIG"
    return caught.value.message


def test_by_default_nvidia_is_trusted_and_nothing_simulated(tmp_path: Path) -> None:
    judge = load_judge(config(tmp_path / "absent"))
    assert (judge.device_roots, judge.rim_roots) == (NVIDIA_DEVICE_ROOTS, NVIDIA_RIM_ROOTS)
    assert judge.collateral.rims == ()
    assert not judge.allow_no_rim
    assert load_rules(GpuConfig()) == GpuRules()
    assert not GpuRules().allow_simulated


def test_a_root_may_be_a_file_or_the_digest_of_its_key(tmp_path: Path) -> None:
    (tmp_path / "root.pem").write_bytes(pem([VENDOR.root.certificate]))
    for root in (f"{tmp_path}/root.pem", spki(), spki().upper()):
        judge = load_judge(config(tmp_path, device_roots=(root,)))
        assert judge.device_roots == VENDOR.device_roots
        assert judge.rim_roots == NVIDIA_RIM_ROOTS


def test_collateral_is_taken_by_suffix_and_nothing_else_is_read(tmp_path: Path) -> None:
    (tmp_path / "driver.swidtag").write_bytes(RIMS.rims[0].data)
    (tmp_path / "vbios.xml").write_bytes(RIMS.rims[1].data)
    (tmp_path / "README").write_bytes(b"not collateral")
    assert {each.data for each in load_judge(config(tmp_path)).collateral.rims} == {
        each.data for each in RIMS.rims[:2]
    }


@pytest.mark.parametrize("name", ["a.xml", "a.swidtag", "a.crl", "a.ocsp"])
@pytest.mark.parametrize("content", [b"", b"<x/>", bytes(range(256))])
def test_collateral_that_is_something_else_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    refusal(config(tmp_path))


def test_a_root_that_is_not_there_or_no_certificate_is_refused(tmp_path: Path) -> None:
    assert "absent.pem" in refusal(config(tmp_path, device_roots=(f"{tmp_path}/absent.pem",)))
    (tmp_path / "bad.pem").write_bytes(b"bad")
    refusal(config(tmp_path, rim_roots=(f"{tmp_path}/bad.pem",)))


def test_a_bad_floor_is_refused(tmp_path: Path) -> None:
    refusal(config(tmp_path, min_driver="new"))
    refusal(config(tmp_path, min_vbios="1"))


def test_the_digest_changes_with_configuration_and_files_and_with_nothing_else(tmp_path: Path) -> None:
    empty = load_judge(config(tmp_path)).digest
    assert load_judge(config(tmp_path)).digest == empty
    assert load_judge(config(tmp_path, count=2)).digest != empty
    (tmp_path / "driver.xml").write_bytes(RIMS.rims[0].data)
    one = load_judge(config(tmp_path)).digest
    assert one != empty
    (tmp_path / "README").write_bytes(b"x")
    assert load_judge(config(tmp_path)).digest == one


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("backend", "cuda"),
        ("backend", "software:relative"),
        ("backend", "software:"),
        ("device_roots", "root.pem"),
        ("device_roots", ["relative.pem"]),
        ("device_roots", ["ab" * 31]),
        ("rim_roots", [1]),
        ("rim_roots", [""]),
        ("collateral", "relative"),
        ("allow_simulated", 1),
        ("allow_simulated", "yes"),
        ("require_revocation", 0),
        ("count", 65),
        ("count", True),
        ("reattest_seconds", 59),
        ("report_seconds", 0),
        ("report_seconds", 301),
    ],
)
def test_a_bad_value_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(Misuse) as caught:
        parse({"gpu": {key: value}})
    assert caught.value.slug == "BAD_CONFIG"
    assert f"gpu.{key}" in caught.value.message


def test_the_ready_state_is_set_through_the_helper_unless_the_configuration_says_otherwise() -> None:
    for helper, through in (("/run/x/ready.sock", True), ("none", False)):
        gpus = _open_gpus(GpuConfig(backend="nvml", ready_helper=helper))
        assert isinstance(gpus, NvmlGpus)
        assert (gpus._lease is not None) == through
        gpus.close()
