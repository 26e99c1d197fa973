"""What a reward is: a function `(Sample, **params) -> float | None` in a file of its own name in this folder.

A recipe lists rewards by name with weight and parameters; `find_rewards` checks them by signature before a GPU is
spent. None means that the completion cannot be judged; TRL leaves such a reward out of the sum.
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
    """One completion, judged once for all rewards."""

    example: Example
    completion: str  # without its stop token
    prompt_opens_think: bool  # whether the prompt already opened the thought
    truncated: bool  # whether it ran into the length limit
    grade: Grade
    well_formed: bool

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
    """Judge a completion by the task's `judge`, the only one: what was cut off earns nothing, as in evaluation."""
    return Sample(
        example,
        completion,
        prompt_opens_think,
        truncated,
        task.judge(example, completion, prompt_opens_think, truncated),
        not truncated and task.is_well_formed(completion, prompt_opens_think),
    )


def reward_names() -> list[str]:
    """Every module of this folder but this one and the audit."""
    modules = pkgutil.iter_modules(pipeline.rewards.__path__)
    return sorted(m.name for m in modules if m.name not in ("reward", "audit"))


def find_rewards(wanted: Mapping[str, Reward]) -> tuple[dict[str, RewardFunction], list[str]]:
    """The functions a recipe lists, parameters bound, and what is wrong with the list."""
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
            takes = list(inspect.signature(function).parameters)[1:]
            problems.append(f"grpo.rewards.{name}.params: {error}; it takes {', '.join(takes) or 'none'}")
            continue
        found[name] = partial(function, **reward.params)
    others = sum(reward.weight for name, reward in wanted.items() if name != "correctness")
    judged = wanted["correctness"].weight if "correctness" in wanted else 0.0
    if "structure" in wanted and others >= judged:
        problems.append(
            f"grpo.rewards: the others weigh {others:g}, correctness {judged:g}: a good-looking thought with the wrong "
            "verdict could earn as much as the right one; keep their sum below it"
        )
    return found, problems
