"""Up to 1 for a thought that finds the graph of its premise: skeleton, separating sets, v-structures, CPDAG, arrows.

Each part is paid by precision and recall (F1), whatever the words (`tasks/corr2cause/parse_thought.py` reads them),
times its share. A thought without a verdict earns nothing and one with a wrong verdict half, so of two equal thoughts
the right one always earns more; and `find_rewards` refuses weights with which everything else could outweigh
correctness. None for a question that states no independences.
"""

from __future__ import annotations

from pipeline.rewards.reward import Sample
from pipeline.scoring.answers import split_thought
from pipeline.tasks.corr2cause.parse_thought import agreement, parse_question, read_structure, true_structure


def structure(
    sample: Sample,
    skeleton: float = 1.0,
    separating_sets: float = 1.0,
    v_structures: float = 1.0,
    cpdag: float = 1.0,
    compelled: float = 1.0,
) -> float | None:
    known = parse_question(sample.example.question)
    if known is None:
        return None
    thought = split_thought(sample.completion, sample.prompt_opens_think).thought
    if not thought or not sample.grade.answered:
        return 0.0
    premise, mec, words = known
    parts = agreement(read_structure(thought, premise.names, words), true_structure(mec))
    shares = {
        "skeleton": skeleton,
        "separating_sets": separating_sets,
        "v_structures": v_structures,
        "cpdag": cpdag,
        "compelled": compelled,
    }
    total = sum(shares.values())
    paid = sum(share * parts[part] for part, share in shares.items()) / total if total else 0.0
    return paid if sample.grade.correct else paid / 2
