"""The build digest changes with any file of the package, and with nothing else."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cgpu_agent
from cgpu_agent.daemon.build import build_digest

PACKAGE = Path(cgpu_agent.__file__).parent


def digest_of_copy(folder: Path) -> str:
    """The digest as an installation at ``folder`` states it."""
    program = "from cgpu_agent.daemon.build import build_digest; print(build_digest())"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


def test_digest_can_be_recomputed_from_its_description() -> None:
    digest = hashlib.sha256()
    parts = [path for pattern in ("*.py", "*.cedar", "*.cedarschema") for path in PACKAGE.rglob(pattern)]
    for path in sorted(parts):
        content = path.read_bytes()
        name = str(path.relative_to(PACKAGE)).encode()
        digest.update(name + b"\0" + len(content).to_bytes(8, "big") + content)
    assert build_digest() == digest.hexdigest()


def test_any_change_to_a_file_changes_it_and_the_place_does_not(tmp_path: Path) -> None:
    copy = tmp_path / "cgpu_agent"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    same = digest_of_copy(tmp_path)
    assert len(bytes.fromhex(same)) == 32
    (copy / "domain" / "quota.py").open("a").write("\n")
    changed = digest_of_copy(tmp_path)
    assert changed != same
    (copy / "domain" / "extra.py").touch()
    more = digest_of_copy(tmp_path)
    assert more not in (same, changed)
    (copy / "cedar" / "agent.cedarschema").open("a").write("\n")
    assert digest_of_copy(tmp_path) not in (same, changed, more)
