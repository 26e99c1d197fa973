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


@dataclass
class _Group:
    """Requests whose prompts begin alike, while they are looked for."""

    shared: int  # tokens that all begin with
    longest: int  # tokens of a prompt
    members: list[int]


def find_families(requests: Sequence[Request]) -> list[Family]:
    """Group samples by what their prompts have in common, the longest prompts first.

    Prompts of one sample are grouped where they share at least SHARED tokens and half of each, if most of them can be.
    The samples of a prompt share all of it but the last token, which is what the first logits come from.
    """
    order = sorted(range(len(requests)), key=lambda k: list(requests[k].prompt))
    groups: list[_Group] = []
    for k in order:
        prompt, group = requests[k].prompt, groups[-1] if groups else None
        if group and requests[k].samples == requests[group.members[-1]].samples == 1:
            shared = min(group.shared, _common(requests[group.members[-1]].prompt, prompt), len(prompt) - 1)
            longest = max(group.longest, len(prompt))
            if shared >= max(SHARED, longest - shared) and longest - shared <= REST:
                group.shared, group.longest = shared, longest
                group.members.append(k)
                continue
        groups.append(_Group(len(prompt) - 1, len(prompt), [k]))
    together = sum(len(group.members) for group in groups if len(group.members) > 1)
    if 2 * together < sum(one.samples == 1 for one in requests):  # every row would pay for what few of them share
        groups = [_Group(len(requests[k].prompt) - 1, len(requests[k].prompt), [k]) for k in order]
    families = []
    for group in groups:
        waiting = deque((k, sample) for k in sorted(group.members) for sample in requests[k].numbers)
        prefix = list(requests[group.members[0]].prompt[: group.shared]) if len(waiting) > 1 else []
        families.append(Family(prefix, waiting, group.longest))
    return sorted(families, key=lambda family: (-family.longest, family.waiting[0]))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two prompts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((k for k, (mine, others) in pairs if mine != others), min(len(one), len(other)))


def share_out(requests: Sequence[Request], rank: int, world: int) -> list[int]:
    """Return the requests of one of `world` processes, families kept together and lengths spread evenly."""
    mine = find_families(requests)[rank::world]
    return sorted({request for family in mine for request, _ in family.waiting})
