"""The reports of Azure's paravisor, by way of a vTPM that has its indices; its AK and all else are a real TPM's."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cgpu_agent.backends.base import Platform, PlatformReport
from cgpu_agent.backends.platform.azure import TdQuoter
from cgpu_agent.backends.platform.detect import detect
from cgpu_agent.backends.platform.store import CERTIFICATES, TD_QUOTE, PlatformStore
from cgpu_agent.backends.platform.tsm import ConfigFs
from cgpu_agent.backends.tpm.owner import TpmOwner
from cgpu_agent.backends.tpm.software import Swtpm
from cgpu_agent.backends.tpm.transport import UnixPerCommand
from cgpu_agent.errors import DeviceFault, HostileInput, Misuse
from cgpu_agent.verifier.platform import PlatformEndorsement, batch_user_data, endorse_platform
from cgpu_agent.verifier.platformcase import PlatformEvidence
from cgpu_agent.wire.hcl import parse_hcl
from fixtures.azure_tpm import AzureTpm, Manners, azure_tpm
from fixtures.platform import AMD, PARTY
from fixtures.recorded_platform import FLASHBOTS, Azure
from fixtures.swtpm import running_swtpm

pytestmark = pytest.mark.swtpm

ROOT = hashlib.sha256(b"statements").digest()
USER_DATA = batch_user_data(ROOT)


@pytest.fixture(scope="module")
def shared_swtpm() -> Iterator[Swtpm]:
    """One for all: what a test changes, it changes in the proxy in front of it."""
    with running_swtpm() as tpm:
        yield tpm


class Vm:
    """An Azure VM whose TPM is owned as the daemon owns it."""

    def __init__(self, tpm: Swtpm, folder: Path) -> None:
        self._tpm = tpm
        self.store = folder
        self.quoter: TdQuoter | None = None

    @contextmanager
    def behaving(self, **manners: object) -> Iterator[AzureTpm]:
        with azure_tpm(self._tpm, Manners(**manners)) as (azure, path):  # type: ignore[arg-type]
            self.azure, self._path = azure, path
            yield azure

    async def platform(self, owner: TpmOwner) -> Platform:
        store = PlatformStore(self.store)
        return await detect(owner, store, ConfigFs(self.store / "no-tsm"), timeout=20, quoter=self.quoter)

    def report(self, user_data: bytes | None = USER_DATA, *, timeout: float = 20.0) -> PlatformReport:
        async def go() -> PlatformReport:
            owner = TpmOwner(lambda: UnixPerCommand(self._path))
            try:
                return await (await self.platform(owner)).report(user_data, timeout=timeout)
            finally:
                owner.close()

        return asyncio.run(go())

    def judged(self, found: PlatformReport) -> PlatformEndorsement:
        evidence = PlatformEvidence(
            found.report,
            td_quote=found.td_quote,
            certificates=[x509.load_der_x509_certificate(each) for each in found.certificates],
        )
        return endorse_platform(evidence, PARTY, ak=self.azure.ak, root=ROOT)


@pytest.fixture
def vm(shared_swtpm: Swtpm, tmp_path: Path) -> Vm:
    pem = b"".join(each.public_bytes(Encoding.PEM) for each in AMD.certificates)
    (tmp_path / CERTIFICATES).write_bytes(pem)
    return Vm(shared_swtpm, tmp_path)


def test_a_report_is_made_for_this_batch_and_endorses_the_tpms_own_ak(vm: Vm) -> None:
    with vm.behaving():
        found = vm.report()
        answer = vm.judged(found)
    assert (found.kind, found.fresh, found.missing) == ("azure-cvm-snp", True, ())
    assert (answer.endorsed_by, answer.platform_freshness) == ("amd-sev-snp", "this-batch")


def test_a_report_that_comes_late_is_waited_for(vm: Vm) -> None:
    with vm.behaving(late=6) as azure:
        found = vm.report()
    assert found.fresh
    assert azure.writes == [USER_DATA]


def test_nobody_holds_the_tpm_while_waiting(vm: Vm) -> None:
    """A second user of the same owner gets an answer between two looks at a report that never comes."""

    async def go() -> tuple[int, PlatformReport]:
        owner = TpmOwner(lambda: UnixPerCommand(vm._path))
        try:
            platform = await vm.platform(owner)
            asking = asyncio.create_task(platform.report(USER_DATA, timeout=2.0))
            served = 0
            while not asking.done():
                await owner.run(lambda tpm: tpm.random(4), timeout=20)
                served += 1
                await asyncio.sleep(0.01)
            return served, await asking
        finally:
            owner.close()

    with vm.behaving(late=None) as azure:
        served, found = asyncio.run(go())
    looks = azure.commands.count(0x14E)
    assert not found.fresh
    assert served > looks / 4, "looks at the report held everybody else up"


def test_a_report_that_never_comes_leaves_the_old_one_and_says_so(vm: Vm) -> None:
    with vm.behaving(late=None):
        found = vm.report(timeout=1.5)
        answer = vm.judged(found)
    assert not found.fresh
    assert ("platform-freshness", "no new report was made in time") in found.missing
    assert (answer.endorsed_by, answer.platform_freshness) == ("amd-sev-snp", "boot")


def test_after_a_failure_evidence_does_not_wait_again_for_a_while(vm: Vm) -> None:
    async def go() -> list[PlatformReport]:
        owner = TpmOwner(lambda: UnixPerCommand(vm._path))
        try:
            platform = await vm.platform(owner)
            return [await platform.report(USER_DATA, timeout=1), await platform.report(bytes(64), timeout=20)]
        finally:
            owner.close()

    with vm.behaving(late=None) as azure:
        first, second = asyncio.run(go())
    assert azure.writes == [USER_DATA], "the second did not even try"
    assert first.missing == second.missing
    assert second.report is not None


def test_what_another_user_wrote_meanwhile_is_written_over(vm: Vm) -> None:
    with vm.behaving(rivals=2) as azure:
        found = vm.report()
    assert found.fresh
    assert azure.writes == [USER_DATA] * 3


def test_a_rival_who_never_stops_ends_the_attempt(vm: Vm) -> None:
    with vm.behaving(rivals=1000) as azure:
        found = vm.report()
        answer = vm.judged(found)
    assert not found.fresh
    assert [part for part, _ in found.missing] == ["platform-freshness"]
    assert len(azure.writes) == 4
    assert answer.platform_freshness == "boot", "a report for somebody else's bytes is not this batch's"


def test_bytes_that_nobody_may_write_leave_the_old_report(vm: Vm) -> None:
    with vm.behaving(refuse_writes=True) as azure:
        azure.write_as_another(bytes(64))
        found = vm.report()
    assert not found.fresh
    assert found.report is not None
    assert "TPM refused the authorisation" in dict(found.missing)["platform-freshness"]


def test_without_user_data_nothing_is_written(vm: Vm) -> None:
    with vm.behaving() as azure:
        found = vm.report(None)
    assert found.report is not None
    assert not found.fresh
    assert azure.writes == []


def test_a_report_of_the_same_bytes_is_not_asked_for_twice(vm: Vm) -> None:
    with vm.behaving() as azure:
        vm.report()
        assert vm.report().fresh
    assert len(azure.writes) == 1


def test_two_callers_get_each_the_report_for_their_own_bytes(vm: Vm) -> None:
    roots = [hashlib.sha256(bytes([number])).digest() for number in range(3)]

    async def go() -> list[PlatformReport]:
        owner = TpmOwner(lambda: UnixPerCommand(vm._path))
        try:
            platform = await vm.platform(owner)
            return list(await asyncio.gather(*(platform.report(batch_user_data(root), timeout=20) for root in roots)))
        finally:
            owner.close()

    with vm.behaving(late=2) as azure:
        found = asyncio.run(go())
    assert all(each.fresh for each in found)
    assert len(azure.writes) == 3, "callers wrote over one another"
    for root, each in zip(roots, found, strict=True):
        assert batch_user_data(root).hex().upper().encode() in parse_hcl(each.report or b"").claims


def test_a_caller_does_not_wait_for_his_turn_longer_than_he_said(vm: Vm) -> None:
    async def go() -> None:
        owner = TpmOwner(lambda: UnixPerCommand(vm._path))
        try:
            platform = await vm.platform(owner)
            first = asyncio.create_task(platform.report(USER_DATA, timeout=3))
            await asyncio.sleep(0.2)
            with pytest.raises(DeviceFault) as caught:
                await platform.report(batch_user_data(bytes(32)), timeout=0.2)
            assert caught.value.slug == "TPM_TIMEOUT"
            assert (await platform.report(None, timeout=20)).report is not None, "looking takes no turn"
            assert not first.done()
            await first
        finally:
            owner.close()

    with vm.behaving(late=None):
        asyncio.run(go())


def test_a_torn_report_is_read_again(vm: Vm) -> None:
    with vm.behaving() as azure:
        vm.report()
        azure.manners.torn = 2
        found = vm.report(None)
        assert vm.judged(found).endorsed_by == "amd-sev-snp"
    assert azure.manners.torn == 0


def test_a_report_that_is_always_torn_is_no_report(vm: Vm) -> None:
    with vm.behaving() as azure:
        vm.report()
        azure.manners.torn = 1000
        with pytest.raises(HostileInput) as caught:
            vm.report(None)
    assert caught.value.slug == "REPORT_DATA_MISMATCH"


@pytest.mark.parametrize("cut", [0, 100, 1236, 1300])
def test_a_report_cut_short_is_refused(vm: Vm, cut: int) -> None:
    with vm.behaving(cut=cut), pytest.raises(HostileInput):
        vm.report()


def test_a_report_about_another_vms_ak_is_handed_on_and_refused_by_its_reader(vm: Vm) -> None:
    with vm.behaving(other_ak=True):
        answer = vm.judged(vm.report())
    assert answer.endorsed_by == "none"
    assert answer.reason == "ak mismatch"


@pytest.mark.parametrize("user_data", [b"", bytes(32), bytes(65)])
def test_refuses_user_data_of_another_size(vm: Vm, user_data: bytes) -> None:
    with vm.behaving(), pytest.raises(Misuse):
        vm.report(user_data)


@pytest.mark.parametrize(
    ("content", "word"), [(None, "not fetched"), (b"", "no block"), (b"x" * 70_000, "more than")]
)
def test_missing_certificates_are_said(vm: Vm, content: bytes | None, word: str) -> None:
    (vm.store / CERTIFICATES).unlink()
    if content is not None:
        (vm.store / CERTIFICATES).write_bytes(content)
    with vm.behaving():
        found = vm.report()
    assert found.fresh
    assert found.certificates == ()
    assert word in dict(found.missing)["platform-certificates"]


# --- TDX ---


def fetch_quote(vm: Vm, azure: AzureTpm) -> None:
    report = vm.report(None).report
    assert report is not None
    (vm.store / TD_QUOTE).write_bytes(azure.td_quote(parse_hcl(report).hardware))


def test_a_td_report_keeps_the_quote_that_was_fetched_for_it(vm: Vm) -> None:
    """A new report would be without a quote, and then nobody vouches for the VM."""
    with vm.behaving(tee="tdx") as azure:
        fetch_quote(vm, azure)
        found = vm.report()
        answer = vm.judged(found)
    assert azure.writes == []
    assert (found.kind, found.fresh) == ("azure-cvm-tdx", False)
    assert [part for part, _ in found.missing] == ["platform-freshness"]
    assert (answer.endorsed_by, answer.platform_freshness) == ("intel-tdx", "boot")


def test_a_quote_over_another_report_is_left_out_and_said(vm: Vm) -> None:
    with vm.behaving(tee="tdx") as azure:
        fetch_quote(vm, azure)
        azure.write_as_another(bytes(64))
        found = vm.report(None)
    assert found.td_quote is None
    assert "another report" in dict(found.missing)["td-quote"]


@pytest.mark.parametrize(("quote", "word"), [(None, "there is no TD quote"), (bytes(700), "version 0")])
def test_a_missing_or_broken_quote_is_said(vm: Vm, quote: bytes | None, word: str) -> None:
    if quote is not None:
        (vm.store / TD_QUOTE).write_bytes(quote)
    with vm.behaving(tee="tdx"):
        found = vm.report(None)
    assert found.td_quote is None
    assert word in dict(found.missing)["td-quote"]


def test_who_can_make_quotes_makes_one_for_this_batch(vm: Vm) -> None:
    async def quote(tdreport: bytes) -> bytes:
        return vm.azure.td_quote(tdreport)

    vm.quoter = quote
    with vm.behaving(tee="tdx"):
        found = vm.report()
        answer = vm.judged(found)
    assert found.missing == ()
    assert (answer.endorsed_by, answer.platform_freshness) == ("intel-tdx", "this-batch")


def test_a_quoter_that_hangs_is_given_up(vm: Vm) -> None:
    async def quote(_: bytes) -> bytes:
        await asyncio.sleep(3600)
        raise AssertionError

    vm.quoter = quote
    with vm.behaving(tee="tdx"):
        found = vm.report(timeout=1.0)
    assert found.td_quote is None
    assert "td-quote" in dict(found.missing)


# --- what it is ---


def test_without_a_report_a_certified_ak_is_trusted_launch(vm: Vm) -> None:
    with vm.behaving(tee=None):
        found = vm.report()
    assert (found.kind, found.report, found.fresh) == ("azure-trusted-launch", None, False)
    assert [part for part, _ in found.missing] == ["platform-report"]


def test_a_tpm_with_neither_is_plain(swtpm: Swtpm, tmp_path: Path) -> None:
    async def go() -> PlatformReport:
        owner = TpmOwner(swtpm.transport)
        try:
            store, tsm = PlatformStore(tmp_path), ConfigFs(tmp_path / "no-tsm")
            return await (await detect(owner, store, tsm, timeout=20)).report(USER_DATA, timeout=1)
        finally:
            owner.close()

    assert asyncio.run(go()).kind == "plain"


# --- recorded ---


@pytest.mark.parametrize("folder", ["snp-milan-trustee-v1", "snp-milan-kinvolk-hcl", "tdx-trustee-v1", FLASHBOTS])
def test_reads_what_real_paravisors_left(vm: Vm, shared_data: Path, folder: str) -> None:
    azure = Azure(shared_data / "azure")
    recorded, quote = azure.read(f"{folder}/hcl_report.bin"), azure.read(f"{folder}/td_quote.bin")
    assert recorded is not None
    if quote is not None:
        (vm.store / TD_QUOTE).write_bytes(quote)
    with vm.behaving(late=None) as tpm:
        tpm.put_report(recorded)
        found = vm.report(None)
    assert found.report == recorded.ljust(2600, b"\0")
    assert found.td_quote == quote
    assert found.kind == ("azure-cvm-tdx" if "tdx" in folder else "azure-cvm-snp")
    assert found.missing == ()
