"""Parse premises and claims, and find the equivalence class that fits a premise.

It parses both published wordings, with any names for the variables:

    Suppose there is a closed system of 3 variables, A, B and C. All the statistical relations among these 3 variables
    are as follows: A correlates with B. … However, A and C are independent given B.

    Suppose there is a closed system of 3 variables, A, B, and C, whose causal structure forms a directed acyclic graph
    and satisfies faithfulness. All the conditional independence relations are: A indep C | B.

It also parses a story ("… goes together with …") and a minimal premise (one smallest separating set per pair). It
shares no code with `wording`, which writes them. A ValueError names the text that cannot be parsed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

from pipeline.tasks.corr2cause.graphs import MAX_N, EquivalenceClass, Independence, completed, consistent_extension


@dataclass(frozen=True)
class Premise:
    """A parsed premise: the names in its order, and the independences of the nodes 0…n-1 with these names."""

    names: tuple[str, ...]
    independences: tuple[Independence, ...]
    wording: str  # published, story or indep
    minimal: bool = False  # one separating set for each pair that has one, instead of all

    @property
    def n(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Claim:
    """A parsed hypothesis: a relation of the variables i and j. In symmetric relations, either may be first."""

    relation: str
    i: int
    j: int


_OPENING = re.compile(r"closed system of (?P<n>\d+) variables, (?P<rest>.*)", re.DOTALL)
_STATEMENTS = re.compile(r"\. [^.:]*\b(?:are|is)(?: as follows)?:(?P<words>.*)", re.DOTALL)
_FAITHFUL = ", whose causal structure forms a directed acyclic graph and satisfies faithfulness"


def read_premise(text: str) -> Premise:
    """Parse a premise. Every pair must be stated as dependent or independent, and no statement may occur twice.

    Raises ValueError for any other text.
    """
    opening = _OPENING.search(text.strip())
    if not opening:
        raise ValueError('no "closed system of N variables, …"')
    count = opening["n"]
    if len(count) > 3 or int(count) > MAX_N:
        raise ValueError(f"got {count[:12]} variables; expected at most {MAX_N}")
    head, indep = opening["rest"], _FAITHFUL in opening["rest"]
    statements = _STATEMENTS.search(head)
    if not statements:
        raise ValueError('no list of relations ("… are as follows: …", "… independence relations are: …")')
    listed = head[: statements.start()].replace(_FAITHFUL, "")
    names = tuple(re.split(r", and |, | and ", listed))
    if len(names) != int(opening["n"]) or len(set(names)) != len(names) or len(names) < 2:
        raise ValueError(f"got {len(set(names))} different names for {opening['n']} variables: {listed}")
    node = {name: k for k, name in enumerate(names)}
    body = statements["words"].strip()
    minimal = "each with one smallest such set" in head[statements.start() : statements.start("words")]
    story = not indep and any(mark in body for mark in _STORY_MARKS)
    found = _indep_statements(body, node) if indep else _sentences(body, node, story=story, minimal=minimal)
    if minimal and len({(i, j) for i, j, _ in found}) < len(found):
        raise ValueError("a pair has two sets; expected one set per pair")
    return Premise(names, tuple(sorted(found)), "indep" if indep else "story" if story else "published", minimal)


_STORY_MARKS = (" goes together with ", " has nothing to do with ", " among cases alike in ")


def _sentences(body: str, node: dict[str, int], *, story: bool, minimal: bool) -> set[Independence]:
    """Parse the sentences of a published premise or a story."""
    name = "|".join(sorted(map(re.escape, node), key=len, reverse=True))
    phrases = (
        ("goes together with", "has nothing to do with", "are unrelated among cases alike in")
        if story
        else ("correlates with", "is independent of", "are independent given")
    )
    dependent = re.compile(rf"({name}) {phrases[0]} ({name})")
    marginal = re.compile(rf"({name}) {phrases[1]} ({name})")
    given = re.compile(rf"({name}) and ({name}) {phrases[2]} (.*)")
    linked: set[tuple[int, int]] = set()
    found: set[Independence] = set()
    for sentence in (part.strip().rstrip(".") for part in re.split(r"\.\s+|\.$", body)):
        words = sentence.removeprefix("However, ")
        if not words or (minimal and words == "none"):
            continue
        if match := dependent.fullmatch(words):
            pair = _pair(node, match[1], match[2])
            _add(linked, pair, words)
        elif match := marginal.fullmatch(words):
            _add(found, (*_pair(node, match[1], match[2]), ()), words)
        elif match := given.fullmatch(words):
            _add(found, _independence(node, match[1], match[2], re.split(r", and |, | and ", match[3]), words), words)
        else:
            raise ValueError(f"cannot read {words!r}")
    if minimal:
        if linked:
            raise ValueError("a list of independent pairs names a pair that correlates")
        return found
    apart = {(i, j) for i, j, cut in found if not cut}
    for i, j in combinations(range(len(node)), 2):
        if ((i, j) in linked) == ((i, j) in apart):
            pair_names = f"{list(node)[i]} and {list(node)[j]}"
            if (i, j) in linked:
                raise ValueError(f"{pair_names} both correlate and are independent")
            raise ValueError(f"{pair_names} have neither a correlation nor an independence")
    return found


def _indep_statements(body: str, node: dict[str, int]) -> set[Independence]:
    """Parse the statements `A indep B | C` of a Corr2Cause++ premise."""
    found: set[Independence] = set()
    for words in (part.strip() for part in body.rstrip(".").split(";")):
        if not words or words == "none":
            continue
        pair, _, cut = words.partition(" | ")
        first, indep, second = pair.partition(" indep ")
        if not indep:
            raise ValueError(f"cannot read {words!r}")
        _add(found, _independence(node, first, second, re.split(r",\s*", cut) if cut else [], words), words)
    return found


def _pair(node: dict[str, int], first: str, second: str) -> tuple[int, int]:
    """Return the nodes of two names, ascending. Raises ValueError if they are not two variables."""
    unknown = [name for name in (first, second) if name not in node]
    if unknown or first == second:
        raise ValueError(f"{' and '.join(unknown) or first}: not two of the variables")
    return min(node[first], node[second]), max(node[first], node[second])


def _independence(node: dict[str, int], first: str, second: str, given: list[str], words: str) -> Independence:
    """Return the independence of two names given a list of names. Raises ValueError for an impossible one."""
    pair = _pair(node, first, second)
    unknown = [name for name in given if name not in node]
    nodes = tuple(sorted(node[name] for name in given if name in node))
    if unknown or len(set(nodes)) < len(nodes) or set(nodes) & set(pair):
        problem = f"conditions on {', '.join(unknown)}, which is not a variable" if unknown else ""
        raise ValueError(f"{words!r} {problem or 'conditions on a variable twice, or on one of the two'}")
    return (*pair, nodes)


def _add(found: set, item: object, words: str) -> None:  # type: ignore[type-arg]
    """Add a statement. Raises ValueError if it is already there."""
    if item in found:
        raise ValueError(f"{words!r} is stated twice")
    found.add(item)


# every wording in all styles; X and Y are the variables in the order of the relation
_CLAIMS = (
    ("parent", "X directly causes Y"),
    ("parent", "X directly affects Y"),
    ("parent", "X has a direct causal effect on Y"),
    ("parent", "X has a direct effect on Y"),
    ("child", "X is directly affected by Y"),
    ("ancestor", "X causes something else which causes Y"),
    ("ancestor", "X is a cause for Y, but not a direct one"),
    ("ancestor", "X acts on Y by way of something else"),
    ("ancestor", "X influences Y through some mediator(s)"),
    ("ancestor", "X influences Y through some mediator(s) but not directly"),
    ("collider", "There exists at least one collider (i.e., common effect) of X and Y"),
    ("collider", "There exists at least one collider (i.e., a common child) of X and Y"),
    ("collider", "X and Y together cause some other variable(s)"),
    ("collider", "Something is an effect of both X and Y"),
    ("confounder", "Something is a cause of both X and Y"),
    ("confounder", "There exists at least one confounder (i.e., common cause) of X and Y"),
    ("confounder", "There exists at least one confounder (i.e., a common parent) of X and Y"),
    ("confounder", "Some variable(s) cause(s) both X and Y"),
)
_TURNED = {"parent": "child", "ancestor": "descendant", "child": "parent"}


def read_claim(text: str, names: tuple[str, ...]) -> Claim:
    """Parse a hypothesis. For relations with an inverse, the earlier variable is first. Raises ValueError."""
    node = {name: k for k, name in enumerate(names)}
    claim = text.strip().rstrip(".")
    for relation, pattern in _CLAIMS:
        shape = re.escape(pattern).replace("X", "(?P<i>.+?)", 1).replace("Y", "(?P<j>.+?)", 1)
        match = re.fullmatch(shape, claim)
        if match and match["i"] in node and match["j"] in node and match["i"] != match["j"]:
            i, j = node[match["i"]], node[match["j"]]
            if i > j and relation in _TURNED:
                return Claim(_TURNED[relation], j, i)
            return Claim(relation, i, j)
    raise ValueError(f"cannot read the hypothesis {claim!r} as a claim about two of {', '.join(names)}")


def class_of(n: int, independences: Iterable[Independence], *, minimal: bool = False) -> EquivalenceClass | None:
    """Return the class with exactly these independences; None if no DAG is faithful to them.

    `minimal`: the class has one of these for each pair that can be separated, of the smallest size for its pair.
    Skeleton and v-structures follow from the independences (Verma & Pearl 1990), and Meek's rules complete the CPDAG.
    The independences of a DAG of that CPDAG must then be the given ones.
    """
    wanted = set(independences)
    cut = {(i, j): set(given) for i, j, given in sorted(wanted, reverse=True)}
    skeleton = frozenset(pair for pair in combinations(range(n), 2) if pair not in cut)

    def linked(a: int, b: int) -> bool:
        return (min(a, b), max(a, b)) in skeleton

    vees = frozenset(
        (a, c, b)
        for (a, b), given in cut.items()
        for c in range(n)
        if c not in (a, b) and c not in given and linked(a, c) and linked(b, c)
    )
    arrows = {arrow for a, c, b in vees for arrow in ((a, c), (b, c))}
    if any((b, a) in arrows for a, b in arrows):
        return None
    pattern = completed(n, skeleton, vees)
    if consistent_extension(pattern) is None:
        return None
    found = EquivalenceClass(pattern)
    if not minimal:
        return found if set(found.independences) == wanted else None
    size: dict[tuple[int, int], int] = {}
    for i, j, given in found.independences:
        size[i, j] = min(len(given), size.get((i, j), n))
    fits = wanted <= set(found.independences) and all(len(given) == size[i, j] for i, j, given in wanted)
    return found if fits else None
