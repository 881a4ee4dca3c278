"""Reports by way of configfs-tsm: an emulated one, whose reports a throw-away AMD or Intel signs."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from cgpu_agent.backends.base import PlatformReport
from cgpu_agent.backends.platform.tsm import MAX_BLOB, ConfigFs, Tsm, find_kind
from cgpu_agent.errors import AgentError, DeviceFault, HostileInput, Misuse
from cgpu_agent.wire.snp import parse_snp_report
from cgpu_agent.wire.tdx import parse_td_quote
from fixtures.platform import AMD, INTEL, Td, snp_report
from fixtures.snpcertificates import VCEK, certificate_table
from fixtures.tsm import EmulatedTsm

USER_DATA = hashlib.sha512(b"batch").digest()


def signed(user_data: bytes) -> bytes:
    assert isinstance(AMD.vcek.key, ec.EllipticCurvePrivateKey)
    return snp_report(AMD.vcek.key, b"", report_data=user_data)


def quoted(user_data: bytes) -> bytes:
    return INTEL.quote(Td(report_data=user_data))


def report(tsm: EmulatedTsm, user_data: bytes | None = USER_DATA, *, timeout: float = 20.0) -> PlatformReport:
    """The report, by whatever ``find_kind`` says makes it; no request is left behind."""
    kind = find_kind(tsm)
    assert kind is not None
    platform = Tsm(tsm, kind)
    try:
        return asyncio.run(platform.report(user_data, timeout=timeout))
    finally:
        platform.close()
        assert tsm.open == {}


def refusal(tsm: EmulatedTsm) -> AgentError:
    with pytest.raises(AgentError) as caught:
        report(tsm)
    return caught.value


def test_an_snp_report_with_the_hosts_certificates() -> None:
    ders = [each.public_bytes(Encoding.DER) for each in AMD.certificates]
    found = report(EmulatedTsm(signed, auxblob=certificate_table([(VCEK.bytes, der) for der in ders])))
    assert (found.kind, found.fresh) == ("tsm-snp", True)
    assert found.certificates == tuple(ders)
    assert parse_snp_report(found.report or b"").report_data == USER_DATA
    assert [part for part, _ in found.missing] == ["platform-claims"]


def test_a_td_quote() -> None:
    found = report(EmulatedTsm(quoted, provider="tdx_guest", auxblob=None))
    assert (found.kind, found.fresh, found.certificates) == ("tsm-tdx", True, ())
    assert parse_td_quote(found.report or b"").body.report_data == USER_DATA


def test_certificates_that_the_host_did_not_give_are_said() -> None:
    found = report(EmulatedTsm(signed))
    assert ("platform-certificates", "the host gave none") in found.missing


def test_without_user_data_a_report_is_made_and_is_not_fresh() -> None:
    found = report(EmulatedTsm(signed), None)
    assert not found.fresh
    assert parse_snp_report(found.report or b"").report_data == bytes(64)


@pytest.mark.parametrize("rivals", [1, 3])
def test_a_request_that_others_wrote_to_is_made_anew(rivals: int) -> None:
    tsm = EmulatedTsm(signed, rivals=rivals)
    assert parse_snp_report(report(tsm).report or b"").report_data == USER_DATA
    assert tsm.made == 2 + rivals  # one of them found out the kind


def test_a_rival_who_never_stops_ends_the_attempt() -> None:
    tsm = EmulatedTsm(signed, rivals=1000)
    assert refusal(tsm).slug == "TSM_ERROR"
    assert tsm.made == 1 + 4


def test_a_report_for_other_user_data_is_refused() -> None:
    assert refusal(EmulatedTsm(lambda _: signed(bytes(64)))).slug == "REPORT_DATA_MISMATCH"


@pytest.mark.parametrize("size", [0, 10, 1183, 1185, MAX_BLOB + 1])
def test_a_report_of_another_size_is_refused(size: int) -> None:
    tsm = EmulatedTsm(lambda data: signed(data).ljust(size, b"\0")[:size])
    assert isinstance(refusal(tsm), HostileInput)


def test_an_oversized_report_is_not_read_to_its_end() -> None:
    assert refusal(EmulatedTsm(lambda _: bytes(1 << 24))).slug == "TOO_LARGE"


def test_a_broken_certificate_table_is_left_out_and_said() -> None:
    found = report(EmulatedTsm(signed, auxblob=b"\1" * 30))
    assert (found.fresh, found.certificates) == (True, ())
    assert "certificate table" in dict(found.missing)["platform-certificates"]


def test_an_oversized_certificate_table_is_refused() -> None:
    assert refusal(EmulatedTsm(signed, auxblob=bytes(1 << 20))).slug == "TOO_LARGE"


def test_a_provider_that_changes_is_refused() -> None:
    tsm = EmulatedTsm(signed)
    platform = Tsm(tsm, "tsm-tdx")
    try:
        with pytest.raises(DeviceFault) as caught:
            asyncio.run(platform.report(USER_DATA, timeout=20))
    finally:
        platform.close()
    assert caught.value.slug == "TSM_ERROR"
    assert tsm.open == {}


@pytest.mark.parametrize("provider", [None, "arm_cca_guest", "sev_guest2", "", "sev\xff"])
def test_a_provider_nobody_knows_is_none(provider: str | None) -> None:
    assert find_kind(EmulatedTsm(signed, provider=provider)) is None


def test_an_interface_that_is_for_root_is_said() -> None:
    with pytest.raises(DeviceFault) as caught:
        find_kind(EmulatedTsm(signed, denied=True))
    assert "EACCES" in caught.value.message


def test_a_kernel_that_hangs_holds_nobody_up() -> None:
    release = threading.Event()

    def hang(user_data: bytes) -> bytes:
        release.wait(30)
        return signed(user_data)

    platform = Tsm(EmulatedTsm(hang), "tsm-snp")
    try:
        with pytest.raises(DeviceFault) as caught:
            asyncio.run(platform.report(USER_DATA, timeout=0.2))
    finally:
        release.set()
        platform.close()
    assert caught.value.slug == "TSM_TIMEOUT"


@pytest.mark.parametrize("size", [0, 63, 65])
def test_refuses_user_data_of_another_size(size: int) -> None:
    with pytest.raises(Misuse):
        report(EmulatedTsm(signed), bytes(size))


# --- the files themselves ---


def test_no_such_directory_is_no_interface(tmp_path: Path) -> None:
    assert find_kind(ConfigFs(tmp_path / "absent")) is None


@pytest.mark.parametrize("make", [lambda: b"", lambda: b"0123456789", lambda: bytes(1000)])
def test_files_are_read_up_to_a_limit(tmp_path: Path, make: Callable[[], bytes]) -> None:
    files = ConfigFs(tmp_path)
    files.make("request")
    (tmp_path / "request" / "outblob").write_bytes(make())
    assert files.read("request", "outblob", 9) == make()[:10]
    files.write("request", "outblob", b"\1" * 64)
    assert (tmp_path / "request" / "outblob").read_bytes()[:64] == b"\1" * 64


def test_a_request_goes_with_its_directory(tmp_path: Path) -> None:
    files = ConfigFs(tmp_path)
    files.make("request")
    files.remove("request")
    assert list(tmp_path.iterdir()) == []
