"""Write the premises and hypotheses of Corr2Cause, in the published, perturbed and other styles.

    published     correlations and independences as in the published set
    paraphrased   the same premise, the hypothesis in other words
    refactored    published words, A, B, C… called Z, Y, X…
    plusplus      Corr2Cause++: stated assumptions, `A indep B | C`, and the instruction to list every compelled edge
    story         the variables are named after quantities in a study, in everyday language

A `minimal` premise lists one smallest separating set for each pair that has one, and states this. It describes the same
class in far fewer words, which large graphs need.

Sources: Jin et al. 2024 (https://arxiv.org/abs/2306.05836), with whose rows the tests compare the wording; Corr2Cause++
(https://github.com/MarkusEnglberger/Corr2Cause_PP).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from string import ascii_uppercase
from typing import Protocol

from pipeline.tasks.corr2cause.graphs import Independence

Wordings = dict[str, tuple[str, ...]]  # by relation

# The two indirect wordings are used interchangeably in the published set.
PUBLISHED: Wordings = {
    "parent": ("{i} directly causes {j}.",),
    "child": ("{j} directly causes {i}.",),
    "ancestor": ("{i} causes something else which causes {j}.", "{i} is a cause for {j}, but not a direct one."),
    "descendant": ("{j} causes something else which causes {i}.", "{j} is a cause for {i}, but not a direct one."),
    "collider": ("There exists at least one collider (i.e., common effect) of {i} and {j}.",),
    "confounder": ("There exists at least one confounder (i.e., common cause) of {i} and {j}.",),
}
PARAPHRASED: Wordings = {
    "parent": ("{i} directly affects {j}.",),
    "child": ("{j} directly affects {i}.",),
    "ancestor": ("{i} influences {j} through some mediator(s).",),
    "descendant": ("{j} influences {i} through some mediator(s).",),
    "collider": ("{i} and {j} together cause some other variable(s).",),
    "confounder": ("Some variable(s) cause(s) both {i} and {j}.",),
}
PLUSPLUS: Wordings = {
    "parent": ("{i} directly affects {j}.",),
    "child": ("{i} is directly affected by {j}.",),
    "ancestor": ("{i} influences {j} through some mediator(s) but not directly.",),
    "descendant": ("{j} influences {i} through some mediator(s) but not directly.",),
    "collider": ("There exists at least one collider (i.e., a common child) of {i} and {j}.",),
    "confounder": ("There exists at least one confounder (i.e., a common parent) of {i} and {j}.",),
}
STORY: Wordings = {
    "parent": ("{i} has a direct effect on {j}.",),
    "child": ("{j} has a direct effect on {i}.",),
    "ancestor": ("{i} acts on {j} by way of something else.",),
    "descendant": ("{j} acts on {i} by way of something else.",),
    "collider": ("Something is an effect of both {i} and {j}.",),
    "confounder": ("Something is a cause of both {i} and {j}.",),
}
CLAIMS = {
    "published": PUBLISHED,
    "paraphrased": PARAPHRASED,
    "refactored": PUBLISHED,
    "plusplus": PLUSPLUS,
    "story": STORY,
}
# the institution of a study, and its quantities: any N of one list, one word each
STUDIES = (
    ("A hospital", "age smoking exercise stress sleep weight pressure pain fever recovery coffee mood"),
    ("A school", "attendance homework noise sleep motivation grades tutoring reading breakfast stress praise age"),
    ("A farm", "rain sunshine irrigation fertilizer weeds insects yield moisture temperature frost pruning price"),
    ("A city", "traffic income rent crime parks noise jobs buses pollution tourism taxes density"),
    ("A factory", "training overtime speed defects heat vibration maintenance humidity output accidents wear cost"),
)
EDGES = 'Before the verdict, list every edge that all of these graphs share: "X has a direct causal effect on Y."'
INSTRUCTION_THREE = (
    "Does the hypothesis hold in every causal graph that fits the premise, in none of them, or in some only? "
    'Think step by step, then end with "Therefore: Yes", "Therefore: No" or "Therefore: Unknown".'
)
INSTRUCTION = (
    "Does the hypothesis hold in every causal graph that fits the premise? "
    'Think step by step, then end with "Therefore: Yes" or "Therefore: No".'
)


def series(words: Sequence[str]) -> str:
    """Join words as published, without an Oxford comma: `A`, `A and B`, `A, B and C`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


class HasIndependences(Protocol):
    """A class: the part of it that a premise describes."""

    @property
    def n(self) -> int: ...
    @property
    def independences(self) -> tuple[Independence, ...]: ...


def relations(mec: HasIndependences) -> tuple[list[tuple[int, int]], list[Independence]]:
    """Return the dependent pairs and the independences of a class, in the published order."""
    independences = list(mec.independences)
    apart = {(i, j) for i, j, given in independences if not given}
    return [pair for pair in combinations(range(mec.n), 2) if pair not in apart], independences


def smallest(independences: Sequence[Independence]) -> list[Independence]:
    """Return one independence per pair: the first with the smallest separating set."""
    found: dict[tuple[int, int], Independence] = {}
    for i, j, given in sorted(independences, key=lambda item: (len(item[2]), item)):
        found.setdefault((i, j), (i, j, given))
    return sorted(found.values())


def premise(
    names: Sequence[str],
    dependent: Sequence[tuple[int, int]],
    independent: Sequence[Independence],
    style: str = "published",
    *,
    minimal: bool = False,
    who: str = "",
) -> str:
    """Return the premise with every correlation and every independence, in the given order, with these names.

    `minimal`: the independences are one per pair, and correlations are left out. `who` is a story's institution.
    """
    system = f"closed system of {len(names)} variables"
    if style == "plusplus":
        return _plusplus(names, independent, system, minimal=minimal)
    words: tuple[str, str, str]
    if style == "story":
        opening = f"{who} measured a {system}, {series(names)}. "
        relations = "What was found is as follows: "
        words = (
            "{} goes together with {}.",
            "{} has nothing to do with {}.",
            "{} and {} are unrelated among cases alike in {}.",
        )
    else:
        opening = f"Suppose there is a {system}, {series(names)}. "
        relations = f"All the statistical relations among these {len(names)} variables are as follows: "
        words = ("{} correlates with {}.", "{} is independent of {}.", "{} and {} are independent given {}.")
    separate = [
        words[2].format(names[i], names[j], series([names[k] for k in given]))
        if given
        else words[1].format(names[i], names[j])
        for i, j, given in independent
    ]
    if minimal:
        return f"{opening}{MINIMAL} are as follows: {' '.join(separate) or 'none.'}"
    correlated = [words[0].format(names[i], names[j]) for i, j in dependent]
    return opening + relations + " However, ".join(" ".join(part) for part in (correlated, separate) if part)


MINIMAL = "The pairs that some set of the others makes independent, each with one smallest such set,"


def _plusplus(names: Sequence[str], independent: Sequence[Independence], system: str, *, minimal: bool) -> str:
    """Return the premise in the style of Corr2Cause++."""
    statements = [
        f"{names[i]} indep {names[j]}" + (f" | {', '.join(names[k] for k in given)}" if given else "")
        for i, j, given in independent
    ]
    listed = f"{', '.join(names[:-1])}, and {names[-1]}" if len(names) > 2 else " and ".join(names)
    opening = (
        f"Suppose there is a {system}, {listed}, whose causal structure forms a directed acyclic graph and satisfies "
        "faithfulness. "
    )
    relations = f"{MINIMAL} are: " if minimal else "All the conditional independence relations are: "
    return f"{opening}{relations}{'; '.join(statements) or 'none'}."


def hypothesis(relation: str, i: str, j: str, *, wording: int = 0, style: str = "published") -> str:
    """Return the claim that `relation` holds between the variables with the names i and j."""
    options = CLAIMS[style][relation]
    return options[wording % len(options)].format(i=i, j=j)


def refactored(names: Sequence[str]) -> list[str]:
    """Rename variables as in the published refactored test set: A, B, C… become Z, Y, X…"""
    return [ascii_uppercase[-1 - ascii_uppercase.index(name)] for name in names]


def question(premise_text: str, hypothesis_text: str, instruction: str) -> str:
    """Return the whole user message."""
    return "\n".join(
        [f"Premise: {premise_text}", f"Hypothesis: {hypothesis_text}", *([instruction] if instruction else [])]
    )
