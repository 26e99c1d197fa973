"""The words of Corr2Cause: premises and hypotheses, as published and as perturbed.

Source: Jin et al. 2024 (https://arxiv.org/abs/2306.05836); the tests compare the words with published rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from string import ascii_uppercase

from pipeline.tasks.corr2cause.graphs import EquivalenceClass, Independence

# The two indirect wordings are used interchangeably in the published set.
PUBLISHED = {
    "parent": ("{i} directly causes {j}.",),
    "child": ("{j} directly causes {i}.",),
    "ancestor": ("{i} causes something else which causes {j}.", "{i} is a cause for {j}, but not a direct one."),
    "descendant": ("{j} causes something else which causes {i}.", "{j} is a cause for {i}, but not a direct one."),
    "collider": ("There exists at least one collider (i.e., common effect) of {i} and {j}.",),
    "confounder": ("There exists at least one confounder (i.e., common cause) of {i} and {j}.",),
}
PARAPHRASED = {
    "parent": ("{i} directly affects {j}.",),
    "child": ("{j} directly affects {i}.",),
    "ancestor": ("{i} influences {j} through some mediator(s).",),
    "descendant": ("{j} influences {i} through some mediator(s).",),
    "collider": ("{i} and {j} together cause some other variable(s).",),
    "confounder": ("Some variable(s) cause(s) both {i} and {j}.",),
}
INSTRUCTION = (
    "Does the hypothesis hold in every causal graph that fits the premise? "
    'Think step by step, then end with "Therefore: Yes" or "Therefore: No".'
)


def series(words: Sequence[str]) -> str:
    """`A`, `A and B`, `A, B and C`: no Oxford comma, as published."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def relations(mec: EquivalenceClass) -> tuple[list[tuple[int, int]], list[Independence]]:
    """The dependent pairs and the independences of a class, in the published order."""
    independences = list(mec.independences)
    apart = {(i, j) for i, j, given in independences if not given}
    return [pair for pair in combinations(range(mec.n), 2) if pair not in apart], independences


def premise(names: Sequence[str], dependent: Sequence[tuple[int, int]], independent: Sequence[Independence]) -> str:
    """Every correlation and every independence, the nodes called by `names`, told in the order given."""
    correlated = [f"{names[i]} correlates with {names[j]}." for i, j in dependent]
    separate = [
        f"{names[i]} and {names[j]} are independent given {series([names[k] for k in given])}."
        if given
        else f"{names[i]} is independent of {names[j]}."
        for i, j, given in independent
    ]
    opening = (
        f"Suppose there is a closed system of {len(names)} variables, {series(names)}. All the statistical relations "
        f"among these {len(names)} variables are as follows: "
    )
    return opening + " However, ".join(" ".join(part) for part in (correlated, separate) if part)


def hypothesis(relation: str, i: str, j: str, *, wording: int = 0, paraphrased: bool = False) -> str:
    """The claim that `relation` holds of the variables called i and j."""
    options = (PARAPHRASED if paraphrased else PUBLISHED)[relation]
    return options[wording % len(options)].format(i=i, j=j)


def refactored(names: Sequence[str]) -> list[str]:
    """The published renaming of the refactored test set: A, B, C… become Z, Y, X…"""
    return [ascii_uppercase[-1 - ascii_uppercase.index(name)] for name in names]


def question(premise_text: str, hypothesis_text: str, instruction: str) -> str:
    """The whole user message."""
    return "\n".join(
        [f"Premise: {premise_text}", f"Hypothesis: {hypothesis_text}", *([instruction] if instruction else [])]
    )
