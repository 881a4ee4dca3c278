"""Builds what a measured boot needs: signed kernel images, a disk, and what a host may do to them afterwards."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
BUILD: Final = ROOT / "build" / "vm"
_GUEST: Final = Path(__file__).resolve().parent / "guest"
_PACKAGES: Final = (
    *("linux-image-cloud-amd64", "initramfs-tools", "kmod", "tpm2-tools", "libtss2-tcti-device0"),
    *("shim-signed", "grub-efi-amd64-signed"),
)
STUB: Final = Path("/usr/lib/systemd/boot/efi/linuxx64.efi.stub")
OVMF: Final = Path("/usr/share/OVMF")
SNAKEOIL: Final = Path("/usr/share/ovmf/PkKek-1-snakeoil")
"""The key that the firmware of the tests trusts. Debian publishes it, for tests; so nothing here is a secret."""

# no_timer_check: an emulated timer on a busy machine is so late that the kernel takes it for a broken one.
COMMAND_LINE: Final = "root=/dev/vda2 rw console=ttyS0 panic=-1 no_timer_check systemd.show_status=0 loglevel=4"

_MIB: Final = 1 << 20
_ESP_START: Final = 1
_ESP_SIZE: Final = 127
_ROOT_SIZE: Final = 1100
# Fixed, because the partition table is measured into PCR 5.
_TABLE: Final = f"""label: gpt
label-id: 6A3A3C0C-6E0B-4E5B-9E6B-1F6C3A0D5C01
start={_ESP_START}MiB, size={_ESP_SIZE}MiB, type=U, uuid=6A3A3C0C-6E0B-4E5B-9E6B-1F6C3A0D5C02
start={_ESP_START + _ESP_SIZE}MiB, size={_ROOT_SIZE}MiB, type=L, uuid=6A3A3C0C-6E0B-4E5B-9E6B-1F6C3A0D5C03
"""
# Where systemd's stub takes its sections from; the kernel must stay below 24 MiB.
_SECTIONS: Final = {"osrel": 0x20000, "cmdline": 0x30000, "linux": 0x2000000, "initrd": 0x3800000}


def run(*words: str | Path, stdin: str | None = None) -> str:
    """What a tool prints; raises with what it complained about."""
    done = subprocess.run(list(map(str, words)), input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, f"{words[0]}: {done.stdout}{done.stderr}"
    return done.stdout


def make_root() -> Path:
    """The root file system of the machine: a Debian with a kernel, on which the package was installed."""
    tree, root = BUILD / "tree", BUILD / "root"
    run("sh", ROOT / "packaging/tree.sh", tree, *_PACKAGES)
    package = max((ROOT / "dist").glob("cgpu-agent_*.deb"), key=lambda path: path.stat().st_mtime)
    shutil.rmtree(root, ignore_errors=True)
    run("cp", "-a", tree, root)
    shutil.copy(package, root)
    run("chroot", root, "dpkg", "--install", f"/{package.name}")
    (root / package.name).unlink()
    etc, sbin = root / "etc", root / "usr/local/sbin"
    shutil.copy(_GUEST / "config.toml", etc / "cgpu-agent")
    policy = (root / "usr/share/cgpu-agent/policy.cedar").read_text() + (_GUEST / "policy.cedar").read_text()
    (etc / "cgpu-agent/policy.cedar").write_text(policy)
    shutil.copy(_GUEST / "vm-payload", sbin)
    shutil.copy(_GUEST / "vm-payload.service", etc / "systemd/system")
    dropin = etc / "systemd/system/cgpu-agent.service.d"
    dropin.mkdir()
    shutil.copy(_GUEST / "emulated.conf", dropin)
    run("systemctl", "--quiet", f"--root={root}", "enable", "vm-payload.service")
    # All modules would make an initrd that takes the firmware a minute to read and measure.
    (etc / "initramfs-tools/conf.d/vm").write_text("MODULES=list\nRESUME=none\n")
    (etc / "initramfs-tools/modules").write_text("virtio_pci\nvirtio_blk\next4\n")
    run("chroot", root, "update-initramfs", "-u")
    return root


def kernel_of(tree: Path) -> tuple[Path, Path]:
    """Kernel and initrd of a root tree."""
    (kernel,) = tree.glob("boot/vmlinuz-*")
    (initrd,) = tree.glob("boot/initrd.img-*")
    return kernel, initrd


def make_uki(tree: Path, target: Path, command_line: str = COMMAND_LINE, *, signed: bool = True) -> Path:
    """A unified kernel image of the tree's kernel. The stub measures its sections into PCR 11."""
    kernel, initrd = kernel_of(tree)
    text = target.with_suffix(".cmdline")
    text.write_text(command_line)
    contents = {"osrel": tree / "etc/os-release", "cmdline": text, "linux": kernel, "initrd": initrd}
    options: list[str | Path] = []
    for name, address in _SECTIONS.items():
        options += ["--add-section", f".{name}={contents[name]}", "--change-section-vma", f".{name}={address:#x}"]
    run("objcopy", *options, STUB, target)
    if signed:
        sign(target)
    return target


def sign(image: Path) -> None:
    """Sign an EFI image with the key that the firmware trusts."""
    key = image.with_name("db.key")
    run("openssl", "rsa", "-in", SNAKEOIL.with_suffix(".key"), "-passin", "pass:snakeoil", "-out", key)
    run("sbsign", "--key", key, "--cert", SNAKEOIL.with_suffix(".pem"), "--output", image, image)


def shim_and_grub(tree: Path, folder: Path, command_line: str = COMMAND_LINE) -> list[tuple[Path, str]]:
    """Debian's own boot loaders with the tree's kernel, as files of an EFI system partition."""
    kernel, initrd = kernel_of(tree)
    menu = folder / "grub.cfg"
    menu.write_text(f"linux /vmlinuz {command_line}\ninitrd /initrd.img\nboot\n")
    return [
        (tree / "usr/lib/shim/shimx64.efi.signed", "/EFI/BOOT/BOOTX64.EFI"),
        (tree / "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed", "/EFI/BOOT/grubx64.efi"),
        (menu, "/EFI/debian/grub.cfg"),
        (kernel, "/vmlinuz"),
        (initrd, "/initrd.img"),
    ]


def make_disk(tree: Path, disk: Path) -> None:
    """A disk with an empty EFI system partition and the tree as its second partition."""
    disk.unlink(missing_ok=True)
    with disk.open("wb") as file:
        file.truncate((_ESP_START + _ESP_SIZE + _ROOT_SIZE + 1) * _MIB)
    run("sfdisk", "--quiet", disk, stdin=_TABLE)
    run("mformat", "-i", _esp(disk), "-F", "-T", str(_ESP_SIZE * 2048), "::")
    offset = (_ESP_START + _ESP_SIZE) * _MIB
    run("mke2fs", "-q", "-F", "-t", "ext4", "-E", f"offset={offset}", "-d", tree, disk, f"{_ROOT_SIZE}M")


def put_on_esp(disk: Path, files: Sequence[tuple[Path, str]]) -> None:
    """Have exactly these files on the EFI system partition, as whoever has the disk can."""
    run("mformat", "-i", _esp(disk), "-F", "-T", str(_ESP_SIZE * 2048), "::")
    made: set[str] = set()
    for source, name in files:
        folders = name.split("/")[1:-1]
        for depth in range(len(folders)):
            folder = "/".join(folders[: depth + 1])
            if folder not in made:
                run("mmd", "-i", _esp(disk), f"::/{folder}")
                made.add(folder)
        run("mcopy", "-i", _esp(disk), source, f"::{name}")


def _esp(disk: Path) -> str:
    return f"{disk}@@{_ESP_START}M"
