"""Check every step of a proof against the premise.

`check_proof(question, thought)` parses the premise and the hypothesis, then checks the lines of `proof_writer` one by
one, and reports the first step that does not follow. It shares no code with the solver or with the proof writer: graphs
here are sets of arrows and lines, and paths are enumerated. That the cases cover every member is verified by turning
the open links both ways. So a thought that it accepts is a proof, from any author.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from string import ascii_uppercase

from pipeline.tasks.corr2cause.graphs import PUBLISHED, Semantics
from pipeline.tasks.corr2cause.parse_premise import Claim, Premise, read_claim, read_premise

Arrow = tuple[int, int]
Arrows = frozenset[Arrow]


@dataclass
class ProofResult:
    """The proof's verdict (None without one), and an error message for the step that does not follow."""

    verdict: str | None = None
    problems: list[str] = field(default_factory=list)
    lines: int = 0
    followed: int = 0  # lines before the first that does not follow

    @property
    def valid(self) -> bool:
        return self.verdict is not None and not self.problems


class _Wrong(Exception):
    """A step that does not follow."""


def check_proof(question: str, thought: str, semantics: Semantics = PUBLISHED, *, three: bool = False) -> ProofResult:
    """Check a thought (without its tags) against its question. Raises ValueError if the question cannot be parsed."""
    texts = question.removeprefix("Premise: ").split("\nHypothesis: ")
    premise = read_premise(texts[0])
    reader = _Reader(premise, read_claim(texts[1].split("\n")[0], premise.names), semantics, three)
    lines = [line for line in thought.strip().splitlines() if line.strip()]
    found = ProofResult(lines=len(lines))
    for number, line in enumerate(lines, 1):
        try:
            reader.step(line.strip())
        except (_Wrong, ValueError, IndexError, StopIteration, TypeError) as wrong:
            reason = wrong if isinstance(wrong, _Wrong) else "cannot be read"
            found.problems.append(f"line {number}: {reason}: {line}")
            return found  # the later steps depend on this one
        found.followed = number
    try:
        found.verdict = reader.end()
    except _Wrong as wrong:
        found.problems.append(f"the end: {wrong}")
    return found


_BEFORE = {  # title -> the titles of which one must come directly before it
    "Claim": ("", "Graph"),
    "Names": ("Claim",),
    "Pairs": ("Claim", "Names"),
    "Links": ("Claim",),
    "Neighbours": ("Pairs",),
    "Between": ("Neighbours",),
    "At": ("Pairs", "At"),
    "Arrows": ("Between", "At"),
    "Forced": ("Arrows", "Forced"),
    "Graph": ("Arrows", "Forced", "Links"),
}


_MARKS = ("->", "<-", "--", "|")


class _Reader:
    """The state of a proof: the facts shown so far, and the steps that may come next."""

    def __init__(self, premise: Premise, claim: Claim, semantics: Semantics, three: bool) -> None:
        self.premise, self.semantics, self.three = premise, semantics, three
        turned = {"child": "parent", "descendant": "ancestor"}
        i, j = (claim.j, claim.i) if claim.relation in turned else (claim.i, claim.j)
        self.relation, self.i, self.j = turned.get(claim.relation, claim.relation), i, j
        self.called = tuple(premise.names)  # what the proof calls the variables
        self.node = {name: k for k, name in enumerate(self.called)}
        self.apart: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        for a, b, given in premise.independences:
            self.apart.setdefault((a, b), []).append(given)
        self.links = {pair for pair in combinations(range(premise.n), 2) if pair not in self.apart}
        self.cited: dict[tuple[int, int], tuple[int, ...]] = {}
        self.arrows: Arrows = frozenset()  # shown so far
        self.seen: list[str] = []  # the titles of the lines so far
        self.cases: list[Arrows] = []
        self.current: Arrows | None = None  # the arrows of the current case or member
        self.followed: list[int] = []
        self.could: list[int] = []  # followed over open links too
        self.visited: list[int] = []  # the variables of the At lines
        self.holding = False  # a member with the claim has been shown
        self.verdict: str | None = None
        self.steps: dict[str, Callable[[str], None]] = {
            "Claim": self._claim,
            "Names": self._names,
            "Pairs": self._pairs,
            "Links": self._links,
            "Neighbours": self._neighbours,
            "Between": self._between,
            "At": self._at,
            "Arrows": self._arrows,
            "Forced": self._forced,
            "Graph": self._graph,
            "Link": self._link,
            "From": self._from,
            "To": self._to,
            "Case": self._case,
            "Member": self._member,
            "Holds": self._holds,
            "Fails": self._fails,
            "Never": self._never,
            "There": self._there,
            "Open": self._open,
        }

    # ---- lines

    def step(self, line: str) -> None:
        """Check one line. Raises _Wrong, or an error of a malformed line."""
        title = re.split(r"[: ]", line, maxsplit=1)[0]
        rest = line[len(title) :].lstrip(":").strip()
        last = self.seen[-1] if self.seen else ""
        if " has a direct causal effect on " in line or line == "No edge is shared.":
            return self._edges(line)
        if title not in self.steps:
            raise _Wrong("not a step of a proof")
        if title in _BEFORE:
            if last not in _BEFORE[title]:
                raise _Wrong(f"{title} cannot come after {last or 'nothing'}")
        elif "Graph" not in self.seen:
            raise _Wrong("the graph has not been shown yet")
        elif self.verdict is not None and not (self.cases and title == "Case"):
            raise _Wrong("the claim has been decided already")
        self.steps[title](rest)
        self.seen.append(title)
        return None

    def end(self) -> str:
        """Return the verdict. Raises _Wrong without one, or if the cases do not cover every member."""
        if self.verdict is None:
            raise _Wrong("no decision")
        if self.cases and not self._covered(self.arrows):
            raise _Wrong("a member is in none of the cases")
        return self.verdict

    # ---- the steps, in their order

    def _claim(self, rest: str) -> None:
        a, b = self._name(self.i), self._name(self.j)
        shape = {"parent": f"{a} direct {b}", "ancestor": f"{a} indirect {b}"}
        shape |= {"collider": f"effect {a} {b}", "confounder": f"cause {a} {b}"}
        self._need(rest == f"{shape[self.relation]}.", "this is not the hypothesis")

    def _names(self, rest: str) -> None:
        called = [item.split(" ") for item in _items(rest)]
        letters = [letter for _, letter in called]
        self._need([name for name, _ in called] == list(self.premise.names), "not the variables, in their order")
        self._need(letters == list(ascii_uppercase[: len(letters)]), "not the first letters of the alphabet")
        self.called, self.node = tuple(letters), {letter: k for k, letter in enumerate(letters)}

    def _pairs(self, rest: str) -> None:
        named = []
        for item in _items(rest):
            if self.called != self.premise.names:
                letter = dict(zip(self.premise.names, self.called, strict=True))
                read, _, item = item.partition(", ")
                self._need(item == " ".join(letter.get(word, word) for word in read.split(" ")), f"{read}: not {item}")
            words = item.split(" ")
            pair = self._pair(words[0], words[1])
            named.append(pair)
            if words[2:] in (["linked"], ["--"]):
                self._need(pair in self.links, f"{item}: in the premise they are independent")
                continue
            self._need(words[2] == "|" or words[2:4] == ["apart", "given"], f"{item}: neither linked nor apart")
            listed = words[3:] if words[2] == "|" else words[4:]
            given = tuple(sorted(self._node(name) for name in listed)) if listed != ["nothing"] else ()
            self._need(given in self.apart.get(pair, []), f"{item}: the premise does not state this")
            self.cited[pair] = given
        self._need(sorted(named) == list(combinations(range(self.premise.n), 2)), "not every pair once")

    def _links(self, rest: str) -> None:
        named = [self._pair(*item.split(" ")) for item in _items(rest)]
        self._need(sorted(named) == sorted(self.links), "not exactly the pairs that no set separates")
        self.cited = {pair: sets[0] for pair, sets in self.apart.items()}

    def _neighbours(self, rest: str) -> None:
        found = self._lists(rest)
        self._need(list(found) == list(range(self.premise.n)), "not every variable once")
        for node, near in found.items():
            self._need(near == {k for k in found if self._linked(node, k)}, f"neighbours of {self._name(node)}")

    def _between(self, rest: str) -> None:
        named, shown = [], set()
        for item in _items(rest):
            head, _, listed = item.partition(": ")
            words = head.split(" ")
            pair = self._pair(words[0], words[1])
            named.append(pair)
            given = tuple(sorted(self._node(name) for name in words[3:])) if words[3:] != ["nothing"] else ()
            self._need(words[2] == "given" and self.cited.get(pair) == given, f"{item}: another set was cited")
            between = {k for k in self.node.values() if self._linked(pair[0], k) and self._linked(pair[1], k)}
            for entry in listed.split(", ") if listed != "none" else []:
                k = self._node(entry.split(" ")[0])
                self._need(k in between, f"{entry}: not between {head}")
                between.discard(k)
                if entry.endswith(" passes"):
                    self._need(k in given, f"{entry}: not in the set")
                    continue
                marks = re.findall(r"(\S+) (\S+) (->|<-)", entry.partition("collides")[2])
                arrows = {self._arrow(*mark) for mark in marks}
                self._need(k not in given and arrows == {(pair[0], k), (pair[1], k)}, f"{entry}: does not follow")
                shown |= arrows
            self._need(not between, f"{item}: a variable between the two is missing")
        self._need(sorted(named) == sorted(self.apart), "not every pair that is apart once")
        self.arrows = frozenset(shown)

    def _at(self, rest: str) -> None:
        name, _, listed = rest.partition(": ")
        node = self._node(name)
        self._need(node == len(self.visited), "not the next variable")
        self.visited.append(node)
        near, *items = listed.removesuffix(".").split(". ")
        around = sorted(k for k in self.node.values() if self._linked(node, k))
        self._need(near == (" ".join(map(self._name, around)) or "none"), f"neighbours of {name}")
        named = []
        for item in items:
            a, b, mark, *words = item.split(" ")
            pair = self._pair(a, b)
            named.append(pair)
            if mark == "--":
                self._need(not words and pair in self.links, f"{item}: not linked")
                continue
            self._need(mark == "|" and pair in self.cited, f"{item}: not apart")
            given = self.cited[pair]
            end = next(k for k, word in enumerate(words) if word in ("passes", "collides"))
            self._need(words[:end] == [self._name(k) for k in given], f"{item}: another set was cited")
            if words[end] == "passes":
                self._need(node in given, f"{item}: {name} is not in the set")
                continue
            marks = re.findall(r"(\S+) (\S+) (->|<-)", " ".join(words[end + 1 :]))
            arrows = {self._arrow(*mark) for mark in marks}
            follows = node not in given and arrows == {(pair[0], node), (pair[1], node)}
            self._need(follows, f"{item}: does not follow")
            self.arrows |= arrows
        self._need(named == list(combinations(around, 2)), f"not every pair of neighbours of {name} once")

    def _arrows(self, rest: str) -> None:
        if self.visited:
            self._need(len(self.visited) == self.premise.n, "not every variable was looked at")
        self._need(self._marks(rest) == self.arrows, "not the orientations shown so far")

    def _forced(self, rest: str) -> None:
        for item in _items(rest):
            head, *texts = item.split(": ")
            pair = self._pair(*head.split(" "))
            self._need(pair in self._left(), f"{item}: the link is not open")
            if len(texts) == 1:
                self._forced_by_roles(pair, texts[0])
                continue
            listed, mark = texts
            others = {}
            for entry in listed.split(", ") if listed != "none" else []:
                k, *ends = entry.split(" ")
                others[self._node(k)] = tuple(ends)
            right = {k: tuple(self._seen(k, end) for end in pair) for k in self.node.values() if k not in pair}
            right = {k: ends for k, ends in right.items() if {"into", "from"} & set(ends)}
            self._need(others == right, f"{item}: not the arrows at its ends")
            forced = [arrow for arrow in (pair, pair[::-1]) if self._rule(arrow)]
            if mark == "--":
                self._need(not forced, f"{item}: a rule forces it")
            else:
                a, b = head.split(" ")
                arrow = self._arrow(a, b, mark)
                self._need(arrow in forced, f"{item}: no rule forces it")
                self.arrows |= {arrow}

    def _forced_by_roles(self, pair: tuple[int, int], text: str) -> None:
        """Check one link: what other variables are to its ends, facts about two of them, and what follows for it."""
        *words, a, b, mark = text.replace(";", "").split(" ")
        shown: set[tuple[int, int]] = set()
        while words:
            if words[2] in _MARKS:
                one, other, found = words[:3]
                shown.add(self._pair(one, other))
                self._need(found == self._mark(*self._pair(one, other)), f"{one} {other} {found}: not what was shown")
                words = words[3:]
                continue
            k = self._node(words[0])
            for name, role in (words[1:3], words[3:5]):
                end = self._node(name)
                self._need(self._seen(k, end) == role, f"{' '.join(words[:5])}: not what was shown")
                shown.add((min(k, end), max(k, end)))
            words = words[5:]
        self._need(self._pair(a, b) == pair, f"{text}: not the link")
        if mark == "--":
            ends = {(min(k, end), max(k, end)) for end in pair for k in self.node.values() if k not in pair}
            self._need(ends <= shown, f"{text}: what a variable is to its ends is missing")
            self._need(not any(self._rule(arrow) for arrow in (pair, pair[::-1])), f"{text}: a rule forces it")
        else:
            arrow = self._arrow(a, b, mark)
            self._need(any(rests <= shown for rests in self._rules(arrow)), f"{text}: no rule forces it")
            self.arrows |= {arrow}

    def _mark(self, a: int, b: int) -> str:
        """Return what was shown of a pair: `->`, `<-`, `--` (linked) or `|` (apart)."""
        return {"into": "->", "from": "<-", "open": "--", "apart": "|"}[self._seen(a, b)]

    def _graph(self, rest: str) -> None:
        in_full = self.seen[-1] == "Arrows" and not self.visited
        self._need(not in_full, "Graph cannot come after Arrows")  # in steps it can, where nothing could be forced
        if self.seen[-1] == "Links":  # a short proof leaves the look-ups out
            self.arrows = frozenset(
                arrow
                for (a, b), given in self.cited.items()
                for k in self.node.values()
                if k not in given and self._linked(a, k) and self._linked(b, k)
                for arrow in ((a, k), (b, k))
            )
            while forced := {arrow for pair in self._left() for arrow in (pair, pair[::-1]) if self._rule(arrow)}:
                self.arrows |= {min(forced)}
        self._need(not any(self._rule(e) for pair in self._left() for e in (pair, pair[::-1])), "a rule forces more")
        self._need(self._marks(rest) == self.arrows, "not the arrows shown so far")

    # ---- the decision

    def _link(self, rest: str) -> None:
        start, seen, end = rest.rstrip(".").split(" ")
        if end in _MARKS:
            pair = self._pair(start, seen)
            self._need(set(pair) == {self.i, self.j}, "not the pair of the claim")
            self._need(end == self._mark(*pair), "not the link's orientation in the graph")
            return
        a, b = self._node(start), self._node(end)
        self._need({a, b} == {self.i, self.j}, "not the pair of the claim")
        self._need(self._seen(a, b) == seen and seen != "from", "not the link's orientation in the graph")

    def _from(self, rest: str) -> None:
        self._follow(rest, self._forwards("From", self.arrows if self.current is None else self.current), self.followed)

    def _to(self, rest: str) -> None:
        self._follow(rest, self._forwards("To", self.arrows if self.current is None else self.current), self.followed)

    def _forwards(self, kind: str, arrows: Arrows) -> Arrows:
        """Return the arrows to follow: turned round for `To`."""
        if kind == "From":
            return arrows
        self._need(self.relation == "confounder", "only a common cause is searched among ancestors")
        return frozenset((b, a) for a, b in arrows)

    def _follow(self, rest: str, arrows: Arrows, followed: list[int]) -> None:
        found = self._lists(rest)
        start = next(iter(found))
        starts = (self.i,) if self.relation == "ancestor" else (self.i, self.j)
        self._need(start == starts[len(followed) % len(starts)], "not the variable of the claim that is next")
        for node, ahead in found.items():
            self._need(ahead == {b for a, b in arrows if a == node}, f"not the nodes that follow {self._name(node)}")
        reached = {start}.union(*found.values())
        self._need(reached == set(found), "not followed to the end")
        followed.append(start)

    def _case(self, rest: str) -> None:
        self._need(not self.cases or self.seen[-1] in ("Holds", "Never"), "the last case was not decided")
        self.cases.append(self._turned(rest))
        self.current, self.verdict = self.arrows | self.cases[-1], None

    def _member(self, rest: str) -> None:
        turned = self._turned(rest)
        self.current = self.arrows | turned
        self._need({(min(e), max(e)) for e in turned} == set(self._left()), "a link is left open")
        self._need(not _cyclic(self.current), "a cycle")
        self._need(_meetings(self.current, self.links) == _meetings(self.arrows, self.links), "another v-structure")

    def _holds(self, rest: str) -> None:
        self._shown(rest)
        self.verdict = "Yes"

    def _there(self, rest: str) -> None:
        self._need(self.three and self.seen.count("Member") == 1, "there must be exactly one Member before")
        self._shown(rest)
        self.holding = True

    def _fails(self, rest: str) -> None:
        self._need(not self.three and not self.cases, "not a decision with three answers, or by cases")
        if rest == "there.":
            self._need("Member" in self.seen and not self._true(self.current or frozenset()), "it holds there")
        elif rest == "not shared.":
            self._need(self.relation == "parent" and (self.i, self.j) not in self.arrows, "the arrow is shared")
        else:
            self._impossible(rest, self.arrows)
        self.verdict = "No"

    def _never(self, rest: str) -> None:
        self._need(self.three, "not a decision with two answers")
        if rest == "not shared.":
            link = (min(self.i, self.j), max(self.i, self.j))
            absent = (self.i, self.j) not in self.arrows and link not in self._left()
            self._need(self.relation == "parent" and absent, "a member has the arrow")
        else:
            self._impossible(rest, self.current if self.cases and self.current is not None else self.arrows)
        self.verdict = "No"

    def _open(self, rest: str) -> None:
        if rest.startswith(("From ", "To ")):
            turned = set(self._left())
            open_arrows = self.arrows | turned | {arrow[::-1] for arrow in turned}
            kind, _, listed = rest.partition(" ")
            self._follow(listed, self._forwards(kind, open_arrows), self.could)
            return
        if rest == "it can turn.":
            self._need(self.relation == "parent", "only a claim about a direct cause is decided by a link")
            self._need((min(self.i, self.j), max(self.i, self.j)) in self._left(), "the link cannot turn")
        else:
            self._need(
                rest == "not there." and self.holding and self.seen.count("Member") == 2, "two members are needed"
            )
            self._need(not self._true(self.current or frozenset()), "it holds there")
        self.verdict = "Unknown"

    def _edges(self, line: str) -> None:
        edges = re.findall(r"(\S+) has a direct causal effect on (\S+)\.", line)
        node = {name: k for k, name in enumerate(self.premise.names)}  # sentences keep the premise's names
        self._need({(node.get(a), node.get(b)) for a, b in edges} == self.arrows, "not the edges that are shared")

    # ---- helpers of the steps

    def _shown(self, rest: str) -> None:
        """Check a witness: the shared arrow, a path of two arrows or more, or the variable where two paths meet."""
        arrows = self.current if self.current is not None else self.arrows
        witness = rest.rstrip(".")
        if self.relation == "parent":
            self._need(witness == "shared" and (self.i, self.j) in arrows, "the arrow is not there")
        elif self.relation == "ancestor":
            path = [self._node(name) for name in witness.split(" -> ")]
            self._need(len(path) > 2 and (path[0], path[-1]) == (self.i, self.j), "not a path of the claim")
            self._need(all(step in arrows for step in pairwise(path)), "not a path")
            strict = self.semantics.indirect == "strict"
            self._need(not (strict and self._linked(self.i, self.j)), "the two are linked")
        else:
            self._need(self._node(witness) in self._meet(arrows), "they do not meet there")

    def _impossible(self, rest: str, arrows: Arrows) -> None:
        if rest == "linked.":
            strict = self.relation == "ancestor" and self.semantics.indirect == "strict"
            self._need(strict and self._linked(self.i, self.j), "the two are not linked")
            return
        self._need(rest == "no way.", "no reason")
        turned = {pair for pair in self.links if pair not in arrows and pair[::-1] not in arrows}
        self._need(not self._true(arrows | turned | {e[::-1] for e in turned}), "there is a way")

    def _true(self, arrows: Arrows) -> bool:
        """Return whether the claim (of an indirect relation) holds on these arrows."""
        if self.relation == "ancestor":
            strict = self.semantics.indirect == "strict"
            paths = any(len(path) > 2 for path in _paths(arrows, self.i, self.j))
            return paths and not (strict and (self.i, self.j) in arrows)
        return bool(self._meet(arrows))

    def _meet(self, arrows: Arrows) -> set[int]:
        """Return the variables where directed paths from both of the claim's variables meet, by the semantics."""
        kind = self.semantics.collider if self.relation == "collider" else self.semantics.confounder
        if self.relation == "confounder":
            arrows = frozenset((b, a) for a, b in arrows)
        found = set()
        for k in set(self.node.values()) - {self.i, self.j}:
            from_i, from_j = list(_paths(arrows, self.i, k)), list(_paths(arrows, self.j, k))
            if kind in ("child", "parent"):
                meets = any(len(p) == 2 for p in from_i) and any(len(p) == 2 for p in from_j)
            elif kind in ("descendant", "ancestor"):
                meets = bool(from_i and from_j)
            else:
                meets = any(set(p) & set(q) == {k} for p in from_i for q in from_j)
            if meets:
                found.add(k)
        return found

    def _covered(self, arrows: Arrows) -> bool:
        """Return whether every member with these arrows is in one of the cases."""
        if any(case <= arrows for case in self.cases):
            return True
        if _cyclic(arrows) or _meetings(arrows, self.links) != _meetings(self.arrows, self.links):
            return True  # no member has these arrows
        left = [pair for pair in sorted(self.links) if pair not in arrows and pair[::-1] not in arrows]
        return bool(left) and all(self._covered(arrows | {turn}) for turn in (left[0], left[0][::-1]))

    def _rule(self, arrow: Arrow) -> bool:
        """Return whether Meek's R1, R2 or R3 forces this arrow."""
        return any(True for _ in self._rules(arrow))

    def _rules(self, arrow: Arrow) -> Iterator[set[tuple[int, int]]]:
        """Yield the pairs on which each use of Meek's R1, R2 and R3 rests that forces this arrow."""
        a, b = arrow
        others = [k for k in self.node.values() if k not in arrow]
        for k in others:
            first, second = (k, a) in self.arrows and not self._linked(k, b), {(a, k), (k, b)} <= self.arrows
            if first or second:
                yield {(min(a, k), max(a, k)), (min(b, k), max(b, k))}
        between = [k for k in others if (k, b) in self.arrows and (min(a, k), max(a, k)) in self._left()]
        for k, m in combinations(between, 2):
            if not self._linked(k, m):
                yield {(min(x, y), max(x, y)) for x, y in ((a, k), (a, m), (b, k), (b, m), (k, m))}

    def _left(self) -> list[tuple[int, int]]:
        """Return the links without an arrow."""
        return [pair for pair in sorted(self.links) if pair not in self.arrows and pair[::-1] not in self.arrows]

    def _seen(self, k: int, end: int) -> str:
        if (k, end) in self.arrows:
            return "into"
        if (end, k) in self.arrows:
            return "from"
        return "open" if self._linked(k, end) else "apart"

    def _linked(self, a: int, b: int) -> bool:
        return (min(a, b), max(a, b)) in self.links

    def _marks(self, rest: str) -> Arrows:
        """Return the arrows in a list of all links."""
        found, named = set(), []
        for item in _items(rest):
            a, b, mark = item.split(" ")
            named.append(self._pair(a, b))
            if mark != "--":
                found.add(self._arrow(a, b, mark))
        self._need(sorted(named) == sorted(self.links), "not every link once")
        return frozenset(found)

    def _turned(self, rest: str) -> Arrows:
        found = frozenset(self._arrow(*item.split(" ")) for item in _items(rest))
        self._need({(min(e), max(e)) for e in found} <= set(self._left()), "a link that is not open is turned")
        return found

    def _lists(self, rest: str) -> dict[int, set[int]]:
        found = {}
        for item in _items(rest):
            name, _, listed = item.partition(": ")
            found[self._node(name)] = {self._node(k) for k in listed.split(" ")} if listed != "none" else set()
        return found

    def _pair(self, a: str, b: str) -> tuple[int, int]:
        i, j = self._node(a), self._node(b)
        self._need(i < j, f"{a} {b}: not in the order of the premise")
        return i, j

    def _arrow(self, a: str, b: str, mark: str) -> Arrow:
        i, j = self._pair(a, b)
        self._need(mark in ("->", "<-"), f"{mark}: not an arrow")
        return (i, j) if mark == "->" else (j, i)

    def _node(self, name: str) -> int:
        if name not in self.node:
            raise _Wrong(f"{name!r} is not one of the variables")
        return self.node[name]

    def _name(self, node: int) -> str:
        return self.called[node]

    def _need(self, true: bool, problem: str) -> None:
        if not true:
            raise _Wrong(problem)


def _items(rest: str) -> list[str]:
    return [] if rest in ("none.", "") else rest.removesuffix(".").split(". ")


def _paths(arrows: Arrows, start: int, end: int, walked: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Yield every directed path from start to end that visits no variable twice."""
    walked = (*walked, start)
    if start == end:
        yield walked
        return
    for a, b in sorted(arrows):
        if a == start and b not in walked:
            yield from _paths(arrows, b, end, walked)


def _cyclic(arrows: Arrows) -> bool:
    left = set(arrows)
    while left:
        heads = {b for _, b in left}
        ends = {e for e in left if e[0] not in heads}
        if not ends:
            return True
        left -= ends
    return False


def _meetings(arrows: Arrows, links: set[tuple[int, int]]) -> set[tuple[Arrow, Arrow]]:
    """Return the v-structures of these arrows, as pairs of arrows."""
    return {
        (first, second)
        for first, second in combinations(sorted(arrows), 2)
        if first[1] == second[1] and (min(first[0], second[0]), max(first[0], second[0])) not in links
    }
