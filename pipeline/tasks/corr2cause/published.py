"""Reproduce the published data set, including the errors of its program: `task.params.mode: paper`.

Published figures can only be compared with figures on the same rows. The original program (Jin et al. 2024) has three
defects, and this module reproduces exactly these:

    D1  it looks up a relation of a renamed graph by the renaming instead of its inverse: wrong labels from n = 4
    D2  its search for descendants skips a child if the *next* node has been visited: open colliders appear closed, so
        at n = 6 some premises are wrong and some classes are split
    D3  a path counts for a confounder only if the confounder is a direct parent of the second variable

Letters follow the node numbers, which are a topological order of one member. Rows name the earlier letter first.

    >>> [len(published_classes(n)) for n in (2, 3, 4, 5)]
    [2, 5, 20, 142]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, permutations

import numpy as np

from pipeline.tasks.corr2cause import enumeration
from pipeline.tasks.corr2cause.enumeration import Bools, Ints
from pipeline.tasks.corr2cause.graphs import Dag, Independence, bits, classes_of, independences_of
from pipeline.tasks.corr2cause.parse_premise import class_of


@dataclass(frozen=True)
class PublishedClass:
    """A class of the published set, with the published premise and labels."""

    n: int
    id: str  # the canonical identity of its graph's class; at n = 6 six identities have two published classes
    dag: Dag  # the graph whose topological order the letters follow
    independences: tuple[Independence, ...]
    labels: dict[str, tuple[int, ...]]  # by relation: the pairs labelled Yes, as rows of bits
    size: int  # the number of graphs that the program found in it

    def entails(self, relation: str, i: int, j: int) -> bool:
        return bool(self.labels[relation][i] >> j & 1)


@cache
def published_classes(n: int) -> tuple[PublishedClass, ...]:
    """Return the classes of n variables in the order of the original program: 2, 5, 20, 142, 2207 for n = 2…6."""
    children = enumeration.children_of(enumeration.dags(n), n)
    apart = _independent(children)
    relations = _relations(children)
    candidates: dict[bytes, list[int]] = {}
    signatures = [_signature(rows) for rows in apart]
    for k, signature in enumerate(signatures):
        candidates.setdefault(signature, []).append(k)
    pair_maps, set_maps, orders = _renamings(n)
    counts = apart.sum(axis=2)
    first = {k: _first_renamings(children[k], orders) for k in range(len(children))}
    listed = independences_of(n, apart)
    seen: set[int] = set()
    found: list[PublishedClass] = []
    for k in range(len(children)):
        if k in seen:
            continue
        members = []  # (graph, renaming)
        for other in candidates[signatures[k]]:
            maps = first[other]
            maps = maps[(counts[k][pair_maps[maps]] == counts[other]).all(axis=1)]
            members += [
                (other, r) for r in maps if np.array_equal(apart[k][pair_maps[r]][:, set_maps[r]], apart[other])
            ]
        if any(other in seen for other, _ in members):
            continue
        seen.update(other for other, _ in members)
        labels = {}
        for relation, cells in relations.items():
            # D1: cell (i, j) of a member is read at (order[i], order[j])
            shared = np.logical_and.reduce([cells[other][np.ix_(orders[r], orders[r])] for other, r in members])
            labels[relation] = tuple(int(row) for row in enumeration.rows_of(shared[None])[0])
        dag = tuple(int(mask) for mask in children[k])
        found.append(PublishedClass(n, "", dag, listed[k], labels, len(members)))
    codes = _identities(np.array([mec.dag for mec in found], dtype=np.uint16))
    return tuple(replace(mec, id=f"{n}-{code:x}") for mec, code in zip(found, codes, strict=True))


def _identities(children: Ints) -> list[int]:
    """Return the canonical code of each graph's class."""
    members, owner = enumeration.members(children)
    some = enumeration.any_of(enumeration.matrix_of(members), owner, len(children))
    codes: list[int] = enumeration.canonical_codes(some).tolist()
    return codes


@cache
def published_index(n: int) -> dict[tuple[Independence, ...], PublishedClass]:
    """Return the classes by premise, in the published letters."""
    return {mec.independences: mec for mec in published_classes(n)}


def wrong_labels(n: int) -> dict[str, int]:
    """Count the errors in the published rows of n variables, i < j, by the exact solver.

    `false no` and `false yes` count rows of correct classes. `premises` counts classes with a premise that is not their
    graph's, `unfaithful` those among them to which no DAG is faithful, `duplicates` classes that occur a second time
    (D2 splits one class in two): the labels of all these are meaningless.
    """
    found = {"false no": 0, "false yes": 0, "premises": 0, "unfaithful": 0, "duplicates": 0}
    seen: set[str] = set()
    published = published_classes(n)
    exact = classes_of(np.array([mec.dag for mec in published], dtype=np.uint16))
    for mec, true in zip(published, exact, strict=True):
        if mec.independences != true.independences:
            found["premises"] += 1
            found["unfaithful"] += class_of(n, mec.independences) is None
        elif true.id in seen:
            found["duplicates"] += 1
        else:
            for relation in mec.labels:
                for i, j in combinations(range(n), 2):
                    label, holds = mec.entails(relation, i, j), true.entails(relation, i, j)
                    found["false no"] += holds and not label
                    found["false yes"] += label and not holds
        seen.add(true.id)
    return found


def _descendants(dag: Dag) -> list[int]:
    """Return each node and its descendants, with D2."""

    def visit(node: int, found: int) -> int:
        found |= 1 << node
        for child in bits(dag[node]):
            if not found >> (child + 1) & 1:  # D2: the bit of the next node
                found = visit(child, found)
        return found

    return [visit(node, 0) for node in range(len(dag))]


def _independent(children: Ints) -> Bools:
    """Return the result of `enumeration.independent` with D2: path by path for graphs where D2 misses a descendant."""
    out = enumeration.independent(children)
    right = enumeration.closures(children)
    for k, row in enumerate(children.tolist()):
        below = _descendants(tuple(row))
        if below != right[k].tolist():
            out[k] = _by_paths(tuple(row), below)
    return out


def _by_paths(dag: Dag, below: list[int]) -> Bools:
    """Return (pairs, 2^n): whether the set blocks every path between the pair; a node of `below` opens its collider."""
    n = len(dag)
    sets = np.arange(1 << n)
    out = np.zeros((n * (n - 1) // 2, 1 << n), dtype=bool)

    def walk(node: int, end: int, visited: int, colliders: int, entered: bool) -> None:
        if node == end:
            open_ = (sets & (visited & ~colliders)) == 0
            for collider in bits(colliders):
                open_ &= (sets & below[collider]) != 0
            blocked[open_] = False
            return
        for k in range(n):
            if not visited >> k & 1:
                if dag[node] >> k & 1:
                    walk(k, end, visited | 1 << k, colliders, True)
                elif dag[k] >> node & 1:
                    walk(k, end, visited | 1 << k, colliders | (entered << node), False)

    for pair, (i, j) in enumerate(combinations(range(n), 2)):
        blocked = (sets >> i & 1 == 0) & (sets >> j & 1 == 0)
        walk(i, j, 1 << i, 0, False)
        out[pair] = blocked
    return out


def _relations(children: Ints) -> dict[str, Bools]:
    """Return each relation of each pair in each graph, with D3."""
    n = children.shape[1]
    right = enumeration.relations(children)
    confounder = np.zeros_like(right["direct"])
    for j in range(n):
        without = (children & np.uint16(0xFFFF ^ (1 << j))) * (np.arange(n) != j)
        reach = enumeration.matrix_of(enumeration.closures(without.astype(np.uint16))) & ~np.eye(n, dtype=bool)
        for k in range(n):
            # D3: the confounder k is a direct parent of j, and has a path to i that avoids j
            confounder[:, :, j] |= right["direct"][:, k, j, None] & reach[:, k, :]
    turned = {name: right[name].transpose(0, 2, 1) for name in ("direct", "path")}
    return {
        "parent": right["direct"],
        "child": turned["direct"],
        "ancestor": right["path"],
        "descendant": turned["path"],
        "collider": right["collider/paths"],
        "confounder": confounder,
    }


def _signature(apart: Bools) -> bytes:
    """Return a value that is equal for premises that differ by a renaming, and for few others."""
    return bytes(np.sort(apart.sum(axis=1)).astype(np.uint8)) + bytes(np.sort(apart.sum(axis=0)).astype(np.uint8))


@cache
def _renamings(n: int) -> tuple[Ints, Ints, Ints]:
    """Return, for every renaming in lexicographic order: the image of each pair, of each set, and the renaming."""
    orders = np.array(list(permutations(range(n))))
    place = np.zeros((n, n), dtype=np.int64)
    for k, (i, j) in enumerate(combinations(range(n), 2)):
        place[i, j] = place[j, i] = k
    low, high = np.array(list(combinations(range(n), 2))).T
    sets = np.arange(1 << n)
    set_maps = sum(((sets >> v & 1)[None, :] << orders[:, v, None] for v in range(n)), np.zeros((1, 1), dtype=np.int64))
    return place[orders[:, low], orders[:, high]], set_maps, orders


def _first_renamings(dag: Ints, orders: Ints) -> Ints:
    """Return the first renaming that yields each labelled graph."""
    n = len(dag)
    code = np.zeros(len(orders), dtype=np.int64)
    for i in range(n):
        for j in bits(int(dag[i])):
            code |= np.int64(1) << (orders[:, i] * n + orders[:, j])
    return np.sort(np.unique(code, return_index=True)[1])
