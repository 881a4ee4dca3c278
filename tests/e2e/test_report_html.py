"""The verdict's page in a real browser: its style applies, its policy holds, hostile text stays text."""

from __future__ import annotations

import os
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest

from cgpu_agent.cedar.engine import Policies
from cgpu_agent.cedar.files import appraisal_schema, default_appraisal
from cgpu_agent.cli.verify import not_proven
from cgpu_agent.verifier.appraisal import appraise
from cgpu_agent.verifier.evidence import verify_evidence
from cgpu_agent.verifier.report_html import report
from fixtures import boots
from fixtures.bundles import PLATFORM_AK, caller, made, name_of, statement
from fixtures.lanes import board, gpu_judge, honest
from fixtures.pki import NOW

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 120.0
PAPER = {"light": (0xFD, 0xFD, 0xFC), "dark": (0x15, 0x17, 0x1A)}
SCHEME = {"light": "1", "dark": "0"}
ATTACK = "</style><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def page() -> str:
    """A page on which every text of the evidence attacks, with GPUs."""
    audience = f"https://relying-party.example/{ATTACK}"
    party = gpu_judge(audience=audience, pinned_names=frozenset({name_of(PLATFORM_AK)}))
    said = statement(audience=audience, caller=caller(unit=ATTACK, container=ATTACK), lane="gpus")
    boot = boots.with_command_line(f"/vmlinuz {ATTACK}")
    result = verify_evidence(made(statements=(said,), index=0, gpus=honest, **boot), party)
    assert result.accepted, result.refusal
    policy = Policies.load(default_appraisal(), appraisal_schema(), "policy")
    return report(appraise(result, policy, None), at=NOW, gaps=not_proven(result))


def browse(folder: Path, page: str, *options: str) -> str:
    """Open a page and return what the browser prints."""
    file = folder / "verdict.html"
    file.write_text(page)
    command = [
        *(str(BROWSER), "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(("--no-sandbox",) if os.geteuid() == 0 else ()),
        *(f"--user-data-dir={folder / 'profile'}", "--window-size=900,1200", *options, file.as_uri()),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout


def corner(picture: bytes) -> tuple[int, ...]:
    """The first pixel of a PNG: in its first row every filter leaves that one as it is (RFC 2083, 6)."""
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    at, data = 8, b""
    while at < len(picture):
        size = int.from_bytes(picture[at : at + 4], "big")
        if picture[at + 4 : at + 8] == b"IDAT":
            data += picture[at + 8 : at + 8 + size]
        at += 12 + size
    return tuple(zlib.decompress(data)[1:4])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_its_style_applies_in_light_and_dark(tmp_path: Path, page: str, scheme: str) -> None:
    picture = tmp_path / "page.png"
    browse(tmp_path, page, f"--screenshot={picture}", f"--blink-settings=preferredColorScheme={SCHEME[scheme]}")
    assert corner(picture.read_bytes()) == PAPER[scheme]


def test_a_style_other_than_its_own_does_not_apply(tmp_path: Path, page: str) -> None:
    picture = tmp_path / "page.png"
    altered = page.replace("#fdfdfc", "#ff0000")
    assert altered != page
    browse(tmp_path, altered, f"--screenshot={picture}", "--blink-settings=preferredColorScheme=1")
    assert corner(picture.read_bytes()) == (255, 255, 255)


def test_hostile_text_runs_nothing_and_makes_no_element(tmp_path: Path, page: str) -> None:
    seen = browse(tmp_path, page, "--dump-dom")
    assert "<title>Evidence: " in seen
    assert "<script" not in seen
    assert all(device.pdi.hex().upper() in seen.upper() for device in board())
    assert "<img" not in seen
    assert seen.count("&lt;script&gt;document.title=") >= 3


def test_a_script_that_slipped_through_would_not_run(tmp_path: Path, page: str) -> None:
    broken = page.replace("<h1>", "<script>document.title='owned'</script><h1>")
    assert broken != page
    assert "<title>owned" not in browse(tmp_path, broken, "--dump-dom")
    without_policy = broken.replace("Content-Security-Policy", "X-Nothing")
    assert "<title>owned" in browse(tmp_path, without_policy, "--dump-dom")
