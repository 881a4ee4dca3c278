"""The package is the same bytes, whoever builds it, and wherever."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_another_build_elsewhere_by_a_user_with_another_mask_gives_the_same_bytes(
    package: Path, tmp_path: Path
) -> None:
    script = 'umask 077 && exec sh packaging/deb/build.sh "$1" "$2"'
    made = subprocess.run(
        ["sh", "-c", script, "sh", tmp_path / "out", tmp_path / "elsewhere"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    again = Path(made.stdout.splitlines()[-1])
    assert again.name == package.name
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(package.read_bytes()).digest()
