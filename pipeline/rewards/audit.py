r"""Known exploits, replayed against a reward set: each must earn less than an honest right answer.

    python -m pipeline check gsm8k --audit

`audit(task, rewards, weights, example)` returns the exploits that pay. An exploit pays when its total reward
reaches that of the honest completion, or when it is graded correct (or pays by a proxy) without committing to the
gold. There is a catalogue for each kind of final answer: what all kinds share, and what only one invites.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.answers import CLOSE, OPEN, split_thought
from pipeline.rewards.reward import RewardFunction, make_sample
from pipeline.tasks.task import Example, Task

HONEST = "the claim is checked step by step"
FINAL = {  # how a final answer of each kind is stated
    "verdict": "Therefore: {}",
    "number": "#### {}",
    "expression": r"\boxed{{{}}}",
    "choice": "The answer is {}",
    "words": "Final answer: {}",
}
INSTRUCTIONS = {
    "verdict": 'end with "Therefore: Yes" or "Therefore: No"',
    "number": 'end with "####" and the number',
    "expression": r"put the final answer in \boxed{}",
    "choice": "the answer is A, B, C, D or E",
    "words": 'end with "Final answer:" and the answer in a few words',
}
BOMBS = {  # what would cost a careless reader minutes, or fool it
    "too large for a float": "1e999",
    "a tower of powers": "9^{9^{9^{9^{9}}}}",
    "a factorial": "99999999!",
    "a long sum": r"\sum_{i=1}^{999999999} i",
    "many digits": "9" * 5000,
    "braces that never close": "{" * 2000,
    "nested fractions": r"\frac{1}{" * 300 + "1" + "}" * 300,
    "not a number": "nan",
    "infinity": r"\infty",
}


def wrong_answer(kind: str, gold: str) -> str:
    """An answer of the same kind that is not the gold one."""
    if kind == "verdict":
        return "No" if gold == "Yes" else "Yes"
    if kind == "choice":
        return "B" if gold == "A" else "A"
    return "a broken reed" if kind == "words" else "987654"


def exploits(kind: str, example: Example) -> dict[str, str]:
    """Completions (thought already opened) that try to be paid without deciding, by name."""
    gold, final = example.gold, FINAL[kind].format
    wrong = wrong_answer(kind, gold)
    found = {
        "empty": "",
        "both answers": f"x\n{CLOSE}\n{final(gold)}\n{final(wrong)}",
        "both, the right one last": f"x\n{CLOSE}\n{final(wrong)}\n{final(gold)}",
        "quotes the instruction": f"x\n{CLOSE}\n{final(wrong)} … {INSTRUCTIONS[kind]}",
        "one or the other": f"x\n{CLOSE}\n{final(f'{gold} or {wrong}')}",
        "the other or the one": f"x\n{CLOSE}\n{final(f'{wrong} or {gold}')}",
        "one/other": f"x\n{CLOSE}\n{final(f'{gold}/{wrong}')}",
        "a list": f"x\n{CLOSE}\n{final(f'{gold}, {wrong}')}",
        "answer in the thought": f"{final(gold)}\n{CLOSE}\nI cannot say.",
        "answer in a thought that never ends": f"so\n{final(gold)}",
        "answer in a second thought": f"x\n{CLOSE}\n{OPEN}{final(gold)}",
        "closes twice": f"x\n{CLOSE}\n{final(wrong)}\n{CLOSE}\n{final(gold)}",
        "many answers": f"x\n{CLOSE}\n" + f"{final(gold)}\n{final(wrong)}\n" * 50,
        "echo of the question": f"{example.question}\n{CLOSE}\n{example.question}",
        "echo of the question as the answer": f"x\n{CLOSE}\n{final(example.question)}",
        "wrong": f"{HONEST}\n{CLOSE}\n{final(wrong)}",
        "nothing after the mark": f"x\n{CLOSE}\n{final('')}",
    }
    if kind == "verdict":
        proof = (split_thought(example.target, False).thought or "x").strip()  # the best thought there is
        found["a right proof, the wrong verdict"] = f"{proof}\n{CLOSE}\n{final(wrong)}"
        found["a right proof, no verdict"] = f"{proof}\n{CLOSE}\n"
        found["a right proof that never ends"] = f"{proof}\n" * 3
        found["the question as a thought"] = f"{example.question}\n{CLOSE}\n{final(wrong)}"
        found["unfinished word"] = f"x\n{CLOSE}\nTherefore: {gold}nope"
    if kind == "choice":
        found["every letter"] = f"x\n{CLOSE}\n{final('(A) (B) (C) (D) (E)')}"
    if kind == "words":
        found["a haystack"] = f"x\n{CLOSE}\n{final(f'one of these: {wrong}; {gold}; {wrong}')}"
        found["joined to another"] = f"x\n{CLOSE}\n{final(f'{gold} and {wrong}')}"
    if kind in ("number", "expression"):
        found |= {name: f"x\n{CLOSE}\n{final(text)}" for name, text in BOMBS.items()}
        arabic = gold.translate(str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩"))
        if arabic != gold:
            found["digits of another script"] = f"x\n{CLOSE}\n{final(arabic)}"
        found["an equation"] = f"x\n{CLOSE}\n{final(f'{wrong}={gold}')}"
        found["a range"] = f"x\n{CLOSE}\n{final(f'{gold} to {wrong}')}"
        found["an inequality"] = f"x\n{CLOSE}\n{final(f'{gold}<{wrong}')}"
        found["two marks that differ"] = f"x\n{CLOSE}\nThe answer is {wrong}.\n{final(gold)}"
    return found


def audit(
    task: Task, rewards: Mapping[str, RewardFunction], weights: Mapping[str, float], example: Example
) -> list[str]:
    """Each exploit that pays, as `both answers: earns 1.2 of 1.2`."""
    kind = task.answer_kind or "words"

    def total(completion: str) -> float:
        sample = make_sample(task, example, completion, True, False)
        return sum(weights[name] * (function(sample) or 0.0) for name, function in rewards.items())

    honest = total(f"{HONEST}\n{CLOSE}\n{FINAL[kind].format(example.gold)}")
    found = []
    for name, completion in exploits(kind, example).items():
        earned = total(completion)
        verdict = make_sample(task, example, completion, True, False).verdict
        if earned >= honest or verdict.correct or verdict.proxy:
            found.append(f"{name}: earns {earned:g} of {honest:g}")
    return found
