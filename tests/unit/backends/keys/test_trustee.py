"""Keys from a broker that speaks Trustee's protocol and judges evidence for real; it is a stand-in for Trustee."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cgpu_agent.backends.keys.trustee import TrusteeKbs
from cgpu_agent.backends.platform.store import CERTIFICATES
from cgpu_agent.backends.tpm.software import Swtpm
from cgpu_agent.errors import AgentError, DeviceFault, HostileInput, Misuse, Unavailable
from fixtures.kbs import ORIGIN, Kbs
from fixtures.kbsvm import KEY, Vm, azure_vm, bare_vm
from fixtures.lanes import board
from fixtures.platform import AMD, INTEL, Td
from fixtures.swtpm import running_swtpm
from fixtures.tsm import EmulatedTsm

pytestmark = pytest.mark.swtpm


@pytest.fixture(scope="module")
def swtpm() -> Iterator[Swtpm]:
    with running_swtpm() as tpm:
        yield tpm


def evidence_of(kbs: Kbs) -> tuple[dict[str, object], str]:
    """Primary and additional evidence of the last attestation."""
    body = [json.loads(each[3]) for each in kbs.log if each[1].endswith("/attest")][-1]["tee-evidence"]
    return body["primary_evidence"], body["additional_evidence"]


def tee_of(kbs: Kbs) -> str:
    return str(json.loads(kbs.log[0][3])["tee"])


def test_a_confidential_vm_with_gpus(swtpm: Swtpm, tmp_path: Path) -> None:
    kbs = Kbs(need_gpus=2)
    with azure_vm(swtpm, tmp_path) as (vm, azure):
        vm.gpus = board()
        (released,) = vm.release(kbs)
    assert (released.secret, released.generation) == (b"secret " * 4, 1)
    assert b"secret" not in repr(released).encode()
    assert tee_of(kbs) == "az-snp-vtpm"
    primary, additional = evidence_of(kbs)
    assert primary["version"] == 2
    assert [each["uuid"] for each in json.loads(additional)["nvidia"]["device_evidence_list"]] == [
        "GPU-00000000",
        "GPU-00000001",
    ]
    assert len(azure.writes) == 1, "the report was made for this release and once"


def test_one_without_gpus_says_so_and_the_policy_decides(swtpm: Swtpm, tmp_path: Path) -> None:
    kbs = Kbs()
    with azure_vm(swtpm, tmp_path) as (vm, _):
        vm.release(kbs)
        assert evidence_of(kbs)[1] == ""
        kbs.need_gpus = 1
        with pytest.raises(AgentError) as caught:
            vm.release(kbs)
    assert caught.value.slug == "KEY_REFUSED"


def test_the_session_is_a_cookie_that_goes_nowhere_else(swtpm: Swtpm, tmp_path: Path) -> None:
    kbs = Kbs(resources={KEY: b"1", "default/key/two": b"2"})
    with azure_vm(swtpm, tmp_path) as (vm, _):
        assert [each.secret for each in vm.release(kbs, KEY, "default/key/two")] == [b"1", b"2"]
    calls = [(method, url.removeprefix(f"{ORIGIN}/kbs/v0/")) for method, url, _, _ in kbs.log]
    handshake = [("POST", "auth"), ("POST", "attest")]
    assert calls == [*handshake, ("GET", f"resource/{KEY}"), *handshake, ("GET", "resource/default/key/two")]
    cookies = [headers.get("Cookie") for _, _, headers, _ in kbs.log]
    first, second = (f"kbs-session-id={session}" for session in kbs.sessions)
    assert cookies == [None, first, first, None, second, second]
    keys = [json.loads(body)["runtime-data"]["tee-pubkey"]["x"] for _, url, _, body in kbs.log if "attest" in url]
    assert len(set(keys)) == 2, "every release has a key of its own"


def test_a_report_that_cannot_be_renewed_is_sent_as_what_it_is(swtpm: Swtpm, tmp_path: Path) -> None:
    kbs = Kbs()
    with azure_vm(swtpm, tmp_path, refuse_writes=True) as (vm, _):
        vm.release(kbs)
    assert evidence_of(kbs)[0]["version"] == 1


def test_a_tdx_vm(swtpm: Swtpm, tmp_path: Path) -> None:
    kbs = Kbs()
    with azure_vm(swtpm, tmp_path, tee="tdx") as (vm, azure):

        async def quoter(tdreport: bytes) -> bytes:
            return azure.td_quote(tdreport)

        vm.quoter = quoter
        vm.release(kbs)
    assert tee_of(kbs) == "az-tdx-vtpm"
    assert evidence_of(kbs)[0]["version"] == 2


def test_a_trusted_launch_vm_shows_its_tpm(swtpm: Swtpm, tmp_path: Path) -> None:
    kbs = Kbs(need_gpus=2)
    with azure_vm(swtpm, tmp_path, tee=None) as (vm, _):
        vm.gpus = board()
        vm.release(kbs)
    assert tee_of(kbs) == "tpm"


@pytest.fixture
def bare(swtpm: Swtpm, tmp_path: Path) -> Vm:
    return bare_vm(swtpm, tmp_path)


def test_a_tdx_guest_without_paravisor(bare: Vm) -> None:
    kbs = Kbs()
    bare.requests = EmulatedTsm(lambda data: INTEL.quote(Td(report_data=data)), provider="tdx_guest", auxblob=None)
    bare.release(kbs)
    assert tee_of(kbs) == "tdx"


def refused(vm: Vm, kbs: Kbs, *paths: str) -> tuple[type[AgentError], str]:
    with pytest.raises(AgentError) as caught:
        vm.release(kbs, *paths)
    return type(caught.value), caught.value.slug


def test_a_kind_of_vm_that_has_no_form_here_is_told_before_anybody_is_asked(bare: Vm) -> None:
    kbs = Kbs()
    bare.requests = EmulatedTsm(lambda data: AMD.report(b"", report_data=data))
    assert refused(bare, kbs) == (Unavailable, "PLATFORM_UNSUPPORTED")
    assert not kbs.log


def test_a_gpu_that_trustee_does_not_know_is_not_left_out(swtpm: Swtpm, tmp_path: Path) -> None:
    kbs = Kbs()
    with azure_vm(swtpm, tmp_path) as (vm, _):
        vm.gpus, vm.architecture = board(), "ampere"
        assert refused(vm, kbs) == (Unavailable, "GPU_UNSUPPORTED")
    assert [url.rpartition("/")[2] for _, url, _, _ in kbs.log] == ["auth"]


def test_without_the_processors_certificate_there_is_no_evidence(swtpm: Swtpm, tmp_path: Path) -> None:
    with azure_vm(swtpm, tmp_path) as (vm, _):
        pem = (tmp_path / CERTIFICATES).read_text()
        first = pem.index("-----END CERTIFICATE-----") + 26
        (tmp_path / CERTIFICATES).write_text(pem[first:])
        assert refused(vm, Kbs()) == (Unavailable, "NO_CERTIFICATES")


def test_without_a_td_quote_there_is_no_evidence(swtpm: Swtpm, tmp_path: Path) -> None:
    with azure_vm(swtpm, tmp_path, tee="tdx") as (vm, _):
        assert refused(vm, Kbs()) == (Unavailable, "NO_TD_QUOTE")


@pytest.mark.parametrize(
    "path", ["", "a/b", "a/b/c/d", "a//c", "../b/c", "a/b/..", "a/b/c?d", "a/b/c\n", "ä/b/c", "/a/b/c"]
)
def test_names_of_keys(bare: Vm, path: str) -> None:
    kbs = Kbs()
    assert refused(bare, kbs, path) == (Misuse, "BAD_KEY_PATH")
    assert not kbs.log


@pytest.mark.parametrize(
    "url",
    [
        "http://kbs.example",
        "HTTPS://kbs.example",
        "kbs.example",
        "https://",
        "https://user@kbs.example",
        "https://kbs.example/",
        "https://kbs.example/kbs/v0",
        "https://kbs.example:",
        "https://kbs.example?x",
        "https://kbs.example\n",
        "https://kbs.example#x",
        "https://kbs.example\\@other.example",
    ],
)
def test_addresses_of_brokers(url: str) -> None:
    """There is no way to say plain HTTP."""
    with pytest.raises(Misuse) as caught:
        TrusteeKbs(url, Kbs())
    assert caught.value.slug == "BAD_BROKER_URL"


def test_good_addresses() -> None:
    for url in ("https://kbs.example", "https://10.0.0.1:8080", "https://[fe80::1]:8080"):
        TrusteeKbs(url, Kbs()).close()


@pytest.mark.parametrize(
    ("fault", "slug"),
    [
        (Unavailable("EGRESS_UNREACHABLE", "no"), "BROKER_UNREACHABLE"),
        (DeviceFault("EGRESS_TIMEOUT", "no"), "BROKER_UNREACHABLE"),
        (HostileInput("EGRESS_BAD_ANSWER", "no"), "BROKER_ANSWER"),
    ],
)
@pytest.mark.parametrize("step", ["auth", "attest", "resource"])
def test_who_cannot_be_reached(bare: Vm, step: str, fault: AgentError, slug: str) -> None:
    kbs = Kbs()

    def fail(_answer: object) -> tuple[int, dict[str, str], bytes]:
        raise fault

    kbs.on_answer[step] = fail
    with pytest.raises(Unavailable) as caught:
        bare.release(kbs)
    assert caught.value.slug == slug
    assert (caught.value.retry_after is not None) == (slug == "BROKER_UNREACHABLE")


def test_a_broker_that_never_answers(bare: Vm) -> None:
    class Silent(Kbs):
        async def request(self, *_: object, **__: object) -> tuple[int, dict[str, str], bytes]:  # type: ignore[override]
            await asyncio.Event().wait()
            raise AssertionError

    with pytest.raises(Unavailable) as caught:
        bare.release(Silent(), timeout=0.2)
    assert (caught.value.slug, caught.value.retry_after) == ("BROKER_UNREACHABLE", 5.0)


def test_a_key_that_is_not_there(bare: Vm) -> None:
    assert refused(bare, Kbs(), "default/key/other") == (Unavailable, "KEY_ABSENT")
