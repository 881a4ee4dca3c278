"""The package as built, a Debian tree to install it in, and containers that boot such trees: "make test-systemd"."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cgpu_agent import __version__
from fixtures.nspawn import CONFIG, lacks

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"


@pytest.fixture(scope="session")
def package() -> Path:
    """The package of this source tree, as "make deb" built it."""
    made = sorted((ROOT / "dist").glob(f"cgpu-agent_{__version__}_*.deb"))
    assert made, "make deb"
    return made[0]


@pytest.fixture(scope="session")
def tree() -> Path:
    """Debian with systemd, without the package. Nothing may write to it."""
    if missing := lacks():
        pytest.skip(missing)
    made = subprocess.run(["sh", "packaging/tree.sh", "build/tree"], cwd=ROOT, capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"a Debian tree cannot be made here: {made.stderr[-300:]}")
    return BUILD / "tree"


@pytest.fixture(scope="session")
def installed(tree: Path, package: Path) -> Iterator[Path]:
    """A tree in which the package was installed without a systemd that runs, as whoever builds an image does."""
    image = BUILD / "installed"
    shutil.rmtree(image, ignore_errors=True)
    subprocess.run(["cp", "-a", "--reflink=auto", tree, image], check=True)
    shutil.copy(package, image / "package.deb")
    subprocess.run(["chroot", image, "dpkg", "--install", "/package.deb"], check=True, timeout=300)
    (image / "etc/cgpu-agent/config.toml").write_text(CONFIG)
    yield image
    shutil.rmtree(image)
