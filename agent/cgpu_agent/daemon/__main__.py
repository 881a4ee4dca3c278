"""The ``cgpu-agent`` command."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import sys
import traceback
from pathlib import Path

import structlog

from cgpu_agent import __version__
from cgpu_agent.backends.notify import Notifier
from cgpu_agent.daemon import config as configuration
from cgpu_agent.daemon import logging as journal
from cgpu_agent.daemon.approvals import load_approvals
from cgpu_agent.daemon.policy import load_policy
from cgpu_agent.errors import AgentError, Misuse

DEFAULT_CONFIG = Path("/etc/cgpu-agent/config.toml")

_PR_SET_DUMPABLE = 4

EXIT_FAILED = 1
EXIT_CONFIG = 2  # the unit does not restart on this: the same file would fail again


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="cgpu-agent",
        description="Serve measured-boot evidence to this VM's workloads. Started by systemd; see cgpu-agent(8).",
    )
    parser.add_argument(
        "-c",
        "--config",
        type=Path,
        metavar="FILE",
        help=f"configuration file (default: {DEFAULT_CONFIG} if it exists, else built-in defaults)",
    )
    parser.add_argument("--check", action="store_true", help="check the configuration file and its policy, and exit")
    parser.add_argument("--version", action="version", version=f"cgpu-agent {__version__}")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the daemon; returns the exit status: 0 stopped by a signal, 1 could not serve, 2 bad configuration."""
    arguments = _arguments(argv)
    path: Path | None = arguments.config
    if path is None and DEFAULT_CONFIG.exists():
        path = DEFAULT_CONFIG
    notifier = Notifier()
    journal.configure("info")
    log = structlog.get_logger()
    try:
        config = configuration.load(path)
        journal.configure(config.log_level)
        if arguments.check:
            load_policy(config)
            load_approvals(config.sealed)
            sys.stdout.write(f"{path or 'built-in defaults'}: good\n")
            return 0
        _close_memory()
        return asyncio.run(_serve(config, path, notifier))
    except Misuse as error:
        log.error("bad configuration", why=error.message)
        notifier.status(f"Failed: {error.message}")
        return EXIT_CONFIG
    except AgentError as error:
        log.error("cannot serve", reason=error.slug, why=error.message)
        notifier.status(f"Failed: {error.message}")
        return EXIT_FAILED
    except Exception as error:  # noqa: BLE001 - its text may hold anything; its name and place are what helps
        frames = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-6:]]
        log.critical("failed", error=type(error).__name__, frames=frames)
        notifier.status(f"Failed: {type(error).__name__}, see the journal")
        return EXIT_FAILED


def _close_memory() -> None:
    """Let this process's memory be nobody's but root's: no core, and no debugger of the same uid.

    ``LimitCORE=0`` alone would not do: a handler that ``core_pattern`` names gets the core whatever that limit is.
    """
    if ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError("the kernel does not let this process be closed to others")


async def _serve(config: configuration.Config, path: Path | None, notifier: Notifier) -> int:
    # grpc and the TSS take a while to load; a bad configuration has been reported by now.
    from cgpu_agent.daemon.app import App  # noqa: PLC0415

    await App(config, path, notifier).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
