"""Stop training at the first step that is not finite, name its rows, and skip such steps when the cluster allows it.

    trainer.add_callback(DivergenceCallback(trainer, name_rows, skip={7}))      the last callback

A step is bad where its loss or the norm of its gradients is not finite in any process, or where the weights are not
finite that a checkpoint would hold. No checkpoint is written then: the newest one is good. `cluster.skip_bad_batches`
allows the launcher to start the step again from it, without the update of that step: its rows are not read, weights and
optimizer stay as they are, and the order of the rows and the count of steps continue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pipeline.training import distributed
from pipeline.training.resume import GeneratesAhead

SHOWN_TOKENS = 20  # of a packed sequence, which has no id

NameRows = Callable[[list[Any]], list[str]]  # of the inputs of a step's micro-batches


class DivergenceCallback(TrainerCallback):
    """Looks at each micro-batch's loss, at the gradient of each step, and at the weights before a save."""

    def __init__(self, trainer: Trainer, name_rows: NameRows, skip: Collection[int] = ()) -> None:
        self.trainer, self.name_rows, self.skip = trainer, name_rows, set(skip)
        self.problem: str | None = None
        self.rows: list[str] = []
        self.step = 0
        self.losses: list[torch.Tensor] = []
        self.inputs: list[Any] = []
        self.norm: Any = None
        self._train, self._clip = trainer.training_step, trainer.accelerator.clip_grad_norm_
        vars(trainer)["training_step"] = self._training_step
        vars(trainer.accelerator)["clip_grad_norm_"] = self._clip_grad_norm

    def _training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self.trainer.state.global_step + 1 in self.skip:
            if isinstance(self.trainer, GeneratesAhead):
                self.trainer.skip_micro_batch(inputs)
            return torch.zeros((), device=self.trainer.args.device)  # no gradient: the optimizer changes nothing
        self.inputs.append(inputs)
        loss: torch.Tensor = self._train(model, inputs, num_items_in_batch)
        self.losses.append(loss.detach())
        return loss

    def _clip_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self.norm = self._clip(*args, **kwargs)
        return self.norm

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.losses.clear()
        self.inputs.clear()
        self.norm = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        problem = self._loss_problem() or self._gradient_problem(args) or (self._weights_problem(control))
        if not distributed.any_flag(problem is not None):
            return
        rows = self.name_rows(self.inputs) if self.inputs else []
        found: list[Any] = distributed.to_rank_0([problem, rows])
        every = dict.fromkeys(row for _, some in found for row in some)
        self.problem = distributed.from_rank_0(lambda: next(str(text) for text, _ in found if text))
        self.rows = distributed.from_rank_0(lambda: list(every))
        self.step = state.global_step
        control.should_training_stop = True
        control.should_save = control.should_evaluate = False

    def _loss_problem(self) -> str | None:
        bad = [loss for loss in self.losses if not torch.isfinite(loss).all()] if self.losses else []
        return f"loss is {bad[0].float().mean().item()}" if bad else None

    def _gradient_problem(self, args: TrainingArguments) -> str | None:
        if not self.losses or (args.fp16 and self.trainer.accelerator.optimizer_step_was_skipped):
            return None  # an overflow of float16: the step was not taken
        engine = self.trainer.deepspeed
        norm = engine.get_global_grad_norm() if engine is not None else self.norm
        norm = norm.item() if isinstance(norm, torch.Tensor) else norm
        return f"grad_norm is {norm}" if norm is not None and not math.isfinite(norm) else None

    def _weights_problem(self, control: TrainerControl) -> str | None:
        if not control.should_save or self.trainer.model is None:
            return None
        for name, weights in self.trainer.model.named_parameters():
            own = getattr(weights, "ds_tensor", weights)  # this process's part under ZeRO-3
            if weights.requires_grad and own.numel() and not torch.isfinite(own.detach()).all():
                return f"{name} is not finite"
        return None


def name_prompts(inputs: list[Any]) -> list[str]:
    """Return the ids of GRPO's prompts: its micro-batches are lists of rows."""
    return list(dict.fromkeys(str(row["id"]) for batch in inputs for row in batch))


def _rows_of(batch: Mapping[str, Any]) -> Iterator[list[int]]:
    """Yield the tokens of each row of a micro-batch, which is padded or one line of rows."""
    if "lengths" in batch:
        for row in batch["input_ids"][0].split(batch["lengths"].tolist()):
            yield row.tolist()
        return
    masks = batch.get("attention_mask")
    for k, padded in enumerate(batch["input_ids"].tolist()):
        kept = [1] * len(padded) if masks is None else masks[k].tolist()
        yield [token for token, keep in zip(padded, kept, strict=True) if keep]


def name_token_rows(
    ids: Sequence[str], encoded: Sequence[dict[str, list[int]]], tokenizer: PreTrainedTokenizerBase
) -> NameRows:
    """Return a function that names SFT's rows by their tokens; of packed sequences it shows the beginning."""

    def name(inputs: list[Any]) -> list[str]:
        known: dict[tuple[int, ...], list[str]] = {}
        for one, row in zip(ids, encoded, strict=True):
            known.setdefault(tuple(row["input_ids"]), []).append(one)
        found = []
        for batch in inputs:
            for tokens in _rows_of(batch):
                packed = f"a packed sequence that begins with {tokenizer.decode(tokens[:SHOWN_TOKENS])!r}"
                found.append(" or ".join(known.get(tuple(tokens), [packed])))  # rows may be the same text
        return found

    return name
