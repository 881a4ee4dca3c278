"""What operators see of a live agent: numbers, in words of its own, and a journal as loud as they want."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cgpu_agent import __version__
from cgpu_agent.errors import Denied, Misuse
from cgpu_agent.wire.audit import EMPTY, follow
from fixtures.ctl import PASS, USAGE, Ctl
from fixtures.daemon import PATIENCE, Daemon, booted_daemon
from fixtures.policies import permit
from fixtures.softwaregpu import GpuProcess, running_gpus, using

pytestmark = pytest.mark.swtpm

EXAMPLES = Path(__file__).resolve().parents[2] / "packaging" / "observability"
CANARY = "canary.of.a.caller"


@pytest.fixture(scope="module")
def gpu() -> Iterator[GpuProcess]:
    with running_gpus() as process:
        export = process.socket.parent / "export"
        export.mkdir()
        for name, data in using(process, lambda client: client.collateral(timeout=PATIENCE)).items():
            (export / name).write_bytes(data)
        yield process


@pytest.fixture(scope="module")
def served(gpu: GpuProcess) -> Iterator[Daemon]:
    """An agent with a GPU that is ready, a key, and a socket for metrics."""
    export = gpu.socket.parent / "export"
    with booted_daemon() as agent:
        (agent.folder / "credentials").mkdir(mode=0o700)
        (agent.folder / "credentials" / "llama.key").write_bytes(bytes(32))
        agent.environment["CREDENTIALS_DIRECTORY"] = str(agent.folder / "credentials")
        agent.tables["gpu"] = (
            f'backend = "software:{gpu.socket}"\nallow_simulated = true\ncollateral = "{export}"\n'
            f'device_roots = ["{export}/device-root.pem"]\nrim_roots = ["{export}/rim-root.pem"]\n'
            '[[key]]\nid = "llama"\nbroker = "credential"\npath = "llama.key"'
        )
        agent.grants = permit("key.get_plain", f"principal.uid == {os.geteuid()}")
        agent.configure()
        text = agent.config.read_text().replace("[tpm]", f'metrics = "{agent.folder}/metrics.sock"\n[tpm]', 1)
        agent.configure(text)
        agent.start()
        assert agent.shows("1/1 simulated GPUs trusted")
        yield agent


def scrape(path: Path) -> str:
    """As a scraper does, with a client of HTTP that is not ours."""
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(path))
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    assert (answer.status, answer.getheader("content-type")) == (200, "text/plain; version=0.0.4; charset=utf-8")
    return answer.read().decode()


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    keyed = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in found}
    assert len(keyed) == len(found), "a sample is there twice"
    return keyed


def value(text: str, name: str, **labels: str) -> float:
    return samples(text)[name, frozenset(labels.items())]


def test_the_numbers_tell_what_happened(served: Daemon) -> None:
    before = samples(served.admin().get_metrics())
    with served.client() as agent:
        agent.get_evidence(bytes(32), CANARY)
        with pytest.raises(Denied):
            agent.measure_event(CANARY.encode())
        with pytest.raises(Misuse):
            agent.get_evidence(b"", CANARY)
        agent.get_evidence(bytes(32), CANARY, gpus=True)
        agent.get_key("llama", plain=True)
    text = scrape(served.folder / "metrics.sock")

    def grew(name: str, **labels: str) -> float:
        return value(text, name, **labels) - before.get((name, frozenset(labels.items())), 0)

    evidence = {"socket": "api", "method": "/cgpu.agent.v1.Evidence/GetEvidence"}
    assert grew("cgpu_agent_calls_total", **evidence, code="OK") == 2
    assert grew("cgpu_agent_calls_total", **evidence, code="INVALID_ARGUMENT") == 1
    assert grew("cgpu_agent_call_seconds_count", **evidence) == 3
    assert grew("cgpu_agent_refusals_total", socket="api", reason="NOT_ALLOWED") == 1
    assert grew("cgpu_agent_refusals_total", socket="api", reason="BAD_NONCE") == 1
    for lane in ("boot", "gpus"):
        assert (
            grew("cgpu_agent_quote_callers_count", lane=lane) == grew("cgpu_agent_quote_callers_sum", lane=lane) == 1
        )
    assert grew("cgpu_agent_key_releases_total", broker="credential", outcome="released") == 1
    assert grew("cgpu_agent_tpm_command_seconds_count") > 0
    assert grew("cgpu_agent_tpm_command_seconds_sum") > 0
    assert value(text, "cgpu_agent_gpus_ready") == value(text, "cgpu_agent_gpus", phase="trusted") == 1
    assert value(text, "cgpu_agent_gpus", phase="rejected") == 0
    assert value(text, "cgpu_agent_gpu_attestations_total", outcome="trusted") >= 1
    assert value(text, "cgpu_agent_gpu_attestation_age_seconds") > 0
    assert value(text, "cgpu_agent_state", state="degraded") == 1
    assert value(text, "cgpu_agent_problem", reason="UNENDORSED") == 1
    assert value(text, "cgpu_agent_audit_trouble") == 0
    assert value(text, "cgpu_agent_connections_total", socket="api", outcome="accepted") > 0
    (build,) = [dict(key[1]) for key in samples(text) if key[0] == "cgpu_agent_build_info"]
    assert build["version"] == __version__


def test_nothing_that_a_caller_says_becomes_a_label(served: Daemon) -> None:
    with served.client() as agent:
        agent.get_evidence(bytes(32), CANARY, user_data=CANARY.encode())
        with pytest.raises(Denied):
            agent.get_key(CANARY, plain=True)
        channel = agent._channel
        for name in (CANARY, f"/cgpu.agent.v1.Evidence/{CANARY}", f"/{CANARY}/GetEvidence"):
            with pytest.raises(Exception, match="UNIMPLEMENTED"):
                channel.unary_unary(name)(b"", timeout=30)
    text = served.admin().get_metrics()
    assert value(text, "cgpu_agent_key_releases_total", broker="none", outcome="refused") == 1
    assert CANARY not in text


def test_every_family_has_help_type_and_a_fitting_name(served: Daemon) -> None:
    for family in text_string_to_metric_families(served.admin().get_metrics()):
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram")
        assert family.name.startswith("cgpu_agent_")
        assert all(sample.name.endswith("_total") for sample in family.samples) or family.type != "counter"
        assert not family.name.endswith("_total")


def series(expression: str) -> list[tuple[str, dict[str, str]]]:
    """Names of series in an expression of PromQL, with the labels that select them; operators do not matter here."""
    found = re.findall(r"\b(cgpu_agent_\w+)(?:\{([^}]*)\})?", expression)
    return [(name, dict(re.findall(r'(\w+)(?:=|!=|=~|!~)"([^"]*)"', selected))) for name, selected in found]


def expressions() -> list[str]:
    """Of the dashboard and of the alerts."""
    panels = json.loads((EXAMPLES / "dashboard.json").read_text())["panels"]
    rules = [
        rule for group in yaml.safe_load((EXAMPLES / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
    ]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())] + [
        rule["expr"] for rule in rules
    ]


def test_dashboard_and_alerts_ask_for_what_a_live_agent_tells(served: Daemon) -> None:
    with served.client() as agent:
        agent.get_evidence(bytes(32), CANARY)
        agent.get_key("llama", plain=True)
        with pytest.raises(Denied):
            agent.measure_event(b"x")
    told: dict[str, list[dict[str, str]]] = {}
    for name, labels in samples(served.admin().get_metrics()):
        told.setdefault(name, []).append(dict(labels))
    asked = [each for expression in expressions() for each in series(expression)]
    assert len(asked) > 30
    for name, selected in asked:
        assert name in told
        wanted = selected.keys() - {"instance"}  # the scraper's own
        assert all(wanted <= labels.keys() for labels in told[name]), (name, selected)
    used = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name, _ in asked}
    offered = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in told}
    assert used == offered, "what nobody looks at need not be told"


def test_enumerated_labels_that_alerts_select_exist(served: Daemon) -> None:
    told = samples(served.admin().get_metrics())
    values = {(name, key, value) for name, labels in told for key, value in labels}
    for expression in expressions():
        for name, selected in series(expression):
            for key in selected.keys() & {"state", "phase", "outcome", "socket"}:
                if name != "cgpu_agent_key_releases_total":  # told once it happened
                    assert all((name, key, each) in values for each in selected[key].split("|")), (name, selected)


def test_without_being_asked_for_there_is_no_socket() -> None:
    with booted_daemon() as agent:
        agent.start()
        assert not list(agent.folder.glob("metrics*"))
        assert agent.admin().get_metrics().startswith("# HELP cgpu_agent_build_info ")


def test_the_socket_from_systemd_is_taken_and_left() -> None:
    with booted_daemon() as agent, socket.socket(socket.AF_UNIX) as listener:
        path = agent.folder / "from-systemd.sock"
        listener.bind(str(path))
        listener.listen()
        agent.start(listeners=[("metrics", listener)])
        assert "cgpu_agent_state" in scrape(path)
        assert agent.stop() == 0
        assert path.is_socket()


def test_the_command_writes_a_file_for_a_textfile_collector(
    served: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ctl, file = Ctl(tmp_path, capsys), tmp_path / "cgpu-agent.prom"
    assert ctl("metrics", "-o", str(file), "--socket", served.admin_socket).code == PASS
    shown = ctl("metrics", "--socket", served.admin_socket)
    assert shown.code == PASS
    assert {key for key, _ in samples(file.read_text())} == {key for key, _ in samples(shown.out)}


def test_the_log_level_changes_at_once_is_on_record_and_ends_with_a_reload(
    served: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ctl = Ctl(tmp_path, capsys)

    def level(*words: str) -> str:
        ran = ctl("log-level", *words, "--socket", served.admin_socket)
        assert ran.code == PASS, ran.err
        return ran.out.strip()

    def refused() -> int:
        with served.client() as agent, pytest.raises(Denied):
            agent.measure_event(b"x")
        return sum("call refused" in line for line in served.journal)

    assert level() == "debug"
    told = refused()
    assert level("error") == "error (configured: debug)"
    assert served.journal[-1] == "<4>log level set level=error"
    assert refused() == told
    assert level("warning") == "warning (configured: debug)"
    assert refused() == told + 1
    served.reload()
    assert level() == "debug"
    records = follow((served.folder / "state" / "audit.jsonl").read_bytes(), EMPTY)[0]
    methods = [record.data.get("method") for record in records if record.event == "call"]
    assert methods.count("/cgpu.agent.v1.Admin/SetLogLevel") == 2


def test_a_level_that_there_is_not_is_refused(
    served: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Ctl(tmp_path, capsys)("log-level", "loud", "--socket", served.admin_socket).code == USAGE
    with pytest.raises(Misuse) as caught:
        served.admin().set_log_level("critical")
    assert caught.value.slug == "BAD_LOG_LEVEL"
    assert served.admin().get_log_level().level == "debug"
