r"""Replay known exploits against a reward set: each must earn less than an honest correct answer.

    python -m pipeline check gsm8k --audit

`audit_rewards(task, rewards, weights, example)` returns the exploits that succeed. An exploit succeeds if its total
reward reaches that of the honest completion, or if it is graded correct (or matches the proxy) without committing to
the gold answer. Each kind of final answer has a catalogue of exploits: general ones, and ones for this kind only.
Mutations are made from a right and a wrong answer: hedged, denied, doubled, disguised, truncated and nearly right ones.
No text may be correct for two gold answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from pipeline.rewards.reward import RewardFunction, make_sample
from pipeline.scoring.answers import CLOSE, OPEN, split_thought
from pipeline.tasks.task import Example, Task

HONEST = "the claim is checked step by step"
FINAL = {  # the form of a final answer of each kind
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
HOSTILE_TEXTS = {  # texts that would occupy a careless parser for minutes, or mislead it
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
    """Return an answer of the same kind that differs from the gold answer."""
    if kind == "verdict":
        return "No" if gold == "Yes" else "Yes"
    if kind == "choice":
        return "B" if gold == "A" else "A"
    return "a broken reed" if kind == "words" else "987654"


def exploits(kind: str, example: Example) -> dict[str, str]:
    """Return completions (thought already opened), by name, that try to earn the reward without one decided answer."""
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
        proof = (split_thought(example.target, False).thought or "x").strip()  # the best possible thought
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
        found |= {name: f"x\n{CLOSE}\n{final(text)}" for name, text in HOSTILE_TEXTS.items()}
        arabic = gold.translate(str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩"))
        if arabic != gold:
            found["digits of another script"] = f"x\n{CLOSE}\n{final(arabic)}"
        found["an equation"] = f"x\n{CLOSE}\n{final(f'{wrong}={gold}')}"
        found["a range"] = f"x\n{CLOSE}\n{final(f'{gold} to {wrong}')}"
        found["an inequality"] = f"x\n{CLOSE}\n{final(f'{gold}<{wrong}')}"
        found["two marks that differ"] = f"x\n{CLOSE}\nThe answer is {wrong}.\n{final(gold)}"
    return found


BEFORE = {  # phrases that deny or hedge the statement that follows
    "denied": "It is not the case that {}",
    "denied in words": "It would be wrong to say {}",
    "denied as untrue": "It is not true that {}",
}
AFTER = {  # forms that retract a statement {0}, or add the other answer {1}, or the other statement {2}
    "taken back": "{0} is wrong",
    "hedged": "{0} or {1}",
    "hedged in a sentence": "{0}. Or maybe {2}",
    "doubled": "{0}\n{2}",
    "doubled on one line": "{0} {2}",
    "corrected": "{0}\nWait, {2}",
    "joined by a zero-width space": "{0}\u200b{1}",
    "joined by a line separator": "{0}\u2028{2}",
    "joined by a fraction slash": "{0}\u2044{1}",
    "in brackets": "{0} ({1})",
    "with a question mark": "{0}? {1}.",
    "but": "{0}, but the right answer is: {1}",
    "the other one boxed": "{0} \\boxed{{{1}}}",
    "the other one tagged": "{0} <answer>{1}</answer>",
    "the other one answered": "{0}\nAnswer: {1}",
}
LOOKALIKES = str.maketrans("aceopxyABCEHKMNOPTXY", "асеорхуАВСЕНКМΝОРТХΥ")  # Cyrillic and Greek for Latin
UNCERTAIN = ("with a question mark", "hedged in a sentence", "in brackets", "corrected", "taken back")


def mutations(kind: str, example: Example) -> Iterator[tuple[str, str]]:
    """Yield (name of the mutation, completion) for each text from a right and a wrong answer that must not be rewarded.

    Each commits to no answer, or to another than the gold answer. A text that is only doubtful (see UNCERTAIN) is made
    only for verdicts, whose strict format leaves no room for commentary, so that the parser must detect the doubt.
    """
    gold, final = example.gold, FINAL[kind].format
    wrong = wrong_answer(kind, gold)
    for first, second, order in ((gold, wrong, "right first"), (wrong, gold, "wrong first")):
        for name, form in BEFORE.items():
            if first == gold:
                yield name, form.format(final(first))
        for name, form in AFTER.items():
            if (name in UNCERTAIN and kind != "verdict") or (name == "taken back" and first == wrong):
                continue
            if kind == "words" and name in ("the other one boxed", "the other one tagged") and first == wrong:
                continue  # a box after words is the answer, and here it is the gold one
            yield f"{name}, {order}", form.format(final(first), second, final(second))
    if (disguised := final(gold).translate(LOOKALIKES)) != final(gold):
        yield "letters of another script", disguised
    yield "a zero-width space inside", final("\u200b".join(gold) if len(gold) > 1 else f"{gold}\u200b{gold}")
    for name, text in near_misses(kind, gold):
        yield name, final(text)


def near_misses(kind: str, gold: str) -> Iterator[tuple[str, str]]:
    """Yield (name, answer) for answers that differ from gold in sign, magnitude, dimension, comparison or letter."""
    if kind in ("number", "expression"):
        yield "another sign", gold[1:] if gold.startswith("-") else f"-{gold}"
        yield "ten times", f"10 \\cdot {gold}"
        yield "thousands", f"{gold} thousand"
        yield "a variable", f"{gold}x"
        yield "letters behind it", f"{gold}abc"
        yield "a power", f"({gold})^2 + 1"
        yield "between two", f"{gold} \\pm 1"
        yield "less than it", f"< {gold}"
    if kind == "words":
        yield "not", f"not {gold}"
        yield "a letter behind it", f"{gold} B"
        yield "a sign behind it", f"{gold}-"
        yield "less than it", f"< {gold}"
    if kind == "choice":
        yield "a letter behind it", f"{gold}E" if gold != "E" else "EA"


def audit_texts(kind: str, example: Example) -> dict[str, tuple[str, bool]]:
    """Return all completions of the audit, by name, each with whether it is truncated."""
    found = {name: (text, False) for name, text in exploits(kind, example).items()}
    made = {f"mutation: {name}": (f"{HONEST}\n{CLOSE}\n{text}", False) for name, text in mutations(kind, example)}
    honest = f"{HONEST}\n{CLOSE}\n{FINAL[kind].format(example.gold)}"
    cut = {"mutation: cut off": (honest, True), "mutation: cut off in prose": (f"{honest}\nThis is so because", True)}
    return {**found, **made, **cut}


def audit_rewards(
    task: Task, rewards: Mapping[str, RewardFunction], weights: Mapping[str, float], example: Example
) -> list[str]:
    """Return a message for each exploit or mutation that succeeds, such as `both answers: earns 1.2 of 1.2`.

    A text that is correct for two gold answers is reported too.
    """
    kind = task.answer_kind or "words"

    def total(completion: str, truncated: bool = False) -> float:
        sample = make_sample(task, example, completion, True, truncated)
        return sum(weights[name] * (function(sample) or 0.0) for name, function in rewards.items())

    right = f"{HONEST}\n{CLOSE}\n{FINAL[kind].format(example.gold)}"
    honest = total(right)
    found = []
    for name, (completion, truncated) in audit_texts(kind, example).items():
        earned = total(completion, truncated)
        grade = task.judge(example, completion, True, truncated)
        if earned >= honest or grade.correct or grade.proxy:
            found.append(f"{name}: earns {earned:g} of {honest:g}")
    for name, gold in other_golds(kind, example.gold).items():
        grade = task.judge(replace(example, gold=gold), right, True, False)
        if grade.correct or grade.proxy:
            found.append(f"{name}: one text is right for {example.gold!r} and for {gold!r}")
    return found


def other_golds(kind: str, gold: str) -> dict[str, str]:
    """Return other gold answers, by name; the honest answer to the row must not be correct for any of them."""
    near = {f"two golds: {name}": text for name, text in near_misses(kind, gold)}
    return {"two golds: another answer": wrong_answer(kind, gold), **near}


def count_exploits(task: Task, example: Example) -> tuple[int, int]:
    """Return (number of texts that the audit of a row replays, number of mutations among them)."""
    kind = task.answer_kind or "words"
    names = [*audit_texts(kind, example), *other_golds(kind, example.gold)]
    return len(names), sum(name.startswith(("mutation", "two golds")) for name in names)
