"""The proof that decides a Corr2Cause row: what a model learns to think.

Each line is one step that can be checked from the lines before it and the premise:

    Claim       what the hypothesis says, in two words and two letters
    Pairs       every pair is linked, or apart with a separating set that the premise states (two look-ups)
    Neighbours  the links of each variable
    Between     for each pair that is apart, every variable linked to both: `A B D passes` where D is in their
                separating set; else `A B D collides`, with the arrows into D that this shows
    Arrows      every link with what has been shown: A to B is `A B ->`, B to A is `A B <-`, nothing yet is `A B --`
    Forced      arrows by Meek's rules, each with the variable the rule argues from
    Graph       every link: an arrow that all members share, or a line that can turn (`--`)
    Claim       once more, where it is needed
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
    Edge,
    EquivalenceClass,
    Independence,
    Pattern,
    bits,
    dag_of,
    holds,
    meek_step,
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
        shared = [k for k in nodes if graph.adjacent(a, k) and graph.adjacent(b, k)]
        for k in shared:
            legs = f"collides: {_arrow(names, a, k)}, {_arrow(names, b, k)}"
            between.append(f"{names[a]} {names[b]} {names[k]} {'passes' if k in cut else legs}")
        between += [] if shared else [f"{names[a]} {names[b]} none"]
    current = _with_colliders(graph)
    arrows = _edges(current, names)
    forced = []
    while found := meek_step(current):
        (tail, head), _, because = found
        forced.append(f"{_arrow(names, tail, head)} by {names[because]}")
        current = oriented(current, (tail, head))
    return [
        _line("Pairs:", pairs),
        _line("Neighbours:", near),
        _line("Between:", between),
        _line("Arrows:", arrows),
        _line("Forced:", forced),
        _line("Graph:", _edges(graph, names)),
    ]


def _arrow(names: Sequence[str], tail: int, head: int) -> str:
    """`A C ->` from A to C, `A C <-` from C to A: the earlier letter first."""
    return f"{names[tail]} {names[head]} ->" if tail < head else f"{names[head]} {names[tail]} <-"


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
        if (i, j) in graph.arrows:
            return [f"Holds: {_arrow(names, i, j)}."]
        if (j, i) in graph.arrows:
            return [f"Fails: {_arrow(names, j, i)}."]
        return [f"Fails: {names[i]} {names[j]} {'can turn' if graph.adjacent(i, j) else 'apart'}."]
    shared = dag_of(mec.n, tuple(graph.arrows))
    lines = _follow(names, shared, relation, i, j)
    if holds(shared, relation, i, j):
        return [*lines, f"Holds: {_witness(names, shared, relation, i, j)}."]
    if not holds(_turning(graph), relation, i, j):
        return [*lines, "Fails: no way."]
    if mec.entails(relation, i, j):
        for case in _cases(graph, mec.members, relation, i, j):
            arrows = _shared(case, mec.n)
            told = sorted((arrow for arrow in _arrows(arrows) if arrow not in graph.arrows), key=sorted)
            lines.append(_line("Case:", [_arrow(names, a, b) for a, b in told]))
            lines.append(f"Holds: {_witness(names, arrows, relation, i, j)}.")
        return lines
    # the plainest counterexample: the fewest arrows to follow
    failing = [dag for dag in mec.members if not holds(dag, relation, i, j)]
    member = min(failing, key=lambda dag: (_size(dag, relation, i, j), dag))
    told = sorted((arrow for arrow in _arrows(member) if arrow not in graph.arrows), key=sorted)
    lines.append(_line("Member:", [_arrow(names, a, b) for a, b in told]))
    return [*lines, *_follow(names, member, relation, i, j), "Fails: there."]


def _arrows(dag: Dag) -> list[Edge]:
    return [(a, b) for a in range(len(dag)) for b in bits(dag[a])]


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
