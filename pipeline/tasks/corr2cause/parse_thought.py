r"""Parse the graph that a thought states, in any wording, for the structure reward.

It parses proofs ("A B ->.", "A C apart given B", "A C | B."), arrows between names ("A -> B <- C", "A → B", "A — B"),
the same in LaTeX ("A \to B \leftarrow C", "A \perp C \mid B") and plain sentences ("A directly causes B", "A and C are
independent given B"). Of two statements about one pair, the later counts. It ignores sentences copied from the premise,
and lines about a case, a member or an assumption.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations

from pipeline.tasks.corr2cause.graphs import EquivalenceClass
from pipeline.tasks.corr2cause.parse_premise import Premise, class_of, read_premise

Pair = tuple[int, int]


@dataclass
class Structure:
    """The stated or the true graph. Each part is a set, for precision and recall."""

    skeleton: set[Pair] = field(default_factory=set)
    separating_sets: set[tuple[int, int, tuple[int, ...]]] = field(default_factory=set)
    v_structures: set[tuple[int, int, int]] = field(default_factory=set)
    cpdag: set[tuple[int, int, str]] = field(default_factory=set)  # each link with its mark
    compelled: set[Pair] = field(default_factory=set)  # tail, head


@lru_cache(maxsize=4096)
def parse_question(question: str) -> tuple[Premise, EquivalenceClass, str] | None:
    """Return (premise, its class, the premise's text) of a question; None if it cannot be parsed or no DAG fits."""
    text = question.split("\nHypothesis:")[0].removeprefix("Premise:").strip()
    try:
        premise = read_premise(text)
    except ValueError:
        return None
    mec = class_of(premise.n, premise.independences, minimal=premise.minimal)
    return (premise, mec, text) if mec else None


def true_structure(mec: EquivalenceClass) -> Structure:
    """Return the true graph. Every separating set counts as right, even if a minimal premise states only one."""
    graph = mec.pattern
    links = {(min(e), max(e)) for e in graph.arrows} | set(graph.lines)
    marks = {(i, j, "->" if (i, j) in graph.arrows else "<-" if (j, i) in graph.arrows else "--") for i, j in links}
    return Structure(links, set(mec.independences), set(graph.v_structures), marks, set(graph.arrows))


_RIGHT, _LEFT, _LINE = r"-{1,2}>|→|⟶|⇒", r"<-{1,2}|←|⟵|⇐", r"--|—|–|―|<->|↔"
_SUPPOSED = re.compile(r"^\s*(?:case|member|holds|fails|never|there|open|from|to|suppose|assume|if)\b.*$", re.I | re.M)


_FORCED = re.compile(r"^Forced: .*$", re.M)  # of a proof in steps: `C A apart` there cites no set
_CALLED = re.compile(r"^Names: ((?:\S+ [A-Z]\. )*\S+ [A-Z])\.$", re.M)


MAX_CHARACTERS = 60_000  # the last characters of a thought are parsed: the later statement about a pair counts
_LATEX = {  # the meaning of each command
    **dict.fromkeys(
        ("to", "rightarrow", "longrightarrow", "Rightarrow", "Longrightarrow", "implies", "mapsto"), " -> "
    ),
    **dict.fromkeys(("gets", "leftarrow", "longleftarrow", "Leftarrow", "Longleftarrow", "impliedby"), " <- "),
    **dict.fromkeys(("leftrightarrow", "longleftrightarrow", "Leftrightarrow"), " <-> "),
    **dict.fromkeys(("perp", "bot", "indep", "independent", "Perp", "upmodels"), " ⊥ "),
    **dict.fromkeys(("mid", "vert", "lvert", "rvert", "bigm"), " | "),
    **dict.fromkeys(("emptyset", "varnothing"), " ∅ "),
    **dict.fromkeys(("land", "wedge"), " and "),
    **dict.fromkeys(("quad", "qquad"), " "),
}
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_NOT_APART = re.compile(
    r"\\(?:center)?not\s?\{?\s?\\(?:perp|bot|indep|independent|Perp)(?![A-Za-z])|\\n(?:perp|indep)(?![A-Za-z])|[⊥⫫][̸̷]"
)
_FONTS = re.compile(
    r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it|sf|rel|bin|op)|operatorname|boldsymbol) ?\{([^{}]{0,80})\}"
)


def plain(thought: str) -> str:
    r"""Return a thought without LaTeX and emphasis, such as `A -> B <- C` for `A \to B \leftarrow C`.

    Words are one blank apart. Dependence (`A \not\perp B`) does not become independence.
    """
    text = _one_blank(thought)[-MAX_CHARACTERS:].replace("*", "").replace("`", "")
    if re.search(r"[\\$̸̷]", text):
        text = _FONTS.sub(r"\1", _NOT_APART.sub(" depends on ", text.replace(r"\!", "")))
        text = re.sub(r"(?:\$|\\\)) ?(?:\$|\\\()", " , ", text)  # one formula ends, another begins
        text = re.sub(r"\\[\[\]]|\\\\|\$\$", "\n", text)
        text = re.sub(r"\\[,;: ]|[$~]|\\[()]", " ", text)
        text = text.replace(r"\{", "{").replace(r"\}", "}").replace(r"\|", "|")
        text = _COMMAND.sub(lambda match: _LATEX.get(match[1], f" {match[1]} "), text)
        text = re.sub(r"\{ ?([^{}\n]{0,80}?) ?\}", r"{\1}", _one_blank(text))
        text = re.sub(r"\{ ?((?:⊥ ?){1,3})\}", r"\1", text)
    text = re.sub(r" ?[⊥⟂⫫](?: ?[⊥⟂⫫])* ?", " ⊥ ", text)
    return _one_blank(text)


def _one_blank(text: str) -> str:
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def read_structure(thought: str, names: Sequence[str], copied: str = "") -> Structure:
    """Return the graph that the thought states about these variables, without sentences of `copied` (the premise)."""
    thought = plain(thought)
    for sentence in re.split(r"(?<=\.)\s+", copied):
        words = sentence.removeprefix("However, ").split(" are as follows: ")[-1].strip()
        thought = thought.replace(words, " ") if words else thought
    words = _SUPPOSED.sub("", thought)
    if called := _CALLED.search(words):  # from here on letters stand for the names: what was read stands beside them
        letters = dict(item.split(" ") for item in called[1].split(". "))
        if list(letters) == list(names):
            names, words = list(letters.values()), re.sub(r"(?m)(?<=[:.] )[^:.,\n]*, ", "", words[called.end() :])
    node = {name.lower(): k for k, name in enumerate(names)}
    # a name is a whole word; single letters must be capitals, because otherwise every "a" would be a variable
    flags = 0 if all(len(name) == 1 for name in names) else re.I
    name = rf"(?<!\w)(?:{'|'.join(sorted(map(re.escape, names), key=len, reverse=True))})(?!\w)"
    found = Structure()
    marks: list[tuple[int, int, int, str]] = []  # position, tail or first, head or second, mark

    def take(pattern: str, mark: str, text: str) -> None:
        for match in re.finditer(pattern, text, flags):
            a, b = node[match["a"].lower()], node[match["b"].lower()]
            kind = match["mark"] if mark == "own" else mark
            if a != b:
                marks.append((match.start(), a, b, "->" if re.fullmatch(_RIGHT, kind) else kind))

    two = rf"(?P<a>{name}) (?P<b>{name})"
    onward = r"(?!\s+(?:indep|⟂|⊥|⫫|_\|\|_|is\b))"  # not the first variable of the next statement
    listed = rf"(?P<set>(?:[{{(]?\s*)(?:{name})(?:[\s,]*(?:and\s+)?(?:{name}){onward})*|nothing|∅|\{{\}})"
    apart = (
        rf"(?P<a>{name})(?:,? and | |, )(?P<b>{name}) (?:are )?(?:apart|independent|separated)"
        rf"(?:,? (?:given|by) {listed})?",
        rf"(?P<a>{name}) is (?:conditionally )?independent of (?P<b>{name})(?:,? given {listed})?",
        rf"(?P<a>{name}) (?:indep|⟂|⊥|⫫|_\|\|_) (?P<b>{name})(?: ?\| ?{listed})?",
        rf"{two} \|(?: {listed})?(?=\.| passes| collides)",  # of a proof in steps
    )
    for pattern in apart:
        for match in re.finditer(pattern, _FORCED.sub(lambda line: " " * len(line[0]), words), flags):
            a, b = sorted((node[match["a"].lower()], node[match["b"].lower()]))
            given = {node[listed_name.lower()] for listed_name in re.findall(name, match["set"] or "", flags)}
            if a != b:
                found.separating_sets.add((a, b, tuple(sorted(given))))
                marks.append((match.start(), a, b, "apart"))
    # a proof's links "A B ->" are taken before "A -> B", because otherwise "A D -> C D ->" would contain D -> C
    own = rf"{two} (?P<mark>->|<-|--)(?=[.,;\s]|$)"
    take(own, "own", words)
    rest = re.sub(own, lambda match: " " * len(match[0]), words, flags=flags)
    for match in re.finditer(
        rf"(?P<a>{name})\s*(?:{_RIGHT})\s*(?P<c>{name})\s*(?:{_LEFT})\s*(?P<b>{name})", rest, flags
    ):
        a, c, b = (node[match[key].lower()] for key in "acb")
        found.v_structures.add((min(a, b), c, max(a, b)))
    take(rf"(?P<a>{name})\s*(?:{_RIGHT})\s*(?=(?P<b>{name}))", "->", rest)
    take(rf"(?P<b>{name})\s*(?:{_LEFT})\s*(?=(?P<a>{name}))", "->", rest)
    take(rf"(?P<a>{name})\s*(?:{_LINE}| - )\s*(?=(?P<b>{name}))", "--", rest)
    cause = r"(?:directly (?:causes|affects)|has a direct (?:causal )?effect on|is a direct cause of)"
    take(rf"(?P<a>{name}) {cause} (?P<b>{name})", "->", rest)
    take(
        rf"(?P<a>{name})(?:,? and | )(?P<b>{name}) (?:are )?(?:directly )?(?:linked|adjacent|connected)", "linked", rest
    )

    last: dict[Pair, tuple[int, int, str]] = {}
    for _, a, b, mark in sorted(marks, key=lambda entry: entry[0]):
        pair = (min(a, b), max(a, b))
        if mark == "<-":
            a, b, mark = b, a, "->"
        if mark == "linked" and pair in last and last[pair][2] in ("->", "--"):
            continue  # adds nothing to the earlier statement
        last[pair] = a, b, mark
    for pair, (a, b, mark) in last.items():
        if mark == "apart":
            continue
        found.skeleton.add(pair)
        if mark == "->":
            found.compelled.add((a, b))
        if mark != "linked":
            found.cpdag.add((*pair, "--" if mark == "--" else "->" if a < b else "<-"))
    # two arrows into one variable from variables that are not linked are a v-structure
    for c in range(len(names)):
        tails = sorted(a for a, b in found.compelled if b == c)
        found.v_structures |= {(a, c, b) for a, b in combinations(tails, 2) if (a, b) not in found.skeleton}
    return found


def agreement(stated: Structure, true: Structure) -> dict[str, float]:
    """Return the F1 of each part. Of separating sets, one for each pair that has one is enough.

    If a part is empty in the true graph and nothing is stated about it, its F1 is that of the skeleton: so a thought
    that states nothing earns nothing.
    """
    skeleton = _f1(stated.skeleton, true.skeleton)
    if not true.skeleton and not stated.separating_sets:
        skeleton = 0.0
    found = {"skeleton": skeleton}
    right = stated.separating_sets & true.separating_sets
    pairs = {(i, j) for i, j, _ in true.separating_sets}
    precision = len(right) / len(stated.separating_sets) if stated.separating_sets else 0.0
    recall = len({(i, j) for i, j, _ in right}) / len(pairs) if pairs else 0.0
    found["separating_sets"] = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    if not pairs:
        found["separating_sets"] = 0.0 if stated.separating_sets else skeleton
    for part in ("v_structures", "cpdag", "compelled"):
        stated_part, true_part = getattr(stated, part), getattr(true, part)
        found[part] = _f1(stated_part, true_part) if true_part else (0.0 if stated_part else skeleton)
    return found


def _f1(stated: set[object] | set[Pair], true: set[object] | set[Pair]) -> float:
    both = len(set(stated) & set(true))
    return 2 * both / (len(stated) + len(true)) if both else float(not stated and not true)
