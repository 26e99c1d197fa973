"""What the recipe's types and the calls of the trainers take for granted of the installed transformers and TRL."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from types import ModuleType

import pytest
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl import GRPOConfig, GRPOTrainer, SFTConfig

from pipeline import grpo, sft
from pipeline.config.recipe import Recipe, read
from pipeline.config.trainer_names import (
    SCHEDULER_KWARGS,
    LossName,
    OptimizerName,
    RewardScale,
    SchedulerName,
    scheduler_problems,
)
from pipeline.training import trainer

GIVEN = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}  # to a schedule, by the trainer


def compared_with(cls: type, name: str) -> set[str]:
    """The strings that the code of a class compares `self.name` or `args.name` with."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(inspect.getsource(cls))):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr == name:
            parts = (part for side in node.comparators for part in ast.walk(side))
            found |= {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}
    return found


def test_the_types_list_what_the_libraries_know() -> None:
    assert [*typing.get_args(OptimizerName)] == [*(one.value for one in OptimizerNames), "muon"]
    assert [*typing.get_args(SchedulerName)] == [one.value for one in SchedulerType]
    assert {*typing.get_args(LossName)} == compared_with(GRPOTrainer, "loss_type")
    assert {*typing.get_args(RewardScale)} == compared_with(GRPOTrainer, "scale_rewards") | {"none"}


def test_the_arguments_of_every_schedule_are_known() -> None:
    for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items():
        taken = {name: of for name, of in inspect.signature(function).parameters.items() if name not in GIVEN}
        if any(of.kind is inspect.Parameter.VAR_KEYWORD for of in taken.values()):
            assert kind.value not in SCHEDULER_KWARGS
            continue
        needs, takes = SCHEDULER_KWARGS[kind.value]
        assert set(takes) == set(taken)
        assert set(needs) == {name for name, of in taken.items() if of.default is inspect.Parameter.empty}
    assert scheduler_problems("key", "greedy", {"factor": 0.5}) == []


def passed(module: ModuleType, name: str) -> set[str]:
    """The keywords that a module calls `name` with, and the keys of the dicts that its function `name` returns."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            found |= {keyword.arg for keyword in node.keywords if keyword.arg}
        if isinstance(node, ast.FunctionDef) and node.name == name:
            returned = (part.value for part in ast.walk(node) if isinstance(part, ast.Return))
            keys = (key for value in returned if isinstance(value, ast.Dict) for key in value.keys)
            found |= {str(key.value) for key in keys if isinstance(key, ast.Constant)}
    return found


@pytest.mark.parametrize(("stage", "config"), [(sft, SFTConfig), (grpo, GRPOConfig)], ids=["sft", "grpo"])
def test_every_argument_that_a_stage_passes_is_a_field_of_the_trainers_config(stage: ModuleType, config: type) -> None:
    fields = {field.name for field in dataclasses.fields(config)}
    shared, own = passed(trainer, trainer.training_arguments.__name__), passed(stage, config.__name__)
    assert {"learning_rate", "optim", "lr_scheduler_type"} <= shared
    assert {"num_train_epochs", "max_steps"} <= own
    assert shared | own <= fields


def test_a_name_with_a_slip_is_answered_with_the_name_that_was_meant() -> None:
    for words, told in (
        (["sft.optimizer.name=adamw_torc"], "did you mean 'adamw_torch'?"),
        (["grpo.loss_type=dapoo"], "did you mean 'dapo'?"),
        (["grpo.scale_rewards=groups"], "did you mean 'group'?"),
        (["sft.optimizer.lr_scheduler_kwargs={num_decay_step: 5}"], "did you mean 'num_decay_steps'?"),
    ):
        recipe, problems = read("tiny", words)
        assert recipe is None
        assert told in problems[0]
    assert isinstance(read("tiny")[0], Recipe)
