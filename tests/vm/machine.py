"""A VM with OVMF and a vTPM in software: it outlives its boots, as its disk does."""

from __future__ import annotations

import io
import resource
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vm.image import OVMF, run

SECONDS: Final = 1800.0
"""How long a boot may take: emulated, a minute on an idle machine, ten minutes on a very busy one."""
REFUSED: Final = b"Access Denied"
"""What OVMF says of an image that Secure Boot refuses; it then waits for somebody to press a key."""

_WITH_US: Final = ("setpriv", "--pdeathsig", "KILL")
"""In front of a command that ends when we do, however that is."""

SECURE_BOOT: Final = OVMF / "OVMF_VARS_4M.snakeoil.fd"
SECURE_BOOT_MICROSOFT: Final = OVMF / "OVMF_VARS_4M.ms.fd"
NO_SECURE_BOOT: Final = OVMF / "OVMF_VARS_4M.fd"


@dataclass(frozen=True, slots=True)
class Boot:
    """What a boot left: files by name (empty where the guest never ran), the console, and what it took in seconds."""

    files: Mapping[str, bytes]
    console: bytes
    seconds: float
    cpu_seconds: float

    def text(self, name: str) -> str:
        return self.files[name].decode()


class Machine:
    """One VM. Everything it is made of lies in its folder.

    Args:
        folder: empty; its path is short, because sockets are in it.
        disk: of the VM, written to.
    """

    def __init__(self, folder: Path, disk: Path) -> None:
        self.folder = folder
        self.disk = disk
        self.ca = folder / "ca"
        self._state = folder / "tpm"
        self._make_tpm()

    @property
    def ek_root(self) -> Path:
        """The CA of this VM's TPM."""
        return self.ca / "swtpm-localca-rootca-cert.pem"

    @property
    def ek_intermediate(self) -> Path:
        return self.ca / "issuercert.pem"

    def _make_tpm(self) -> None:
        self.ca.mkdir()
        self._state.mkdir()
        localca, setup = self.folder / "localca.conf", self.folder / "setup.conf"
        localca.write_text(
            f"statedir = {self.ca}\nsigningkey = {self.ca}/signkey.pem\nissuercert = {self.ek_intermediate}\n"
            f"certserial = {self.ca}/certserial\n"
        )
        setup.write_text(
            f"create_certs_tool = /usr/bin/swtpm_localca\ncreate_certs_tool_config = {localca}\n"
            "create_certs_tool_options = /etc/swtpm-localca.options\nactive_pcr_banks = sha256\n"
        )
        options = ("--tpm2", "--create-ek-cert", "--create-platform-cert", "--lock-nvram", "--vmid", "vm-test")
        run("swtpm_setup", *options, "--tpmstate", self._state, "--config", setup, "--runas", "root")

    def boot(self, payload: Mapping[str, bytes], firmware: Path, *, network: bool = False) -> Boot:
        """Power it on with the payload, and wait until it is off, or its firmware refuses the disk.

        ``payload`` holds ``run.sh``. ``network``: the guest reaches the host's loopback as 10.0.2.2.
        """
        sent, got, console = (self.folder / name for name in ("payload.tar", "results.tar", "console"))
        sent.write_bytes(_packed(payload))
        variables = self.folder / "vars.fd"
        shutil.copyfile(firmware, variables)
        got.unlink(missing_ok=True)
        console.unlink(missing_ok=True)
        began, used = time.monotonic(), _cpu_seconds()
        with self._tpm() as socket:
            machine = subprocess.Popen(
                self._command(socket, variables, sent, got, console, network=network), stdin=subprocess.DEVNULL
            )
            try:
                self._wait(machine, console, began + SECONDS)
            finally:
                machine.kill()
                machine.wait()
        return Boot(_unpacked(got), console.read_bytes(), time.monotonic() - began, _cpu_seconds() - used)

    def _wait(self, machine: subprocess.Popen[bytes], console: Path, end: float) -> None:
        while machine.poll() is None:
            said = console.read_bytes() if console.exists() else b""
            if REFUSED in said:
                return
            assert time.monotonic() < end, f"the machine does not end: {said[-2000:]!r}"
            time.sleep(0.5)
        assert machine.returncode == 0

    @contextmanager
    def _tpm(self) -> Iterator[Path]:
        """The TPM, with power."""
        socket = self.folder / "tpm.sock"
        where = ("--tpmstate", f"dir={self._state}", "--ctrl", f"type=unixio,path={socket}")
        words = [*_WITH_US, "swtpm", "socket", "--tpm2", *where, "--terminate", "--flags", "startup-clear"]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 30
            while not socket.exists():
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.05)
            yield socket
        finally:
            process.terminate()
            process.wait()
            socket.unlink(missing_ok=True)

    def _command(
        self, socket: Path, variables: Path, sent: Path, got: Path, console: Path, *, network: bool
    ) -> list[str]:
        devices = [
            *("-chardev", f"socket,id=tpm,path={socket}"),
            *("-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0"),
            *("-device", "virtio-rng-pci"),
            *("-drive", f"if=none,id=disk,format=raw,file={self.disk},cache=unsafe"),
            *("-device", "virtio-blk-pci,drive=disk,bootindex=1"),
            *("-drive", f"if=none,id=payload,format=raw,file={sent},readonly=on"),
            *("-device", "virtio-blk-pci,drive=payload,serial=payload"),
            *("-device", "virtio-serial-pci", "-chardev", f"file,id=results,path={got}"),
            *("-device", "virtserialport,chardev=results,name=results"),
        ]
        if network:
            devices += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]
        return [
            *(*_WITH_US, "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max"),
            # One: on a busy host a second emulated processor is waited for until the kernel gives up.
            *("-smp", "1", "-m", "1024", "-machine", "q35,smm=on"),
            *("-global", "driver=cfi.pflash01,property=secure,value=on", "-global", "ICH9-LPC.disable_s3=1"),
            *("-drive", f"if=pflash,format=raw,unit=0,file={OVMF}/OVMF_CODE_4M.secboot.fd,readonly=on"),
            *("-drive", f"if=pflash,format=raw,unit=1,file={variables}"),
            *devices,
            *("-nodefaults", "-display", "none", "-no-reboot", "-serial", f"file:{console}"),
        ]


def _cpu_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _packed(files: Mapping[str, bytes]) -> bytes:
    """A tar, which is a whole number of sectors."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _unpacked(path: Path) -> dict[str, bytes]:
    if not path.exists() or path.stat().st_size == 0:
        return {}
    with tarfile.open(path) as archive:
        found = ((entry.name.removeprefix("./"), archive.extractfile(entry)) for entry in archive if entry.isfile())
        return {name: file.read() for name, file in found if file is not None}
