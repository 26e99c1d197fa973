"""Find what prompts have in common, so that it is read once: the samples of a prompt, the hypotheses of a premise."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.engines.engine import Request

SHARED = 32  # tokens that prompts have in common, at least, to be read together
REST = 256  # tokens after what is shared, at most: they attend by plain matrix products


@dataclass
class Family:
    """Samples whose prompts begin with the same tokens."""

    prefix: Sequence[int]  # empty: nothing is shared
    waiting: deque[tuple[int, int]]  # request, sample
    longest: int  # tokens of its longest prompt
    place: int = -1  # of the prefix in the cache; -1: not read yet
    free_seats: list[int] = field(default_factory=list)
    active: int = 0  # samples that have a row


def find_families(requests: Sequence[Request]) -> list[Family]:
    """Group samples by what their prompts have in common, the longest prompts first.

    Prompts of one sample are grouped where they share at least SHARED tokens and half of each, if most of them can be.
    The samples of a prompt share all of it but the last token, which is what the first logits come from.
    """
    order = sorted(range(len(requests)), key=lambda k: list(requests[k].prompt))
    groups: list[tuple[int, list[int]]] = []  # length of what is shared, requests
    for k in order:
        prompt = requests[k].prompt
        if groups and requests[k].samples == requests[groups[-1][1][-1]].samples == 1:
            shared, members = groups[-1]
            common = min(shared, _common(requests[members[-1]].prompt, prompt), len(prompt) - 1)
            rest = max(len(requests[m].prompt) for m in (*members, k)) - common
            if common >= SHARED and common >= rest and rest <= REST:
                groups[-1] = common, [*members, k]
                continue
        groups.append((len(prompt) - 1, [k]))
    if 2 * sum(len(members) for _, members in groups if len(members) > 1) < sum(one.samples == 1 for one in requests):
        groups = [(len(requests[k].prompt) - 1, [k]) for k in order]  # every row would pay for what few of them share
    families = []
    for shared, members in groups:
        waiting = deque((k, sample) for k in sorted(members) for sample in requests[k].numbers)
        prefix = list(requests[members[0]].prompt[:shared]) if len(waiting) > 1 else []
        families.append(Family(prefix, waiting, max(len(requests[k].prompt) for k in members)))
    return sorted(families, key=lambda family: (-family.longest, family.waiting[0]))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two prompts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((k for k, (mine, others) in pairs if mine != others), min(len(one), len(other)))


def share_out(requests: Sequence[Request], rank: int, world: int) -> list[int]:
    """Return the requests of one of `world` processes, families kept together and lengths spread evenly."""
    mine = find_families(requests)[rank::world]
    return sorted({request for family in mine for request, _ in family.waiting})
