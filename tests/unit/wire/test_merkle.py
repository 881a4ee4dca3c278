"""Merkle trees against RFC 9162's own definitions, written down once more here as the RFC has them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest

from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.merkle import MAX_LEAVES, Tree, leaf_hash, root_from_path

SIZES = range(1, 71)


def leaves(count: int) -> list[bytes]:
    return [b"leaf %d" % i for i in range(count)]


def split(count: int) -> int:
    """The largest power of two smaller than ``count``."""
    return 1 << (count - 1).bit_length() - 1


def mth(entries: Sequence[bytes]) -> bytes:
    """RFC 9162, 2.1.1: the Merkle Tree Hash."""
    if len(entries) == 1:
        return hashlib.sha256(b"\0" + entries[0]).digest()
    k = split(len(entries))
    return hashlib.sha256(b"\1" + mth(entries[:k]) + mth(entries[k:])).digest()


def path(index: int, entries: Sequence[bytes]) -> list[bytes]:
    """RFC 9162, 2.1.3.1: the inclusion path."""
    if len(entries) == 1:
        return []
    k = split(len(entries))
    if index < k:
        return [*path(index, entries[:k]), mth(entries[k:])]
    return [*path(index - k, entries[k:]), mth(entries[:k])]


def refused(leaf: bytes, index: int, size: int, nodes: Sequence[bytes]) -> bool:
    with pytest.raises(HostileInput, match="BAD_INCLUSION_PATH"):
        root_from_path(leaf, index, size, nodes)
    return True


def test_known_answers_of_certificate_transparency() -> None:
    """Roots over the entries with which CT's reference implementations are tested."""
    entries = [bytes.fromhex(e) for e in ("", "00", "10", "2021", "3031", "40414243")]
    assert leaf_hash(b"").hex() == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    assert Tree(entries[:2]).root.hex() == "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"
    assert Tree(entries[:3]).root.hex() == "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77"
    assert Tree(entries).root.hex() == "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef"


@pytest.mark.parametrize("size", SIZES)
def test_root_and_every_path_are_those_of_the_rfc(size: int) -> None:
    entries = leaves(size)
    tree = Tree(entries)
    assert tree.size == size
    assert tree.root == mth(entries)
    for index, leaf in enumerate(entries):
        assert list(tree.path(index)) == path(index, entries)
        assert root_from_path(leaf, index, size, tree.path(index)) == tree.root


def test_a_single_leaf_is_its_own_tree() -> None:
    tree = Tree([b"only"])
    assert (tree.root, tree.path(0)) == (leaf_hash(b"only"), ())


@pytest.mark.parametrize("size", [2, 3, 5, 8, 13, 64, 65])
def test_another_index_leads_to_another_root_or_nowhere(size: int) -> None:
    entries = leaves(size)
    tree = Tree(entries)
    for index, leaf in enumerate(entries):
        for other in set(range(size)) - {index}:
            try:
                assert root_from_path(leaf, other, size, tree.path(index)) != tree.root
            except HostileInput as error:
                assert error.slug == "BAD_INCLUSION_PATH"  # noqa: PT017 - some places need a path of another length


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 70])
def test_refuses_a_path_of_another_length(size: int) -> None:
    entries = leaves(size)
    tree = Tree(entries)
    for index, leaf in enumerate(entries):
        nodes = tree.path(index)
        assert refused(leaf, index, size, (*nodes, bytes(32)))
        if nodes:
            assert refused(leaf, index, size, nodes[:-1])


@pytest.mark.parametrize(("index", "size"), [(-1, 1), (1, 1), (5, 5), (0, 0), (0, -1), (0, MAX_LEAVES + 1)])
def test_refuses_a_place_that_does_not_exist(index: int, size: int) -> None:
    assert refused(b"leaf", index, size, ())


def test_every_altered_node_leads_elsewhere() -> None:
    tree = Tree(leaves(13))
    nodes = tree.path(6)
    for at, node in enumerate(nodes):
        altered = (*nodes[:at], bytes([node[0] ^ 1]) + node[1:], *nodes[at + 1 :])
        assert root_from_path(b"leaf 6", 6, 13, altered) != tree.root


def test_an_inner_node_is_no_leaf() -> None:
    """Without the prefixes, the two hashes below the root would pass for a statement."""
    tree = Tree(leaves(4))
    inner = leaf_hash(b"leaf 0") + leaf_hash(b"leaf 1")
    assert root_from_path(inner, 0, 2, tree.path(0)[1:]) != tree.root


@pytest.mark.parametrize("size", [0, MAX_LEAVES + 1])
def test_a_tree_has_a_bounded_number_of_leaves(size: int) -> None:
    with pytest.raises(ValueError, match="1 to"):
        Tree([b""] * size)


def test_the_largest_tree_is_proven_in_sixteen_steps() -> None:
    tree = Tree([b""] * MAX_LEAVES)
    assert len(tree.path(MAX_LEAVES - 1)) == 16
    assert root_from_path(b"", MAX_LEAVES - 1, MAX_LEAVES, tree.path(MAX_LEAVES - 1)) == tree.root
