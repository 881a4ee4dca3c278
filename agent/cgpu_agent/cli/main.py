"""The ``cgpuctl`` command: an operator's view of the agent, and the offline verifier."""

from __future__ import annotations

import importlib
import os
import sys

from cgpu_agent.cli import output
from cgpu_agent.cli.parser import build_parser
from cgpu_agent.errors import AgentError, Misuse

_EXTRAS = {
    "cedarpy": "cgpu-agent[verifier]",
    "cryptography": "cgpu-agent[verifier]",
    "google": "cgpu-agent",
    "grpc": "cgpu-agent",
    "joserfc": "cgpu-agent[verifier]",
    "lxml": "cgpu-agent[gpu]",
    "signxml": "cgpu-agent[gpu]",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0 pass, 1 refused, 2 usage."""
    arguments = build_parser().parse_args(argv)
    output.use_escapes()
    try:
        command = importlib.import_module(f"cgpu_agent.cli.{arguments.module}")
        code: int = command.run(arguments)
        sys.stdout.flush()
    except Misuse as error:
        output.complain(error)
        return output.EXIT_USAGE
    except AgentError as error:
        output.complain(error)
        return output.EXIT_REFUSED
    except ModuleNotFoundError as error:
        needed = _EXTRAS.get((error.name or "").split(".", maxsplit=1)[0])
        if needed is None:
            raise
        print(f"cgpuctl: this command needs more: pip install '{needed}'", file=sys.stderr)
        return output.EXIT_USAGE
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return output.EXIT_PASS
    except KeyboardInterrupt:
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
