"""RFC 9162 Merkle trees (section 2.1, SHA-256): how many statements share one signed root."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from cgpu_agent.errors import HostileInput

MAX_LEAVES = 1 << 16


def leaf_hash(leaf: bytes) -> bytes:
    """MTH of a single entry: SHA-256(00 || leaf)."""
    return hashlib.sha256(b"\0" + leaf).digest()


def _node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def _levels(hashes: Sequence[bytes]) -> list[list[bytes]]:
    """All levels of the tree, leaves first; an odd last node rises unchanged, as RFC 9162's split has it."""
    levels = [list(hashes)]
    while len(levels[-1]) > 1:
        level = levels[-1]
        above = [_node_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        if len(level) % 2:
            above.append(level[-1])
        levels.append(above)
    return levels


class Tree:
    """The tree over 1 to ``MAX_LEAVES`` leaves, given as bytes. Raises ``ValueError`` outside that range."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        if not 1 <= len(leaves) <= MAX_LEAVES:
            raise ValueError(f"a tree has 1 to {MAX_LEAVES} leaves")
        self._levels = _levels([leaf_hash(leaf) for leaf in leaves])

    @property
    def size(self) -> int:
        return len(self._levels[0])

    @property
    def root(self) -> bytes:
        return self._levels[-1][0]

    def path(self, index: int) -> tuple[bytes, ...]:
        """Inclusion path of leaf ``index``, bottom up; empty for a tree of one."""
        found: list[bytes] = []
        for level in self._levels[:-1]:
            sibling = index ^ 1
            if sibling < len(level):
                found.append(level[sibling])
            index >>= 1
        return tuple(found)


def root_from_path(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes:
    """The root that ``leaf`` at ``index`` in a tree of ``size`` leads to (RFC 9162, 2.1.3.2).

    Raises:
        HostileInput: ``BAD_INCLUSION_PATH`` when index, size and length of the path do not fit each other.
    """
    if not 0 <= index < size <= MAX_LEAVES:
        raise HostileInput("BAD_INCLUSION_PATH", f"leaf {index} does not exist in a tree of {size}")
    node, last = leaf_hash(leaf), size - 1
    remaining = list(reversed(path))
    while last:
        if index & 1 or index < last:
            if not remaining:
                raise HostileInput("BAD_INCLUSION_PATH", "the inclusion path is too short for this tree")
            sibling = remaining.pop()
            node = _node_hash(sibling, node) if index & 1 else _node_hash(node, sibling)
        index >>= 1
        last >>= 1
    if remaining:
        raise HostileInput("BAD_INCLUSION_PATH", "the inclusion path is too long for this tree")
    return node
