"""``cgpuctl key``: the keys that the caller may have, and one of them."""

from __future__ import annotations

import argparse
import sys

from cgpu_agent.cli import output
from cgpu_agent.cli.files import write_whole
from cgpu_agent.client import Agent
from cgpu_agent.errors import Misuse


def run(arguments: argparse.Namespace) -> int:
    return _list(arguments) if arguments.verb == "list" else _get(arguments)


def _list(arguments: argparse.Namespace) -> int:
    with Agent(arguments.socket) as agent:
        keys = agent.list_keys()
    if arguments.json:
        told = [
            {
                "broker": k.broker,
                "key": k.key,
                "loads": list(k.loads),
                "opens": k.opens,
                "plain": k.plain,
                "wrapped": k.wrapped,
            }
            for k in keys
        ]
        output.emit_json(told)
        return output.EXIT_PASS
    for key in keys:
        words = (("wrapped", key.wrapped), ("in plain", key.plain), ("opens objects", key.opens))
        ways = [word for word, may in words if may]
        ways += [f"loads objects into {gpu}" for gpu in key.loads]
        output.say(f"{key.key}  ({key.broker}; {', '.join(ways)})")
    if not keys:
        output.say("no key that you may have now")
    return output.EXIT_PASS


def _get(arguments: argparse.Namespace) -> int:
    if arguments.output is None and sys.stdout.isatty():
        raise Misuse("NO_OUTPUT", "a key is not for a terminal: give -o FILE, or redirect")
    with Agent(arguments.socket) as agent:
        key = agent.get_key(arguments.key, plain=arguments.plain)
    if arguments.output is None:
        sys.stdout.buffer.write(key.secret)
        return output.EXIT_PASS
    write_whole(arguments.output, key.secret, secret=True)
    output.say(f"{arguments.output}: {len(key.secret)} bytes of {key.key}, generation {key.generation}")
    return output.EXIT_PASS
