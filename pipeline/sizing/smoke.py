"""A recipe made small enough to be tried in minutes: every code path of a long run, and no result.

    bash run_pipeline.sh deepseek7b --smoke-test          in runs/deepseek7b-smoke-test/, marked wherever it is shown

What stays: the stages, the model's architecture, chat format, quantization, LoRA, ZeRO stages, optimizers, rewards and
launcher. What shrinks: the model (random weights, its own tokenizer), the rows, the steps, the answers and batches. A
data set of the hub is stood for by the few rows in its schema that the project ships; a file of the user's is read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.config.architectures import ARCHITECTURES, architecture_of
from pipeline.config.cluster import Cluster, process_count
from pipeline.config.model_files import model_config
from pipeline.config.recipe import Evaluate, Grpo, RandomInit, Recipe, Sft, TaskChoice
from pipeline.core.errors import RecipeError
from pipeline.tasks.task import Task, task_of

SUFFIX = "-smoke-test"
STEPS = 4  # of SFT; GRPO takes half as many
WORDS = 16  # tokens of a completion


def smoke_test_of(recipe: Recipe, cluster: Cluster | None) -> Recipe:
    """The recipe in small. RecipeError where its model's architecture is not known or not one that can be drawn."""
    model, task = recipe.model, task_of(recipe.task, recipe.seed)
    processes = cluster.nodes * process_count(cluster) if cluster else 1
    group = recipe.grpo.num_generations
    batch = processes * 2
    grpo_batch = group * processes
    return replace(
        recipe,
        name=recipe.name + SUFFIX,
        smoke_test=True,
        model=replace(model, random_init=_scratch(recipe), gguf=None, chat_template=model.chat_template or "chatml"),
        task=_task(recipe.task, task),
        sft=replace(
            recipe.sft,
            max_steps=STEPS,
            global_batch_size=batch,
            eval_steps=STEPS // 2 if recipe.sft.eval_steps else None,
            optimizer=_plain(recipe.sft),
        ),
        grpo=replace(
            recipe.grpo,
            max_steps=STEPS // 2,
            global_batch_size=grpo_batch,
            max_completion_length=WORDS,
            optimizer=_plain(recipe.grpo),
        ),
        evaluate=_evaluate(recipe.evaluate),
        report=replace(recipe.report, bootstrap_samples=50),
    )


def _task(choice: TaskChoice, task: Task) -> TaskChoice:
    params = {**choice.params, **task.smoke_test_params()}
    if task.source == "hub" and "sample" in task.sources:
        return replace(choice, source="sample", revision=None, params=params)
    return replace(choice, params=params)


def _scratch(recipe: Recipe) -> RandomInit:
    """Return two narrow layers of the model's architecture, with its ratio of key/value heads."""
    if recipe.model.random_init:
        given = recipe.model.random_init
        return replace(given, hidden_size=32, layers=1, heads=2, key_value_heads=2, intermediate_size=64)
    config = model_config(recipe.model)
    if config is None or architecture_of(config) is None:
        what = (
            f"its architecture is {config.get('model_type')!r}"
            if config
            else "its config.json is neither bundled nor in the local cache"
        )
        raise RecipeError(
            f"model.name: {recipe.model.name} cannot be smoke-tested, {what}; known: {', '.join(ARCHITECTURES)} "
            "(python -m pipeline download brings the config of another)"
        )
    grouped = config.get("num_key_value_heads", 1) != config.get("num_attention_heads", 1)
    return RandomInit(
        architecture=config["model_type"],
        vocabulary=600,
        hidden_size=64,
        layers=2,
        heads=4,
        key_value_heads=2 if grouped else 4,
        intermediate_size=128,
        context=max(recipe.sft.max_length, recipe.grpo.max_prompt_length + recipe.grpo.max_completion_length),
        rope_theta=10_000.0,
        initializer_range=0.02,
    )


def _plain(stage: Sft | Grpo) -> Any:
    """The stage's optimizer with a schedule that fits a few steps."""
    return replace(stage.optimizer, lr_scheduler_type="linear", lr_scheduler_kwargs=None, warmup=0)


def _evaluate(given: Evaluate) -> Evaluate:
    return replace(given, limit=4, max_new_tokens=WORDS, samples=min(given.samples, 2))
