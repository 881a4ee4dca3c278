"""What ``cgpuctl completion`` takes."""

from __future__ import annotations

from cgpu_agent.cli.arguments.common import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "completion",
        help="print a shell completion script",
        description="Print a completion script, e.g. for bash: cgpuctl completion bash > "
        "/usr/share/bash-completion/completions/cgpuctl",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell")
    parser.set_defaults(module="completion")
