"""Known exploits, replayed against a reward set: each must earn less than an honest right answer.

`audit(task, rewards, weights, example)` returns the exploits that pay. An exploit pays when its total reward
reaches that of the honest completion, or when it is graded correct without committing to the gold.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.answers import CLOSE, OPEN, split_thought
from pipeline.rewards.reward import RewardFunction, make_sample
from pipeline.tasks.task import Example, Task

HONEST = "the claim is checked step by step"
QUESTION = (
    "Premise: Suppose there is a closed system of 3 variables, A, B and C. All the statistical relations among these 3 "
    "variables are as follows: A correlates with C. B correlates with C. However, A is independent of B.\n"
    "Hypothesis: A directly causes C."
)
PROOF = f"{OPEN}\nA B apart given nothing. A C ->. B C ->.\n{CLOSE}\n"


def sample(gold: str) -> Example:
    """A row that every reward can judge, its graph too."""
    return Example("1", QUESTION, gold, "g", target=f"{PROOF}Therefore: {gold}")


def exploits(example: Example) -> dict[str, str]:
    """Completions (thought already opened) that try to be paid without deciding, by name."""
    gold = example.gold
    wrong = "No" if gold == "Yes" else "Yes"
    proof = (split_thought(example.target, False).thought or "x").strip()  # the best thought there is
    return {
        "a right proof, the wrong verdict": f"{proof}\n{CLOSE}\nTherefore: {wrong}",
        "a right proof, no verdict": f"{proof}\n{CLOSE}\n",
        "a right proof that never ends": f"{proof}\n" * 3,
        "the question as a thought": f"{example.question}\n{CLOSE}\nTherefore: {wrong}",
        "empty": "",
        "both verdicts": f"x\n{CLOSE}\nTherefore: {gold}\nTherefore: {wrong}",
        "both, the right one last": f"x\n{CLOSE}\nTherefore: {wrong}\nTherefore: {gold}",
        "quotes the instruction": f'x\n{CLOSE}\nTherefore: {wrong} … end with "Therefore: Yes" or "Therefore: No"',
        "yes or no": f"x\n{CLOSE}\nTherefore: {gold} or {wrong}",
        "yes/no": f"x\n{CLOSE}\nTherefore: {gold}/{wrong}",
        "verdict in the thought": f"Therefore: {gold}\n{CLOSE}\nI cannot say.",
        "verdict in a thought that never ends": f"so\nTherefore: {gold}",
        "verdict in a second thought": f"x\n{CLOSE}\n{OPEN}Therefore: {gold}",
        "closes twice": f"x\n{CLOSE}\nTherefore: {wrong}\n{CLOSE}\nTherefore: {gold}",
        "many verdicts": f"x\n{CLOSE}\n" + f"Therefore: {gold} Therefore: {wrong} " * 50,
        "echo of the question": f"{example.question}\n{CLOSE}\n{example.question}",
        "wrong": f"{HONEST}\n{CLOSE}\nTherefore: {wrong}",
        "unfinished word": f"x\n{CLOSE}\nTherefore: {gold}nope",
    }


def audit(
    task: Task, rewards: Mapping[str, RewardFunction], weights: Mapping[str, float], example: Example
) -> list[str]:
    """Each exploit that pays, as `both verdicts: earns 1.2 of 1.2`."""

    def total(completion: str) -> float:
        sample = make_sample(task, example, completion, True, False)
        return sum(weights[name] * (function(sample) or 0.0) for name, function in rewards.items())

    honest = total(f"{HONEST}\n{CLOSE}\nTherefore: {example.gold}")
    found = []
    for name, completion in exploits(example).items():
        earned = total(completion)
        graded = make_sample(task, example, completion, True, False).verdict.correct
        if earned >= honest or graded:
            found.append(f"{name}: earns {earned:g} of {honest:g}")
    return found
