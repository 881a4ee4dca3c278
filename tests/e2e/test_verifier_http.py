"""A real ``cgpu-verifier`` on loopback: what it answers, and what it does about strangers who waste its time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from cgpu_agent.service import keygen
from fixtures.gpu import DRIVER
from fixtures.lanes import honest, vendor
from fixtures.verifier import (
    AUDIENCE,
    PATIENCE,
    Verifier,
    bundle,
    certify_ak,
    claims,
    fresh_nonce,
    refusal,
    running,
)

LIMITS = """bundle_bytes = 1000000
buffered_bytes = 1500000
body_seconds = 1
header_seconds = 1
connections = 40
"""


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Verifier]:
    made = Verifier(tmp_path_factory.mktemp("verifier"))
    made.tables["limits"] = LIMITS
    with running(made):
        yield made


@pytest.fixture(scope="module")
def judge_of_gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Verifier]:
    """A service that trusts the throw-away maker of GPUs, and demands two of them."""
    folder = tmp_path_factory.mktemp("gpus")
    made = Verifier(folder)
    for name, signer in (("device", vendor().root), ("rim", vendor().rim_root)):
        (folder / f"{name}.pem").write_bytes(signer.certificate.public_bytes(Encoding.PEM))
    (folder / "store").mkdir()
    for number, rim in enumerate(vendor().rims()):
        (folder / "store" / f"{number}.xml").write_bytes(rim)
    made.tables["gpu"] = (
        f'device_roots = ["{folder}/device.pem"]\nrim_roots = ["{folder}/rim.pem"]\n'
        f'collateral = "{folder}/store"\ncount = 2\nmin_driver = "{DRIVER}"\n'
    )
    with running(made):
        yield made


@pytest.fixture
def client(verifier: Verifier) -> Iterator[httpx.Client]:
    with verifier.client() as made:
        yield made


def test_gpus_are_judged_and_told_in_the_token(judge_of_gpus: Verifier) -> None:
    with judge_of_gpus.client() as client:
        nonce, certificate = fresh_nonce(client), certify_ak(judge_of_gpus.ak_root)
        answer = client.post("/v1/verify", content=bundle(nonce, certificate, lane="gpus", gpus=honest))
        assert answer.status_code == 200, answer.text
        found = claims(client, answer.text)
    gpus = found["submods"]["gpus"]
    assert found["cgpu.simulated"] is True
    assert gpus["ear.status"] == "contraindicated"
    assert (gpus["cgpu.signed"]["measurements"], gpus["cgpu.signed"]["floor"]) == ("match", "kept")
    assert len(gpus["cgpu.signed"]["devices"]) == 2
    assert gpus["cgpu.reported"]["ready"] is True


def test_gpus_that_are_demanded_must_be_there(judge_of_gpus: Verifier) -> None:
    with judge_of_gpus.client() as client:
        nonce, certificate = fresh_nonce(client), certify_ak(judge_of_gpus.ak_root)
        answer = client.post("/v1/verify", content=bundle(nonce, certificate))
    assert refusal(answer) == (422, "GPUS_NOT_ASKED", "gpus.lane")


def test_gpus_nobody_gave_reference_values_for_are_refused(verifier: Verifier, client: httpx.Client) -> None:
    nonce, certificate = fresh_nonce(client), certify_ak(verifier.ak_root)
    answer = client.post("/v1/verify", content=bundle(nonce, certificate, lane="gpus", gpus=honest))
    assert refusal(answer) == (422, "UNKNOWN_ROOT", "gpus.devices")


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), 0.0)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def read_to_end(connection: socket.socket) -> bytes:
    """What the service says until it hangs up, as it must within the patience of a test."""
    connection.settimeout(PATIENCE)
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received


class TestAnswers:
    def test_evidence_becomes_a_token_that_the_published_keys_verify(
        self, verifier: Verifier, client: httpx.Client
    ) -> None:
        answer = client.post("/v1/verify", content=bundle(fresh_nonce(client), certify_ak(verifier.ak_root)))
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/eat+jwt")
        found = claims(client, answer.text)
        assert found["cgpu.purpose"] == "evidence"
        assert found["submods"]["platform"]["cgpu.signed"]["endorsement"] == "ak-certificate"
        assert found["exp"] - found["iat"] == 300

    def test_a_nonce_says_for_whom_and_until_when(self, client: httpx.Client) -> None:
        answer = client.post("/v1/nonce").json()
        assert answer.keys() == {"audience", "expires", "nonce"}
        assert answer["audience"] == AUDIENCE

    def test_a_refusal_names_step_and_reason(self, verifier: Verifier, client: httpx.Client) -> None:
        relayed = bundle(fresh_nonce(client), certify_ak(verifier.ak_root), audience="https://elsewhere.example")
        assert refusal(client.post("/v1/verify", content=relayed)) == (422, "WRONG_AUDIENCE", "statement.audience")
        stale = bundle(b"somebody's nonce", certify_ak(verifier.ak_root))
        assert refusal(client.post("/v1/verify", content=stale)) == (422, "NONCE_UNKNOWN", "statement.nonce")

    @pytest.mark.parametrize("body", [b"", b"{}", b"\xff" * 100, b"[" * 5000, b'{"format":1,"format":1}', b"null"])
    def test_garbage_is_refused_as_such(self, client: httpx.Client, body: bytes) -> None:
        status, _, step = refusal(client.post("/v1/verify", content=body))
        assert (status, step) == (422, "bundle.format")

    def test_answers_are_not_kept_and_load_nothing(self, client: httpx.Client) -> None:
        for answer in (client.get("/healthz"), client.post("/v1/nonce"), client.get("/nowhere")):
            assert answer.headers["cache-control"] == "no-store"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert not answer.headers.keys() & {"server", "access-control-allow-origin", "set-cookie"}

    def test_no_page_of_another_origin_gets_in(self, client: httpx.Client) -> None:
        asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
        answer = client.options("/v1/nonce", headers=asked)
        assert refusal(answer)[:2] == (405, "METHOD_NOT_ALLOWED")
        assert "access-control-allow-origin" not in answer.headers

    def test_what_is_not_there_is_not_there(self, client: httpx.Client) -> None:
        assert refusal(client.get("/docs"))[:2] == (404, "NOT_FOUND")
        assert refusal(client.get("/v1/verify"))[:2] == (405, "METHOD_NOT_ALLOWED")

    def test_a_nonce_takes_no_orders(self, client: httpx.Client) -> None:
        assert refusal(client.post("/v1/nonce", content=b"xx"))[:2] == (400, "BAD_REQUEST")

    def test_what_happened_is_counted(self, client: httpx.Client) -> None:
        client.post("/v1/verify", content=b"{}")
        lines = client.get("/metrics").text.splitlines()
        assert any('result="refused",slug="BAD_FIELD"' in line for line in lines)
        client.get("/a-name-of-my-own")
        assert "a-name-of-my-own" not in client.get("/metrics").text

    def test_nothing_is_held_afterwards(self, client: httpx.Client) -> None:
        client.post("/v1/verify", content=b"x" * 500000)
        assert metric(client, "cgpu_verifier_buffered_bytes") == 0
        assert metric(client, "cgpu_verifier_verifications") == 0


class TestWaste:
    def test_a_body_that_is_announced_too_large_is_not_read(self, verifier: Verifier) -> None:
        with verifier.connect() as connection:
            connection.sendall(b"POST /v1/verify HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
            said = read_to_end(connection)
        assert said.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close" in said.lower()
        assert b"BODY_TOO_LARGE" in said

    def test_a_body_that_grows_too_large_is_cut_off(self, client: httpx.Client) -> None:
        def endless() -> Iterator[bytes]:
            for _ in range(200):
                yield b"x" * 100000

        try:
            answer = client.post("/v1/verify", content=endless())
        except httpx.TransportError:
            return  # it hung up while we were still talking
        assert refusal(answer)[:2] == (413, "BODY_TOO_LARGE")

    def test_a_slow_body_is_not_waited_for(self, verifier: Verifier) -> None:
        with verifier.connect() as connection:
            connection.sendall(b"POST /v1/verify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
            said = read_to_end(connection)
        assert said.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in said.lower()
        assert b"BODY_TOO_SLOW" in said

    @pytest.mark.parametrize("said", [b"", b"POST /v1/nonce HTTP/1.1\r\nHost: x\r\nX-Slow: "])
    def test_a_silent_or_slow_client_is_hung_up_on(self, verifier: Verifier, said: bytes) -> None:
        with verifier.connect() as connection:
            connection.sendall(said)
            assert read_to_end(connection) == b""

    def test_a_client_that_goes_on_after_its_answer_is_hung_up_on(self, verifier: Verifier) -> None:
        """It has its answer, and its body would never end."""
        with verifier.connect() as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
            stop = threading.Event()

            def dribble() -> None:
                while not stop.wait(0.1):
                    try:
                        connection.sendall(b"x")
                    except OSError:
                        return

            talking = threading.Thread(target=dribble)
            talking.start()
            said = read_to_end(connection)
            stop.set()
            talking.join()
        assert said.startswith(b"HTTP/1.1 200 ")

    def test_a_client_that_reads_no_answers_is_hung_up_on(self, verifier: Verifier) -> None:
        with verifier.connect() as connection:
            connection.settimeout(60)
            many = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 1_000_000
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                connection.sendall(many)

    def test_bodies_that_do_not_fit_together_are_told_to_come_back(self, verifier: Verifier) -> None:
        head = b"POST /v1/verify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
        with verifier.connect() as first, verifier.connect() as second:
            first.sendall(head + b"x" * 900000)
            with verifier.client() as client:
                wait_until(lambda: metric(client, "cgpu_verifier_buffered_bytes") >= 900000)
            second.sendall(head + b"x" * 900000)
            said = read_to_end(second)
        assert said.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1\r\n" in said.lower()

    def test_connections_above_the_limit_are_cut_at_once(self, tmp_path: Path) -> None:
        patient = Verifier(tmp_path)
        patient.tables["limits"] = "connections = 40\nheader_seconds = 600"
        with running(patient):
            held = [patient.connect() for _ in range(60)]
            try:
                assert [read_to_end(connection) for connection in held[50:]] == [b""] * 10
            finally:
                for connection in held:
                    connection.close()
            wait_until(patient.answers)

    def test_a_crowd_is_served_or_told_to_come_back(self, verifier: Verifier) -> None:
        with verifier.client() as client:
            posted = bundle(fresh_nonce(client), certify_ak(verifier.ak_root))

        def post(_: int) -> int:
            with verifier.client() as client:
                return client.post("/v1/verify", content=posted).status_code

        with ThreadPoolExecutor(8) as pool:
            found = set(pool.map(post, range(24)))
        assert 200 in found
        assert found <= {200, 503}


class TestLife:
    def test_stops_in_order_and_logs_no_secret(self, tmp_path: Path) -> None:
        verifier = Verifier(tmp_path)
        with running(verifier):
            with verifier.client() as client:
                answer = client.post("/v1/verify", content=bundle(fresh_nonce(client), certify_ak(verifier.ak_root)))
            assert verifier.stop() == 0
        secrets = [(tmp_path / "replica.key").read_text().strip(), answer.text]
        assert not any(secret in verifier.journal for secret in secrets)
        assert all(line.startswith("<") for line in verifier.journal.splitlines())
        assert verifier.journal.splitlines()[-1] == "<6>stopped"

    def test_keys_are_exchanged_without_a_gap(self, tmp_path: Path) -> None:
        verifier = Verifier(tmp_path)
        with running(verifier):
            with verifier.client() as client:
                nonce = fresh_nonce(client)
            verifier.stop()
            keygen.signing_key(tmp_path / "new.pem")
            keygen.replica_key(tmp_path / "new.key")
            old = (tmp_path / "replica.key").read_bytes()
            (tmp_path / "replica.key").write_bytes((tmp_path / "new.key").read_bytes() + old)
            signing = f'["{tmp_path}/new.pem", "{tmp_path}/signing.pem"]'
            verifier.tables["keys"] = f'replica = "{tmp_path}/replica.key"\nsigning = {signing}'
            verifier.start()
            with verifier.client() as client:
                answer = client.post("/v1/verify", content=bundle(nonce, certify_ak(verifier.ak_root)))
                assert answer.status_code == 200
                claims(client, answer.text)
                assert len(client.get("/.well-known/jwks.json").json()["keys"]) == 2

    def test_serves_on_a_unix_socket(self, tmp_path: Path) -> None:
        verifier = Verifier(tmp_path)
        path = f"/tmp/cgpu-verifier-{verifier.port}.sock"
        verifier.head = f'audience = "{AUDIENCE}"\nlisten = "unix:{path}"\n'
        verifier.reach = path
        try:
            with running(verifier), verifier.client() as client:
                assert client.post("/v1/nonce").status_code == 200
        finally:
            Path(path).unlink(missing_ok=True)

    def test_bad_files_are_named_before_anything_is_served(self, tmp_path: Path) -> None:
        verifier = Verifier(tmp_path)
        assert verifier.run("check", "--config", verifier.config).returncode == 0
        (tmp_path / "ak_root.pem").unlink()
        for command in ("check", "serve"):
            answer = verifier.run(command, "--config", verifier.config)
            assert answer.returncode == 2
            assert "ak_root.pem" in answer.stderr

    def test_an_address_in_use_is_a_failure(self, tmp_path: Path) -> None:
        verifier = Verifier(tmp_path)
        with socket.create_server(("127.0.0.1", verifier.port)):
            assert verifier.run("serve", "--config", verifier.config).returncode == 1

    def test_without_a_ca_nobody_is_enrolled(self, tmp_path: Path) -> None:
        verifier = Verifier(tmp_path)
        verifier.tables["enrol"] = ""
        with running(verifier), verifier.client() as client:
            assert refusal(client.post("/v1/enrol/challenge", content=b"{}"))[:2] == (404, "NOT_FOUND")

    def test_keygen_makes_what_serve_takes(self, tmp_path: Path) -> None:
        verifier = Verifier(tmp_path)
        for kind, more in (
            ("signing", ()),
            ("replica", ()),
            ("ca", ("--certificate", tmp_path / "made.pem", "--name", "our CA")),
        ):
            assert verifier.run("keygen", kind, tmp_path / f"made-{kind}", *more).returncode == 0
            assert verifier.run("keygen", kind, tmp_path / f"made-{kind}", *more).returncode == 2
        again = (tmp_path / "other-ca", "--certificate", tmp_path / "made.pem", "--name", "our CA")
        assert verifier.run("keygen", "ca", *again).returncode == 2
        assert not (tmp_path / "other-ca").exists()
        verifier.tables["keys"] = f'replica = "{tmp_path}/made-replica"\nsigning = ["{tmp_path}/made-signing"]'
        verifier.tables["enrol"] = f'certificate = "{tmp_path}/made.pem"\nkey = "{tmp_path}/made-ca"'
        assert verifier.run("check", "--config", verifier.config).returncode == 0
