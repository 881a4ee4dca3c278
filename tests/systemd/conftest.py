"""The package as built, a Debian tree to install it in, and containers that boot such trees: "make test-systemd"."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cgpu_agent import __version__
from cgpu_agent.backends.tpm.software import Swtpm
from fixtures.machine import BOOT_LOG, replay_boot
from fixtures.nspawn import Container, booted, lacks

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"

CONFIG = """\
[tpm]
device = "swtpm:/srv/host/tpm/sock"
create_platform_ak = "ecc"
[logs]
boot = "/srv/host/boot.log"
[gpu]
backend = "none"
"""
"""Of an agent in a container: an emulated TPM, in which the recorded firmware booted."""


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


@contextmanager
def machine(image: Path) -> Iterator[Container]:
    """A machine of its own: a TPM in which the recorded firmware booted, and a container that boots."""
    folder = Path(tempfile.mkdtemp(prefix="cgpu-", dir="/tmp"))
    folder.chmod(0o755)
    shutil.copy(BOOT_LOG, folder / "boot.log")
    tpm = Swtpm(folder / "tpm")
    try:
        tpm.start()
        replay_boot(tpm)
        # To the agent's user in the container, whose number is nobody's here.
        tpm.directory.chmod(0o711)
        tpm.data_socket.chmod(0o666)
        with booted(image, folder) as container:
            yield container
    finally:
        tpm.kill()
        shutil.rmtree(folder)
