"""Write the proof of a Corr2Cause row: the thought that SFT teaches.

Each line is one step that follows from the lines before it and the premise:

    Claim       the hypothesis, in two words and two letters
    Pairs       every pair is linked, or apart with a separating set that the premise states (two look-ups)
    Neighbours  the links of each variable
    Between     for each pair that is apart, every variable linked to both: it `passes` if it is in their separating
                set, else it `collides`, with the two arrows into it that follow
    Arrows      the orientation of every link so far: A to B is `A B ->`, B to A is `A B <-`, none is `A B --`
    Forced      Meek's rules for each open link, in rounds until nothing changes: `A B: C into apart: ->` (C has an
                arrow into A and is apart from B, so by R1 A has an arrow into B)
    Graph       every link: an arrow that all members share, or a line that can turn (`--`)
    Claim       repeated, next to where it is needed
    Link        the orientation of the pair, if the claim is about a direct cause
    From / To   lists of children (parents), followed from the claim's variables
    Holds, Fails, Case, Member    the decision, on the shared arrows if they decide it, else by cases that
                cover all members (yes) or by one member in which the claim fails (no)

A link always has the earlier letter first, then the later one, then its mark. So its two letters identify it in every
list: a model that writes left to right first settles the pair, then its orientation.

A `short` proof leaves the look-ups out: Claim, Links (the linked pairs), Graph and the decision.

A proof in `steps` says the same in facts about pairs, `A B ->`, `A B <-`, `A B --` (linked) or `A B |` (apart), and
repeats each fact where it is needed, so that no word needs two look-ups. A small model learns it with far fewer errors:

    Claim       as above
    Names       where the variables have other names: each with the letter that stands for it from here: `X A. M B`
    Pairs       a fact for each pair, with its separating set if it is apart: `A C | B D`; after Names as it is read,
                and in letters: `X Q | M, A C | B`
    At B        the neighbours of B; then a fact for each pair of them. If the pair is apart, B `passes` (it is in
                their separating set), or it `collides`, with the two arrows into it
    Arrows      as above
    Forced      for each open link, in rounds: what each other variable is to its ends, up to one by which a rule of
                Meek applies, and what follows for the link: `A B: C A open B apart; D A into B apart A B ->`
    Graph, Claim, Link, From, To    as above, the link as a fact
    Open From, Open To    the same lists along the arrows and, both ways, the links that can turn
    Holds, Fails, Case, Member      as above

With three answers, `Holds` is Yes. `Never`, no member allows the claim, is No. `Open`, one member with the claim and
one without it, is Unknown.

Sources: Verma & Pearl 1990, Meek 1995.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from itertools import combinations
from operator import and_, or_
from string import ascii_uppercase
from typing import Literal

from pipeline.tasks.corr2cause.graphs import (
    CPDAG,
    PUBLISHED,
    Dag,
    EquivalenceClass,
    Independence,
    Semantics,
    bits,
    common_effects,
    dag_of,
    holds,
    meek,
    oriented,
    reachable,
    transpose,
)
from pipeline.tasks.corr2cause.parse_premise import Claim

Form = Literal["full", "short", "steps"]
# child and descendant are parent and ancestor of the turned pair
_TURNED = {"child": "parent", "descendant": "ancestor"}


def write_proof(
    mec: EquivalenceClass,
    names: Sequence[str],
    claim: Claim,
    stated: Sequence[Independence] | None = None,
    semantics: Semantics = PUBLISHED,
    *,
    form: Form = "full",
    three: bool = False,
) -> str:
    """Return the thought, without its tags: the lines above. The verdict follows from the last line.

    `stated` are the independences in the order of the premise: the first of each pair is cited.
    """
    relation, i, j = claim.relation, claim.i, claim.j
    if relation in _TURNED:
        relation, i, j = _TURNED[relation], j, i
    stated = mec.independences if stated is None else stated
    first = _claim(names, relation, i, j)
    called = ascii_uppercase[: mec.n] if form == "steps" else names
    decision = _Decision(mec, called, relation, i, j, semantics, form).lines(three=three)
    if form == "short":
        links = [f"{names[a]} {names[b]}" for a, b in combinations(range(mec.n), 2) if mec.pattern.adjacent(a, b)]
        return "\n".join([first, _line("Links:", links), _line("Graph:", _edges(mec.pattern, names)), *decision])
    lines = _in_steps(mec, names, stated) if form == "steps" else _in_full(mec, names, stated)
    return "\n".join([first, *lines, _claim(called, relation, i, j), *decision])


def _in_full(mec: EquivalenceClass, names: Sequence[str], stated: Sequence[Independence]) -> list[str]:
    """Return the lines from Pairs to Graph."""
    graph, nodes = mec.pattern, range(mec.n)
    given = {(a, b): cut for a, b, cut in reversed(stated)}  # the first one in the premise of each pair
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


def _forced(current: CPDAG, names: Sequence[str]) -> list[str]:
    """Return the Forced lines: rounds through the open links, until a round changes nothing or no link is open.

    Each link lists, before its mark, every variable that has an arrow at one of its ends, with its relation to both
    ends. Meek's rules follow from this list.
    """
    rounds = []
    changed = bool(current.arrows)  # the rules argue from arrows
    while changed and current.lines:
        changed, items = False, []
        for line in sorted(current.lines):
            others = {k: [_seen(current, k, end) for end in line] for k in range(current.n) if k not in line}
            shown = [f"{names[k]} {' '.join(ends)}" for k, ends in others.items() if {"into", "from"} & set(ends)]
            mark = "--"
            if found := meek(current, line):
                mark, current, changed = _mark(*found[0]), oriented(current, found[0]), True
            items.append(f"{names[line[0]]} {names[line[1]]}: {', '.join(shown) or 'none'}: {mark}")
        rounds.append(_line("Forced:", items))
    return rounds or [_line("Forced:", [])]


def _in_steps(mec: EquivalenceClass, names: Sequence[str], stated: Sequence[Independence]) -> list[str]:
    """Return the lines from Names to Graph of a proof in steps."""
    graph, nodes, called = mec.pattern, range(mec.n), ascii_uppercase[: mec.n]
    given = {(a, b): cut for a, b, cut in reversed(stated)}  # as in `_in_full`
    skeleton = CPDAG(mec.n, frozenset(), frozenset(pair for pair in combinations(nodes, 2) if pair not in given))
    renamed = list(names) != list(called)
    facts, pairs, lines = {}, [], []
    for pair in combinations(nodes, 2):
        read, facts[pair] = (
            _fact(skeleton, letters, *pair) + "".join(f" {letters[k]}" for k in given.get(pair, ()))
            for letters in (names, called)
        )
        pairs.append(f"{read}, {facts[pair]}" if renamed else read)
    if renamed:
        lines.append(_line("Names:", [f"{name} {letter}" for name, letter in zip(names, called, strict=True)]))
    lines.append(_line("Pairs:", pairs))
    for k in nodes:
        near = [x for x in nodes if skeleton.adjacent(x, k)]
        items = [" ".join(called[x] for x in near) or "none"]
        for a, b in combinations(near, 2):
            follows = ""
            if (a, b) in given:
                arrows = f"{_arrow(called, a, k)} {_arrow(called, b, k)}"
                follows = " passes" if k in given[a, b] else f" collides {arrows}"
            items.append(facts[a, b] + follows)
        lines.append(_line(f"At {called[k]}:", items))
    current = _with_colliders(graph)
    return [
        *lines,
        _line("Arrows:", _edges(current, called)),
        *_forced_by_roles(current, called),
        _line("Graph:", _edges(graph, called)),
    ]


def _forced_by_roles(current: CPDAG, names: Sequence[str]) -> list[str]:
    """Return the Forced lines of a proof in steps: rounds as in `_forced`, none without an arrow or an open link."""
    rounds = []
    changed = bool(current.arrows)
    while changed and current.lines:
        changed, items = False, []
        for a, b in sorted(current.lines):
            arrow, rule, by = meek(current, (a, b)) or (None, "", -1)
            facts = []
            for k in (k for k in range(current.n) if k not in (a, b)):
                facts.append(f"{names[k]} {names[a]} {_seen(current, k, a)} {names[b]} {_seen(current, k, b)}")
                if k == by and rule != "R3":
                    break
                facts[-1] += ";"
            else:  # R3 rests on two variables
                middles = ([k for k in range(current.n) if _middle(current, k, *ends)] for ends in ((a, b), (b, a)))
                for k, m in (pair for middle in middles for pair in combinations(middle, 2)):
                    facts.append(_fact(current, names, k, m))
                    if not current.adjacent(k, m):
                        break
                    facts[-1] += ";"
            if arrow:
                current, changed = oriented(current, arrow), True
            items.append(f"{names[a]} {names[b]}: {' '.join(facts)} {_fact(current, names, a, b)}")
        rounds.append(_line("Forced:", items))
    return rounds


def _middle(graph: CPDAG, k: int, tail: int, head: int) -> bool:
    return k not in (tail, head) and (_seen(graph, k, tail), _seen(graph, k, head)) == ("open", "into")


def _fact(graph: CPDAG, names: Sequence[str], a: int, b: int) -> str:
    """Format what the graph has between two variables, the earlier letter first: an arrow, `--`, or `|` for nothing."""
    a, b = min(a, b), max(a, b)
    mark = {"into": "->", "from": "<-", "open": "--", "apart": "|"}[_seen(graph, a, b)]
    return f"{names[a]} {names[b]} {mark}"


def _seen(graph: CPDAG, k: int, end: int) -> str:
    """Return a variable's relation to one end of a link: an arrow `into` it, `from` it, an `open` link, `apart`."""
    if (k, end) in graph.arrows:
        return "into"
    if (end, k) in graph.arrows:
        return "from"
    return "open" if graph.adjacent(k, end) else "apart"


def _mark(tail: int, head: int) -> str:
    return "->" if tail < head else "<-"


def _arrow(names: Sequence[str], tail: int, head: int) -> str:
    """Format an arrow, the earlier letter first: `A C ->` from A to C, `A C <-` from C to A."""
    return f"{names[min(tail, head)]} {names[max(tail, head)]} {_mark(tail, head)}"


def _edges(graph: CPDAG, names: Sequence[str]) -> list[str]:
    """Format every link with its mark, sorted by pair."""
    lines = [(edge, f"{names[edge[0]]} {names[edge[1]]} --") for edge in graph.lines]
    arrows = [((min(edge), max(edge)), _arrow(names, *edge)) for edge in graph.arrows]
    return [text for _, text in sorted(lines + arrows)]


def _line(title: str, items: list[str]) -> str:
    return " ".join([title, *(f"{item}." for item in items or ["none"])])


def _with_colliders(graph: CPDAG) -> CPDAG:
    """Return the skeleton with only its v-structures oriented."""
    arrows = frozenset(arrow for a, c, b in graph.v_structures for arrow in ((a, c), (b, c)))
    edges = {(min(e), max(e)) for e in graph.arrows} | graph.lines
    return CPDAG(graph.n, arrows, frozenset(e for e in edges if e not in arrows and e[::-1] not in arrows))


def _claim(names: Sequence[str], relation: str, i: int, j: int) -> str:
    """Return the Claim line."""
    forms = {
        "parent": f"{names[i]} direct {names[j]}",
        "ancestor": f"{names[i]} indirect {names[j]}",
        "collider": f"effect {names[i]} {names[j]}",
        "confounder": f"cause {names[i]} {names[j]}",
    }
    return f"Claim: {forms[relation]}."


@dataclass(frozen=True)
class _Decision:
    """The decision of one claim on the graph of a class."""

    mec: EquivalenceClass
    names: Sequence[str]
    relation: str  # parent, ancestor, collider or confounder
    i: int
    j: int
    semantics: Semantics
    form: Form = "full"

    def lines(self, *, three: bool) -> list[str]:
        """Return the lines after the second Claim."""
        graph, names, i, j = self.mec.pattern, self.names, self.i, self.j
        lines: list[str] = []
        if self.relation == "parent" or (self.relation == "ancestor" and self.semantics.indirect == "strict"):
            turned = (j, i) in graph.arrows
            start, end = (j, i) if turned else (i, j)
            link = _seen(graph, start, end)
            role = f"{names[start]} {link} {names[end]}"
            lines.append(_line("Link:", [_fact(graph, names, i, j) if self.form == "steps" else role]))
            if self.relation == "parent":
                if (i, j) in graph.arrows:
                    return [*lines, "Holds: shared."]
                if three:
                    return [*lines, "Open: it can turn." if link == "open" else "Never: not shared."]
                return [*lines, "Fails: not shared."]
            if link != "apart":  # linked either way, one variable is never strictly indirect to the other
                return [*lines, "Never: linked." if three else "Fails: linked."]
        shared = dag_of(self.mec.n, tuple(graph.arrows))
        lines += _follow(names, shared, self.relation, i, j)
        if self.holds(shared):
            return [*lines, f"Holds: {self.witness(shared)}."]
        turning = _turning(graph)
        if self.form == "steps" and graph.lines:
            lines += [f"Open {line}" for line in _follow(names, turning, self.relation, i, j)]
        if not self.holds(turning):
            return [*lines, "Never: no way." if three else "Fails: no way."]
        if self.mec.entails(self.relation, i, j, self.semantics):
            for case in _cases(graph, self.mec.members, lambda found: self.holds(_shared(found, graph.n))):
                arrows = _shared(case, graph.n)
                lines.append(_line("Case:", _turned(names, graph, arrows)))
                lines.append(f"Holds: {self.witness(arrows)}.")
            return lines
        if three and not self.mec.allows(self.relation, i, j, self.semantics):
            for case in _cases(graph, self.mec.members, lambda found: not self.holds(_either(found, graph.n))):
                lines.append(_line("Case:", _turned(names, graph, _shared(case, graph.n))))
                lines.append("Never: no way.")
            return lines
        if three:
            member = self.plainest(holding=True)
            lines.append(_line("Member:", _turned(names, graph, member)))
            lines += [*_follow(names, member, self.relation, i, j), f"There: {self.witness(member)}."]
        member = self.plainest(holding=False)
        lines.append(_line("Member:", _turned(names, graph, member)))
        return [*lines, *_follow(names, member, self.relation, i, j), "Open: not there." if three else "Fails: there."]

    def holds(self, dag: Dag) -> bool:
        return holds(dag, self.relation, self.i, self.j, self.semantics)

    def plainest(self, *, holding: bool) -> Dag:
        """Return the member with (or without) the claim that has the fewest arrows to follow."""
        found = [dag for dag in self.mec.members if self.holds(dag) == holding]
        return min(found, key=lambda dag: (_size(dag, self.relation, self.i, self.j), dag))

    def witness(self, dag: Dag) -> str:
        """Return the witness of the claim on these arrows: a path of two or more, or the node where two paths meet."""
        i, j, names = self.i, self.j, self.names
        if self.relation == "ancestor":
            paths: list[tuple[int, ...]] = [(i, k) for k in bits(dag[i]) if k != j]
            for path in paths:  # the list grows during the loop: the shortest path comes first
                if dag[path[-1]] >> j & 1:
                    return " -> ".join(names[k] for k in (*path, j))
                paths.extend((*path, k) for k in bits(dag[path[-1]]) if k not in path)
        kind = self.semantics.key(self.relation, i, j)[0].partition("/")[2]
        return names[common_effects(_step(dag, self.relation), i, j, kind)[0]]


def _turned(names: Sequence[str], graph: CPDAG, dag: Dag) -> list[str]:
    """Format the arrows of a DAG that are lines of the graph, in the order of their links."""
    arrows = [(a, b) for a in range(len(dag)) for b in bits(dag[a]) if (a, b) not in graph.arrows]
    return [_arrow(names, *arrow) for arrow in sorted(arrows, key=sorted)]


def _turning(graph: CPDAG) -> Dag:
    """Return every arrow, and every line both ways: a supergraph of all members."""
    both = list(dag_of(graph.n, tuple(graph.arrows)))
    for a, b in graph.lines:
        both[a] |= 1 << b
        both[b] |= 1 << a
    return tuple(both)


def _shared(members: Sequence[Dag], n: int) -> Dag:
    """Return the arrows that all of these members have."""
    return tuple(reduce(and_, (dag[node] for dag in members)) for node in range(n))


def _either(members: Sequence[Dag], n: int) -> Dag:
    """Return the arrows that some of these members have."""
    return tuple(reduce(or_, (dag[node] for dag in members)) for node in range(n))


def _cases(
    graph: CPDAG, members: tuple[Dag, ...], decided: Callable[[tuple[Dag, ...]], bool]
) -> tuple[tuple[Dag, ...], ...]:
    """Return the fewest sets of members, split line by line, in each of which the claim is decided."""
    lines = sorted(graph.lines)
    failed: dict[tuple[Dag, ...], int] = {}  # members -> a number of cases that is not enough

    @cache
    def split(members: tuple[Dag, ...]) -> list[tuple[tuple[Dag, ...], tuple[Dag, ...]]]:
        parts = []
        for a, b in lines:
            forward = tuple(dag for dag in members if dag[a] >> b & 1)
            if forward and len(forward) < len(members):
                parts.append((forward, tuple(dag for dag in members if not dag[a] >> b & 1)))
        return parts

    def search(members: tuple[Dag, ...], most: int) -> tuple[tuple[Dag, ...], ...] | None:
        if failed.get(members, 0) >= most:
            return None
        if decided(members):
            return (members,)
        for forward, backward in split(members) if most > 1 else []:
            for size in range(1, most):
                if (first := search(forward, size)) is not None:
                    if (second := search(backward, most - len(first))) is not None:
                        return first + second
                    break
        failed[members] = most
        return None

    most = 1
    while (found := search(members, most)) is None:
        most += 1
    return found


def _starts(relation: str, i: int, j: int) -> list[int]:
    return [i] if relation == "ancestor" else [i, j]


def _step(dag: Dag, relation: str) -> Dag:
    return transpose(dag) if relation == "confounder" else dag


def _size(dag: Dag, relation: str, i: int, j: int) -> int:
    step = _step(dag, relation)
    return sum(step[k].bit_count() for start in _starts(relation, i, j) for k in bits(reachable(step, 1 << start)))


def _follow(names: Sequence[str], dag: Dag, relation: str, i: int, j: int) -> list[str]:
    """Return the From (confounder: To) lines: children (parents) of each start and all that follow, breadth first."""
    step, title = _step(dag, relation), "To" if relation == "confounder" else "From"
    lines = []
    for start in _starts(relation, i, j):
        queue, items = [start], []
        for node in queue:  # the list grows during the loop
            ahead = bits(step[node])
            items.append(f"{names[node]}: {' '.join(names[k] for k in ahead) or 'none'}")
            queue.extend(k for k in ahead if k not in queue)
        lines.append(_line(title, items))
    return lines
