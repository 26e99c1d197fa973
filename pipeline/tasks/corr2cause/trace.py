"""The proof that decides a Corr2Cause row: what a model learns to think.

Each line is one step that can be checked from the lines before it and the premise:

    Claim       what the hypothesis says, in two words and two letters
    Pairs       every pair is linked, or apart with a separating set that the premise states (two look-ups)
    Neighbours  the links of each variable
    Between     for each pair that is apart, every variable linked to both: it `passes` where it is in their
                separating set, else it `collides`, with the two arrows into it that this shows
    Arrows      every link with what has been shown: A to B is `A B ->`, B to A is `A B <-`, nothing yet is `A B --`
    Forced      what Meek's rules make of each open link, in rounds until nothing changes: `A B: C into apart: ->` (C
                has an arrow into A and is apart from B, so by R1 A has an arrow into B)
    Graph       every link: an arrow that all members share, or a line that can turn (`--`)
    Claim       once more, where it is needed
    Link        what is known of the pair, where the claim is of a direct cause
    From / To   children (parents) lists, followed from the claim's variables
    Holds, Fails, Case, Member    the decision, on the shared arrows where they decide it, else by cases that
                cover all members (yes) or by one member in which the claim fails (no)

A link always names the earlier letter first and then its mark, so that what is known of a pair can be found by its
two letters: a model that writes left to right settles which pair before what is true of it.

Sources: Verma & Pearl 1990, Meek 1995.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, reduce
from itertools import combinations
from operator import and_

from pipeline.tasks.corr2cause.graphs import (
    Dag,
    EquivalenceClass,
    Independence,
    Pattern,
    bits,
    dag_of,
    holds,
    meek,
    meetings,
    oriented,
    reachable,
    transpose,
)

# child and descendant are parent and ancestor of the turned pair
_TURNED = {"child": "parent", "descendant": "ancestor"}


def proof(
    mec: EquivalenceClass,
    names: Sequence[str],
    relation: str,
    i: int,
    j: int,
    told: Sequence[Independence] | None = None,
) -> str:
    """The thought, without its tags: the steps above as lines. The verdict follows from the last line.

    `told` are the independences in the order of the premise: the first of each pair is cited.
    """
    if relation in _TURNED:
        relation, i, j = _TURNED[relation], j, i
    told = mec.independences if told is None else told
    claim = _claim(names, relation, i, j)
    return "\n".join([claim, *_steps(mec, names, told), claim, *_decision(mec, names, relation, i, j)])


def _steps(mec: EquivalenceClass, names: Sequence[str], told: Sequence[Independence]) -> list[str]:
    graph, nodes = mec.pattern, range(mec.n)
    given = {(a, b): cut for a, b, cut in reversed(told)}  # the first that the premise lists
    pairs = []
    for a, b in combinations(nodes, 2):
        if (a, b) in given:
            apart = " ".join(names[k] for k in given[a, b]) or "nothing"
            pairs.append(f"{names[a]} {names[b]} apart given {apart}")
        else:
            pairs.append(f"{names[a]} {names[b]} linked")
    near = [
        f"{names[a]}: {' '.join(names[b] for b in nodes if b != a and graph.adjacent(a, b)) or 'none'}" for a in nodes
    ]
    between = []
    for (a, b), cut in sorted(given.items()):
        shared = [
            f"{names[k]} passes" if k in cut else f"{names[k]} collides {_arrow(names, a, k)} {_arrow(names, b, k)}"
            for k in nodes
            if graph.adjacent(a, k) and graph.adjacent(b, k)
        ]
        apart = " ".join(names[k] for k in cut) or "nothing"
        between.append(f"{names[a]} {names[b]} given {apart}: {', '.join(shared) or 'none'}")
    current = _with_colliders(graph)
    arrows = _edges(current, names)
    return [
        _line("Pairs:", pairs),
        _line("Neighbours:", near),
        _line("Between:", between),
        _line("Arrows:", arrows),
        *_forced(current, names),
        _line("Graph:", _edges(graph, names)),
    ]


def _forced(current: Pattern, names: Sequence[str]) -> list[str]:
    """Rounds through the open links, in order, until a round changes nothing or no link is open.

    Before its mark each link names every variable that has an arrow at one of its ends, and what it is to both: the
    rules are read off from there.
    """
    rounds = []
    changed = bool(current.arrows)  # the rules argue from arrows
    while changed and current.lines:
        changed, items = False, []
        for line in sorted(current.lines):
            others = {k: [_seen(current, k, end) for end in line] for k in range(current.n) if k not in line}
            told = [f"{names[k]} {' '.join(ends)}" for k, ends in others.items() if {"into", "from"} & set(ends)]
            mark = "--"
            if found := meek(current, line):
                mark, current, changed = _mark(*found[0]), oriented(current, found[0]), True
            items.append(f"{names[line[0]]} {names[line[1]]}: {', '.join(told) or 'none'}: {mark}")
        rounds.append(_line("Forced:", items))
    return rounds or [_line("Forced:", [])]


def _seen(graph: Pattern, k: int, end: int) -> str:
    """What a variable is to one end of a link: an arrow into it, an arrow from it, an open link, or apart."""
    if (k, end) in graph.arrows:
        return "into"
    if (end, k) in graph.arrows:
        return "from"
    return "open" if graph.adjacent(k, end) else "apart"


def _mark(tail: int, head: int) -> str:
    return "->" if tail < head else "<-"


def _arrow(names: Sequence[str], tail: int, head: int) -> str:
    """`A C ->` from A to C, `A C <-` from C to A: the earlier letter first."""
    return f"{names[min(tail, head)]} {names[max(tail, head)]} {_mark(tail, head)}"


def _edges(graph: Pattern, names: Sequence[str]) -> list[str]:
    lines = [(edge, f"{names[edge[0]]} {names[edge[1]]} --") for edge in graph.lines]
    arrows = [((min(edge), max(edge)), _arrow(names, *edge)) for edge in graph.arrows]
    return [words for _, words in sorted(lines + arrows)]


def _line(title: str, items: list[str]) -> str:
    return " ".join([title, *(f"{item}." for item in items or ["none"])])


def _with_colliders(graph: Pattern) -> Pattern:
    """The skeleton with only its v-structures oriented."""
    arrows = frozenset(arrow for a, c, b in graph.v_structures for arrow in ((a, c), (b, c)))
    edges = {(min(e), max(e)) for e in graph.arrows} | graph.lines
    return Pattern(graph.n, arrows, frozenset(e for e in edges if e not in arrows and e[::-1] not in arrows))


def _claim(names: Sequence[str], relation: str, i: int, j: int) -> str:
    words = {
        "parent": f"{names[i]} direct {names[j]}",
        "ancestor": f"{names[i]} indirect {names[j]}",
        "collider": f"effect {names[i]} {names[j]}",
        "confounder": f"cause {names[i]} {names[j]}",
    }
    return f"Claim: {words[relation]}."


def _decision(mec: EquivalenceClass, names: Sequence[str], relation: str, i: int, j: int) -> list[str]:
    graph = mec.pattern
    if relation == "parent":
        start, end = (j, i) if (j, i) in graph.arrows else (i, j)
        verdict = "Holds: shared." if (i, j) in graph.arrows else "Fails: not shared."
        return [f"Link: {names[start]} {_seen(graph, start, end)} {names[end]}.", verdict]
    shared = dag_of(mec.n, tuple(graph.arrows))
    lines = _follow(names, shared, relation, i, j)
    if holds(shared, relation, i, j):
        return [*lines, f"Holds: {_witness(names, shared, relation, i, j)}."]
    if not holds(_turning(graph), relation, i, j):
        return [*lines, "Fails: no way."]
    if mec.entails(relation, i, j):
        for case in _cases(graph, mec.members, relation, i, j):
            arrows = _shared(case, mec.n)
            lines.append(_line("Case:", _turned(names, graph, arrows)))
            lines.append(f"Holds: {_witness(names, arrows, relation, i, j)}.")
        return lines
    # the plainest counterexample: the fewest arrows to follow
    failing = [dag for dag in mec.members if not holds(dag, relation, i, j)]
    member = min(failing, key=lambda dag: (_size(dag, relation, i, j), dag))
    lines.append(_line("Member:", _turned(names, graph, member)))
    return [*lines, *_follow(names, member, relation, i, j), "Fails: there."]


def _turned(names: Sequence[str], graph: Pattern, dag: Dag) -> list[str]:
    """The arrows of a DAG that are lines of the graph, in the order of their links."""
    arrows = [(a, b) for a in range(len(dag)) for b in bits(dag[a]) if (a, b) not in graph.arrows]
    return [_arrow(names, *arrow) for arrow in sorted(arrows, key=sorted)]


def _turning(graph: Pattern) -> Dag:
    """Every arrow, and every line both ways: what no member can go beyond."""
    both = list(dag_of(graph.n, tuple(graph.arrows)))
    for a, b in graph.lines:
        both[a] |= 1 << b
        both[b] |= 1 << a
    return tuple(both)


def _shared(members: Sequence[Dag], n: int) -> Dag:
    """The arrows that all of these members have."""
    return tuple(reduce(and_, (dag[node] for dag in members)) for node in range(n))


def _cases(graph: Pattern, members: tuple[Dag, ...], relation: str, i: int, j: int) -> tuple[tuple[Dag, ...], ...]:
    """The fewest sets of members, split line by line, in each of which the shared arrows show the claim."""

    @cache
    def split(members: tuple[Dag, ...]) -> tuple[tuple[Dag, ...], ...]:
        if holds(_shared(members, graph.n), relation, i, j):
            return (members,)
        options = []
        for a, b in sorted(graph.lines):
            one = tuple(dag for dag in members if dag[a] >> b & 1)
            other = tuple(dag for dag in members if not dag[a] >> b & 1)
            if one and other:
                options.append(split(one) + split(other))
        return min(options, key=len)

    return split(members)


def _starts(relation: str, i: int, j: int) -> list[int]:
    return [i] if relation == "ancestor" else [i, j]


def _step(dag: Dag, relation: str) -> Dag:
    return transpose(dag) if relation == "confounder" else dag


def _size(dag: Dag, relation: str, i: int, j: int) -> int:
    step = _step(dag, relation)
    return sum(step[k].bit_count() for start in _starts(relation, i, j) for k in bits(reachable(step, 1 << start)))


def _follow(names: Sequence[str], dag: Dag, relation: str, i: int, j: int) -> list[str]:
    """Children (for a confounder: parents) of each start and of all that they lead to, breadth first."""
    step, title = _step(dag, relation), "To" if relation == "confounder" else "From"
    lines = []
    for start in _starts(relation, i, j):
        queue, items = [start], []
        for node in queue:  # the list grows while it is walked
            ahead = bits(step[node])
            items.append(f"{names[node]}: {' '.join(names[k] for k in ahead) or 'none'}")
            queue.extend(k for k in ahead if k not in queue)
        lines.append(_line(title, items))
    return lines


def _witness(names: Sequence[str], dag: Dag, relation: str, i: int, j: int) -> str:
    """What shows the claim on these arrows: a path of two arrows or more, or the node where two paths meet."""
    if relation == "ancestor":
        paths: list[tuple[int, ...]] = [(i, k) for k in bits(dag[i]) if k != j]
        for path in paths:  # grows: the shortest comes first
            if dag[path[-1]] >> j & 1:
                return " -> ".join(names[k] for k in (*path, j))
            paths.extend((*path, k) for k in bits(dag[path[-1]]) if k not in path)
    return names[meetings(_step(dag, relation), i, j)[0]]
