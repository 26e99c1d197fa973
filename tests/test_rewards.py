"""Rewards: what they pay, and that no known exploit pays."""

from __future__ import annotations

import pytest

from pipeline.recipe import Reward, TaskChoice, read, recipe_names
from pipeline.rewards.audit import FINAL, audit, exploits
from pipeline.rewards.reward import Sample, find_rewards, make_sample, reward_names
from pipeline.tasks.task import Example, Task, Verdict, task_of

EXAMPLE = Example("1", "Premise: A correlates with B.\nHypothesis: A directly causes B.", "Yes", "g")


@pytest.fixture(scope="module")
def task() -> Task:
    return task_of(TaskChoice("corr2cause", "auto", None, None, "stop", {}), 0)


def sample(task: Task, completion: str, *, truncated: bool = False) -> Sample:
    return make_sample(task, EXAMPLE, completion, True, truncated)


def pay(name: str, given: Sample) -> float | None:
    found, problems = find_rewards({name: Reward(1.0, {})})
    assert problems == []
    return found[name](given)


def test_every_reward_is_a_function_of_its_files_name() -> None:
    assert reward_names() == ["correctness", "format", "match"]
    found, problems = find_rewards({name: Reward(1.0, {}) for name in reward_names()})
    assert set(found) == set(reward_names())
    assert problems == []


def test_correctness_is_the_tasks_verdict(task: Task) -> None:
    assert pay("correctness", sample(task, "x</think>Therefore: Yes")) == 1
    assert pay("correctness", sample(task, "x</think>Therefore: No")) == 0
    assert pay("correctness", sample(task, "Therefore: Yes")) == 0
    unverifiable = Sample(EXAMPLE, "", True, False, Verdict(None, True, None), True)
    assert pay("correctness", unverifiable) is None


def test_match_is_the_declared_proxy_and_no_correctness(task: Task) -> None:
    def judged(verdict: Verdict) -> Sample:
        return Sample(EXAMPLE, "", True, False, verdict, True)

    assert pay("match", judged(Verdict(None, True, "iron", proxy=True))) == 1
    assert pay("match", judged(Verdict(None, True, "rest", proxy=False))) == 0
    assert pay("match", judged(Verdict(None, True, "prose"))) is None
    assert pay("match", judged(Verdict(True, True, "Yes"))) is None  # where it verifies, correctness is what is paid
    assert pay("correctness", judged(Verdict(None, True, "iron", proxy=True))) is None


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
    examples = task.specimens()
    assert examples or "grpo" not in recipe.stages
    for example in examples:
        assert audit(task, rewards, weights, example) == []


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
    found = audit(task, hackable, {"substring": 1.0}, EXAMPLE)
    assert any(text.startswith("both answers") for text in found)
    assert any(text.startswith("answer in the thought") for text in found)
    assert len(exploits("verdict", EXAMPLE)) >= 16
