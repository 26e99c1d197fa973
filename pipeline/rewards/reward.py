"""Reward functions: each is a function `(Sample, **params) -> float | None` in a file of the same name in this folder.

A recipe lists rewards by name with weight and parameters. `find_rewards` checks these against the function's signature
before a job uses a GPU. None means that a completion cannot be scored; TRL leaves such a reward out of the sum.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import pipeline.rewards
from pipeline.config.recipe import Reward
from pipeline.core.errors import did_you_mean
from pipeline.tasks.task import Example, Grade, Task


@dataclass(frozen=True)
class Sample:
    """One completion, graded once for all rewards."""

    example: Example
    completion: str  # without its stop token
    prompt_opens_think: bool  # whether the prompt already opened the thought
    truncated: bool  # whether it reached the length limit
    grade: Grade
    well_formed: bool
    check: Callable[[], float | None] = lambda: None  # Task.check_thought of it, called where a reward wants it

    @property
    def verdict(self) -> Grade:
        """The former name of `grade`."""
        warnings.warn("Sample.verdict is now Sample.grade", FutureWarning, stacklevel=2)
        return self.grade

    @property
    def prefilled(self) -> bool:
        """The former name of `prompt_opens_think`."""
        warnings.warn("Sample.prefilled is now Sample.prompt_opens_think", FutureWarning, stacklevel=2)
        return self.prompt_opens_think


RewardFunction = Callable[[Sample], float | None]


def make_sample(task: Task, example: Example, completion: str, prompt_opens_think: bool, truncated: bool) -> Sample:
    """Grade a completion with the task's `judge`, as evaluation does: a truncated completion earns nothing."""
    return Sample(
        example,
        completion,
        prompt_opens_think,
        truncated,
        task.judge(example, completion, prompt_opens_think, truncated),
        not truncated and task.is_well_formed(completion, prompt_opens_think),
        lambda: task.check_thought(example, completion, prompt_opens_think),
    )


def reward_names() -> list[str]:
    """Return the names of all rewards: every module of this folder but this one and the audit."""
    modules = pkgutil.iter_modules(pipeline.rewards.__path__)
    return sorted(m.name for m in modules if m.name not in ("reward", "audit"))


def find_rewards(wanted: Mapping[str, Reward]) -> tuple[dict[str, RewardFunction], list[str]]:
    """Return (the recipe's reward functions with their parameters bound, error messages)."""
    found: dict[str, RewardFunction] = {}
    problems = []
    for name, reward in wanted.items():
        if name not in reward_names():
            problems.append(f"grpo.rewards.{name}: unknown reward; {did_you_mean(name, reward_names())}")
            continue
        function = getattr(importlib.import_module(f"pipeline.rewards.{name}"), name)
        try:
            inspect.signature(function).bind(None, **reward.params)
        except TypeError as error:
            known = list(inspect.signature(function).parameters)[1:]
            problems.append(f"grpo.rewards.{name}.params: {error}; it takes {', '.join(known) or 'none'}")
            continue
        found[name] = partial(function, **reward.params)
    others = sum(reward.weight for name, reward in wanted.items() if name != "correctness")
    correctness = wanted["correctness"].weight if "correctness" in wanted else 0.0
    if {"structure", "proof"} & wanted.keys() and others >= correctness:
        problems.append(
            f"grpo.rewards: the others weigh {others:g}, correctness {correctness:g}: a good thought with the wrong "
            "verdict could earn as much as the right one. Fix: keep their sum below correctness"
        )
    return found, problems
