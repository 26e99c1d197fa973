"""Rewards: what they pay, and that no known exploit pays."""

from __future__ import annotations

import importlib
import re

import pytest
from bounded import ends

from pipeline.config.recipe import Reward, TaskChoice, read, recipe_names
from pipeline.rewards.audit import FINAL, audit_rewards, count_exploits, exploits
from pipeline.rewards.reward import Sample, find_rewards, make_sample, reward_names
from pipeline.tasks.corr2cause.parse_thought import read_structure
from pipeline.tasks.gsm8k import Gsm8k
from pipeline.tasks.task import Example, Grade, Task, task_of

EXAMPLE = Example("1", "Premise: A correlates with B.\nHypothesis: A directly causes B.", "Yes", "g")


@pytest.fixture(scope="module")
def task() -> Task:
    return task_of(TaskChoice("corr2cause", "auto", None, None, "error", {}), 0)


def sample(task: Task, completion: str, *, truncated: bool = False) -> Sample:
    return make_sample(task, EXAMPLE, completion, True, truncated)


def pay(name: str, given: Sample, **params: float) -> float | None:
    found, problems = find_rewards({"correctness": Reward(2.0, {}), name: Reward(1.0, params)})
    assert problems == []
    return found[name](given)


def test_every_reward_is_a_function_of_its_files_name() -> None:
    assert {"correctness", "format", "match", "proof", "structure"} <= set(reward_names())
    weights = {name: 1.0 if name == "correctness" else 0.1 for name in reward_names()}
    found, problems = find_rewards({name: Reward(weight, {}) for name, weight in weights.items()})
    assert set(found) == set(reward_names())
    assert problems == []


def test_correctness_is_the_tasks_verdict(task: Task) -> None:
    assert pay("correctness", sample(task, "x</think>Therefore: Yes")) == 1
    assert pay("correctness", sample(task, "x</think>Therefore: No")) == 0
    assert pay("correctness", sample(task, "Therefore: Yes")) == 0
    unverifiable = Sample(EXAMPLE, "", True, False, Grade(None, True, None), True)
    assert pay("correctness", unverifiable) is None


def test_match_is_the_declared_proxy_and_no_correctness(task: Task) -> None:
    def judged(verdict: Grade) -> Sample:
        return Sample(EXAMPLE, "", True, False, verdict, True)

    assert pay("match", judged(Grade(None, True, "iron", proxy=True))) == 1
    assert pay("match", judged(Grade(None, True, "rest", proxy=False))) == 0
    assert pay("match", judged(Grade(None, True, "prose"))) is None
    assert pay("match", judged(Grade(True, True, "Yes"))) is None  # where it verifies, correctness is what is paid
    assert pay("correctness", judged(Grade(None, True, "iron", proxy=True))) is None


def test_format_is_the_tasks_form(task: Task) -> None:
    assert pay("format", sample(task, "x\n</think>\nTherefore: No")) == 1
    assert pay("format", sample(task, "x\n</think>\nTherefore: No, I think")) == 0
    assert pay("format", sample(task, "x\n</think>\nTherefore: No", truncated=True)) == 0


@pytest.mark.parametrize("name", recipe_names())
def test_no_known_exploit_pays_under_any_recipe(name: str) -> None:
    recipe, _ = read(name)
    assert recipe is not None
    task = task_of(recipe.task, recipe.seed)
    rewards, _ = find_rewards(recipe.grpo.rewards)
    weights = {key: reward.weight for key, reward in recipe.grpo.rewards.items()}
    examples = task.audit_examples()
    assert examples or "grpo" not in recipe.stages
    for example in examples:
        assert audit_rewards(task, rewards, weights, example) == []


@pytest.mark.parametrize("name", recipe_names())
def test_the_mutations_are_many_and_check_counts_them(name: str) -> None:
    recipe, _ = read(name)
    assert recipe is not None
    task = task_of(recipe.task, recipe.seed)
    for example in task.audit_examples() if "grpo" in recipe.stages else ():
        replayed, mutated = count_exploits(task, example)
        assert mutated >= 25
        assert replayed > mutated


class Careless(Gsm8k):
    """Reads the first number there is, without its sign: the mistake of others."""

    def grade(self, example: Example, completion: str, prompt_opens_think: bool) -> Grade:
        found = re.search(r"[0-9]+", completion.partition("</think>")[2])
        said = found[0] if found else None
        return Grade(said is not None and said == re.sub(r"[^0-9]", "", example.gold)[: len(said)], bool(said), said)


def test_the_audit_finds_a_judge_that_takes_two_answers_for_one() -> None:
    task = task_of(TaskChoice("gsm8k", "sample", None, None, "error", Gsm8k.smoke_test_params(Gsm8k)), 0)  # type: ignore[arg-type]
    careless = Careless(task.choice, task.params, 0)
    rewards, _ = find_rewards({"correctness": Reward(1.0, {})})
    found = audit_rewards(careless, rewards, {"correctness": 1.0}, careless.audit_examples()[0])
    for name in (
        "mutation: denied",
        "mutation: another sign",
        "two golds: another sign",
        "mutation: doubled, right first",
    ):
        assert any(text.startswith(name) for text in found), name
    assert not any("cut off" in text for text in found)  # `judge` sees to those, whatever `grade` says


@pytest.mark.parametrize("name", ["gsm8k", "medical", "math_science", "corr2cause"])
def test_what_was_cut_off_is_unanswered_for_rewards_as_for_evaluation(name: str) -> None:
    cls = importlib.import_module(f"pipeline.tasks.{name}").TASK
    task = task_of(TaskChoice(name, cls.sources[-1] if name != "corr2cause" else "auto", None, None, "error", {}), 0)
    example = task.audit_examples()[0]
    right = f"so it is\n</think>\n{FINAL[task.answer_kind or ''].format(example.gold)}"
    whole, cut = (make_sample(task, example, right, True, truncated) for truncated in (False, True))
    assert whole.grade == task.grade(example, right, True)
    assert (whole.grade.answered, whole.grade.reason, whole.well_formed) == (True, None, True)
    assert cut.grade == task.judge(example, right, True, True)
    assert (cut.grade.answered, cut.grade.reason, cut.well_formed) == (False, "truncated", False)
    assert not cut.grade.correct
    assert not cut.grade.proxy
    for reward in ("correctness", "format", "match", "proof", "structure"):
        assert not pay(reward, cut)


# ---------------------------------------------------------------- structure

ROWS = {
    "phases": [{"n": [4, 5], "rows": 40}],
    "grpo_rows": 0,
    "validation_rows": 0,
    "test_rows": 2,
    "perturbed_rows": 0,
}


@pytest.fixture(scope="module")
def proved() -> tuple[Task, list[Example]]:
    found = task_of(TaskChoice("corr2cause", "auto", None, None, "error", ROWS), 0)
    return found, found.load().sft


def thought_of(example: Example) -> str:
    return example.target.removeprefix("<think>\n").partition("</think>")[0]


def structure_of(proved: tuple[Task, list[Example]], example: Example, completion: str, **params: float) -> float:
    paid = pay("structure", make_sample(proved[0], example, completion, True, False), **params)
    assert paid is not None
    return paid


def test_a_proof_earns_all_of_the_structure_and_half_with_the_wrong_verdict(
    proved: tuple[Task, list[Example]],
) -> None:
    for example in proved[1]:
        wrong = "No" if example.gold == "Yes" else "Yes"
        thought = thought_of(example)
        assert structure_of(proved, example, f"{thought}</think>\nTherefore: {example.gold}") == 1
        assert structure_of(proved, example, f"{thought}</think>\nTherefore: {wrong}") == 0.5
        assert structure_of(proved, example, f"{thought}</think>\n") == 0
        assert structure_of(proved, example, thought) == 0
        assert structure_of(proved, example, f"so it is</think>\nTherefore: {example.gold}") == 0


def test_structure_is_read_in_other_words() -> None:
    """A → C ← B, and D behind C: the same graph in eight ways of saying it, three of them LaTeX."""
    names = "ABCD"
    premise = "A C linked. B and C are adjacent. A and B are independent. "
    ways = [
        "A C ->. B C ->. C D ->. A B apart given nothing. A D apart given C. B D apart given C.",
        "A -> C <- B, so C -> D. A and B are independent; A and D are independent given C; B ⟂ D | C",
        f"{premise}A → C, B → C and C → D. A indep D | C; B indep D | C.",
        "A directly causes C. B directly causes C. C is a direct cause of D. A is independent of B. "
        "A is independent of D given C. B and D are separated by C.",
        r"$A \to C \leftarrow B$, so $C \to D$. $A \perp B$; $A \perp D \mid C$; $B \perp D \mid \{C\}$",
        r"\(A \rightarrow C\), \(B\rightarrow C\), \(C \longrightarrow D\). \(A \perp\!\!\!\perp B\), "
        r"\(A \mathrel{\perp\!\!\!\perp} D \mid C\), \(B\perp\!\!\!\perp D\mid C\).",
        r"\[\text{A} \to \text{C}\] \[B \to C\] \[D \gets C\] A \indep B \mid \emptyset. A ⊥⊥ D | {C}; **B ⊥ D|C**",
        "First A - C, C — B and C--D. Then A->C, C<-B, C -> D. A and B are independent, A, D are independent given C, "
        "and B indep D | C.",
    ]
    for words in ways:
        found = read_structure(words, names)
        assert found.skeleton == {(0, 2), (1, 2), (2, 3)}, words
        assert found.v_structures == {(0, 2, 1)}, words
        assert found.compelled == {(0, 2), (1, 2), (2, 3)}, words
        assert found.cpdag == {(0, 2, "->"), (1, 2, "->"), (2, 3, "->")}, words
        assert found.separating_sets == {(0, 1, ()), (0, 3, (2,)), (1, 3, (2,))}, words


def test_dependence_in_latex_is_no_independence() -> None:
    for words in (r"$A \not\perp B \mid C$", r"A \not\!\perp B", r"\(A \not\perp\!\!\!\perp B\)", r"$A \nperp B$"):
        assert read_structure(words, "ABC").separating_sets == set(), words


@pytest.mark.parametrize(
    "piece", [" ", "\n", "A ", "A -> ", r"A \to B ", "⊥ ", "{", "}", "\\", "$", "A, ", "if\n", "A\n", r"\{ "]
)
def test_a_megabyte_of_thought_costs_little(piece: str) -> None:
    with ends():
        read_structure(f"A{piece * (2**20 // len(piece))}B", "ABCD")


def test_what_is_wrong_or_said_of_everything_earns_less(proved: tuple[Task, list[Example]]) -> None:
    for example in proved[1]:
        end = f"</think>\nTherefore: {example.gold}"
        names = example.tags["names"]
        pairs = [(a, b) for k, a in enumerate(names) for b in names[k + 1 :]]
        everything = " ".join(f"{a} {b} ->. {b} {a} ->. {a} and {b} are independent." for a, b in pairs)
        assert structure_of(proved, example, everything + end) < 0.75
        turned = thought_of(example).replace("->", "=").replace("<-", "->").replace("=", "<-")
        if "->" in turned.split("Graph:")[1].split("\n")[0]:
            assert structure_of(proved, example, turned + end) < 1
            assert structure_of(proved, example, turned + end, v_structures=0, cpdag=0, compelled=0) == 1
        copied = example.question.split("\n")[0] + end
        assert structure_of(proved, example, copied) == 0  # the premise says it already


def test_structure_is_no_matter_of_other_questions(task: Task) -> None:
    other = Example("1", "What is 2 + 2?", "Yes", "g")
    assert pay("structure", make_sample(task, other, "x</think>Therefore: Yes", True, False)) is None


def test_the_row_that_check_audits_is_judged_by_every_reward(task: Task) -> None:
    row = task.audit_examples()[0]
    judged = make_sample(task, row, row.target.removeprefix("<think>"), True, False)
    assert pay("structure", judged) == 1
    outweighed = {"correctness": 0.1, "structure": 9.0}
    found, _ = find_rewards({"correctness": Reward(2.0, {}), "structure": Reward(1.0, {})})
    assert any("a right proof" in one for one in audit_rewards(task, found, outweighed, row))


def test_no_exploit_pays_with_the_structure_reward_and_weights_that_let_it_are_refused(
    proved: tuple[Task, list[Example]],
) -> None:
    task, examples = proved
    wanted = {"correctness": Reward(1.0, {}), "format": Reward(0.2, {}), "structure": Reward(0.7, {})}
    rewards, problems = find_rewards(wanted)
    assert problems == []
    weights = {name: reward.weight for name, reward in wanted.items()}
    for example in examples[:10]:
        assert audit_rewards(task, rewards, weights, example) == []
    # the audit itself would see it: a proof with the wrong verdict pays where structure outweighs correctness
    assert any(
        "a right proof" in one for one in audit_rewards(task, rewards, {**weights, "structure": 9.0}, examples[0])
    )
    _, problems = find_rewards({**wanted, "structure": Reward(0.8, {})})
    assert "Fix: keep their sum below correctness" in problems[0]


# ---------------------------------------------------------------- proof


def test_a_valid_proof_earns_all_and_a_wrong_step_what_stands_before_it(proved: tuple[Task, list[Example]]) -> None:
    task, examples = proved

    def proof_of(example: Example, completion: str) -> float:
        paid = pay("proof", make_sample(task, example, completion, True, False))
        assert paid is not None
        return paid

    for example in examples:
        lines, end = thought_of(example).splitlines(), f"\n</think>\nTherefore: {example.gold}"
        wrong = end.replace(example.gold, "No" if example.gold == "Yes" else "Yes")
        assert proof_of(example, "\n".join(lines) + end) == 1
        assert 0 < proof_of(example, "\n".join(lines) + wrong) < 0.5
        assert proof_of(example, "\n".join(lines)) == 0  # no verdict
        assert proof_of(example, f"so it is{end}") == 0
        assert 0 < proof_of(example, "\n".join(lines[:-1]) + end) < 0.5  # no decision
        cut = [proof_of(example, "\n".join([*lines[:k], "Perhaps.", *lines[k:]]) + end) for k in range(len(lines))]
        assert cut == sorted(cut)  # the later the first wrong step, the more
        assert cut[-1] < 0.5


def test_no_exploit_pays_with_the_proof_reward(proved: tuple[Task, list[Example]], task: Task) -> None:
    wanted = {"correctness": Reward(1.0, {}), "format": Reward(0.2, {}), "proof": Reward(0.7, {})}
    rewards, problems = find_rewards(wanted)
    assert problems == []
    for example in proved[1][:10]:
        assert audit_rewards(proved[0], rewards, {name: one.weight for name, one in wanted.items()}, example) == []
    assert "keep their sum below correctness" in find_rewards({**wanted, "proof": Reward(0.8, {})})[1][0]
    other = Example("1", "What is 2 + 2?", "Yes", "g")
    assert pay("proof", make_sample(task, other, "x</think>Therefore: Yes", True, False)) is None


KINDS = {"verdict": "Yes", "number": "72", "expression": "4\\sqrt{3}", "choice": "B", "words": "Vitamin C"}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_answer_has_a_catalogue_that_a_careless_reader_fails(kind: str) -> None:
    """A reader that looks for the gold answer anywhere is caught, whatever is asked."""
    assert set(KINDS) == set(FINAL)
    gold = KINDS[kind]
    example = Example("1", f"Is it {gold}?", gold, "g")
    found = exploits(kind, example)
    assert len(found) >= 17
    assert sum(gold in completion for completion in found.values()) >= 10
    assert len(set(found.values())) == len(found)


def test_the_audit_finds_a_reward_that_can_be_hacked(task: Task) -> None:
    """First-substring matching is the mistake of others: the audit has to see it."""
    hackable = {"substring": lambda s: float(f"Therefore: {s.example.gold}" in s.completion)}
    found = audit_rewards(task, hackable, {"substring": 1.0}, EXAMPLE)
    assert any(text.startswith("both answers") for text in found)
    assert any(text.startswith("answer in the thought") for text in found)
    assert len(exploits("verdict", EXAMPLE)) >= 16
