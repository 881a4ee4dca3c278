"""``cgpuctl completion``: completion scripts made from the parser itself, so that they cannot fall behind it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from cgpu_agent.cli import output
from cgpu_agent.cli.parser import build_parser


def run(arguments: argparse.Namespace) -> int:
    words = dict(_words(build_parser(), ""))
    output.say({"bash": _bash, "zsh": _zsh, "fish": _fish}[arguments.shell](words))
    return output.EXIT_PASS


def _words(parser: argparse.ArgumentParser, path: str) -> Iterator[tuple[str, list[str]]]:
    """For each command path ("", "evidence get"): the sub-commands, choices and options that may follow."""
    found: list[str] = []
    below: list[tuple[str, argparse.ArgumentParser]] = []
    for action in parser._actions:  # noqa: SLF001 - argparse offers no other way to read a parser
        found += [option for option in action.option_strings if option.startswith("--")]
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            found += list(action.choices)
            below += list(action.choices.items())
        elif not action.option_strings and action.choices is not None:
            found += [str(choice) for choice in action.choices]
    yield path, found
    for name, child in below:
        yield from _words(child, f"{path} {name}".strip())


def _bash(words: dict[str, list[str]]) -> str:
    known = "|".join(f'"{path}"' for path in words if path)
    cases = "\n".join(f'    "{path}") words="{" ".join(found)}" ;;' for path, found in words.items())
    return f"""# bash completion for cgpuctl
_cgpuctl() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" path="" next word words=""
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    next="${{path:+$path }}$word"
    case "$next" in {known}) path="$next" ;; *) break ;; esac
  done
  case "$path" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  [[ ${{#COMPREPLY[@]}} -gt 0 ]] || COMPREPLY=($(compgen -f -- "$current"))
}}
complete -o filenames -F _cgpuctl cgpuctl"""


def _zsh(words: dict[str, list[str]]) -> str:
    return f"#compdef cgpuctl\nautoload -U +X bashcompinit && bashcompinit\n{_bash(words)}"


def _fish(words: dict[str, list[str]]) -> str:
    lines = ["# fish completion for cgpuctl"]
    for path, found in words.items():
        names = path.split()
        seen = "; and ".join(f"__fish_seen_subcommand_from {name}" for name in names)
        condition = seen or "__fish_use_subcommand"
        for word in found:
            what = f"-l {word[2:]}" if word.startswith("--") else f"-f -a {word}"
            lines.append(f"complete -c cgpuctl -n '{condition}' {what}")
    return "\n".join(lines)
