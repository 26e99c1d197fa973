"""Graphs, Markov equivalence classes and causal relations: the exact solver behind Corr2Cause.

A node is an int 0…n-1, a set of nodes is a bitmask, a DAG is the tuple of its nodes' child sets. Up to n = 6,
`classes(n)` lists one representative of every Markov equivalence class on n unlabelled nodes, each with its members,
compelled edges and independences. Up to n = 10, `sampled(n, …)` draws classes of random graphs. This module does not
handle text. It has the plain algorithms for one graph; `enumeration` has those for many graphs at once (arrays), and
the tests compare the two.

    >>> [len(classes(n)) for n in (2, 3, 4)]
    [2, 5, 20]

Sources: Verma & Pearl 1990 (a class is its skeleton and v-structures), Meek 1995 (orientation rules),
Lauritzen et al. 1990 (d-separation in the moral graph of the ancestors), Dor & Tarsi 1992 (a DAG of a pattern),
Chickering 1995 (covered arrows), Jin et al. 2024 (the relations).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import combinations
from typing import Any, Literal

Dag = tuple[int, ...]  # dag[i] is the bitmask of the children of node i
Edge = tuple[int, int]
Independence = tuple[int, int, tuple[int, ...]]  # i, j (i < j) and the nodes given

ENUMERATED_N = 6  # every class is listed up to here, and counted up to 7
MAX_N = 10
RELATIONS = ("parent", "child", "ancestor", "descendant", "collider", "confounder")


@dataclass(frozen=True)
class Semantics:
    """The meaning of the relations. The defaults are the published semantics; the others are options of the task.

    indirect: `path`, a directed path of two arrows or more, with or without a direct arrow (published);
    `strict`, a directed path and no direct arrow.
    collider: `paths`, directed paths from both into one node that share no other node (published); `descendant`, a
    common descendant; `child`, a common child. confounder: the same for the graph with its arrows reversed.
    """

    indirect: Literal["path", "strict"] = "path"
    collider: Literal["paths", "descendant", "child"] = "paths"
    confounder: Literal["paths", "ancestor", "parent"] = "paths"

    def key(self, relation: str, i: int, j: int) -> tuple[str, int, int]:
        """Return the table of `enumeration.relations` for this relation, and the cell (i, j) in it."""
        if relation in ("child", "descendant"):
            i, j = j, i
        if relation in ("parent", "child"):
            return "direct", i, j
        if relation in ("ancestor", "descendant"):
            return self.indirect, i, j
        if relation in ("collider", "confounder"):
            return f"{relation}/{getattr(self, relation)}", i, j
        raise ValueError(f"unknown relation {relation!r}; known: {', '.join(RELATIONS)}")


PUBLISHED = Semantics()
PLUSPLUS = Semantics("strict", "child", "parent")  # of Corr2Cause++


def bits(mask: int) -> list[int]:
    """Return the nodes of a set, ascending."""
    return [i for i in range(mask.bit_length()) if mask >> i & 1]


def transpose(dag: Dag) -> Dag:
    """Return the graph with every arrow reversed: child sets become parent sets."""
    out = [0] * len(dag)
    for i, children in enumerate(dag):
        for j in bits(children):
            out[j] |= 1 << i
    return tuple(out)


def reachable(step: Dag, start: int) -> int:
    """Return all nodes reached from the set `start` along `step`, including `start`."""
    seen = frontier = start
    while frontier:
        ahead = 0
        for i in bits(frontier):
            ahead |= step[i]
        frontier = ahead & ~seen
        seen |= frontier
    return seen


def is_acyclic(dag: Dag) -> bool:
    """Return whether no node reaches itself."""
    return not any(reachable(dag, dag[i]) >> i & 1 for i in range(len(dag)))


def dag_of(n: int, edges: list[Edge] | tuple[Edge, ...]) -> Dag:
    """Return the DAG on n nodes with these arrows (tail, head)."""
    out = [0] * n
    for tail, head in edges:
        out[tail] |= 1 << head
    return tuple(out)


def d_separated(dag: Dag, i: int, j: int, given: int) -> bool:
    """Return whether the set `given` d-separates i and j: no path in the moral graph of their ancestors."""
    parents = transpose(dag)
    kept = reachable(parents, 1 << i | 1 << j | given)
    moral = [0] * len(dag)
    for child in bits(kept):
        family = parents[child] | 1 << child
        for member in bits(family):
            moral[member] |= family & ~(1 << member)
    open_ = tuple(neighbours & kept & ~given for neighbours in moral)
    return not reachable(open_, 1 << i) >> j & 1


def holds(dag: Dag, relation: str, i: int, j: int, semantics: Semantics = PUBLISHED) -> bool:
    """Return whether `relation` holds of the ordered pair (i, j) in one graph."""
    key, i, j = semantics.key(relation, i, j)
    if key == "direct":
        return bool(dag[i] >> j & 1)
    if key == "path":
        return any(reachable(dag, 1 << k) >> j & 1 for k in bits(dag[i] & ~(1 << j)))
    if key == "strict":
        return not dag[i] >> j & 1 and bool(reachable(dag, 1 << i) >> j & 1)
    return bool(common_effects(dag if relation == "collider" else transpose(dag), i, j, key.partition("/")[2]))


def _paths(dag: Dag, start: int, end: int, avoid: int) -> Iterator[int]:
    """Yield the node sets, without `end`, of the directed paths start → … → end that avoid a set."""
    here = 1 << start
    for nxt in bits(dag[start] & ~avoid & ~here):
        if nxt == end:
            yield here
        else:
            for rest in _paths(dag, nxt, end, avoid | here):
                yield here | rest


def common_effects(dag: Dag, i: int, j: int, kind: str = "paths") -> list[int]:
    """Return the common effects of i and j: ends of disjoint `paths`, common descendants, or common children."""
    others = [k for k in range(len(dag)) if k not in (i, j)]
    if kind in ("child", "parent"):
        return bits(dag[i] & dag[j])
    if kind in ("descendant", "ancestor"):
        both = reachable(dag, 1 << i) & reachable(dag, 1 << j)
        return [k for k in others if both >> k & 1]
    return [
        k for k in others if any(next(_paths(dag, j, k, used), None) is not None for used in _paths(dag, i, k, 1 << j))
    ]


@dataclass(frozen=True)
class CPDAG:
    """A partially directed graph: `arrows` are the compelled edges, `lines` the undirected ones (i < j)."""

    n: int
    arrows: frozenset[Edge]
    lines: frozenset[Edge]

    def adjacent(self, i: int, j: int) -> bool:
        return bool({(i, j), (j, i)} & self.arrows) or (min(i, j), max(i, j)) in self.lines

    def renamed(self, new: tuple[int, ...]) -> CPDAG:
        """Return the graph with node i renamed to new[i]."""
        return CPDAG(
            self.n,
            frozenset((new[i], new[j]) for i, j in self.arrows),
            frozenset((min(new[i], new[j]), max(new[i], new[j])) for i, j in self.lines),
        )

    @property
    def v_structures(self) -> frozenset[tuple[int, int, int]]:
        """The (a, c, b), a < b, with a → c ← b and a, b not adjacent."""
        return frozenset(
            (a, c, b)
            for a, c in self.arrows
            for b in range(a + 1, self.n)
            if (b, c) in self.arrows and not self.adjacent(a, b)
        )

    @property
    def code(self) -> int:
        """The graph as one number: bit i·n+j is set for i → j, both bits for i — j."""
        code = 0
        for i, j in self.arrows:
            code |= 1 << (i * self.n + j)
        for i, j in self.lines:
            code |= 1 << (i * self.n + j) | 1 << (j * self.n + i)
        return code

    @property
    def matrix(self) -> list[list[bool]]:
        """matrix[i][j]: an arrow from i to j, or a line between them."""
        return [[bool(self.code >> (i * self.n + j) & 1) for j in range(self.n)] for i in range(self.n)]

    def canonical_code(self) -> int:
        """Return a number that is equal exactly for isomorphic graphs.

        Up to n = 7 it is the least `code` over all renamings; beyond, over those that colour refinement leaves.
        """
        if self.n <= 7:
            import numpy as np

            from pipeline.tasks.corr2cause.enumeration import canonical_codes

            return int(canonical_codes(np.array([self.matrix]))[0])
        return min(self.renamed(order).code for order in _refined_orders(self))


def _refined_orders(graph: CPDAG) -> Iterator[tuple[int, ...]]:
    """Yield enough renamings for a canonical form: nodes are ordered by their neighbours' colours, ties by trying each.

    Of nodes with the same neighbours (twins) only one is tried, because swapping them changes nothing.
    """
    n, matrix = graph.n, graph.matrix

    def refined(colours: list[int]) -> list[int]:
        while True:
            seen = [
                (colours[v], sorted((matrix[v][w], matrix[w][v], colours[w]) for w in range(n) if w != v))
                for v in range(n)
            ]
            ranks = sorted(range(n), key=lambda v: seen[v])
            fresh, colour = [0] * n, 0
            for place, v in enumerate(ranks):
                if place and seen[v] != seen[ranks[place - 1]]:
                    colour = place
                fresh[v] = colour
            if fresh == colours:
                return colours
            colours = fresh

    def twins(v: int, w: int) -> bool:
        rest = [k for k in range(n) if k not in (v, w)]
        same = all(matrix[v][k] == matrix[w][k] and matrix[k][v] == matrix[k][w] for k in rest)
        return same and matrix[v][w] == matrix[w][v]

    def search(colours: list[int]) -> Iterator[tuple[int, ...]]:
        colours = refined(colours)
        cell = next((c for c in range(n) if colours.count(c) > 1), None)
        if cell is None:
            yield tuple(colours)
            return
        tried: list[int] = []
        for v in (v for v in range(n) if colours[v] == cell):
            if not any(twins(v, w) for w in tried):
                tried.append(v)
                # v stays first in its cell, the others move one place back
                yield from search([c + (c == cell and w != v) for w, c in enumerate(colours)])

    yield from search([0] * n)


def v_structures(dag: Dag) -> frozenset[tuple[int, int, int]]:
    """Return the (a, c, b), a < b, with a → c ← b and a, b not adjacent."""
    found = []
    for c, parents in enumerate(transpose(dag)):
        for a, b in combinations(bits(parents), 2):
            if not (dag[a] >> b & 1 or dag[b] >> a & 1):
                found.append((a, c, b))
    return frozenset(found)


def meek_step(pattern: CPDAG) -> tuple[Edge, str, int] | None:
    """Return the next arrow that Meek's rules R1–R3 force, with the rule and the node that it uses, or None."""
    return next((found for line in sorted(pattern.lines) if (found := meek(pattern, line))), None)


def meek(pattern: CPDAG, line: Edge) -> tuple[Edge, str, int] | None:
    """Return the arrow that Meek's rules R1–R3 make of this line, with the rule and the node that it uses, or None."""
    arrows, lines, n = pattern.arrows, pattern.lines, pattern.n
    for tail, head in (line, line[::-1]):
        for k in range(n):
            if k in (tail, head):
                continue
            if (k, tail) in arrows and not pattern.adjacent(k, head):
                return (tail, head), "R1", k
            if (tail, k) in arrows and (k, head) in arrows:
                return (tail, head), "R2", k
        middle = [k for k in range(n) if (k, head) in arrows and (min(k, tail), max(k, tail)) in lines]
        for k, m in combinations(middle, 2):
            if not pattern.adjacent(k, m):
                return (tail, head), "R3", k
    return None


def oriented(pattern: CPDAG, edge: Edge) -> CPDAG:
    """Return the CPDAG with one of its lines oriented as the arrow `edge`."""
    line = (min(edge), max(edge))
    return CPDAG(pattern.n, pattern.arrows | {edge}, pattern.lines - {line})


def completed(n: int, skeleton: frozenset[Edge], vees: frozenset[tuple[int, int, int]]) -> CPDAG:
    """Return the CPDAG of the class with this skeleton and these v-structures, by Meek's rules."""
    arrows = frozenset(arrow for a, c, b in vees for arrow in ((a, c), (b, c)))
    lines = frozenset(e for e in skeleton if e not in arrows and e[::-1] not in arrows)
    pattern = CPDAG(n, arrows, lines)
    while found := meek_step(pattern):
        pattern = oriented(pattern, found[0])
    return pattern


def cpdag_of(dag: Dag) -> CPDAG:
    """Return the CPDAG of the class of one DAG."""
    n = len(dag)
    skeleton = frozenset((min(i, j), max(i, j)) for i in range(n) for j in bits(dag[i]))
    return completed(n, skeleton, v_structures(dag))


def consistent_extension(pattern: CPDAG) -> Dag | None:
    """Return a DAG with the CPDAG's arrows, skeleton and v-structures, or None if no DAG has them.

    A node is removed if it can be the last: no arrow leaves it, and the other end of each of its lines is adjacent to
    all its other neighbours (Dor & Tarsi 1992).
    """
    n = pattern.n
    out = dag_of(n, tuple(pattern.arrows))
    into, lines = transpose(out), [0] * n
    for i, j in pattern.lines:
        lines[i] |= 1 << j
        lines[j] |= 1 << i
    dag, left = list(out), (1 << n) - 1
    near = [out[v] | into[v] | lines[v] for v in range(n)]
    while left:
        for v in bits(left):
            around = near[v] & left
            if not out[v] & left and all(not around & ~near[w] & ~(1 << w) for w in bits(lines[v] & left)):
                for w in bits(lines[v] & left):
                    dag[w] |= 1 << v
                left &= ~(1 << v)
                break
        else:
            return None
    return tuple(dag)


def equivalent_dags(dag: Dag, most: int | None = None) -> tuple[Dag, ...] | None:
    """Return every DAG of this one's class, sorted, by reversing covered arrows; None if there are more than `most`."""
    seen, queue = {dag}, [dag]
    for member in queue:  # the list grows during the loop
        parents = transpose(member)
        for i, children in enumerate(member):
            for j in bits(children):
                if parents[j] == parents[i] | 1 << i:
                    turned = list(member)
                    turned[i] &= ~(1 << j)
                    turned[j] |= 1 << i
                    if (other := tuple(turned)) not in seen:
                        seen.add(other)
                        queue.append(other)
        if most is not None and len(seen) > most:
            return None
    return tuple(sorted(seen))


def _renamed_dag(dag: Dag, new: tuple[int, ...]) -> Dag:
    out = [0] * len(dag)
    for i, children in enumerate(dag):
        out[new[i]] = sum(1 << new[j] for j in bits(children))
    return tuple(out)


@dataclass(frozen=True)
class EquivalenceClass:
    """One Markov equivalence class on nodes 0…n-1, which a premise describes.

    `origin` is a class of which this one is a renaming: its properties are renamed and not computed again.
    """

    pattern: CPDAG
    origin: tuple[EquivalenceClass, tuple[int, ...]] | None = field(default=None, compare=False, repr=False)

    @property
    def n(self) -> int:
        return self.pattern.n

    @cached_property
    def id(self) -> str:
        """The canonical identity, equal exactly for classes that differ by a renaming of the nodes."""
        return self.origin[0].id if self.origin else f"{self.n}-{self.pattern.canonical_code():x}"

    @cached_property
    def members(self) -> tuple[Dag, ...]:
        if self.origin:
            return tuple(sorted(_renamed_dag(dag, self.origin[1]) for dag in self.origin[0].members))
        dag = consistent_extension(self.pattern)
        if dag is None:
            raise ValueError("no DAG has this skeleton and these v-structures")
        return equivalent_dags(dag) or ()

    @property
    def size(self) -> int:
        """The number of members."""
        return self.origin[0].size if self.origin else len(self.members)

    @cached_property
    def independences(self) -> tuple[Independence, ...]:
        """Every (i, j, given) with i < j that holds, sorted as published: by i, j, then the set's letters."""
        if self.origin:
            mec, new = self.origin
            return tuple(
                sorted(
                    (min(new[i], new[j]), max(new[i], new[j]), tuple(sorted(new[k] for k in given)))
                    for i, j, given in mec.independences
                )
            )
        import numpy as np

        from pipeline.tasks.corr2cause.enumeration import independent

        member = consistent_extension(self.pattern)  # any member: all have the same independences
        if member is None:
            raise ValueError("no DAG has this skeleton and these v-structures")
        return independences_of(self.n, independent(np.array([member], dtype=np.uint16)))[0]

    @cached_property
    def tables(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """For each key of `Semantics.key`: the (i, j) for which it holds in every member, and in some, as bit rows."""
        if self.origin:
            mec, new = self.origin
            return {
                key: (_renamed_dag(every, new), _renamed_dag(some, new)) for key, (every, some) in mec.tables.items()
            }
        import numpy as np

        return _tables(np.array(self.members, dtype=np.uint16), np.zeros(len(self.members), dtype=np.int64), 1)[0]

    def entails(self, relation: str, i: int, j: int, semantics: Semantics = PUBLISHED) -> bool:
        """Return whether the relation holds in every member."""
        key, i, j = semantics.key(relation, i, j)
        return bool(self.tables[key][0][i] >> j & 1)

    def allows(self, relation: str, i: int, j: int, semantics: Semantics = PUBLISHED) -> bool:
        """Return whether the relation holds in some member; otherwise the premise contradicts it."""
        key, i, j = semantics.key(relation, i, j)
        return bool(self.tables[key][1][i] >> j & 1)

    def renamed(self, new: tuple[int, ...]) -> EquivalenceClass:
        """Return the class with node i renamed to new[i]."""
        return EquivalenceClass(self.pattern.renamed(new), (self, new))


def _tables(members: Any, owner: Any, count: int) -> list[dict[str, tuple[tuple[int, ...], tuple[int, ...]]]]:
    from pipeline.tasks.corr2cause import enumeration

    found: list[dict[str, tuple[tuple[int, ...], tuple[int, ...]]]] = [{} for _ in range(count)]
    for key, cells in enumeration.relations(members).items():
        every = enumeration.rows_of(enumeration.all_of(cells, owner, count))
        some = enumeration.rows_of(enumeration.any_of(cells, owner, count))
        for tables, a, b in zip(found, every, some, strict=True):
            tables[key] = tuple(a), tuple(b)
    return found


@cache
def _sets(n: int) -> tuple[list[int], list[tuple[int, ...]]]:
    """Return the subsets of the nodes in the order of their letters: as bitmasks, and as tuples."""
    listed = sorted((tuple(bits(mask)), mask) for mask in range(1 << n))
    return [mask for _, mask in listed], [nodes for nodes, _ in listed]


def independences_of(n: int, independent: Any) -> list[tuple[Independence, ...]]:
    """Convert rows of `enumeration.independent` to independences in the published order."""
    masks, sets = _sets(n)
    pairs = list(combinations(range(n), 2))
    found: list[list[Independence]] = [[] for _ in range(len(independent))]
    for row, pair, place in zip(*(axis.tolist() for axis in independent[:, :, masks].nonzero()), strict=True):
        found[row].append((*pairs[pair], sets[place]))
    return [tuple(independences) for independences in found]


def classes_of(children: Any, members: Any = None, owner: Any = None) -> list[EquivalenceClass]:
    """Return the classes of these DAGs (rows, n), with all cached properties computed.

    `members` are the DAGs of all classes (computed if None), `owner` the row to which each belongs, ascending.
    """
    from pipeline.tasks.corr2cause import enumeration

    if members is None:
        members, owner = enumeration.members(children)
    count, n = children.shape
    some = enumeration.any_of(enumeration.matrix_of(members), owner, count)
    tables, independences = _tables(members, owner, count), independences_of(n, enumeration.independent(children))
    listed: list[list[Dag]] = [[] for _ in range(count)]
    for k, dag in zip(owner.tolist(), members.tolist(), strict=True):
        listed[k].append(tuple(dag))
    found = []
    for k in range(count):
        edges = list(zip(*(axis.tolist() for axis in some[k].nonzero()), strict=True))
        lines = frozenset((i, j) for i, j in edges if i < j and some[k, j, i])
        arrows = frozenset((i, j) for i, j in edges if not some[k, j, i])
        mec = EquivalenceClass(CPDAG(n, arrows, lines))
        mec.__dict__.update(members=tuple(sorted(listed[k])), independences=independences[k], tables=tables[k])
        found.append(mec)
    if n <= 7:
        for mec, code in zip(found, enumeration.canonical_codes(some).tolist(), strict=True):
            mec.__dict__["id"] = f"{n}-{code:x}"
    return found


@cache
def classes(n: int) -> tuple[EquivalenceClass, ...]:
    """Return one representative of each class on n unlabelled nodes, by code: 2, 5, 20, 142, 2201 for n = 2…6.

    The representative is the one whose DAG has the least code (`enumeration`), so letters follow a topological order.
    """
    if not 2 <= n <= ENUMERATED_N:
        raise ValueError(f"n: got {n}; expected 2…{ENUMERATED_N} for all classes; `sampled` draws some up to {MAX_N}")
    from pipeline.tasks.corr2cause import enumeration

    children = enumeration.children_of(enumeration.equivalence_classes(n), n)
    found = classes_of(children)
    return tuple(sorted(found, key=lambda mec: int(mec.id.partition("-")[2], 16)))


def sampled(
    n: int,
    count: int,
    *,
    edge_probability: float,
    seed: str,
    most_members: int = 1000,
    most_independences: int | None = None,
) -> tuple[EquivalenceClass, ...]:
    """Return `count` different classes of random DAGs on n nodes; `edge_probability` is that of each arrow.

    Classes with more members or more independences are left out, and so is the class without arrows. Fewer classes are
    returned if 50 draws for each do not find enough. Equal seeds give equal classes on every machine.
    """
    import numpy as np

    from pipeline.tasks.corr2cause.enumeration import independent

    rng = random.Random(seed)
    found: dict[str, EquivalenceClass] = {}
    pairs = list(combinations(range(n), 2))
    for _ in range(50):
        kept: list[tuple[Dag, tuple[Dag, ...]]] = []
        for _ in range(count):
            dag = dag_of(n, [pair for pair in pairs if rng.random() < edge_probability])
            members = equivalent_dags(dag, most_members) if any(dag) else None
            if members:
                kept.append((dag, members))
        if most_independences is not None and kept:
            sizes = independent(np.array([dag for dag, _ in kept], dtype=np.uint16)).sum(axis=(1, 2))
            kept = [pair for pair, size in zip(kept, sizes.tolist(), strict=True) if size <= most_independences]
        for start in range(0, len(kept), 256):
            part = kept[start : start + 256]
            children = np.array([dag for dag, _ in part], dtype=np.uint16)
            every = np.array([dag for _, members in part for dag in members], dtype=np.uint16)
            owner = np.repeat(np.arange(len(part)), [len(members) for _, members in part])
            for mec in classes_of(children, every, owner):
                if len(found) < count:
                    found.setdefault(mec.id, mec)
        if len(found) == count:
            break
    return tuple(found.values())
