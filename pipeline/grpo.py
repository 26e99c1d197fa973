"""Reinforcement learning from the task's rewards: group relative policy optimization (Shao et al. 2024).

    python -m pipeline.grpo tiny                        one recipe's GRPO step, under torchrun
    python -m pipeline.grpo tiny grpo.init_from=base    from the base model, without SFT ("direct GRPO")

What is computed, with the settings of configs/base.yaml in brackets; TRL's GRPOTrainer computes it:

    reward      weighted sum of the recipe's rewards, all from one grade of each completion by `Task.grade`
    advantage   reward − mean of the prompt's `num_generations` completions, divided by their standard deviation
                (scale_rewards: group; batch divides by that of the batch, none does not divide). No value model
    ratio       by token, new policy / policy that generated, clipped to 1 − epsilon … 1 + epsilon_high
                (0.2, 0.28: DAPO's clip-higher, Yu et al. 2025). It is 1 in the first pass over a generation
    loss        −min(ratio × advantage, clipped ratio × advantage), summed over the tokens of all completions and
                divided by their number (loss_type: dapo; grpo averages each completion first, dr_grpo divides by
                the length limit). Truncated completions count, unless mask_truncated_completions is set
    reference   with beta > 0: + beta × KL to the first policy of this stage, the estimator e^d − d − 1, where d is
                the difference of log-probabilities (beta: 0, so no reference model is kept)

Every optimizer step takes `global_batch_size` completions. Leaves the same files as SFT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig

from pipeline.config.cluster import generation_sizes
from pipeline.config.recipe import Recipe
from pipeline.core import heartbeat, stopwatch
from pipeline.core.errors import RecipeError
from pipeline.engines.engine import Engine, Sampling
from pipeline.engines.text import decode, stop_ids
from pipeline.engines.transformers import TransformersEngine
from pipeline.models.kernels import choose_head
from pipeline.models.loading import (
    choose_dtype,
    initial_checkpoint,
    load_tokenizer,
    revision_of,
    template_opens_think,
)
from pipeline.rewards.reward import RewardFunction, find_rewards, make_sample
from pipeline.sizing.memory import shares_prompts
from pipeline.tasks.task import Task, example_of, task_of
from pipeline.training import distributed, flat
from pipeline.training.divergence import name_prompts
from pipeline.training.harness import main
from pipeline.training.redraw import Redraw
from pipeline.training.rollouts import EngineTrainer, mismatch
from pipeline.training.tokens import prompt_lengths
from pipeline.training.trainer import (
    layout_and_batches,
    load_for_training,
    load_rows,
    logger_environment,
    preserve_adapter_dtype,
    require_rows,
    train,
    training_arguments,
    warn_of_long_rows,
)
from pipeline.workflow.artifact import DRAWS, Artifact
from pipeline.workflow.runtime import Runtime
from pipeline.workflow.weights import Checkpoint


def run(recipe: Recipe, inputs: Mapping[str, Artifact], out: Path, runtime: Runtime) -> dict[str, Any]:
    settings = recipe.grpo
    layout, sizes = layout_and_batches(recipe, runtime, "grpo")
    distributed.start(deepspeed=layout.deepspeed != "none")
    choose_head()

    # ---- prompts; what is too long is dropped and counted
    stopwatch.enter("rows")
    runtime.progress.update(note="reading prompts")
    checkpoint = initial_checkpoint(recipe.model, inputs)
    tokenizer = load_tokenizer(checkpoint, recipe.model)
    prompts = load_rows(inputs["data"], "grpo").remove_columns("completion")
    lengths = prompt_lengths(tokenizer, prompts["prompt"])
    kept = [k for k, length in enumerate(lengths) if length <= settings.max_prompt_length]
    limit = f"grpo.max_prompt_length {settings.max_prompt_length} tokens"
    require_rows(len(kept), "GRPO prompts", limit)
    warn_of_long_rows(runtime, prompts["id"], kept, "GRPO prompts", limit)

    # ---- rewards
    task = task_of(recipe.task, recipe.seed)
    functions, problems = find_rewards(settings.rewards)
    if problems:
        raise RecipeError(*problems)

    # ---- the trainer
    at_once = runtime.cluster.generation_batch_size
    if at_once == "auto":
        at_once = generation_sizes(recipe, sizes)[0]
    shared = training_arguments(recipe, settings.optimizer, layout, sizes, out, runtime)
    config = GRPOConfig(
        **{**shared, "logging_steps": 1},  # a step takes seconds or minutes, and there are few
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        num_generations=settings.num_generations,
        steps_per_generation=at_once // sizes.per_device,
        num_iterations=settings.num_iterations,
        max_completion_length=settings.max_completion_length,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        beta=settings.beta,
        epsilon=settings.epsilon,
        epsilon_high=settings.epsilon_high,
        loss_type=settings.loss_type,
        scale_rewards=settings.scale_rewards,
        mask_truncated_completions=settings.mask_truncated_completions,
        # of the reference that TRL loads by itself where all weights are trained: the commit that the policy is of
        model_init_kwargs={"revision": recipe.model.revision} if _has_full_reference(recipe, checkpoint) else None,
        reward_weights=[reward.weight for reward in settings.rewards.values()],
    )
    stopwatch.enter("load")
    runtime.progress.update(note="loading the model")
    model = load_for_training(
        recipe, checkpoint, layout
    )  # after the arguments: under ZeRO-3 they say that it is loaded in parts
    model.generation_config.eos_token_id = stop_ids(model, tokenizer)  # TRL fills its own settings from this config
    stops = {*model.generation_config.eos_token_id, tokenizer.pad_token_id}
    rewards = [as_trl_reward(task, name, f, tokenizer, stops) for name, f in functions.items()]
    with preserve_adapter_dtype(model), logger_environment(out, runtime):
        trainer = EngineTrainer(
            model, reward_funcs=rewards, args=config, train_dataset=prompts.select(kept), processing_class=tokenizer
        )
    if runtime.cluster.generation.grpo.engine == "vllm":
        runtime.progress.update(note="starting vLLM")
        trainer.use_own_weights(_vllm(recipe, checkpoint, tokenizer, trainer, at_once, runtime))
    else:
        rows = min(at_once, runtime.cluster.generation.grpo.rows or at_once)
        trainer.engine = TransformersEngine(model, tokenizer, rows)
    shares = shares_prompts(recipe, runtime.cluster, sizes.per_device) and not trainer.aux_loss_enabled
    trainer.flat = flat.replace_attention(runtime, model, saves=shares)
    if trainer.flat and trainer.ref_model is not None:
        flat.replace_attention(runtime, trainer.accelerator.unwrap_model(trainer.ref_model), saves=True)
    if settings.redraw_without_spread < 1:
        highest = sum(max(0.0, reward.weight) for reward in settings.rewards.values())
        record = out / DRAWS if runtime.rank == 0 else None
        ids = [prompts["id"][k] for k in kept]
        trainer.redraw = Redraw(ids, settings.redraw_without_spread, recipe.seed, highest, record)
    trainer.sampling = Sampling(settings.temperature, settings.top_p, settings.top_k, settings.max_completion_length)

    # ---- train, save
    metrics = train(trainer, recipe, "grpo", out, runtime, name_prompts)
    trainer.engine.close()
    apart = {"engine_mismatch": found} if (found := mismatch(trainer.state.log_history)) else {}
    draws = trainer.redraw.metrics() if trainer.redraw else {}
    return {**metrics, **apart, **draws, "prompts": len(kept), "dropped_too_long": len(lengths) - len(kept)}


def _vllm(
    recipe: Recipe,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    trainer: EngineTrainer,
    rows: int,
    runtime: Runtime,
) -> Engine:
    """Start vLLM beside the trainer, on the same devices, with the base model; the policy comes with each update."""
    from pipeline.engines.vllm import VllmEngine, VllmSettings, adapter_rank

    settings, chosen = recipe.grpo, runtime.cluster.generation.grpo
    rank = adapter_rank(checkpoint.adapter) if checkpoint.adapter else recipe.lora.r if recipe.lora.enabled else None
    engine = VllmEngine(
        checkpoint.base,
        tokenizer,
        stop_ids(trainer.accelerator.unwrap_model(trainer.model), tokenizer),
        VllmSettings(
            dtype=choose_dtype(recipe.model),
            rows=rows,
            max_length=settings.max_prompt_length + settings.max_completion_length,
            quantization=recipe.model.quantization,
            revision=revision_of(checkpoint, recipe.model),
            lora_rank=rank,
            trains=True,
            gpu_memory=chosen.gpu_memory,
            sleep=chosen.sleep is True,
            use="grpo",
        ),
        gather=trainer._dist.gather_params,
    )
    distributed.barrier()  # DeepSpeed may hang where its processes begin far apart
    return engine


def _has_full_reference(recipe: Recipe, checkpoint: Checkpoint) -> bool:
    pinned = recipe.model.revision is not None and checkpoint.base == recipe.model.name
    return pinned and recipe.grpo.beta > 0 and not recipe.lora.enabled


def as_trl_reward(
    task: Task, name: str, function: RewardFunction, tokenizer: PreTrainedTokenizerBase, stop_ids: set[int]
) -> Callable[..., list[float | None]]:
    """A reward in TRL's shape: lists of completions and of the rows' columns in, a list of rewards out.

    The text is decoded as in an evaluation: TRL's own has lost the tags of a thought where these are special tokens.
    """
    prompt_opens_think = template_opens_think(tokenizer)

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        samples = []
        for k, ids in enumerate(completion_ids):
            row = {key: columns[key][k] for key in ("id", "question", "gold", "group", "tags")}
            heartbeat.beat()
            truncated = not ids or ids[-1] not in stop_ids
            samples.append(make_sample(task, example_of(row), decode(tokenizer, ids), prompt_opens_think, truncated))
        found = []
        for sample in samples:
            heartbeat.beat()
            found.append(function(sample))
        return found

    reward.__name__ = name
    return reward


if __name__ == "__main__":
    main("grpo", run)
