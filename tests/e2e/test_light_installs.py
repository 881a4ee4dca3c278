"""Installs without the daemon's dependencies: a relying party with the verifier, a workload with the client alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from fixtures.attest import quote
from fixtures.bundles import AGENT_AK, AUDIENCE, BOOT_LOG, GENUINE, NONCE, ROOT
from fixtures.lanes import asking

RPC = ("grpc", "google", "grpc_health", "grpc_reflection")
DAEMON = ("structlog", "tpm2_pytss", "pynvml")
POLICY = ("cedarpy", "joserfc")
CRYPTO = ("cryptography",)

GPU = ("lxml", "signxml")

VERIFIER_LACKS = (*RPC, *DAEMON, *GPU)
CLIENT_LACKS = (*DAEMON, *POLICY, *CRYPTO)

PRELUDE = """
import sys
blocked = {blocked!r}
sys.modules.update(dict.fromkeys(blocked))  # None: importing it fails as if it were not installed
"""
RUN = "from cgpu_agent.cli.main import main\nsys.exit(main(sys.argv[1:]))"


def python(code: str, *arguments: str, without: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter in which some packages are not installed."""
    whole = PRELUDE.format(blocked=without) + code
    return subprocess.run([sys.executable, "-c", whole, *arguments], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evidence")
    attest = quote(GENUINE.pcrs, extra=NONCE)
    contents = {
        "bundle": GENUINE.encode(),
        "root": ROOT.certificate.public_bytes(Encoding.PEM),
        "log": BOOT_LOG,
        "attest": attest,
        "signature": AGENT_AK.sign(attest),
        "ak": AGENT_AK.public(),
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return folder


def test_a_missing_package_is_really_missing() -> None:
    for package in (*RPC[:2], *DAEMON, *CRYPTO):
        ran = python(f"import {package}", without=(package,))
        assert ran.returncode == 1
        assert "ModuleNotFoundError" in ran.stderr


class TestVerifierOnly:
    VERIFY = ("verify", "bundle", "--nonce", NONCE.hex(), "--audience", AUDIENCE, "--ak-root", "root")
    VERIFY += ("--at", "2026-06-01T12:00:00Z")
    COMMANDS = (
        VERIFY,
        (*VERIFY, "--json"),
        ("eventlog", "log"),
        ("eventlog", "log", "--json"),
        ("quote", "verify", "--attest", "attest", "--signature", "signature", "--ak", "ak"),
        ("boot", "show", "--bundle", "bundle"),
        ("completion", "bash"),
    )

    @pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: " ".join(arguments[:2]))
    def test_the_offline_commands_work(self, files: Path, arguments: tuple[str, ...]) -> None:
        named = [str(files / word) if (files / word).is_file() else word for word in arguments]
        ran = python(RUN, *named, without=VERIFIER_LACKS)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert ran.stdout

    def test_the_verifier_loads_nothing_of_the_daemon(self) -> None:
        code = """
import cgpu_agent.verifier.evidence
loaded = {name.split(".")[0] for name, module in sys.modules.items() if module is not None}
print(sorted(loaded & {"grpc", "google", "tpm2_pytss", "structlog", "pynvml", "cedarpy", "joserfc"}))
"""
        ran = python(code, without=())
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "[]\n", "")

    def test_without_the_packages_for_gpus_a_bundle_with_gpus_is_refused_and_says_why(self, tmp_path: Path) -> None:
        bundle, root = tmp_path / "bundle", tmp_path / "root"
        bundle.write_bytes(asking())
        root.write_bytes(ROOT.certificate.public_bytes(Encoding.PEM))
        arguments = [str(bundle) if word == "bundle" else word for word in self.VERIFY]
        ran = python(RUN, *[str(root) if word == "root" else word for word in arguments], without=GPU)
        assert (ran.returncode, ran.stderr) == (1, "")
        assert "GPU_PACKAGES_MISSING" in ran.stdout
        assert "pip install 'cgpu-agent[gpu]'" in ran.stdout

    @pytest.mark.parametrize("arguments", [("status",), ("evidence", "get", "-o", "x"), ("boot", "show")])
    def test_commands_that_need_the_agent_say_what_to_install(self, arguments: tuple[str, ...]) -> None:
        ran = python(RUN, *arguments, without=VERIFIER_LACKS)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert ran.stderr == "cgpuctl: this command needs more: pip install 'cgpu-agent'\n"


class TestClientOnly:
    def test_the_client_can_be_imported(self) -> None:
        code = "from cgpu_agent.client import Agent, Admin\nimport cgpu_agent.client.aio"
        ran = python(code, without=CLIENT_LACKS)
        assert (ran.returncode, ran.stderr) == (0, "")

    def test_help_needs_nothing(self) -> None:
        ran = python(RUN, "--help", without=(*CLIENT_LACKS, *RPC))
        assert (ran.returncode, ran.stderr) == (0, "")
        assert "usage: cgpuctl" in ran.stdout

    @pytest.mark.parametrize(
        "arguments",
        [
            ("verify", "bundle", "--nonce", "00"),
            ("eventlog", "log"),
            ("quote", "verify", "--attest", "a", "--signature", "s", "--ak", "k"),
        ],
        ids=lambda arguments: arguments[0],
    )
    def test_the_verifiers_commands_say_what_to_install(self, arguments: tuple[str, ...]) -> None:
        ran = python(RUN, *arguments, without=CLIENT_LACKS)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert ran.stderr == "cgpuctl: this command needs more: pip install 'cgpu-agent[verifier]'\n"

    def test_a_command_of_the_client_reaches_for_the_agent(self, tmp_path: Path) -> None:
        arguments = ("evidence", "get", "--socket", str(tmp_path / "none.sock"), "-o", str(tmp_path / "bundle"))
        ran = python(RUN, *arguments, without=CLIENT_LACKS)
        assert ran.returncode == 1
        assert ran.stderr.startswith("cgpuctl: ")
        assert "Traceback" not in ran.stderr
        assert not (tmp_path / "bundle").exists()
