"""The command line itself: usage errors, help, and completion scripts that work."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cgpu_agent.cli.parser import build_parser
from fixtures.ctl import PASS, USAGE, Ctl


class TestCompletion:
    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_prints_a_script_that_knows_every_command(self, ctl: Ctl, shell: str) -> None:
        ran = ctl("completion", shell)
        assert (ran.code, ran.err) == (PASS, "")
        for command in ("status", "doctor", "boot", "evidence", "verify", "eventlog", "quote", "completion"):
            assert command in ran.out

    @pytest.mark.parametrize(
        ("words", "offered", "not_offered"),
        [
            ([""], {"verify", "quote", "--help"}, {"--nonce"}),
            (["ver"], {"verify"}, {"quote"}),
            (["quote", ""], {"verify", "--help"}, {"eventlog", "--attest"}),
            (["quote", "verify", "--a"], {"--attest", "--ak", "--allow-sha1-bank"}, {"--at", "--bank"}),
            (["verify", "FILE", "--al"], {"--allow-unendorsed", "--allow-no-boot-log"}, {"--at"}),
            (["verify", "--nonce", "00", "--ak-r"], {"--ak-root"}, {"--ak-name"}),
            (["completion", ""], {"bash", "zsh", "fish"}, {"verify"}),
        ],
    )
    def test_bash_completes(self, ctl: Ctl, words: list[str], offered: set[str], not_offered: set[str]) -> None:
        script = ctl("completion", "bash").out
        array = " ".join(f"'{word}'" for word in ["cgpuctl", *words])
        script += f"\nCOMP_WORDS=({array}); COMP_CWORD={len(words)}; _cgpuctl; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=60)
        found = set(ran.stdout.split())
        assert offered <= found
        assert not found & not_offered

    def test_fish_conditions_are_commands_of_their_own(self, ctl: Ctl) -> None:
        """``and`` inside one command would be one more word to look for."""
        wanted = "'__fish_seen_subcommand_from quote; and __fish_seen_subcommand_from verify' -l attest"
        assert wanted in ctl("completion", "fish").out

    def test_another_shell_is_a_usage_error(self, ctl: Ctl) -> None:
        assert ctl("completion", "csh").code == USAGE


class TestCommandLine:
    @pytest.mark.parametrize("arguments", [(), ("unknown",), ("quote",), ("boot",), ("verify",), ("eventlog",)])
    def test_what_is_incomplete_is_a_usage_error(self, ctl: Ctl, arguments: tuple[str, ...]) -> None:
        ran = ctl(*arguments)
        assert (ran.code, ran.out) == (USAGE, "")
        assert ran.err.startswith("usage: cgpuctl")

    @pytest.mark.parametrize("arguments", [("--help",), ("verify", "--help"), ("quote", "verify", "-h")])
    def test_help_is_no_error(self, ctl: Ctl, arguments: tuple[str, ...]) -> None:
        ran = ctl(*arguments)
        assert (ran.code, ran.err) == (PASS, "")
        assert "usage: cgpuctl" in ran.out

    def test_every_command_names_a_module_that_runs_it(self) -> None:
        for words in (
            ["status"],
            ["doctor"],
            ["completion", "bash"],
            ["eventlog", "x"],
            ["verify", "x", "--nonce", ""],
        ):
            module = build_parser().parse_args(words).module
            assert (Path(__file__).parents[3] / "agent/cgpu_agent/cli" / f"{module}.py").is_file()
