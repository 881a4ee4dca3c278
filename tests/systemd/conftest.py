"""A tree of Debian or Ubuntu with the agent installed, and containers that boot such trees: "make test-systemd".

``SUITE`` names the release: Debian 12's gets the package, any other what docs/install.md says of pip.
"""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cgpu_agent import __version__
from fixtures.nspawn import CONFIG, lacks

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
SUITE = os.environ.get("SUITE") or "bookworm"
PACKAGED = SUITE == "bookworm"
COMPILES = ("gcc", "libc6-dev", "pkg-config", "python3-dev", "python3-venv", "libtss2-dev")
WITH_PIP = """
python3 -m venv /opt/cgpu-agent
/opt/cgpu-agent/bin/pip install --quiet "$1[daemon]"
ln -s /opt/cgpu-agent/bin/cgpu* /usr/bin/
systemd-sysusers
systemctl --quiet enable cgpu-agent.socket cgpu-agent-admin.socket cgpu-agent-lease.socket cgpu-ready.socket
systemctl --quiet enable cgpu-agent.service
"""
"""As docs/install.md has it, and what the relying party's unit starts; the boot does the rest."""


@pytest.fixture(scope="session")
def package() -> Path:
    """The package of this source tree, as "make deb" built it."""
    if not PACKAGED:
        pytest.skip("the package is for Debian 12")
    made = sorted((ROOT / "dist").glob(f"cgpu-agent_{__version__}_*.deb"))
    assert made, "make deb"
    return made[0]


@pytest.fixture(scope="session")
def tree() -> Path:
    """A system with systemd, without the agent. Nothing may write to it."""
    if missing := lacks():
        pytest.skip(missing)
    name, packages = ("tree", ()) if PACKAGED else (f"tree-{SUITE}", COMPILES)
    command = ["sh", "packaging/tree.sh", f"build/{name}", *packages]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"a tree of {SUITE} cannot be made here: {made.stderr[-300:]}")
    return BUILD / name


@pytest.fixture(scope="session")
def installed(tree: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A tree in which the agent was installed without a systemd that runs, as whoever builds an image does."""
    image = BUILD / f"installed-{SUITE}"
    shutil.rmtree(image, ignore_errors=True)
    subprocess.run(["cp", "-a", "--reflink=auto", tree, image], check=True)
    if PACKAGED:
        shutil.copy(request.getfixturevalue("package"), image / "package.deb")
        subprocess.run(["chroot", image, "dpkg", "--install", "/package.deb"], check=True, timeout=300)
    else:
        install_with_pip(image)
    (image / "etc/cgpu-agent/config.toml").write_text(CONFIG)
    yield image
    shutil.rmtree(image)


def install_with_pip(image: Path) -> None:
    (wheel,) = (ROOT / "dist").glob(f"cgpu_agent-{__version__}-*.whl")
    shutil.copy(wheel, image)
    # The way to the index, and, where the environment says so, whom this machine trusts to be it.
    for needed in ("/etc/resolv.conf", ssl.get_default_verify_paths().cafile):
        if needed is not None:
            there = image / needed.lstrip("/")
            there.parent.mkdir(parents=True, exist_ok=True)
            there.unlink(missing_ok=True)
            shutil.copy(needed, there)
    subprocess.run(["make", "--silent", "install", f"DESTDIR={image}"], cwd=ROOT, check=True)
    command = ["chroot", image, "sh", "-ec", WITH_PIP, "sh", f"/{wheel.name}"]
    subprocess.run(command, check=True, timeout=900)
