"""The ``cgpu-egress`` command."""

from __future__ import annotations

import argparse
import asyncio
import pwd
import signal
import socket
import sys
from pathlib import Path
from typing import Final

from cgpu_agent import __version__
from cgpu_agent.backends.notify import Notifier, passed_descriptors
from cgpu_agent.egress.config import Config, load
from cgpu_agent.egress.proxy import Proxy
from cgpu_agent.errors import Misuse

USER: Final = "cgpu-agent"
DEFAULT_CONFIG: Final = Path("/etc/cgpu-agent/egress.toml")

EXIT_FAILED: Final = 1
EXIT_CONFIG: Final = 2  # the unit does not restart on this: the same file would fail again


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="cgpu-egress",
        description="Connect cgpu-agent to listed destinations. Started by its socket unit; see cgpu-egress(8).",
    )
    parser.add_argument(
        "-c",
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help=f"configuration file (default: {DEFAULT_CONFIG})",
    )
    parser.add_argument("--check", action="store_true", help="check the configuration file, and exit")
    parser.add_argument("--version", action="version", version=f"cgpu-egress {__version__}")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the proxy; returns the exit status: 0 stopped or good, 1 could not serve, 2 bad configuration."""
    arguments = _arguments(argv)
    notifier = Notifier()
    try:
        config = load(arguments.config)
    except Misuse as error:
        sys.stderr.write(f"<3>bad configuration: {error.message}\n")
        notifier.status(f"Failed: {error.message}")
        return EXIT_CONFIG
    if arguments.check:
        sys.stdout.write(f"{arguments.config}: good\n")
        return 0
    listener = _listener()
    if listener is None:
        sys.stderr.write("<3>cgpu-egress is started by cgpu-egress.socket\n")
        return EXIT_FAILED
    with listener:
        asyncio.run(_serve(Proxy(config, pwd.getpwnam(USER).pw_uid), listener, arguments.config, notifier))
    return 0


def _listener() -> socket.socket | None:
    descriptors = dict(passed_descriptors())
    if descriptors.keys() != {"egress"}:
        return None
    sock = socket.socket(fileno=descriptors["egress"])
    return sock if (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_STREAM) else None


async def _serve(proxy: Proxy, listener: socket.socket, path: Path, notifier: Notifier) -> None:
    serving = asyncio.ensure_future(proxy.serve(listener))

    def reload() -> None:
        notifier.reloading()
        try:
            proxy.config = load(path)
        except Misuse as error:
            sys.stderr.write(f"<3>bad configuration, the one before it stays: {error.message}\n")
            notifier.status(f"{_status(proxy.config)}; the file is bad: {error.message}")
        else:
            notifier.status(_status(proxy.config))
        notifier.ready()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, reload)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, serving.cancel)
    notifier.status(_status(proxy.config))
    notifier.ready()
    await asyncio.wait([serving])
    notifier.stopping()
    if not serving.cancelled():
        serving.result()


def _status(config: Config) -> str:
    return f"Destinations allowed: {len(config.allow)}"


if __name__ == "__main__":
    sys.exit(main())
