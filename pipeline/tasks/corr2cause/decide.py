"""Decide a claim about a class without listing its members: a complete graph of ten variables has 3,628,800 of them.

    >>> decide(CPDAG(3, frozenset({(0, 2), (1, 2)}), frozenset()), "parent", 0, 2)
    'entailed'

Every relation is monotone in the arrows (Semantics.indirect `strict` is a path between two that are not adjacent). So a
claim is decided for all members of a CPDAG if it holds on the arrows that they share. It is also decided if it does not
hold even on all arrows that any member may have. Otherwise one undirected edge is oriented each way, Meek's rules R1-R4
add the arrows that follow, and both graphs are searched. Every undirected edge of such a graph can have both
orientations (Meek 1995), so no branch is empty.

After LIMIT graphs it raises ValueError. Of 13,000 claims about ten variables, the most expensive took 1,036 graphs and
0.2 s. The tests compare the result with `graphs.holds` over all members.
"""

from __future__ import annotations

from pipeline.tasks.corr2cause.graphs import (
    CPDAG,
    PUBLISHED,
    Dag,
    Semantics,
    bits,
    common_effects,
    dag_of,
    reachable,
    transpose,
)

LIMIT = 20_000  # partly directed graphs that one claim may cost: a minute
Graph = tuple[list[int], list[int]]  # for each node: its children, and its neighbours by undirected edges


def decide(pattern: CPDAG, relation: str, i: int, j: int, semantics: Semantics = PUBLISHED) -> str:
    """Return `entailed`, `contradicted` or `undetermined`. Raises ValueError after LIMIT graphs."""
    key, i, j = semantics.key(relation, i, j)
    kind = key.partition("/")[2]
    lines = [0] * pattern.n
    for a, b in pattern.lines:
        lines[a] |= 1 << b
        lines[b] |= 1 << a
    out = list(dag_of(pattern.n, tuple(pattern.arrows)))
    if key == "strict":
        if pattern.adjacent(i, j):
            return "contradicted"  # a path along an arrow is not strictly indirect, and one against it is a cycle
        key = "path"
    search = _Search(key, kind, i, j)
    some, every = search.exists((out, lines), True), not search.exists((out, lines), False)
    return "entailed" if every else "undetermined" if some else "contradicted"


class _Search:
    """The search of a class for a member in which a claim holds, or does not hold."""

    def __init__(self, key: str, kind: str, i: int, j: int) -> None:
        self.key, self.kind, self.i, self.j, self.count = key, kind, i, j, 0
        self.backwards = key.startswith("confounder")  # a collider of the graph with its arrows turned

    def exists(self, graph: Graph, wanted: bool) -> bool:
        """Return whether the claim's truth is `wanted` in a member of this partially directed graph."""
        self.count += 1
        if self.count > LIMIT:
            raise ValueError(f"the claim is not decided after {LIMIT:,} graphs of its class, the limit")
        out, lines = graph
        arrows = tuple(out) if not self.backwards else transpose(tuple(out))
        if self.holds(arrows):
            return wanted
        if not self.may_hold(tuple(a | b for a, b in zip(arrows, lines, strict=True))):
            return not wanted
        a, b = self.edge(lines)  # one exists: without undirected edges, one of the two tests above decides
        for tail, head in ((a, b), (b, a)) if wanted != self.backwards else ((b, a), (a, b)):
            if self.exists(turned(graph, tail, head), wanted):
                return True
        return False

    def edge(self, lines: list[int]) -> tuple[int, int]:
        """Return the next undirected edge to orient: one at the claim's variables, if any, where it decides most."""
        for node in (self.i, self.j, *range(len(lines))):
            if lines[node]:
                return node, bits(lines[node])[0]
        raise AssertionError("a graph without undirected edges is decided")

    def holds(self, dag: Dag) -> bool:
        """Return whether the claim holds on the arrows of all members (they have no cycle)."""
        i, j = self.i, self.j
        if self.key == "direct":
            return bool(dag[i] >> j & 1)
        if self.key == "path":
            return any(reachable(dag, 1 << k) >> j & 1 for k in bits(dag[i] & ~(1 << j)))
        return bool(common_effects(dag, i, j, self.kind))

    def may_hold(self, upper: Dag) -> bool:
        """Return whether the claim holds on all possible arrows, lines both ways; False only if no member has it."""
        i, j = self.i, self.j
        if self.key == "direct":
            return bool(upper[i] >> j & 1)
        if self.key == "path":
            onward = upper[i] & ~(1 << j)
            return bool(_avoiding(upper, onward, 1 << i) >> j & 1)
        if self.kind in ("child", "parent"):
            return bool(upper[i] & upper[j])
        if self.kind in ("descendant", "ancestor"):
            return bool(reachable(upper, 1 << i) & reachable(upper, 1 << j) & ~(1 << i | 1 << j))
        return bool(_avoiding(upper, upper[i], 1 << j) & _avoiding(upper, upper[j], 1 << i) & ~(1 << i | 1 << j))


def _avoiding(step: Dag, start: int, avoid: int) -> int:
    """Return all nodes reached from `start` on paths that avoid a set."""
    return reachable(tuple(children & ~avoid for children in step), start & ~avoid)


def turned(graph: Graph, tail: int, head: int) -> Graph:
    """Return the graph with one undirected edge oriented, and all orientations that follow by Meek's rules."""
    out, lines = list(graph[0]), list(graph[1])
    near = [a | b for a, b in zip(out, lines, strict=True)]
    for v, children in enumerate(out):
        for w in bits(children):
            near[w] |= 1 << v
    queue = [(tail, head)]
    while queue:
        for a, b in queue:
            out[a] |= 1 << b
            lines[a] &= ~(1 << b)
            lines[b] &= ~(1 << a)
        into = transpose(tuple(out))
        queue = [(a, b) for a, rest in enumerate(lines) for b in bits(rest) if _forced(a, b, out, into, lines, near)]
    return out, lines


def _forced(a: int, b: int, out: list[int], into: Dag, lines: list[int], near: list[int]) -> bool:
    """Return whether one of Meek's rules orients a - b as a → b."""
    far = ~near[b] & ~(1 << b)
    if into[a] & far or out[a] & into[b]:  # R1, R2
        return True
    middle = lines[a] & into[b]
    return any(  # R3: two of them apart; R4: a - k, k to one of them, k and b apart
        middle & ~near[k] & ~(1 << k) or lines[a] & into[k] & far for k in bits(middle)
    ) or any(lines[a] & into[k] & far for k in bits(near[a] & into[b]))
