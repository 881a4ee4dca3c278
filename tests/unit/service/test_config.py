"""The configuration is read strictly, and everything it names is checked before the first request."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cgpu_agent.errors import Misuse
from cgpu_agent.service import config as configuration
from cgpu_agent.service import material
from cgpu_agent.service.config import Config, Enrol, Limits, Token, Trust
from fixtures.verifier import Verifier

LEAST = 'audience = "https://verifier.example"\n[keys]\nreplica = "/k/replica"\nsigning = ["/k/signing"]\n'


def read(text: str, folder: Path) -> Config:
    path = folder / "verifier.toml"
    path.write_text(text)
    return configuration.load(path)


def refusal(text: str, folder: Path) -> str:
    with pytest.raises(Misuse) as caught:
        read(text, folder)
    assert caught.value.slug == "BAD_CONFIG"
    return caught.value.message


def test_a_name_and_keys_are_enough(tmp_path: Path) -> None:
    found = read(LEAST, tmp_path)
    assert (found.token, found.trust, found.enrol, found.limits) == (Token(), Trust(), Enrol(), Limits())
    assert found.address == ("127.0.0.1", 8440)
    assert not found.enrol.enabled


@pytest.mark.parametrize("missing", ["audience", "replica", "signing"])
def test_nothing_goes_without(tmp_path: Path, missing: str) -> None:
    text = "\n".join(line for line in LEAST.splitlines() if not line.startswith(missing))
    assert f"{missing} is missing" in refusal(text, tmp_path)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("colour = 1", "'colour'"),
        ("[token]\nsecond = 1", "'token.second'"),
        ("[token]\nseconds = true", "token.seconds"),
        ("[token]\nseconds = -1", "token.seconds"),
        ("[token]\nseconds = 120", "token.nonce_seconds"),
        ("[token]\nseconds = 86401", "token.seconds"),
        ('[token]\naudience = "a\\u0000"', "token.audience"),
        ("token = 1", "token must be a table"),
        ("[trust]\nak_roots = '/a'", "trust.ak_roots"),
        ("[trust]\nak_roots = ['a']", "absolute path"),
        ("[trust]\nak_roots = [1]", "trust.ak_roots"),
        ("[trust]\npurposes = []", "trust.purposes"),
        ("[trust]\npurposes = ['everything']", "trust.purposes"),
        ("[trust]\nregister = 16", "trust.register"),
        ("[trust]\npinned_ak_names = ['00']", "pinned_ak_names"),
        ("[trust]\nallow_unendorsed = 'yes'", "true or false"),
        ("[limits]\nworkers = 0", "limits"),
        ("[limits]\nbundle_bytes = 99999999", "limits.bundle_bytes"),
        ("[limits]\nbuffered_bytes = 1", "limits.bundle_bytes"),
        ("[enrol]\ncertificate = '/c'", "needs its certificate and its key"),
        ("[enrol]\noperator_ek_roots = ['/r']", "enrol.certificate"),
        ("[enrol]\nvendor_ek_roots = { A = ['/r'] }", "enrol.certificate"),
        ("[enrol]\nsimulated_ek_roots = ['/r']", "enrol.simulated_certificate"),
        ("[enrol]\ncertificate='/c'\nkey='/k'\nvendor_ek_roots = { 'a b' = ['/r'] }", "vendor"),
        ("[enrol]\ncertificate='/c'\nkey='/k'\nsimulated_certificate='/c'\nsimulated_key='/k'", "another one"),
        ("[enrol]\ndays = 0", "enrol.days"),
        ("[gpu]\ncount = 65", "gpu.count"),
        ("[gpu]\nmin_driver = 550", "gpu.min_driver"),
        ("[enrol]\ncertificate = 'credential:ca'\nkey = '/k'", "no credentials"),
    ],
)
def test_refuses_and_names_what_is_wrong(tmp_path: Path, line: str, named: str) -> None:
    text = LEAST + line if line.startswith("[") else f"{line}\n{LEAST}"
    assert named in refusal(text, tmp_path)


@pytest.mark.parametrize("listen", ["127.0.0.1", "8440", "127.0.0.1:99999", "unix:relative", "http://x:1", "a b:1"])
def test_refuses_an_address_that_is_none(tmp_path: Path, listen: str) -> None:
    assert "listen" in refusal(f'listen = "{listen}"\n{LEAST}', tmp_path)


@pytest.mark.parametrize(
    ("listen", "address"),
    [("[::1]:1", ("::1", 1)), ("0.0.0.0:80", ("0.0.0.0", 80)), ("localhost:8", ("localhost", 8))],
)
def test_takes_host_and_port(tmp_path: Path, listen: str, address: tuple[str, int]) -> None:
    found = read(f'listen = "{listen}"\n{LEAST}', tmp_path)
    assert (found.address, found.unix_socket) == (address, None)


def test_takes_a_unix_socket(tmp_path: Path) -> None:
    assert read(f'listen = "unix:/run/v.sock"\n{LEAST}', tmp_path).unix_socket == "/run/v.sock"


@pytest.mark.parametrize("name", ["../x", "..", "", "a/b"])
def test_a_credential_is_a_name_and_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/x")
    text = LEAST.replace("/k/replica", f"credential:{name}")
    assert "keys.replica" in refusal(text, tmp_path)
    assert str(read(LEAST.replace("/k/replica", "credential:replica"), tmp_path).keys.replica) == (
        "/run/credentials/x/replica"
    )


@pytest.mark.parametrize("text", ["\xff", "a = [" + "[" * 5000, "audience ="])
def test_refuses_what_is_no_toml(tmp_path: Path, text: str) -> None:
    (tmp_path / "verifier.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(Misuse) as caught:
        configuration.load(tmp_path / "verifier.toml")
    assert caught.value.slug == "BAD_CONFIG"


class TestFiles:
    @pytest.fixture
    def verifier(self, tmp_path: Path) -> Verifier:
        return Verifier(tmp_path)

    def slug(self, verifier: Verifier) -> str:
        with pytest.raises(Misuse) as caught:
            material.load(configuration.load(verifier.config))
        return caught.value.slug

    def test_good_ones_are_taken(self, verifier: Verifier) -> None:
        held = material.load(configuration.load(verifier.config))
        assert [str(each.ek_class) for each in held.ek_trust] == ["vendor:ACME", "operator", "simulated"]
        assert len(held.judge.party.roots) == len(held.judge.party.simulated_roots) == 2
        assert "BEGIN" not in repr(held)

    def test_public_keys_are_published_and_nothing_else(self, verifier: Verifier) -> None:
        (found,) = material.load(configuration.load(verifier.config)).jwks()["keys"]
        assert found.keys() == {"alg", "crv", "kid", "kty", "use", "x", "y"}

    @pytest.mark.parametrize("name", ["replica.key", "signing.pem", "ca.key"])
    def test_a_secret_that_everybody_may_read_is_refused(self, verifier: Verifier, name: str) -> None:
        (verifier.folder / name).chmod(0o644)
        assert self.slug(verifier) in ("KEY_EXPOSED", "BAD_ISSUER")

    @pytest.mark.parametrize("name", ["replica.key", "signing.pem", "ak_root.pem", "ca.pem", "ek_root.pem"])
    def test_a_missing_or_broken_file_is_refused(self, verifier: Verifier, name: str) -> None:
        path = verifier.folder / name
        path.write_bytes(b"not a key")
        broken = self.slug(verifier)
        path.unlink()
        assert broken in ("BAD_KEY", "BAD_REPLICA_KEY", "BAD_CERTIFICATE", "BAD_ISSUER")
        assert self.slug(verifier) in ("NO_FILE", "BAD_ISSUER")

    @pytest.mark.parametrize(
        "key", [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())], ids=["rsa", "p384"]
    )
    def test_signs_by_p256_alone(
        self, verifier: Verifier, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
    ) -> None:
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (verifier.folder / "signing.pem").write_bytes(pem)
        assert self.slug(verifier) == "BAD_KEY"

    @pytest.mark.parametrize(
        ("one", "other"),
        [("ek_root", "simulated_root"), ("operator_root", "ek_root"), ("ak_root", "simulated_ak_root")],
    )
    def test_a_root_cannot_be_of_two_classes(self, verifier: Verifier, one: str, other: str) -> None:
        folder = verifier.folder
        (folder / f"{other}.pem").write_bytes((folder / f"{one}.pem").read_bytes())
        assert self.slug(verifier) == "ROOT_IN_TWO_STORES"

    def test_simulators_need_a_ca_of_their_own(self, verifier: Verifier) -> None:
        for suffix in (".pem", ".key"):
            source = (verifier.folder / f"ca{suffix}").read_bytes()
            (verifier.folder / f"simulated-ca{suffix}").write_bytes(source)
        assert self.slug(verifier) == "ROOT_IN_TWO_STORES"

    def test_a_policy_that_is_none_is_refused(self, verifier: Verifier, tmp_path: Path) -> None:
        (tmp_path / "policy.cedar").write_text("permit (principal, action, resource);")
        verifier.tables["trust"] += f'\npolicy = "{tmp_path}/policy.cedar"'
        assert self.slug(verifier) == "BAD_POLICY"

    def test_a_reference_that_is_none_is_refused(self, verifier: Verifier, tmp_path: Path) -> None:
        (tmp_path / "reference.json").write_text("{}")
        verifier.tables["trust"] += f'\nreference = "{tmp_path}/reference.json"'
        assert self.slug(verifier) == "BAD_REFERENCE"

    def test_demands_of_gpus_are_checked_at_the_start(self, verifier: Verifier, tmp_path: Path) -> None:
        for text, slug in (
            (f'collateral = "{tmp_path}/none"', "NO_FILE"),
            ('min_driver = "new"', "BAD_FLOOR"),
            (f'device_roots = ["{tmp_path}/signing.pem"]', "BAD_CERTIFICATE"),
        ):
            verifier.tables["gpu"] = text
            assert self.slug(verifier) == slug

    def test_a_broken_store_is_refused_with_its_name(self, verifier: Verifier, tmp_path: Path) -> None:
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "a.xml").write_text("<a/>")
        verifier.tables["gpu"] = f'collateral = "{tmp_path}/store"'
        assert self.slug(verifier) == "BAD_RIM"

    def test_floors_of_the_processor_are_checked_at_the_start(self, verifier: Verifier) -> None:
        verifier.tables["platform"] = 'floors = ["microcode=new"]'
        assert self.slug(verifier) == "BAD_FLOOR"
