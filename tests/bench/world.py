"""The processes under measurement: an swtpm, the real daemon on it, a bare server, a caller; all gone at the end."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cgpu_agent.backends.base import AkAlgorithm, Signed, TpmCommands
from cgpu_agent.backends.tpm import raw
from cgpu_agent.backends.tpm.commands import Commands
from cgpu_agent.backends.tpm.keys import sized
from cgpu_agent.backends.tpm.software import Swtpm
from cgpu_agent.backends.tpm.transport import UnixPerCommand, response_code
from cgpu_agent.wire import eventlog
from cgpu_agent.wire.tpm import PcrSelection

VECTORS = Path(__file__).resolve().parents[1] / "vectors" / "vm-boot"
BOOT_LOG = VECTORS / "shim-grub-ms-secboot" / "binary_bios_measurements"
AK_HANDLE = 0x81000003
HEALTH = "/grpc.health.v1.Health/Check"
SELECTION = PcrSelection.of("sha256", range(16))
_READY_SECONDS = 60.0
_TPM_CC_QUOTE = 0x158
_TPM_ALG_NULL = 0x0010


def swtpm_with_boot(folder: Path) -> Swtpm:
    """An swtpm whose PCRs hold a recorded boot, so that evidence from it is judged like a real VM's."""
    tpm = Swtpm(folder, die_with_parent=True)
    tpm.start()
    log = eventlog.parse(BOOT_LOG.read_bytes(), kind="tpm")
    tpm.replay_boot((event.pcr, event.digest("sha256") or b"") for event in log.events if event.measured)
    return tpm


class RawTpm:
    """The TPM without the daemon, in this process; speaks to it between the daemon's commands.

    Args:
        socket_path: swtpm's data socket, or one that passes commands on to it.
    """

    def __init__(self, socket_path: Path) -> None:
        self._transport = UnixPerCommand(socket_path)
        selection = (1).to_bytes(4, "big") + bytes.fromhex("000b 03 ffff00")
        scheme = _TPM_ALG_NULL.to_bytes(2, "big")
        self._quote = raw._authorised(_TPM_CC_QUOTE, [AK_HANDLE], sized(bytes(32)) + scheme + selection)

    def quote(self) -> bytes:
        """TPM2_Quote by the platform AK over PCRs 0-15: one command, and nothing made of the answer."""
        answer = self._transport.transact(self._quote, time.monotonic() + _READY_SECONDS)
        assert response_code(answer) == 0
        return answer

    def provision(self, algorithm: AkAlgorithm) -> None:
        """Make the platform AK, as a cloud would have."""
        commands = self.commands()
        commands.create_platform_ak(AK_HANDLE, algorithm)
        commands.close()

    def commands(self) -> Commands:
        """Single commands composed as the daemon does it."""
        return Commands(self._transport)


def quote_and_read(commands: TpmCommands) -> tuple[Signed, dict[int, bytes]]:
    """What a GetQuote answer holds: the quote, and the PCR values it covers."""
    return commands.quote(AK_HANDLE, bytes(32), SELECTION), commands.pcr_read(SELECTION)


class Daemon:
    """``python -m cgpu_agent.daemon``, told by its own readiness message that it serves.

    Args:
        head, limits, keys: TOML of the configuration: what stands before the tables, what in ``[limits]``, and keys.
        connections_per_uid: all the callers of a benchmark are mostly of one.
    """

    def __init__(
        self,
        folder: Path,
        tpm_socket: Path,
        *,
        head: str = "",
        limits: str = "",
        keys: str = "",
        connections_per_uid: int = 1024,
        **environment: str,
    ) -> None:
        self.api = str(folder / "agent.sock")
        self._notify = folder / "notify"
        self._config = folder / "config.toml"
        self._journal = folder / "journal"
        (folder / "private").mkdir(mode=0o700)
        self._config.write_text(
            f'{head}log_level = "warning"\nruntime_dir = "{folder}/private"\nstate_dir = "{folder}/state"\n'
            f'[sockets]\napi = "{self.api}"\nadmin = "{folder}/admin.sock"\nlease = "{folder}/lease.sock"\n'
            f'[tpm]\ndevice = "swtpm:{tpm_socket}"\ncreate_platform_ak = "no"\n'
            f'[logs]\nboot = "{BOOT_LOG}"\nsystemd = "{folder}/no-systemd-log"\n'
            f"[limits]\nconnections_per_uid = {connections_per_uid}\n{limits}{keys}"
        )
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> float:
        """Start it; seconds from the fork to READY=1."""
        self._notify.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, self._journal.open("ab") as journal:
            notify.bind(str(self._notify))
            notify.settimeout(_READY_SECONDS)
            begun = time.perf_counter()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cgpu_agent.daemon", "--config", str(self._config)],
                stdin=subprocess.DEVNULL,
                stderr=journal,
                env={**os.environ, "NOTIFY_SOCKET": str(self._notify), **self._environment},
            )
            while b"READY=1" not in notify.recv(4096).splitlines():
                if self._process.poll() is not None:
                    raise RuntimeError(f"the daemon ended: {self._journal.read_text()[-2000:]}")
            return time.perf_counter() - begun

    def stop(self) -> None:
        """End it in order. Idempotent."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(_READY_SECONDS)
            self._process = None


class Helper:
    """A script of this folder as a process that ends when its stdin closes."""

    def __init__(self, script: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(script)), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def says(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a process of the benchmark died; its error stands above")
        return line

    def ask(self, task: dict[str, Any]) -> dict[str, float]:
        assert self._process.stdin is not None
        print(json.dumps(task), file=self._process.stdin, flush=True)
        answer: dict[str, float] = json.loads(self.says())
        return answer

    def stop(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def proportional_memory(pid: int) -> int:
    """PSS in bytes: shared pages count for a part, so a library that several processes use is not counted twice."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    line = next(line for line in text.splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) * 1024
