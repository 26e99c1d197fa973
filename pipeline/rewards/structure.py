"""Return up to 1 for a thought that states the graph of its premise: skeleton, separating sets, v-structures, CPDAG.

The reward is the weighted mean of the F1 of each part, including the compelled arrows.
`tasks/corr2cause/parse_thought.py` parses the thought in any wording. A thought without a verdict earns 0, one with a
wrong verdict half. Thus of two equal thoughts, the one with the right verdict always earns more. `find_rewards` rejects
weights with which the other rewards could outweigh correctness. None for a question without a readable premise.
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
    parsed = parse_question(sample.example.question)
    if parsed is None:
        return None
    thought = split_thought(sample.completion, sample.prompt_opens_think).thought
    if not thought or not sample.grade.answered:
        return 0.0
    premise, mec, premise_text = parsed
    parts = agreement(read_structure(thought, premise.names, premise_text), true_structure(mec))
    shares = {
        "skeleton": skeleton,
        "separating_sets": separating_sets,
        "v_structures": v_structures,
        "cpdag": cpdag,
        "compelled": compelled,
    }
    total = sum(shares.values())
    reward = sum(share * parts[part] for part, share in shares.items()) / total if total else 0.0
    return reward if sample.grade.correct else reward / 2
