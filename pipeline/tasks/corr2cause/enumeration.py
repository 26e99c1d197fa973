"""Enumerate every class on n nodes at once, in numpy arrays, for `graphs.classes` and the published program.

A DAG on n unlabelled nodes can be written with all arrows from a lower to a higher node: a code with one bit for each
pair, in lexicographic order. Two codes are isomorphic DAGs if swaps of neighbouring nodes without an arrow between them
lead from one to the other, because such swaps connect any two topological orders. They are Markov equivalent if swaps
over a covered arrow are allowed too (Chickering 1995, theorem 2). So both partitions are the connected components of
one table of swaps, and graphs are never compared pairwise.

    >>> [(len(dags(n)), len(equivalence_classes(n))) for n in (2, 3, 4, 5)]
    [(2, 2), (6, 5), (31, 20), (302, 142)]

Measured on one core: all of n = 2…6 with members, independences, labels and text in 1.0 s, the counts of n = 7 in 1.4 s
(`scripts/bench generate`).
"""

from __future__ import annotations

from functools import cache
from itertools import combinations, permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[Any]
Bools = NDArray[np.bool_]


@cache
def pairs_of(n: int) -> tuple[tuple[int, int], ...]:
    """Return the pairs of nodes, in the order of a code's bits."""
    return tuple(combinations(range(n), 2))


def children_of(codes: Ints, n: int) -> Ints:
    """Return (codes, n): the child set of each node as a bitmask, all arrows from lower to higher."""
    out = np.zeros((len(codes), n), dtype=np.uint16)
    for bit, (i, j) in enumerate(pairs_of(n)):
        out[:, i] |= ((codes >> bit & 1) << j).astype(np.uint16)
    return out


@cache
def _swaps(n: int) -> tuple[list[Ints], list[Bools], list[Bools]]:
    """Return for each k: the codes with nodes k and k+1 swapped, whether no arrow is between them, or a covered one."""
    pairs = pairs_of(n)
    bit = {pair: k for k, pair in enumerate(pairs)}
    codes = np.arange(1 << len(pairs), dtype=np.int32)
    swapped, free, covered = [], [], []
    for k in range(n - 1):
        out = np.zeros_like(codes)
        same = np.ones(len(codes), dtype=bool)
        name = {k: k + 1, k + 1: k}
        for i, j in pairs:
            a, b = name.get(i, i), name.get(j, j)
            out |= (codes >> bit[i, j] & 1) << bit[min(a, b), max(a, b)]
        for i in range(k):
            same &= (codes >> bit[i, k] & 1) == (codes >> bit[i, k + 1] & 1)
        arrow = (codes >> bit[k, k + 1] & 1).astype(bool)
        swapped.append(out)
        free.append(~arrow)
        covered.append(arrow & same)
    return swapped, free, covered


def _components(n: int, *, equivalent: bool) -> Ints:
    """Return the least code of each code's component."""
    swapped, free, covered = _swaps(n)
    least = np.arange(len(swapped[0]), dtype=np.int32)
    while True:
        before = least
        least = before.copy()
        for other, no_arrow, may_turn in zip(swapped, free, covered, strict=True):
            allowed = no_arrow | may_turn if equivalent else no_arrow
            np.minimum(least, np.where(allowed, least[other], least), out=least)
        least = least[least]
        if np.array_equal(least, before):
            return least


@cache
def dags(n: int) -> Ints:
    """Return the least code of each DAG on n unlabelled nodes, ascending."""
    least = _components(n, equivalent=False)
    return np.flatnonzero(least == np.arange(len(least)))


@cache
def equivalence_classes(n: int) -> Ints:
    """Return the least code of each Markov equivalence class on n unlabelled nodes, ascending."""
    least = _components(n, equivalent=True)
    return np.flatnonzero(least == np.arange(len(least)))


def members(children: Ints) -> tuple[Ints, Ints]:
    """Return all DAGs of the classes of the given DAGs (rows, n): (members, n), sorted by class, and each one's class.

    Covered arrows are reversed until no new DAG appears (Chickering 1995).
    """
    n = children.shape[1]
    found_keys = _keys(np.arange(len(children)), children)
    keys, dags_ = [found_keys], [children]
    owner, frontier = np.arange(len(children)), children
    while len(frontier):
        parents = transposed(frontier)
        new_owner, new = [], []
        for i in range(n):
            for j in range(n):
                arrow = (frontier[:, i] >> j & 1).astype(bool)
                turn = np.flatnonzero(arrow & (parents[:, j] == (parents[:, i] | (1 << i))))
                dag = frontier[turn].copy()
                dag[:, i] &= np.uint16(0xFFFF ^ (1 << j))
                dag[:, j] |= np.uint16(1 << i)
                new_owner.append(owner[turn])
                new.append(dag)
        owner, frontier = np.concatenate(new_owner), np.concatenate(new)
        key, first = np.unique(_keys(owner, frontier), return_index=True)
        fresh = ~np.isin(key, found_keys)
        owner, frontier = owner[first[fresh]], frontier[first[fresh]]
        found_keys = np.concatenate([found_keys, key[fresh]])
        keys.append(key[fresh])
        dags_.append(frontier)
    order = np.argsort(np.concatenate(keys))
    every = np.concatenate(dags_)[order]
    owners = np.concatenate(keys)[order]
    return every, (owners >> np.uint64(n * (n - 1))).astype(np.int64)


def _keys(owner: Ints, children: Ints) -> Ints:
    """Return a number for each (class, DAG): the class in the high bits, the n·(n-1) cells off the diagonal below."""
    n = children.shape[1]
    key = owner.astype(np.uint64)
    for i in range(n):
        row = children[:, i].astype(np.uint64)
        low, high = row & np.uint64((1 << i) - 1), row >> np.uint64(i + 1)
        key = key << np.uint64(n - 1) | low | high << np.uint64(i)
    return key


def transposed(children: Ints) -> Ints:
    """Return the parent set of each node: (rows, n) bitmasks."""
    n = children.shape[1]
    out = np.zeros_like(children)
    for i in range(n):
        for j in range(n):
            out[:, j] |= (children[:, i] >> j & 1) << i
    return out


def _union(step: Ints, nodes: Ints) -> Ints:
    """Return the union of the step sets of the nodes: `step` (rows, n), `nodes` (rows, …) bitmasks."""
    shape = (len(step),) + (1,) * (nodes.ndim - 1)
    out = np.zeros_like(nodes)
    for v in range(step.shape[1]):
        out |= np.where(nodes >> v & 1, step[:, v].reshape(shape), 0).astype(nodes.dtype)
    return out


def closures(step: Ints) -> Ints:
    """Return all nodes reached from each node, including itself: (rows, n) bitmasks."""
    n = step.shape[1]
    out: Ints = step | (1 << np.arange(n, dtype=step.dtype))
    for k in range(n):
        out |= np.where(out >> k & 1, out[:, k : k + 1], 0).astype(out.dtype)
    return out


def independent(children: Ints) -> Bools:
    """Return (rows, pairs, 2^n): whether the set d-separates the pair, for all pairs and sets at once.

    By reachability along active trails (Koller & Friedman 2009, algorithm 3.1). False if the set has one of the pair.
    """
    rows, n = children.shape
    parents = transposed(children)
    sets = np.arange(1 << n, dtype=np.uint16)
    above = _union(closures(parents), np.broadcast_to(sets, (rows, len(sets))).copy())  # the set and its ancestors
    out = np.zeros((rows, len(pairs_of(n)), len(sets)), dtype=bool)
    for i in range(n - 1):
        up = np.full((rows, len(sets)), 1 << i, dtype=np.uint16)  # nodes entered from a child
        down = np.zeros_like(up)  # nodes entered from a parent
        while True:
            new_up = up | _union(parents, (up & ~sets) | (down & above))
            new_down = down | _union(children, (up | down) & ~sets)
            if np.array_equal(new_up, up) and np.array_equal(new_down, down):
                break
            up, down = new_up, new_down
        for pair, (a, b) in enumerate(pairs_of(n)):
            if a == i:
                apart = ((up | down) >> b & 1) == 0
                out[:, pair] = apart & (sets >> a & 1 == 0) & (sets >> b & 1 == 0)
    return out


def matrix_of(masks: Ints) -> Bools:
    """Convert (rows, n) bitmasks to (rows, n, n) booleans."""
    cells: Bools = (masks[:, :, None] >> np.arange(masks.shape[1], dtype=masks.dtype) & 1).astype(bool)
    return cells


def rows_of(cells: Bools) -> list[list[int]]:
    """Convert (rows, n, n) booleans to rows of bitmasks."""
    masks: list[list[int]] = (cells.astype(np.int64) << np.arange(cells.shape[2])).sum(axis=2).tolist()
    return masks


def relations(children: Ints) -> dict[str, Bools]:
    """Return each relation of `graphs.Semantics.key` by name: (rows, n, n), whether it holds of (i, j) in each DAG."""
    n = children.shape[1]
    parents = transposed(children)
    direct, reach = matrix_of(children), matrix_of(closures(children))
    below, above = closures(children), closures(parents)
    proper = reach & ~np.eye(n, dtype=bool)
    longer = np.zeros_like(direct)  # a path of two arrows or more
    for k in range(n):
        longer |= direct[:, :, k, None] & reach[:, None, k, :] & ~np.eye(n, dtype=bool)[k][None, None, :]
    found = {
        "direct": direct,
        "path": longer,
        "strict": proper & ~direct,
        "collider/paths": _meet(children),
        "confounder/paths": _meet(parents),
    }
    for name, own in (("collider/descendant", below), ("confounder/ancestor", above)):
        pure = own & ~(1 << np.arange(n, dtype=own.dtype))
        found[name] = (pure[:, :, None] & pure[:, None, :]) != 0
    for name, own in (("collider/child", children), ("confounder/parent", parents)):
        found[name] = (own[:, :, None] & own[:, None, :]) != 0
    return found


def _meet(step: Ints) -> Bools:
    """Return (rows, n, n): whether directed paths from i and j lead into one node and share no other node.

    Two tokens move along the paths; a token that the other can no longer reach takes the next step (Fortune, Hopcroft &
    Wyllie 1980). Both must move before they meet, so a token may not enter the start of one that has not moved.
    """
    n = step.shape[1]
    arrow, reach = matrix_of(step), matrix_of(closures(step))
    # walked[a][b]: both tokens have moved; stays[a][b]: b has not
    walked = np.zeros_like(arrow)
    while True:
        before = walked.copy()
        for a in range(n):
            for b in range(n):
                if a != b:
                    onward = arrow[:, a, b].copy()
                    for c in range(n):
                        if c not in (a, b):
                            onward |= arrow[:, a, c] & walked[:, c, b]
                    both = onward & ~reach[:, b, a]
                    walked[:, a, b] |= both
                    walked[:, b, a] |= both
        if np.array_equal(before, walked):
            break
    stays = np.zeros_like(arrow)
    for _ in range(n):
        for a in range(n):
            for b in range(n):
                if a != b:
                    onward = np.zeros(len(step), dtype=bool)
                    for c in range(n):
                        if c not in (a, b):
                            # b takes its first step as soon as the other token can no longer reach it
                            leaves = np.zeros(len(step), dtype=bool)
                            for d in range(n):
                                if d != b:
                                    leaves |= arrow[:, b, d] & (walked[:, d, c] if d != c else True)
                            onward |= arrow[:, a, c] & (stays[:, c, b] | (leaves & ~reach[:, c, b]))
                    stays[:, a, b] |= onward & ~reach[:, b, a]
    return stays | stays.transpose(0, 2, 1)


def all_of(found: Bools, owner: Ints, count: int) -> Bools:
    """Return the AND over the members of each class: (members, …) to (classes, …); `owner` must be ascending."""
    starts = np.searchsorted(owner, np.arange(count))
    return np.logical_and.reduceat(found, starts, axis=0)


def any_of(found: Bools, owner: Ints, count: int) -> Bools:
    """Return the OR over the members of each class: (members, …) to (classes, …); `owner` must be ascending."""
    starts = np.searchsorted(owner, np.arange(count))
    return np.logical_or.reduceat(found, starts, axis=0)


@cache
def renaming_weights(n: int) -> Ints:
    """Return (n!, n·n): the weight of cell (i, j) in the code of each renamed graph; exact floats, because n·n < 53."""
    orders = np.array(list(permutations(range(n))), dtype=np.int64)
    return 2.0 ** (orders[:, :, None] * n + orders[:, None, :]).reshape(len(orders), n * n)


def canonical_codes(arrows: Bools) -> Ints:
    """Return the least code over all renamings of (rows, n, n) adjacencies, bit i·n+j for i → j (as `CPDAG.code`)."""
    n = arrows.shape[1]
    cells = arrows.reshape(len(arrows), n * n).astype(np.float64)
    least = [np.min(renaming_weights(n) @ part.T, axis=0) for part in np.array_split(cells, 1 + len(cells) // 512)]
    return np.concatenate(least).astype(np.int64)
