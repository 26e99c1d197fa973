"""Supervised fine-tuning on the task's targets.

    python -m pipeline.sft tiny                          one recipe's SFT step, under torchrun
    torchrun --nproc_per_node=2 -m pipeline.sft tiny     the same, processes started by hand

The loss is the cross-entropy of the target's tokens given the prompt, averaged over the tokens of a global batch;
prompt tokens have no loss, but for the first `full_loss_fraction` of the rows. Rows that are longer than `max_length`
are dropped and counted, never cut. With `early_stopping_patience` the weights of the lowest validation loss are kept.

Leaves `model/` (all weights) or `adapter/` (LoRA), `history.json`, `tensorboard/` and `checkpoints/`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import EarlyStoppingCallback
from trl import SFTConfig, SFTTrainer

from pipeline.config.recipe import Recipe
from pipeline.core import stopwatch
from pipeline.models.kernels import choose_head
from pipeline.models.loading import initial_checkpoint, load_tokenizer
from pipeline.training import distributed, flat
from pipeline.training.divergence import name_token_rows
from pipeline.training.harness import main
from pipeline.training.tokens import encode_split, masked_lengths, row_lengths
from pipeline.training.trainer import (
    layout_and_batches,
    load_for_training,
    logger_environment,
    preserve_adapter_dtype,
    require_rows,
    train,
    training_arguments,
    warn_of_long_rows,
)
from pipeline.workflow.artifact import Artifact, read_split
from pipeline.workflow.runtime import Runtime

WINDOW = 16  # global batches that are sorted by length together: little padding, yet a random order


def run(recipe: Recipe, inputs: Mapping[str, Artifact], out: Path, runtime: Runtime) -> dict[str, Any]:
    settings = recipe.sft
    layout, sizes = layout_and_batches(recipe, runtime, "sft")
    distributed.start(deepspeed=layout.deepspeed != "none")
    choose_head()

    # ---- rows: tokens and labels; what is too long is dropped and counted
    stopwatch.enter("rows")
    runtime.progress.update(note="tokenizing")
    checkpoint = initial_checkpoint(recipe.model, inputs)
    tokenizer = load_tokenizer(checkpoint, recipe.model)
    rows = read_split(inputs["data"], "sft", ["id", "tags"]).to_pydict()
    encoded = encode_split(tokenizer, inputs["data"].folder, "sft")
    kept = within_length(encoded, settings.max_length)
    limit = f"sft.max_length {settings.max_length} tokens"
    require_rows(len(kept), "SFT rows", limit)
    warn_of_long_rows(runtime, rows["id"], kept, "SFT rows", limit)
    if settings.order != "shuffled":
        phases = [tags.get("phase", 0) if settings.order == "curriculum" else 0 for tags in rows["tags"]]
        # like prompts, not like answers: rows of short answers, alone in their batches, would weigh many times more
        kept = order_rows(kept, phases, masked_lengths(encoded), settings.global_batch_size, recipe.seed)
    dataset = unmask_prompts(encoded, kept, settings.full_loss_fraction)

    # ---- rows whose loss is only looked at
    validation = None
    if settings.eval_steps:
        held_out = read_split(inputs["data"], "validation", ["id"]).to_pydict()
        others = encode_split(tokenizer, inputs["data"].folder, "validation")
        short = within_length(others, settings.max_length)
        validation = others.select(short)
        require_rows(len(validation), "validation rows", limit)
        warn_of_long_rows(runtime, held_out["id"], short, "validation rows", limit)

    # ---- the trainer
    shared = training_arguments(recipe, settings.optimizer, layout, sizes, out, runtime)
    if settings.early_stopping_patience:
        shared["save_steps"] = settings.eval_steps  # the best weights have to be there to come back to; Watch adds
        # the saves at cluster.save_steps, so that a node that dies costs no more than those
    config = SFTConfig(
        **shared,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        max_length=settings.max_length,
        packing=settings.packing,
        dataset_kwargs={"skip_prepare_dataset": not settings.packing},  # the rows are tokens already
        train_sampling_strategy="random" if settings.order == "shuffled" else "sequential",
        eval_strategy="steps" if validation else "no",
        eval_steps=settings.eval_steps,
        per_device_eval_batch_size=sizes.per_device,
        load_best_model_at_end=settings.early_stopping_patience is not None,
        metric_for_best_model="eval_loss",
    )
    stopwatch.enter("load")
    runtime.progress.update(note="loading the model")
    model = load_for_training(recipe, checkpoint, layout)
    with preserve_adapter_dtype(model), logger_environment(out, runtime):
        trainer = RowsTrainer(model, config, train_dataset=dataset, eval_dataset=validation, processing_class=tokenizer)
    if flat.replace_attention(runtime, model, saves=sizes.per_device > 1 or settings.packing):
        trainer.data_collator = flat.collate  # not at construction, where TRL has one of its own for packed rows
    if settings.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))

    # ---- train, save
    metrics = train(trainer, recipe, "sft", out, runtime, name_token_rows(rows["id"], encoded, tokenizer))
    lengths = row_lengths(encoded)
    tokens = sum(lengths[k] for k in kept)
    counts = {"rows": len(kept), "dropped_too_long": len(encoded) - len(kept), "tokens_an_epoch": tokens}
    return {
        **metrics,
        **counts,
        **validation_metrics(trainer.state.log_history, best=settings.early_stopping_patience is not None),
    }


class RowsTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's SFT trainer, for batches of `flat.collate` too."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], **more: Any) -> Any:
        return super().compute_loss(model, {k: value for k, value in inputs.items() if k != "lengths"}, **more)


def within_length(encoded: Dataset, longest: int) -> list[int]:
    return [k for k, length in enumerate(row_lengths(encoded)) if length <= longest]


def validation_metrics(history: list[dict[str, Any]], *, best: bool) -> dict[str, Any]:
    """The validation loss of the weights that are kept, and how far it is above the training loss around it.

    `best`: of the lowest loss, else of the last. The training loss is the mean of what was logged since the validation
    before. Empty where nothing was validated.
    """
    found = [(k, entry["eval_loss"]) for k, entry in enumerate(history) if "eval_loss" in entry]
    if not found:
        return {}
    number = min(range(len(found)), key=lambda n: found[n][1]) if best else len(found) - 1
    here, loss = found[number]
    since = found[number - 1][0] if number else 0
    losses = [entry["loss"] for entry in history[since:here] if "loss" in entry]
    gap = loss - sum(losses) / len(losses) if losses else None
    return {
        "validation_loss": loss,
        "validation_loss_gap": gap,
        "validation_step": history[here]["step"],
        "validations": len(found),
    }


def order_rows(rows: list[int], phases: list[int], lengths: list[int], batch: int, seed: int) -> list[int]:
    """Rows by phase; within a phase shuffled, then batches of rows of like length.

    Short premises come first where the task marks phases: looking a statement up is learned on them.
    """
    rng = random.Random(f"{seed}/order")
    ordered: list[int] = []
    for phase in sorted({phases[k] for k in rows}):
        mine = [k for k in rows if phases[k] == phase]
        rng.shuffle(mine)
        for start in range(0, len(mine), batch * WINDOW):
            window = sorted(mine[start : start + batch * WINDOW], key=lambda k: lengths[k])
            groups = [window[i : i + batch] for i in range(0, len(window), batch)]
            short = [groups.pop()] if len(groups[-1]) < batch else []  # an incomplete batch would shift the others
            rng.shuffle(groups)
            ordered += [k for group in groups + short for k in group]
    return ordered


def unmask_prompts(rows: Dataset, order: list[int], share: float) -> Dataset:
    """Return the rows in this order, with the loss on every token of the first `share` of them.

    Weights that were drawn at random learn what words go together from prompts; once they have, prompts are noise.
    """
    first = round(share * len(order))
    table = rows.data.table
    whole = Dataset(table.set_column(table.column_names.index("labels"), "labels", table["input_ids"]))
    return concatenate_datasets([whole.select(order[:first]), rows.select(order[first:])])


if __name__ == "__main__":
    main("sft", run)
