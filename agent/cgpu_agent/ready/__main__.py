"""The ``cgpu-ready`` command."""

from __future__ import annotations

import argparse
import functools
import os
import pwd
import signal
import socket
import sys
from typing import Final

from cgpu_agent import __version__
from cgpu_agent.backends.gpu.nvml import Nvml
from cgpu_agent.backends.gpu.nvmlfaults import NOT_SUPPORTED
from cgpu_agent.backends.gpu.sysfs import loaded_driver
from cgpu_agent.errors import HostileInput
from cgpu_agent.ready.helper import Helper, put_ready
from cgpu_agent.ready.identity import is_main_process
from cgpu_agent.wire.ready import CLEAR, MAX_MESSAGE, SOCKET, parse_answer

USER: Final = "cgpu-agent"
_ASK_SECONDS: Final = 10.0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="cgpu-ready",
        description="Hold the GPUs' ready state for cgpu-agent. Started by its socket unit; see cgpu-ready(8).",
    )
    parser.add_argument("--clear", action="store_true", help="clear the ready state and exit; root does so itself")
    parser.add_argument("--version", action="version", version=f"cgpu-ready {__version__}")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the helper, or clear; returns the exit status: 0 stopped or cleared, 1 could not."""
    if _arguments(argv).clear:
        return 0 if loaded_driver() is None or _clear() in (0, NOT_SUPPORTED) else 1
    listener = _listener()
    if listener is None:
        sys.stderr.write("<3>cgpu-ready is started by cgpu-ready.socket\n")
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    Helper(listener, functools.partial(put_ready, Nvml()), pwd.getpwnam(USER).pw_uid, is_main_process).serve()
    return 0


def _listener() -> socket.socket | None:
    """The socket from systemd, sd_listen_fds(3)."""
    if (os.environ.get("LISTEN_PID"), os.environ.get("LISTEN_FDS")) != (str(os.getpid()), "1"):
        return None
    sock = socket.socket(fileno=3)
    return sock if (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET) else None


def _clear() -> int | None:
    """Root needs no helper, which may hang; anybody else asks it."""
    if os.geteuid() == 0:
        return put_ready(Nvml(), ready=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(_ASK_SECONDS)
        try:
            sock.connect(SOCKET)
            sock.send(CLEAR)
            return parse_answer(sock.recv(MAX_MESSAGE))
        except (OSError, HostileInput):
            return None


if __name__ == "__main__":
    sys.exit(main())
