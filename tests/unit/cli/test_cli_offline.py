"""cgpuctl's offline readers of evidence: exit status, JSON for programs, words for people."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

from cgpu_agent.wire import strictjson
from cgpu_agent.wire.bundle import MAX_BUNDLE
from fixtures.bundles import (
    AGENT_AK,
    AUDIENCE,
    BOOT_LOG,
    GENUINE,
    HONEST,
    PLATFORM_AK,
    QUOTED,
    caller,
    made,
    name_of,
    stating,
)
from fixtures.ctl import PASS, REFUSED, USAGE, Ctl, Ran
from fixtures.eventlogs import EV_IPL, header, record

HOSTILE = "evil\x1b[2J\x07\x7f\u202e\x9b1m\nresult: ACCEPTED"
"""What a container or a kernel command line may call itself."""


def terminal_safe(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


class TestVerify:
    def test_tells_people_what_is_proven_and_what_is_not(self, ctl: Ctl) -> None:
        ran = ctl.verify()
        assert (ran.code, ran.err) == (PASS, "")
        assert "ACCEPTED" in ran.out
        assert "uid 1001, pid 4242, model.service (identified by pidfd)" in ran.out
        assert "certified as an AK below CN=throw-away AK root" in ran.out
        assert "not proven:" in ran.out
        assert "what the agent itself says" in ran.out

    def test_json_keeps_signed_and_reported_apart(self, ctl: Ctl) -> None:
        ran = ctl.verify(None, "--json")
        assert (ran.code, ran.err) == (PASS, "")
        found = ran.json
        assert (found["result"], found["reason"]) == ("pass", None)
        assert found["signed"] == {"secure_boot": "enabled"}
        assert found["reported"]["caller"] == caller()
        assert found["reported"]["audience"] == AUDIENCE
        assert found["reported"]["agent"]["build"] == "aa" * 32
        assert [each["author"] for each in found["agent_log"]] == ["agent", "agent", "caller"]
        assert found["agent_log"][0]["content"] == {"agent_ak_name": name_of(AGENT_AK).hex(), "event": "agent-ak"}
        assert {int(index) for index in found["pcrs"]} == set(QUOTED)
        assert found["pcrs"]["7"] == {"status": "explained", "note": "", "value": GENUINE.pcrs[7].hex()}
        assert found["endorsement"]["kind"] == "ak-certificate"
        assert {step["outcome"] for step in found["steps"]} == {"pass", "skip"}
        assert found["not_proven"]

    def test_a_refusal_names_its_step_and_claims_nothing(self, ctl: Ctl) -> None:
        ran = ctl.verify(stating(nonce=b"yesterday"), "--json")
        assert ran.code == REFUSED
        found = ran.json
        assert found["result"] == "refused"
        assert found["reason"]["step"] == "statement.nonce"
        assert found["reason"]["slug"] == "NONCE_MISMATCH"
        assert (found["reported"], found["signed"], found["pcrs"]) == (None, {"secure_boot": None}, {})
        assert (found["agent_log"], found["endorsement"], found["not_proven"]) == ([], None, [])

    def test_a_refusal_in_words(self, ctl: Ctl) -> None:
        ran = ctl.verify(stating(nonce=b"yesterday"))
        assert ran.code == REFUSED
        assert "REFUSED at step 3, it answers this nonce" in ran.out
        assert "[NONCE_MISMATCH]" in ran.out
        assert "ACCEPTED" not in ran.out

    def test_says_what_to_name_when_nobody_vouches(self, ctl: Ctl) -> None:
        ran = ctl.verify(trusting=False)
        assert ran.code == REFUSED
        assert "--ak-root" in ran.out

    def test_accepts_a_name_that_was_enrolled(self, ctl: Ctl) -> None:
        assert ctl.verify(None, "--ak-name", name_of(PLATFORM_AK).hex().upper(), trusting=False).code == PASS
        assert ctl.verify(None, "--ak-name", name_of(AGENT_AK).hex(), trusting=False).code == REFUSED

    def test_allowances_stay_in_the_verdict(self, ctl: Ctl) -> None:
        ran = ctl.verify(made(boot_log=None), "--allow-unendorsed", "--allow-no-boot-log", "--json", trusting=False)
        assert ran.code == PASS
        assert ran.json["signed"] == {"secure_boot": None}
        assert ran.json["endorsement"]["kind"] == "none"
        assert any("nobody vouches" in gap for gap in ran.json["not_proven"])
        assert any("no firmware log" in gap for gap in ran.json["not_proven"])

    def test_a_pcr_without_an_explanation_is_not_proven(self, ctl: Ctl) -> None:
        ran = ctl.verify(made(quoted=(*QUOTED, 10)), "--json")
        assert ran.code == PASS
        assert any(gap.startswith("PCR 10:") for gap in ran.json["not_proven"])

    @pytest.mark.parametrize(
        "at", ["2026-06-01T12:00:00z", "2026-06-01T14:00:00+02:00", "2026-06-01T12:00:00.5-00:00"]
    )
    def test_reads_the_moment_in_every_form_of_rfc_3339(self, ctl: Ctl, at: str) -> None:
        assert ctl.verify(None, "--at", at).code == PASS

    def test_judges_certificates_at_the_moment_that_was_named(self, ctl: Ctl) -> None:
        ran = ctl.verify(None, "--at", "2028-01-01T00:00:00Z", "--json")
        assert ran.code == REFUSED
        assert ran.json["reason"]["slug"] == "CERTIFICATE_EXPIRED"

    @pytest.mark.parametrize(
        "at",
        [
            "2026-06-01T12:00:00",
            "2026-06-01",
            "20260601T120000Z",
            "2026-13-01T00:00:00Z",
            "2026-06-01T12:00:00+24:00",
            "yesterday",
            "",
        ],
    )
    def test_a_moment_that_is_none_is_a_usage_error(self, ctl: Ctl, at: str) -> None:
        ran = ctl.verify(None, "--at", at)
        assert (ran.code, ran.out) == (USAGE, "")
        assert "[BAD_TIME]" in ran.err

    def test_binds_user_data_and_key(self, ctl: Ctl) -> None:
        data = stating(user_data=b"mine", public_key=b"spki")
        key, other = ctl.write("key.der", b"spki"), ctl.write("other.der", b"other")
        assert ctl.verify(data, "--user-data", b"mine".hex(), "--public-key", key).code == PASS
        assert ctl.verify(data, "--user-data", b"yours".hex(), "--public-key", key).code == REFUSED
        assert ctl.verify(data, "--public-key", other).code == REFUSED

    def test_expects_the_register_of_its_own_vms(self, ctl: Ctl) -> None:
        other = made(register=15, quoted=(*QUOTED, 15))
        assert ctl.verify(other, "--register", "15").code == PASS
        assert ctl.verify(other).code == REFUSED

    @pytest.mark.parametrize("register", ["16", "23", "-1", "x"])
    def test_no_register_that_can_be_reset(self, ctl: Ctl, register: str) -> None:
        assert ctl.verify(None, "--register", register).code == USAGE

    def test_reads_a_bundle_from_standard_input(self, ctl: Ctl, stdin: io.BytesIO) -> None:
        stdin.write(GENUINE.encode())
        stdin.seek(0)
        assert ctl.verify("-").code == PASS

    @pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe\x00", b"[" * 100000, GENUINE.encode()[:-1]])
    def test_any_other_file_is_refused(self, ctl: Ctl, data: bytes) -> None:
        ran = ctl.verify(data or ctl.write("empty", b""), "--json")
        assert ran.code == REFUSED
        assert ran.json["reason"]["step"] == "bundle.format"

    @pytest.mark.parametrize("name", ["missing.json", "."])
    def test_a_file_that_cannot_be_read_is_a_usage_error(self, ctl: Ctl, name: str) -> None:
        ran = ctl.verify(str(ctl.folder / name))
        assert (ran.code, ran.out) == (USAGE, "")
        assert "[NO_FILE]" in ran.err

    def test_reads_no_more_of_a_file_than_a_bundle_may_have(self, ctl: Ctl) -> None:
        path = ctl.folder / "sparse"
        with path.open("wb") as file:
            file.truncate(64 * MAX_BUNDLE)
        ran = ctl.verify(str(path))
        assert ran.code == USAGE
        assert "[FILE_TOO_LARGE]" in ran.err

    @pytest.mark.parametrize("content", [b"", b"no certificate", b"-----BEGIN CERTIFICATE-----\n", b"\x30\x00"])
    def test_a_root_that_is_no_certificate_is_a_usage_error(self, ctl: Ctl, content: bytes) -> None:
        ran = ctl.verify(None, "--ak-root", ctl.write("bad.pem", content))
        assert (ran.code, ran.out) == (USAGE, "")
        assert "[BAD_CERTIFICATE]" in ran.err

    @pytest.mark.parametrize("option", ["--nonce", "--ak-name", "--user-data"])
    def test_hex_that_is_none_is_a_usage_error(self, ctl: Ctl, option: str) -> None:
        ran = ctl.verify(None, option, "0g")
        assert ran.code == USAGE
        assert f"{option} is not hex [BAD_HEX]" in ran.err

    def test_a_nonce_must_be_named(self, ctl: Ctl) -> None:
        ran = ctl("verify", ctl.bundle)
        assert ran.code == USAGE
        assert "--nonce" in ran.err

    def test_names_never_reach_the_terminal_raw(self, ctl: Ctl) -> None:
        data = stating(caller=caller(unit=HOSTILE, cgroup=HOSTILE))
        ran = ctl.verify(data)
        assert ran.code == PASS
        assert terminal_safe(ran.out)
        assert "evil\\x1b[2J\\x07\\x7f\\u202e" in ran.out
        assert "\nresult" not in ran.out
        as_json = ctl.verify(data, "--json")
        assert terminal_safe(as_json.out)
        assert as_json.json["reported"]["caller"]["unit"] == HOSTILE

    def test_keys_of_a_hostile_file_never_reach_the_terminal_raw(self, ctl: Ctl) -> None:
        data = strictjson.dumps({**json.loads(GENUINE.encode()), HOSTILE: 1})
        for more in ((), ("--json",)):
            ran = ctl.verify(data, *more)
            assert ran.code == REFUSED
            assert terminal_safe(ran.out + ran.err)

    def test_a_terminal_of_another_encoding_is_shown_escapes(self, ctl: Ctl) -> None:
        path = ctl.write("bundle.json", stating(caller=caller(unit="m\u00f6del-\U0001f512.service")))
        arguments = ["verify", path, *ctl.demands, "--ak-root", ctl.root]
        ran = subprocess.run(
            [sys.executable, "-m", "cgpu_agent.cli.main", *arguments],
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            timeout=60,
        )
        assert (ran.returncode, ran.stderr) == (PASS, b"")
        assert b"m\\xf6del-\\U0001f512.service" in ran.stdout


class TestEventlog:
    def test_tells_the_boot(self, ctl: Ctl) -> None:
        ran = ctl("eventlog", ctl.write("log", BOOT_LOG))
        assert (ran.code, ran.err) == (PASS, "")
        assert "PCRs after replay (sha256):" in ran.out
        assert GENUINE.pcrs[7].hex() in ran.out
        assert "* = described by the log, not under a digest" in ran.out

    def test_json_holds_registers_events_and_secure_boot(self, ctl: Ctl) -> None:
        found = ctl("eventlog", "--json", "--kind", "tpm", ctl.write("log", BOOT_LOG)).json
        assert found["pcrs"]["sha256"]["7"] == GENUINE.pcrs[7].hex()
        assert found["secure_boot"] == "enabled"
        assert found["secure_boot_detail"]["state"] == "enabled"
        assert found["secure_boot_detail"]["db"]["certificates"]
        assert len(found["events"]) == 48

    @pytest.mark.parametrize("data", [b"", b"\0" * 10, b"no log at all, but long enough to try", BOOT_LOG[:1000]])
    def test_refuses_what_is_no_log(self, ctl: Ctl, data: bytes) -> None:
        path = ctl.write("log", data)
        ran = ctl("eventlog", path)
        assert (ran.code, ran.out) == (REFUSED, "")
        assert ran.err.startswith("cgpuctl: ")
        found = ctl("eventlog", "--json", path)
        assert found.code == REFUSED
        assert found.json["result"] == "refused"
        assert f"[{found.json['reason']['slug']}]" in ran.err

    def test_reads_standard_input(self, ctl: Ctl, stdin: io.BytesIO) -> None:
        stdin.write(BOOT_LOG)
        stdin.seek(0)
        assert ctl("eventlog", "-").code == PASS

    def test_texts_of_a_log_never_reach_the_terminal_raw(self, ctl: Ctl) -> None:
        texts = [HOSTILE.encode(), HOSTILE.encode("utf-16-le"), b"kernel_cmdline: " + HOSTILE.encode() + b"\0"]
        log = header() + b"".join(record(pcr, EV_IPL, text) for pcr in (4, 8, 9, 12) for text in texts)
        path = ctl.write("log", log)
        ran = ctl("eventlog", path)
        assert ran.code == PASS
        assert terminal_safe(ran.out)
        assert "evil" in ran.out
        assert terminal_safe(ctl("eventlog", "--json", path).out)

    def test_another_kind_is_a_usage_error(self, ctl: Ctl) -> None:
        assert ctl("eventlog", "--kind", "other", ctl.write("log", BOOT_LOG)).code == USAGE


class TestBootShow:
    def show(self, ctl: Ctl, data: bytes, *more: str) -> Ran:
        return ctl("boot", "show", "--bundle", ctl.write("bundle.json", data), *more)

    def test_tells_the_boot_and_which_pcrs_are_explained(self, ctl: Ctl) -> None:
        ran = self.show(ctl, GENUINE.encode())
        assert (ran.code, ran.err) == (PASS, "")
        assert "  13  explained    equal after the records of the agent" in ran.out

    def test_json_agrees_with_the_event_log_command(self, ctl: Ctl) -> None:
        found = self.show(ctl, GENUINE.encode(), "--json").json
        of_the_log = ctl("eventlog", "--json", ctl.write("log", BOOT_LOG)).json
        for key in ("secure_boot", "secure_boot_detail", "stages"):
            assert found[key] == of_the_log[key]
        assert found["pcrs"]["7"] == {"note": "", "status": "explained"}

    @pytest.mark.parametrize("more", [(), ("--json",)])
    def test_a_log_that_contradicts_the_pcrs_is_no_pass(self, ctl: Ctl, more: tuple[str, ...]) -> None:
        lied = made(pcrs={**HONEST.values, 7: bytes(32)})
        ran = self.show(ctl, lied, *more)
        assert ran.code == REFUSED
        assert "mismatch" in ran.out

    def test_a_bundle_without_a_boot_log_says_so(self, ctl: Ctl) -> None:
        ran = self.show(ctl, made(boot_log=None))
        assert ran.code == USAGE
        assert "[NO_BOOT_LOG]" in ran.err

    @pytest.mark.parametrize("data", [b"", b"{}", made(boot_log=b"no log"), made(agent_log=b"no log")])
    def test_refuses_what_is_no_bundle(self, ctl: Ctl, data: bytes) -> None:
        ran = self.show(ctl, data)
        assert (ran.code, ran.out) == (REFUSED, "")
        assert ran.err.startswith("cgpuctl: ")
