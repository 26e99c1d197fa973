"""Graphs, Markov equivalence classes and causal relations: the exact solver behind Corr2Cause.

A node is an int 0…n-1, a set of nodes a bitmask, a DAG the tuple of its nodes' child sets. Everything is
enumerated: `classes(n)` lists one representative of every Markov equivalence class on n unlabelled nodes,
each with its members, its compelled edges and its independences. Nothing here knows about words.

    >>> [len(classes(n)) for n in (2, 3, 4)]
    [2, 5, 20]

Sources: Verma & Pearl 1990 (a class is its skeleton and v-structures), Meek 1995 (orientation rules),
Lauritzen et al. 1990 (d-separation in the moral graph of the ancestors), Jin et al. 2024 (the relations).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations, permutations

Dag = tuple[int, ...]  # dag[i] is the bitmask of the children of node i
Edge = tuple[int, int]
Independence = tuple[int, int, tuple[int, ...]]  # i, j (i < j) and the nodes given

MAX_N = 5
RELATIONS = ("parent", "child", "ancestor", "descendant", "collider", "confounder")


def bits(mask: int) -> list[int]:
    """The nodes of a set, ascending."""
    return [i for i in range(mask.bit_length()) if mask >> i & 1]


def transpose(dag: Dag) -> Dag:
    """The same graph with every arrow turned: child sets become parent sets."""
    out = [0] * len(dag)
    for i, children in enumerate(dag):
        for j in bits(children):
            out[j] |= 1 << i
    return tuple(out)


def reachable(step: Dag, start: int) -> int:
    """All nodes reached from the set `start` along `step`, `start` included."""
    seen = frontier = start
    while frontier:
        ahead = 0
        for i in bits(frontier):
            ahead |= step[i]
        frontier = ahead & ~seen
        seen |= frontier
    return seen


def is_acyclic(dag: Dag) -> bool:
    """No node reaches itself."""
    return not any(reachable(dag, dag[i]) >> i & 1 for i in range(len(dag)))


def dag_of(n: int, edges: list[Edge] | tuple[Edge, ...]) -> Dag:
    """The DAG on n nodes with these arrows (tail, head)."""
    out = [0] * n
    for tail, head in edges:
        out[tail] |= 1 << head
    return tuple(out)


def d_separated(dag: Dag, i: int, j: int, given: int) -> bool:
    """Whether i and j are d-separated by the set `given`: no path in the moral graph of their ancestors."""
    parents = transpose(dag)
    kept = reachable(parents, 1 << i | 1 << j | given)
    moral = [0] * len(dag)
    for child in bits(kept):
        family = parents[child] | 1 << child
        for member in bits(family):
            moral[member] |= family & ~(1 << member)
    open_ = tuple(neighbours & kept & ~given for neighbours in moral)
    return not reachable(open_, 1 << i) >> j & 1


def holds(dag: Dag, relation: str, i: int, j: int) -> bool:
    """Whether `relation` holds of the ordered pair (i, j) in one DAG, in the published semantics.

    ancestor/descendant: a directed path of two or more arrows, whether or not there is a direct one.
    collider: directed paths from i and from j into one node that share nothing else.
    confounder: directed paths from one node to i and to j that share nothing else.
    """
    if relation == "parent":
        return bool(dag[i] >> j & 1)
    if relation == "child":
        return bool(dag[j] >> i & 1)
    if relation == "ancestor":
        return any(reachable(dag, 1 << k) >> j & 1 for k in bits(dag[i] & ~(1 << j)))
    if relation == "descendant":
        return holds(dag, "ancestor", j, i)
    if relation == "collider":
        return bool(meetings(dag, i, j))
    if relation == "confounder":
        return bool(meetings(transpose(dag), i, j))
    raise ValueError(f"unknown relation {relation!r}; known: {', '.join(RELATIONS)}")


def _paths(dag: Dag, start: int, end: int, avoid: int) -> Iterator[int]:
    """The node sets of the directed paths start → … → end that avoid a set, `end` left out."""
    here = 1 << start
    for nxt in bits(dag[start] & ~avoid & ~here):
        if nxt == end:
            yield here
        else:
            for rest in _paths(dag, nxt, end, avoid | here):
                yield here | rest


def meetings(dag: Dag, i: int, j: int) -> list[int]:
    """The nodes into which directed paths from i and from j lead that share nothing else."""
    return [
        k
        for k in range(len(dag))
        if k not in (i, j)
        and any(next(_paths(dag, j, k, used), None) is not None for used in _paths(dag, i, k, 1 << j))
    ]


@dataclass(frozen=True)
class Pattern:
    """A partially directed graph: `arrows` are the compelled edges, `lines` the undirected ones (i < j)."""

    n: int
    arrows: frozenset[Edge]
    lines: frozenset[Edge]

    def adjacent(self, i: int, j: int) -> bool:
        return bool({(i, j), (j, i)} & self.arrows) or (min(i, j), max(i, j)) in self.lines

    def renamed(self, new: tuple[int, ...]) -> Pattern:
        """The same graph with node i called new[i]."""
        return Pattern(
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

    def canonical_code(self) -> int:
        """The least `code` over all renamings: equal exactly for isomorphic graphs."""
        cells = [divmod(bit, self.n) for bit in bits(self.code)]
        return min(sum(1 << table[i][j] for i, j in cells) for table in _renamings(self.n))


@cache
def _renamings(n: int) -> list[list[list[int]]]:
    return [[[p[i] * n + p[j] for j in range(n)] for i in range(n)] for p in permutations(range(n))]


def v_structures(dag: Dag) -> frozenset[tuple[int, int, int]]:
    """The (a, c, b), a < b, with a → c ← b and a, b not adjacent."""
    found = []
    for c, parents in enumerate(transpose(dag)):
        for a, b in combinations(bits(parents), 2):
            if not (dag[a] >> b & 1 or dag[b] >> a & 1):
                found.append((a, c, b))
    return frozenset(found)


def meek_step(pattern: Pattern) -> tuple[Edge, str, int] | None:
    """The first arrow that Meek's rules R1–R3 force next, with the rule and the node it argues from."""
    return next((found for line in sorted(pattern.lines) if (found := meek(pattern, line))), None)


def meek(pattern: Pattern, line: Edge) -> tuple[Edge, str, int] | None:
    """The arrow that Meek's rules R1–R3 make of this line, with the rule and the node it argues from."""
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


def oriented(pattern: Pattern, edge: Edge) -> Pattern:
    """The pattern with one of its lines made the arrow `edge`."""
    line = (min(edge), max(edge))
    return Pattern(pattern.n, pattern.arrows | {edge}, pattern.lines - {line})


def completed(n: int, skeleton: frozenset[Edge], vees: frozenset[tuple[int, int, int]]) -> Pattern:
    """The CPDAG of the class with this skeleton and these v-structures, by Meek's rules."""
    arrows = frozenset(arrow for a, c, b in vees for arrow in ((a, c), (b, c)))
    lines = frozenset(e for e in skeleton if e not in arrows and e[::-1] not in arrows)
    pattern = Pattern(n, arrows, lines)
    while found := meek_step(pattern):
        pattern = oriented(pattern, found[0])
    return pattern


def pattern_of(dag: Dag) -> Pattern:
    """The CPDAG of the class of one DAG."""
    n = len(dag)
    skeleton = frozenset((min(i, j), max(i, j)) for i in range(n) for j in bits(dag[i]))
    return completed(n, skeleton, v_structures(dag))


def members_of(pattern: Pattern) -> tuple[Dag, ...]:
    """Every DAG of the class, by orienting its lines without a new v-structure or a cycle."""
    skeleton = tuple(sorted(pattern.lines))
    wanted = pattern.v_structures
    found = []
    for choice in range(1 << len(skeleton)):
        turned = tuple((j, i) if choice >> k & 1 else (i, j) for k, (i, j) in enumerate(skeleton))
        dag = dag_of(pattern.n, tuple(pattern.arrows) + turned)
        if v_structures(dag) == wanted and is_acyclic(dag):
            found.append(dag)
    return tuple(found)


def _renamed_dag(dag: Dag, new: tuple[int, ...]) -> Dag:
    out = [0] * len(dag)
    for i, children in enumerate(dag):
        out[new[i]] = sum(1 << new[j] for j in bits(children))
    return tuple(out)


@dataclass(frozen=True)
class EquivalenceClass:
    """One Markov equivalence class on nodes 0…n-1: what a premise describes."""

    pattern: Pattern

    @property
    def n(self) -> int:
        return self.pattern.n

    @cached_property
    def id(self) -> str:
        """The canonical identity: equal exactly for classes that differ by a renaming of the nodes."""
        return f"{self.n}-{self.pattern.canonical_code():x}"

    @cached_property
    def members(self) -> tuple[Dag, ...]:
        return members_of(self.pattern)

    @cached_property
    def independences(self) -> tuple[Independence, ...]:
        """Every (i, j, given) with i < j that holds, sorted as published: by i, j, then the set's letters."""
        dag = self.members[0]
        found = []
        for i, j in combinations(range(self.n), 2):
            rest = [k for k in range(self.n) if k not in (i, j)]
            for size in range(len(rest) + 1):
                for given in combinations(rest, size):
                    if d_separated(dag, i, j, sum(1 << k for k in given)):
                        found.append((i, j, given))
        return tuple(sorted(found))

    def entails(self, relation: str, i: int, j: int) -> bool:
        """Whether the relation holds in every member."""
        return all(holds(dag, relation, i, j) for dag in self.members)

    def renamed(self, new: tuple[int, ...]) -> EquivalenceClass:
        """The same class with node i called new[i]; what is already known of it is renamed, not found again."""
        other = EquivalenceClass(self.pattern.renamed(new))
        other.__dict__["id"] = self.id
        other.__dict__["members"] = tuple(_renamed_dag(dag, new) for dag in self.members)
        other.__dict__["independences"] = tuple(
            sorted(
                (min(new[i], new[j]), max(new[i], new[j]), tuple(sorted(new[k] for k in given)))
                for i, j, given in self.independences
            )
        )
        return other


@cache
def classes(n: int) -> tuple[EquivalenceClass, ...]:
    """One representative of each class on n unlabelled nodes, by canonical id: 2, 5, 20, 142 for n = 2…5."""
    if not 2 <= n <= MAX_N:
        raise ValueError(f"n is {n}; classes can be enumerated for n = 2…{MAX_N}")
    pairs = list(combinations(range(n), 2))
    seen: set[int] = set()
    kept: dict[int, EquivalenceClass] = {}
    for choice in range(1 << len(pairs)):  # every DAG has a topological order, so upper-triangular ones suffice
        dag = dag_of(n, [pair for k, pair in enumerate(pairs) if choice >> k & 1])
        pattern = pattern_of(dag)
        if pattern.code not in seen:
            seen.add(pattern.code)
            kept.setdefault(pattern.canonical_code(), EquivalenceClass(pattern))
    return tuple(kept[code] for code in sorted(kept))
