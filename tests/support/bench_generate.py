"""How fast Corr2Cause is made: `scripts/bench generate [N]` beside a plain networkx program that makes the same rows.

The plain program does what one would write first: every DAG by all orderings, d-separation by `nx.is_d_separator`,
classes by comparing all their independences under all renamings, labels by looking at every member's paths. It takes
n = 2…N (default 5, a minute or two); ours also n = 6 with text, and the counts of n = 7.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from itertools import chain, combinations, permutations

import networkx as nx

from pipeline.tasks.corr2cause import enumeration, wording
from pipeline.tasks.corr2cause.graphs import RELATIONS, classes


def rows_of_ours(n: int) -> Iterator[tuple[str, bool]]:
    names = "ABCDEF"[:n]
    for mec in classes(n):
        premise = wording.premise(names, *wording.relations(mec))
        for i, j in combinations(range(n), 2):
            for relation in RELATIONS:
                claim = wording.hypothesis(relation, names[i], names[j])
                yield wording.question(premise, claim, ""), mec.entails(relation, i, j)


def subsets(nodes: list[int]) -> list[set[int]]:
    return [set(s) for s in chain.from_iterable(combinations(nodes, k) for k in range(len(nodes) + 1))]


Statements = frozenset[tuple[frozenset[int], frozenset[int]]]


def independences(graph: nx.DiGraph, n: int) -> Statements:
    return frozenset(
        (frozenset((i, j)), frozenset(given))
        for i, j in combinations(range(n), 2)
        for given in subsets([k for k in range(n) if k not in (i, j)])
        if nx.is_d_separator(graph, {i}, {j}, given)
    )


def holds(graph: nx.DiGraph, relation: str, i: int, j: int) -> bool:
    if relation in ("child", "descendant"):
        relation, i, j = {"child": "parent", "descendant": "ancestor"}[relation], j, i
    if relation == "parent":
        return bool(graph.has_edge(i, j))
    if relation == "ancestor":
        return any(len(path) > 2 for path in nx.all_simple_paths(graph, i, j))
    step = graph if relation == "collider" else graph.reverse()
    return any(
        set(one) & set(other) == {k}
        for k in set(graph) - {i, j}
        for one in nx.all_simple_paths(step, i, k)
        for other in nx.all_simple_paths(step, j, k)
    )


def rows_of_networkx(n: int) -> Iterator[tuple[str, bool]]:
    pairs, orders = list(combinations(range(n), 2)), list(permutations(range(n)))
    found: dict[Statements, list[nx.DiGraph]] = {}
    known: set[frozenset[tuple[int, int]]] = set()
    for edges in chain.from_iterable(combinations(pairs, k) for k in range(len(pairs) + 1)):
        for order in orders:
            named = frozenset((order[a], order[b]) for a, b in edges)
            if named not in known:
                known.add(named)
                graph = nx.DiGraph(list(named))
                graph.add_nodes_from(range(n))
                found.setdefault(independences(graph, n), []).append(graph)
    told: set[Statements] = set()
    names = "ABCDEF"[:n]
    for statements, members in found.items():
        if statements in told:
            continue
        for order in orders:
            told.add(
                frozenset(
                    (frozenset(order[k] for k in pair), frozenset(order[k] for k in given))
                    for pair, given in statements
                )
            )
        listed = sorted((min(pair), max(pair), tuple(sorted(given))) for pair, given in statements)
        apart = {(i, j) for i, j, given in listed if not given}
        premise = wording.premise(names, [pair for pair in pairs if pair not in apart], listed)
        for i, j in pairs:
            for relation in RELATIONS:
                claim = wording.hypothesis(relation, names[i], names[j])
                yield wording.question(premise, claim, ""), all(holds(graph, relation, i, j) for graph in members)


def main() -> None:
    most = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(f"{'n':>3} {'DAGs':>8} {'classes':>8} {'rows':>9} {'positive':>9} {'ours':>9} {'networkx':>9}    ratio")
    start = time.perf_counter()
    for n in range(2, 7):
        began = time.perf_counter()
        labels = [label for _, label in rows_of_ours(n)]
        ours = time.perf_counter() - began
        line = (
            f"{n:>3} {len(enumeration.dags(n)):>8} {len(classes(n)):>8} {len(labels):>9} {sum(labels):>9} {ours:>8.2f}s"
        )
        if n <= most:
            began = time.perf_counter()
            plain = [label for _, label in rows_of_networkx(n)]
            took = time.perf_counter() - began
            if (len(plain), sum(plain)) != (len(labels), sum(labels)):
                raise SystemExit(
                    f"n = {n}: networkx finds {sum(plain)} of {len(plain)}, ours {sum(labels)} of {len(labels)}"
                )
            line += f" {took:>8.2f}s   1 : {took / ours:,.0f}"
        print(line, flush=True)
    print(f"n = 2…6 with text, and what is above: {time.perf_counter() - start:.2f} s")
    began = time.perf_counter()
    graphs, found = len(enumeration.dags(7)), len(enumeration.equivalence_classes(7))
    print(f"  7 {graphs:>8} {found:>8} {found * 21 * 6:>9}           {time.perf_counter() - began:>8.2f}s   counts")


if __name__ == "__main__":
    main()
