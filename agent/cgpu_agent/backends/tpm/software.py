"""Run an emulated TPM (swtpm) for the demo and for tests: start it, stop it in order, fill it as a platform would.

The emulator is as trustworthy as whoever may write its directory: evidence from it is simulated.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from cgpu_agent.backends.tpm import raw
from cgpu_agent.backends.tpm.faults import TpmFault
from cgpu_agent.backends.tpm.transport import UnixPerCommand, converse, fits_socket_address, response_code
from cgpu_agent.errors import DeviceFault, Misuse, Unavailable

NV_INDEX_MAX: Final = 2048
"""What libtpms stores in one index. Azure's AK certificate index is padded to 4096 bytes: give less padding here."""
_NV_CHUNK: Final = 1024
_COMMAND_TIMEOUT: Final = 10.0
_START_TIMEOUT: Final = 10.0
_STOP_TIMEOUT: Final = 5.0
_POLL: Final = 0.002

# TPMA_NV (Part 2, 13.4): PPWRITE, AUTHREAD, PPREAD, OWNERREAD, NO_DA, PLATFORMCREATE.
_PLATFORM_INDEX: Final = 1 << 0 | 1 << 18 | 1 << 16 | 1 << 17 | 1 << 25 | 1 << 30


class Swtpm:
    """One swtpm process over one state directory.

    Args:
        directory: holds TPM state, socket and log. Made with mode 0700 if absent; else it must belong to this user
            and be closed to everybody else.
        die_with_parent: let the kernel end swtpm when the *thread* that called ``start`` ends; for a daemon, start
            from the main thread.

    Raises:
        Unavailable: ``SWTPM_MISSING`` without the program, ``SWTPM_DIRECTORY`` for an unfit directory.
    """

    def __init__(self, directory: str | Path, *, die_with_parent: bool = False) -> None:
        self.directory: Final = Path(directory).absolute()
        self._die_with_parent: Final = die_with_parent
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def data_socket(self) -> Path:
        """The data socket; swtpm's control socket stands beside it with the suffix ``.ctrl``."""
        return self.directory / "sock"

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def running(self) -> bool:
        """True while the process lives. Whether it answers is another question."""
        return self._process is not None and self._process.poll() is None

    def transport(self) -> UnixPerCommand:
        """A new transport to this TPM: a factory for ``TpmOwner``."""
        return UnixPerCommand(self.data_socket)

    def start(self) -> None:
        """Start swtpm, after a real command has shown that it answers. A second call does nothing while it runs.

        Raises:
            Unavailable: as the constructor.
            DeviceFault: ``SWTPM_FAILED`` when it ends or does not answer. State it cannot read is left as it is.
        """
        if self.running:
            return
        arguments = self._arguments()
        self._prepare_directory()
        self._process = subprocess.Popen(  # noqa: S603 - fixed arguments, no shell
            arguments,
            # swtpm outlives a crashed parent; an inherited pipe would then keep the reader of that pipe waiting.
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )
        try:
            self._await_answer()
        except DeviceFault as fault:
            self.kill()
            raise DeviceFault("SWTPM_FAILED", "swtpm does not answer; its log says why") from fault

    def stop(self) -> None:
        """Shut the TPM down in order, then end the process. Idempotent."""
        if self._process is None:
            return
        if self.running:
            # A broken or hung TPM cannot do this, and what follows does not need it.
            with contextlib.suppress(DeviceFault):
                self.execute(raw.shutdown_clear(), timeout=1.0)
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        self._process = None

    def kill(self) -> None:
        """End the process at once, as a power cut would. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """``stop`` and ``start``: a TPM Reset. PCRs are zero again, and the platform hierarchy is enabled."""
        self.stop()
        self.start()

    def replay_boot(self, log: Iterable[tuple[int, bytes]]) -> None:
        """Extend PCRs in the order given: (PCR index, digest); the digest's size names the bank."""
        for index, digest in log:
            if not 0 <= index <= 23:
                raise Misuse("TPM_ARGUMENT", "a PCR index must be within 0-23")
            try:
                command = raw.pcr_extend(index, [digest])
            except ValueError as error:
                raise Misuse("TPM_ARGUMENT", "no PCR bank has digests of this size") from error
            self.execute(command)

    def provision_nv(self, index: int, content: bytes, *, size: int | None = None) -> None:
        """Define an NV index as a cloud platform does (platform-written, owner-readable) and fill it.

        Args:
            size: of the index, at most 2048; ``content`` is padded with zeros. Default: the size of ``content``.
        """
        size = len(content) if size is None else size
        if not len(content) <= size <= NV_INDEX_MAX:
            raise Misuse("TPM_ARGUMENT", f"an NV index of swtpm holds at most {NV_INDEX_MAX} bytes")
        self.execute(raw.nv_define(index, size, _PLATFORM_INDEX, raw.PLATFORM))
        self.fill_nv(index, content.ljust(size, b"\0"))

    def fill_nv(self, index: int, data: bytes) -> None:
        """Write an index of the platform's anew, from its beginning on."""
        for offset in range(0, len(data), _NV_CHUNK):
            self.execute(raw.nv_write(index, data[offset : offset + _NV_CHUNK], offset, raw.PLATFORM))

    def disable_platform_hierarchy(self) -> None:
        """Take away what a guest of a cloud does not have either; lasts until the next start."""
        self.execute(raw.disable_hierarchy(raw.PLATFORM))

    def execute(self, command: bytes, *, timeout: float = _COMMAND_TIMEOUT) -> bytes:
        """Send a raw command and return the response frame; a TPM error is raised as ``DeviceFault``."""
        frame = converse(self.transport(), command, time.monotonic() + timeout)
        if response_code(frame):
            raise TpmFault(response_code(frame), f"command 0x{command[6:10].hex()}")
        return frame

    def _arguments(self) -> list[str]:
        program = _program("swtpm", "SWTPM_MISSING")
        folder = os.fspath(self.directory)
        if not fits_socket_address(f"{self.data_socket}.ctrl") or "," in folder:
            raise Unavailable("SWTPM_DIRECTORY", "the path of swtpm's directory is too long or holds a comma")
        arguments = [program, "socket", "--tpm2"]
        arguments += ["--server", f"type=unixio,path={self.data_socket},mode=0600"]
        arguments += ["--ctrl", f"type=unixio,path={self.data_socket}.ctrl,mode=0600"]
        arguments += ["--tpmstate", f"dir={folder},mode=0600"]
        arguments += ["--flags", "not-need-init,startup-clear"]
        # Level 1 and above write a line for every command.
        arguments += ["--log", f"file={folder}/log,level=0"]
        if self._die_with_parent:
            # The signal survives exec, and a forked child of a threaded parent need not run Python for it.
            arguments = [_program("setpriv", "SETPRIV_MISSING"), "--pdeathsig", "TERM", *arguments]
        return arguments

    def _prepare_directory(self) -> None:
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.directory.lstat()
        except OSError as error:
            raise Unavailable("SWTPM_DIRECTORY", "swtpm's directory cannot be made") from error
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise Unavailable("SWTPM_DIRECTORY", "swtpm's directory must be a directory of ours with mode 0700")
        if _listening(self.data_socket):
            raise Unavailable("SWTPM_DIRECTORY", "another swtpm serves this directory already")
        # A killed swtpm leaves its sockets, and the next one cannot bind over them.
        for name in (self.data_socket, Path(f"{self.data_socket}.ctrl")):
            name.unlink(missing_ok=True)

    def _await_answer(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            try:
                self.execute(raw.read_clock(), timeout=deadline - time.monotonic())
            except DeviceFault as fault:
                # Until it listens it looks broken; a broken one ends with the first command.
                if fault.slug != "TPM_IO" or not self.running:
                    raise
            else:
                return
            time.sleep(_POLL)


def _listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except BlockingIOError:
            return True  # Its queue is full, so somebody listens.
        except OSError:
            return False
        return True


def _program(name: str, slug: str) -> str:
    found = shutil.which(name)
    if found is None:
        package = {"swtpm": "swtpm", "setpriv": "util-linux"}[name]
        raise Unavailable(slug, f"the program {name} is not installed: apt-get install {package}")
    return found
