"""``cgpuctl verify`` with a policy, a reference, a page and a token; ``cgpuctl reference make``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from joserfc import jwk, jwt

from cgpu_agent.verifier.reference import parse_reference
from fixtures import boots
from fixtures.bundles import AUDIENCE, GENUINE, NONCE, PLATFORM_AK, made, name_of
from fixtures.ctl import PASS, REFUSED, USAGE, Ctl

KEY = ec.generate_private_key(ec.SECP256R1())
PEM = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
PINNED = ("--ak-name", name_of(PLATFORM_AK).hex())
EVERYTHING = b'@id("everything") permit (principal, action, resource);'
BOOT_ONLY = (
    b'@id("boot-needed") permit (principal, action == CGpu::Action::"require", resource == CGpu::Part::"boot");\n'
    b'@id("boot-will-do") permit (principal, action == CGpu::Action::"accept", resource == CGpu::Part::"boot");\n'
)


def made_reference(ctl: Ctl, *more: str) -> str:
    path = str(ctl.folder / "reference.json")
    ran = ctl("reference", "make", ctl.bundle, *ctl.demands, "--ak-root", ctl.root, "-o", path, *more)
    assert ran.code == PASS, ran.err
    return path


class TestVerdict:
    def test_without_a_policy_the_default_one_is_shown_and_does_not_decide(self, ctl: Ctl) -> None:
        ran = ctl.verify()
        assert ran.code == PASS
        assert "appraisal by the default policy, the exit status does not follow it:" in ran.out
        assert "contraindicated  platform: " in ran.out

    def test_asked_to_the_default_policy_decides(self, ctl: Ctl) -> None:
        assert ctl.verify(None, "--appraise").code == REFUSED
        ran = ctl.verify(None, "--appraise", *PINNED)
        assert ran.code == PASS
        assert "warning  boot: accepted by rule some-signed-boot" in ran.out

    def test_a_policy_of_ones_own_decides(self, ctl: Ctl) -> None:
        policy = ctl.write("mine.cedar", BOOT_ONLY)
        ran = ctl.verify(None, "--policy", policy)
        assert ran.code == PASS
        assert "it decides" in ran.out
        off = made(**boots.with_secure_boot_off())
        assert ctl.verify(off, "--policy", policy).code == PASS
        assert ctl.verify(off, "--appraise", *PINNED).code == REFUSED

    def test_no_policy_lets_refused_evidence_pass(self, ctl: Ctl) -> None:
        ran = ctl.verify(None, "--nonce", "00" * 32, "--policy", ctl.write("all.cedar", EVERYTHING))
        assert ran.code == REFUSED
        assert "the evidence was refused, step statement.nonce" in ran.out

    def test_json_holds_the_appraisal(self, ctl: Ctl) -> None:
        found = ctl.verify(None, "--json", *PINNED).json
        assert found["appraisal"]["status"] == "warning"
        assert found["appraisal"]["parts"]["gpus"]["status"] == "none"
        assert found["simulated"] is False

    def test_a_simulators_root_is_told_apart(self, ctl: Ctl) -> None:
        ran = ctl.verify(None, "--simulated-ak-root", ctl.root, *PINNED, "--appraise", trusting=False)
        assert ran.code == REFUSED
        assert "simulated  true" in ran.out
        assert "a simulator's root vouches for it" in ran.out

    def test_explains_every_part_by_its_rule_and_what_would_change_it(self, ctl: Ctl) -> None:
        ran = ctl.verify(None, "--explain")
        for part in ("platform", "boot", "agent", "gpus", "workload"):
            assert f"  {part}: " in ran.out
        assert "rule some-signed-boot: line " in ran.out
        assert '- the VM named by you (--ak-name, or "instances" in the reference)' in ran.out
        assert "nothing measures the agent's files" in ran.out

    def test_names_differences_from_the_reference(self, ctl: Ctl) -> None:
        reference = made_reference(ctl, "--pcr", "8")
        ran = ctl.verify(
            made(**boots.with_command_line(boots.VERITY)), "--reference", reference, "--appraise", "--explain"
        )
        assert ran.code == REFUSED
        assert "differs from the reference: PCR 8 is " in ran.out
        assert "differs from the reference: the kernel was started with another command line" in ran.out

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (("--policy", "{bad}"), "BAD_POLICY"),
            (("--policy", "{latin}"), "BAD_POLICY"),
            (("--policy", "{folder}/absent"), "NO_FILE"),
            (("--reference", "{bad}"), "BAD_REFERENCE"),
            (("--jwt", "{folder}/x"), "NO_JWT_KEY"),
            (("--jwt-key", "{bad}"), "NO_JWT_KEY"),
            (("--jwt", "{folder}/x", "--jwt-key", "{bad}"), "BAD_EAR_KEY"),
        ],
    )
    def test_a_file_of_ones_own_that_is_wrong_is_a_usage_error(
        self, ctl: Ctl, options: tuple[str, ...], reason: str
    ) -> None:
        names = {
            "bad": ctl.write("bad", b"permit (nonsense)"),
            "latin": ctl.write("latin", b"\xff"),
            "folder": str(ctl.folder),
        }
        ran = ctl.verify(None, *(option.format(**names) for option in options))
        assert ran.code == USAGE
        assert reason in ran.err


class TestFiles:
    def test_writes_a_page_of_a_refusal_too(self, ctl: Ctl) -> None:
        page = ctl.folder / "verdict.html"
        assert ctl.verify(None, "--html", str(page)).code == PASS
        assert "<h1>Do not trust</h1>" in page.read_text()
        assert ctl.verify(None, "--nonce", "00" * 32, "--html", str(page)).code == REFUSED
        assert "<h1>Refused</h1>" in page.read_text()

    def test_writes_a_token_signed_by_the_relying_partys_key(self, ctl: Ctl) -> None:
        path = ctl.folder / "verdict.jwt"
        options = ("--jwt", str(path), "--jwt-key", ctl.write("key.pem", PEM), *PINNED)
        assert ctl.verify(None, *options, "--jwt-audience", "https://broker.example").code == PASS
        public = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        opened = jwt.decode(path.read_text().strip(), jwk.JWKRegistry.import_key(public, "EC"), algorithms=["ES256"])
        assert opened.claims["aud"] == "https://broker.example"
        assert opened.claims["exp"] - opened.claims["iat"] == 300
        assert opened.claims["submods"]["platform"]["ear.status"] == "affirming"
        first = opened.claims["jti"]
        assert ctl.verify(None, *options).code == PASS
        opened = jwt.decode(path.read_text().strip(), jwk.JWKRegistry.import_key(public, "EC"), algorithms=["ES256"])
        assert (opened.claims["aud"], opened.claims["jti"]) == (AUDIENCE, first)

    def test_writes_no_token_of_refused_evidence(self, ctl: Ctl) -> None:
        path = ctl.folder / "verdict.jwt"
        ran = ctl.verify(None, "--nonce", "00" * 32, "--jwt", str(path), "--jwt-key", ctl.write("key.pem", PEM))
        assert ran.code == REFUSED
        assert "NO_EAR" in ran.err
        assert not path.exists()


class TestReferenceMake:
    def test_what_it_makes_is_what_verify_takes(self, ctl: Ctl) -> None:
        reference = made_reference(ctl)
        ran = ctl.verify(None, "--reference", reference, "--appraise", "--json")
        assert ran.code == PASS
        assert ran.json["appraisal"]["parts"]["boot"]["status"] == "affirming"

    def test_prints_to_standard_output_and_takes_more_registers(self, ctl: Ctl) -> None:
        ran = ctl(
            "reference", "make", ctl.bundle, *ctl.demands, "--ak-root", ctl.root, "--pcr", "9", "--any-instance"
        )
        found = parse_reference(ran.out.encode())
        assert set(found.pcrs) == {0, 2, 3, 4, 7, 9}
        assert found.instances is None

    def test_verifies_first(self, ctl: Ctl) -> None:
        ran = ctl("reference", "make", ctl.bundle, "--nonce", NONCE.hex(), "--ak-root", ctl.root)
        assert ran.code == REFUSED
        assert "WRONG_AUDIENCE" in ran.err
        assert ran.out == ""

    def test_refuses_a_register_that_was_not_quoted(self, ctl: Ctl) -> None:
        ran = ctl("reference", "make", ctl.bundle, *ctl.demands, "--ak-root", ctl.root, "--pcr", "12")
        assert ran.code == USAGE
        assert "PCR_UNEXPLAINED" in ran.err


def test_an_edited_reference_is_read_strictly(ctl: Ctl) -> None:
    path = Path(made_reference(ctl))
    path.write_text(json.dumps({**json.loads(path.read_text()), "instance": None}))
    ran = ctl.verify(GENUINE.encode(), "--reference", str(path))
    assert ran.code == USAGE
    assert "unknown key" in ran.err
