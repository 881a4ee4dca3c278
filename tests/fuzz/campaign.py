"""The mutation campaign: many altered bundles, of which none may be accepted with a meaning of its own.

``make campaign``. Deterministic for a seed and a set of keys: the number of an accepted mutant is printed.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from typing import Any

from cgpu_agent.verifier.evidence import verify_evidence
from cgpu_agent.wire.bundle import parse_bundle
from fixtures.lanes import FULL_PARTY
from fuzz.test_bundle_fuzz import GENUINE, MEANINGS, OTHER, SAME_BATCH, meaning

_CHUNK = 2000
_FILES = tuple(bundle.encode() for bundle in (GENUINE, SAME_BATCH, OTHER))
_DOCUMENTS = tuple(json.loads(data) for data in _FILES)
Document = dict[str, Any]


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [leaf for key, child in value.items() for leaf in _leaves(child, (*path, key))]
    if isinstance(value, list):
        return [leaf for index, child in enumerate(value) for leaf in _leaves(child, (*path, index))]
    return [path]


def _holder(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        document = document[key]
    return document


def _bit(rng: random.Random, data: bytes) -> bytes:
    if not data:
        return b"\0"
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_in_file(rng: random.Random) -> bytes:
    """A bit of the file itself."""
    return _bit(rng, _FILES[0])


def truncate(rng: random.Random) -> bytes:
    """A beginning of the file, or the file with a piece cut out of it."""
    data = _FILES[0]
    start = rng.randrange(len(data))
    return data[:start] + (b"" if rng.random() < 0.5 else data[start + rng.randrange(1, 64) :])


def flip_in_part(rng: random.Random) -> bytes:
    """A bit inside a part, under its encoding: what a signature or a digest must notice."""
    document = deepcopy(_DOCUMENTS[0])
    texts = [path for path in _leaves(document) if isinstance(_holder(document, path)[path[-1]], str)]
    path = rng.choice(texts)
    holder, value = _holder(document, path), _holder(document, path)[path[-1]]
    if path[0] in ("pcrs", "inclusion_path"):
        holder[path[-1]] = _bit(rng, bytes.fromhex(value)).hex()
    elif path[0] == "format":
        holder[path[-1]] = value[:-1] + rng.choice("123456789 ")
    else:
        holder[path[-1]] = base64.b64encode(_bit(rng, base64.b64decode(value))).decode()
    return json.dumps(document).encode()


def swap_parts(rng: random.Random) -> bytes:
    """Parts of one genuine bundle in another, of the same batch or of another VM."""
    document, donor = deepcopy(_DOCUMENTS[0]), rng.choice(_DOCUMENTS[1:])
    for _ in range(rng.choice((1, 1, 2, 3))):
        path = rng.choice(_leaves(donor))
        path = path[: rng.randrange(1, len(path) + 1)]
        try:
            _holder(document, path)[path[-1]] = deepcopy(_holder(donor, path)[path[-1]])
        except (KeyError, IndexError, TypeError):
            continue
    return json.dumps(document).encode()


def edit_signed_json(rng: random.Random) -> bytes:
    """A value of the statement, the manifest or a log record changed as a forger would, its bytes well-formed."""
    document = deepcopy(_DOCUMENTS[0])
    name = rng.choice(("statement", "manifest"))
    inner = json.loads(base64.b64decode(document[name]))
    path = rng.choice(_leaves(inner))
    holder = _holder(inner, path)
    value = holder[path[-1]]
    if isinstance(value, int):
        holder[path[-1]] = rng.choice((value + 1, max(0, value - 1), 0, rng.randrange(1 << 20)))
    elif isinstance(value, str):
        holder[path[-1]] = rng.choice((value[::-1], value + "0", value.swapcase(), "", "root"))
    else:
        holder[path[-1]] = rng.choice((0, "", "x", None, []))
    document[name] = base64.b64encode(json.dumps(inner, sort_keys=True, separators=(",", ":")).encode()).decode()
    return json.dumps(document).encode()


def edit_tree(rng: random.Random) -> bytes:
    """Another place in the tree, another path, or a path of another length."""
    document = deepcopy(_DOCUMENTS[0])
    path = document["inclusion_path"]
    how = rng.randrange(5)
    if how == 0:
        document["leaf_index"] = rng.randrange(1 << 17)
    elif how == 1:
        path.insert(rng.randrange(len(path) + 1), rng.randbytes(32).hex())
    elif how == 2 and path:
        path.pop(rng.randrange(len(path)))
    elif how == 3:
        rng.shuffle(path)
        document["leaf_index"] ^= 1
    else:
        document["inclusion_path"] = [rng.randbytes(32).hex() for _ in range(rng.randrange(18))]
    return json.dumps(document).encode()


def keys(rng: random.Random) -> bytes:
    """A key twice, a key that does not belong, or one missing."""
    document = deepcopy(_DOCUMENTS[0])
    objects: list[Document] = [document, document["quote"], document["logs"], document["agent_ak"], document["pcrs"]]
    chosen = rng.choice(objects)
    key = rng.choice(list(chosen))
    how = rng.randrange(3)
    if how == 0:
        del chosen[key]
    elif how == 1:
        chosen[rng.choice(("simulated", "version", key + "_", key.upper(), ""))] = rng.choice((True, None, 0, "x"))
    else:
        text = json.dumps(document)
        needle = json.dumps(key) + ": "
        at = text.index(needle)
        return (text[:at] + needle + rng.choice(('""', "null", "0", "{}")) + ", " + text[at:]).encode()
    return json.dumps(document).encode()


def replay(rng: random.Random) -> bytes:
    """A genuine bundle of somebody else, or for another nonce, in whole or with the wanted nonce written over it."""
    document = deepcopy(rng.choice(_DOCUMENTS))
    statement = json.loads(base64.b64decode(document["statement"]))
    statement["nonce"] = rng.choice((FULL_PARTY.nonce.hex(), rng.randbytes(16).hex()))
    statement["salt"] = rng.randbytes(16).hex()
    encoded = json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()
    document["statement"] = base64.b64encode(encoded).decode()
    return json.dumps(document).encode()


MUTATORS: tuple[Callable[[random.Random], bytes], ...] = (
    flip_in_file,
    truncate,
    flip_in_part,
    swap_parts,
    edit_signed_json,
    edit_tree,
    keys,
    replay,
)


def mutant(number: int, seed: int) -> tuple[str, bytes]:
    """Mutant ``number`` of a campaign: its mutator's name and its bytes."""
    rng = random.Random(f"{seed}/{number}")
    make = MUTATORS[number % len(MUTATORS)]
    return make.__name__, make(rng)


def judge(start: int, count: int, seed: int) -> tuple[Counter[str], list[int]]:
    """Outcomes by mutator and reason, and the numbers of mutants that were accepted with another meaning."""
    outcomes: Counter[str] = Counter()
    wrong: list[int] = []
    for number in range(start, start + count):
        name, data = mutant(number, seed)
        result = verify_evidence(data, FULL_PARTY)
        if result.accepted:
            same = meaning(parse_bundle(data)) in MEANINGS
            outcomes[f"{name}: the same bundle, written otherwise" if same else f"{name}: ACCEPTED"] += 1
            if not same:
                wrong.append(number)
        elif result.refusal is None or result.refusal.slug in (None, "INTERNAL"):
            outcomes[f"{name}: refused without a reason"] += 1
            wrong.append(number)
        else:
            outcomes[f"{name}: {result.refusal.slug}"] += 1
    return outcomes, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Judge mutants of evidence bundles.")
    parser.add_argument("--mutants", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    begun, total, wrong, outcomes = time.monotonic(), arguments.mutants, list[int](), Counter[str]()
    starts = range(0, total, _CHUNK)
    # Forked: the genuine bundles are signed with keys made at import, and every worker must know the same ones.
    from multiprocessing import get_context

    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        jobs = [pool.submit(judge, start, min(_CHUNK, total - start), arguments.seed) for start in starts]
        for done, job in enumerate(jobs, 1):
            found, bad = job.result()
            outcomes += found
            wrong += bad
            if done % 10 == 0 or done == len(jobs):
                print(f"{min(done * _CHUNK, total)} mutants, {len(wrong)} accepted, {time.monotonic() - begun:.0f} s")
    for reason, count in sorted(outcomes.items()):
        print(f"  {count:>7}  {reason}")
    print(f"{total} mutants: {len(wrong)} accepted with another meaning {wrong[:20] or ''}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
