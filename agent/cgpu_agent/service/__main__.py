"""The ``cgpu-verifier`` command."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path

import uvicorn

from cgpu_agent import __version__
from cgpu_agent.errors import AgentError
from cgpu_agent.service import config as configuration
from cgpu_agent.service import keygen, log, material
from cgpu_agent.service.app import Service
from cgpu_agent.service.protocol import bounded_protocol

DEFAULT_CONFIG = Path("/etc/cgpu-verifier/config.toml")
STOP_SECONDS = 10

EXIT_FAILED = 1
EXIT_CONFIG = 2  # the unit does not restart on this: the same files would fail again


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="cgpu-verifier", description="Verify evidence of confidential GPU VMs over HTTP. See cgpu-verifier(8)."
    )
    parser.add_argument("--version", action="version", version=f"cgpu-verifier {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, what in (("serve", "serve until SIGTERM"), ("check", "read all files that serve would, and exit")):
        command = commands.add_parser(name, help=what, description=f"{what.capitalize()}.")
        command.add_argument(
            "-c",
            "--config",
            type=Path,
            default=DEFAULT_CONFIG,
            metavar="FILE",
            help=f"configuration file (default: {DEFAULT_CONFIG})",
        )
    make = commands.add_parser(
        "keygen", help="make a key", description="Make a key file, mode 0600; an existing file is left alone."
    )
    make.add_argument("kind", choices=("signing", "replica", "ca"), help="what the key is for")
    make.add_argument("file", type=Path, metavar="FILE", help="the key file to make")
    make.add_argument("--certificate", type=Path, metavar="FILE", help="the CA's certificate file to make (for ca)")
    make.add_argument(
        "--name", default="cgpu enrolment CA", metavar="TEXT", help="subject of the CA (default: cgpu enrolment CA)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done or stopped, 1 could not serve, 2 bad usage or files."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    log.configure("info")
    if arguments.command == "keygen" and (arguments.kind == "ca") != (arguments.certificate is not None):
        parser.error("--certificate is for keygen ca, which needs it")
    try:
        if arguments.command == "keygen":
            _keygen(arguments)
            return 0
        config = configuration.load(arguments.config)
        log.configure(config.log_level)
        held = material.load(config)
    except AgentError as error:
        log.event("bad configuration", logging.ERROR, reason=error.slug, why=error.message)
        return EXIT_CONFIG
    if arguments.command == "check":
        sys.stdout.write(f"{arguments.config}: good\n")
        return 0
    return _serve(held)


def _keygen(arguments: argparse.Namespace) -> None:
    if arguments.kind == "ca":
        keygen.enrolment_ca(arguments.file, arguments.certificate, arguments.name)
    elif arguments.kind == "signing":
        keygen.signing_key(arguments.file)
    else:
        keygen.replica_key(arguments.file)


def _serve(held: material.Material) -> int:
    config = held.config
    limits = config.limits
    host, port = ("", 0) if config.unix_socket else config.address
    server = uvicorn.Server(
        uvicorn.Config(
            Service(held).application(),
            host=host,
            port=port,
            uds=config.unix_socket,
            http=bounded_protocol(limits.connections, limits.header_seconds),  # type: ignore[arg-type] # called, only
            loop="asyncio",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=limits.header_seconds,
            timeout_graceful_shutdown=STOP_SECONDS,
        )
    )
    # uvicorn stops in order on these, and then raises them once more for whoever was there before it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    log.event("starting", listen=config.listen, audience=config.audience, version=__version__)
    try:
        server.run()
    except SystemExit:  # uvicorn's word for: the address cannot be bound; it has said why
        return EXIT_FAILED
    except OSError as error:
        log.event("cannot listen", logging.ERROR, why=error.strerror)
        return EXIT_FAILED
    log.event("stopped")
    return 0 if server.started else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
