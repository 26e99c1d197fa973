"""GRPO's completions come from an engine, in the place of the trainer's own generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.nn.functional import pad
from trl import GRPOTrainer
from trl.extras.profiling import profiling_context
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import RepeatSampler, split_tensor_dict

from pipeline.core import stopwatch
from pipeline.engines.engine import Engine, Request, Sampling, seed_of
from pipeline.training.flat import of_groups
from pipeline.training.redraw import Redraw

SKIPPED = "completions_skipped"  # share of a step's completions that nothing is learned from


class EpochSampler(RepeatSampler):  # type: ignore[misc]
    """TRL's sampler, whose order follows from the epoch: TRL's own takes the first epoch's after every resume."""

    redraw: Redraw | None = None
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(epoch):
                torch.randperm(self.num_samples, generator=self.generator)

    def __iter__(self) -> Iterator[int]:
        if self.redraw is None:
            yield from super().__iter__()
            return
        shuffled = torch.randperm(self.num_samples, generator=self.generator).tolist()
        batches = self.num_samples // self.batch_size
        order = self.redraw.order(self.epoch, shuffled, batches * self.batch_size)
        for first in range(0, len(order), self.batch_size):
            for _ in range(self.repeat_count):
                for place in order[first : first + self.batch_size]:
                    yield from [place] * self.mini_repeat_count


class EngineTrainer(GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPO trainer whose completions come from `engine`, drawn as `sampling` says.

    The random stream of a completion follows from the seed, the step, the process and its place in the batch, so that a
    run that resumes draws what it would have drawn.
    """

    engine: Engine
    sampling: Sampling
    _buffered_inputs: list[dict[str, Any]] | None
    _learned: dict[str, Any] | None = None  # the micro-batch whose loss is computed
    flat = False  # its model attends as flat.py says: a prompt is computed once for its completions
    redraw: Redraw | None = None  # where some prompts are drawn less often

    # ---- completions

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], *_: Any, **__: Any
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Return the completion of each prompt of this process, and the log-probabilities of its tokens.

        They are None for an engine that computes with the trainer's own model: the trainer's are the same.
        """
        where = [self.state.global_step, self.accelerator.process_index]
        requests = []
        for _, places in groupby(range(len(prompt_ids)), key=lambda k: prompt_ids[k]):
            group = list(places)  # samples of one prompt stand together
            requests.append(Request(prompt_ids[group[0]], seed_of(self.args.seed, [*where, group[0]]), len(group)))
        first = [0]
        for request in requests:
            first.append(first[-1] + request.samples)
        found: list[list[int]] = [[] for _ in prompt_ids]
        scores: list[list[float]] = [[] for _ in prompt_ids]
        timed = stopwatch.part("generate")
        with timed, profiling_context(self, "engine.generate"), self._policy() as policy:
            self.engine.update(policy)
            for answer in self.engine.generate(requests, self.sampling, logprobs=self.use_vllm):
                place = first[answer.request] + answer.sample
                found[place] = answer.completion.token_ids
                scores[place] = answer.completion.logprobs or []
        return found, scores if self.use_vllm else None

    def _get_train_sampler(self, dataset: Any = None) -> RepeatSampler:
        sampler = super()._get_train_sampler(dataset)
        sampler.__class__ = EpochSampler
        sampler.redraw = self.redraw
        return sampler

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *words: Any) -> torch.Tensor:
        """Return the rewards of the completions of all processes, by function."""
        rewards: torch.Tensor = super()._calculate_rewards(inputs, *words)
        if self.redraw:
            ids = gather_object([row["id"] for row in inputs])
            sums = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
            sums[rewards.isnan().all(dim=1)] = torch.nan
            self.redraw.observe(ids[:: self.num_generations], sums.view(-1, self.num_generations).tolist())
        return rewards

    # ---- the loss: rows of one prompt together, and none without a gradient

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        new = self._buffered_inputs is None or self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        batch = super()._prepare_inputs(generation_batch)
        if not (new and self.model.training):
            return batch
        rows = _joined(self._buffered_inputs or [])
        useful = self._useful(rows)
        shares = self.accelerator.gather((~useful).float().mean())
        self._metrics["train"][SKIPPED].append(shares.mean().item())
        self._buffered_inputs = split_tensor_dict(_in_groups(rows, useful), self.args.steps_per_generation)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _useful(self, rows: dict[str, Any]) -> torch.Tensor:
        """Return which completions have a gradient: not those whose reward is their group's mean, nor masked ones."""
        if self.beta:  # all of them pull towards the reference
            return torch.ones_like(rows["advantages"], dtype=torch.bool)
        useful: torch.Tensor = (rows["advantages"] != 0) & rows["completion_mask"].any(1)
        return useful

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the loss of all completions; those without a gradient are not computed, and have a ratio of 1."""
        if not self.model.training or self.beta:
            whole: torch.Tensor = super()._compute_loss(model, inputs)
            return whole
        self._learned = inputs
        try:
            loss: torch.Tensor = super()._compute_loss(model, inputs)
        finally:
            self._learned = None
        total, count = self.accelerator.reduce(self._entropy, reduction="sum").tolist()
        entropies = self._metrics["train"]["entropy"]
        entropies[-1:] = [total / count] if count else []  # TRL's has the others as 0
        return loss

    def _get_per_token_logps_and_entropies(
        self, model: Any, ids: torch.Tensor, mask: torch.Tensor, scored: int, *args: Any, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return the log-probabilities and entropies of completions, (rows, scored), 0 behind their end.

        While a loss is computed they are those of TRL's old policy where there is no gradient. All processes take part
        in a pass: where none of a process's rows has one, it is over two tokens.
        """
        if self._learned is None:
            return self._scores(model, ids, mask, scored, *args, **more)
        useful = self._useful(self._learned)
        if useful.any():
            found, entropy, aux = self._scores(model, ids[useful], mask[useful], scored, *args, **more)
        else:
            two = ids[:1, -scored - 1 : 1 - scored or None]
            found, entropy, aux = self._scores(model, two, torch.ones_like(two), 1, *args, **more)
        old = self._learned.get("old_per_token_logps")
        whole = torch.zeros_like(mask[:, -scored:], dtype=found.dtype) if old is None else old.to(found.dtype)
        entropies = torch.zeros_like(whole)
        if useful.any() and entropy is not None:
            whole = whole.masked_scatter(useful[:, None], found)
            entropies = entropies.masked_scatter(useful[:, None], entropy.to(whole.dtype))
        else:
            whole = whole + 0 * found.sum()
        shown = (mask[:, -scored:] * useful[:, None]).sum()
        self._entropy = torch.stack([entropies.sum().detach(), shown.to(entropies.dtype)])
        return whole, entropies, aux

    def _scores(
        self,
        model: Any,
        ids: torch.Tensor,
        mask: torch.Tensor,
        scored: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **more: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if not self.flat:
            found: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
            found = super()._get_per_token_logps_and_entropies(
                model, ids, mask, scored, batch_size, compute_entropy, **more
            )
            return found
        parts = []
        size = batch_size or len(ids)
        for some, seen in zip(torch.split(ids, size), torch.split(mask, size), strict=True):
            line, inputs = of_groups(some, seen, scored)
            with self.accelerator.autocast():
                output = model(**inputs, fused_lm_head=True)
            hidden = seen[:, -scored:] == 0
            wide = (0, scored - line.own.shape[1])
            scores = [output.log_probs, output.entropy] if compute_entropy else [output.log_probs]
            parts.append([pad(one[0][line.own], wide).masked_fill(hidden, 0) for one in scores])
        whole = [torch.cat(scores) for scores in zip(*parts, strict=True)]
        return whole[0], whole[1] if compute_entropy else None, None

    # ---- resume

    # A checkpoint inside a generation cycle has the completions that are left of it. The alternative, saves only where
    # a cycle ends, would let a stop wait for num_iterations steps (minutes each), which a time limit may not leave, and
    # every cause of a save (save_steps, stop, deadline, validation) would have to know of cycles. They take kilobytes.

    def cycle(self) -> dict[str, torch.Tensor]:
        """Return the completions of a generation cycle that is not at its end; {} at its end."""
        if not self._buffered_inputs or self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
            return {}
        return {name: value.detach().cpu().contiguous() for name, value in _joined(self._buffered_inputs).items()}

    def restore_cycle(self, saved: dict[str, torch.Tensor]) -> None:
        """Continue a generation cycle, in micro-batches of any size; TRL draws anew what is not of this number of rows.

        That is so where `cluster.generation_batch_size` is another one now.
        """
        rows = self.args.per_device_train_batch_size * self.args.steps_per_generation
        if saved and len(saved["completion_ids"]) == rows:
            here = {name: value.to(self.args.device) for name, value in saved.items()}
            self._buffered_inputs = split_tensor_dict(here, self.args.steps_per_generation)

    def count_micro_batches(self) -> None:
        """Set TRL's count of micro-batches to that of the step that it resumes at."""
        batches, at_once = len(self.callback_handler.train_dataloader), self.args.gradient_accumulation_steps
        epochs, steps = divmod(self.state.global_step, max(1, -(-batches // at_once)))
        self._step = epochs * batches + steps * at_once

    def skip_micro_batch(self, inputs: Any) -> None:
        """Count a micro-batch that is not trained on; its completions are drawn, for the rest of their cycle."""
        self.model.train()
        self._prepare_inputs(inputs)
        self._step += 1

    def _policy(self) -> AbstractContextManager[Any]:
        """Return the model that is trained: whole for an engine that computes with it."""
        if self.use_vllm:
            return nullcontext(self.accelerator.unwrap_model(self.model))
        unwrapped: AbstractContextManager[Any] = unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )
        return unwrapped

    def use_own_weights(self, engine: Engine) -> None:
        """Generate with an engine that holds weights of its own, and correct for what it computes otherwise.

        TRL then weighs each completion by the ratio of its probabilities in trainer and engine (importance sampling).
        It happens after construction, because TRL would start an engine of its own.
        """
        self.engine, self.use_vllm = engine, True


def _joined(batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the rows of micro-batches in one; what is one number for all of them stays."""
    first = batches[0]
    return {
        name: torch.cat([batch[name] for batch in batches]) if value.ndim else value
        for name, value in first.items()
        if value is not None
    }


def _by_row(value: Any, count: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == count


def _in_groups(rows: dict[str, torch.Tensor], useful: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return rows with those of one prompt together, and those without a gradient last.

    All of them are of one optimizer step, so their order only changes which are computed together. Micro-batches at the
    end may then have nothing to compute.
    """
    prompts: dict[tuple[int, ...], int] = {}
    groups = [prompts.setdefault(tuple(prompt), len(prompts)) for prompt in rows["prompt_ids"].tolist()]
    flags = useful.tolist()
    order = torch.tensor(sorted(range(len(groups)), key=lambda k: (not flags[k], groups[k])), device=useful.device)
    return {name: value[order] if _by_row(value, len(order)) else value for name, value in rows.items()}


def mismatch(history: list[dict[str, Any]]) -> dict[str, float]:
    """Return how far the log-probabilities of engine and trainer were apart over all steps that a trainer logged.

    `mean` and `max` are of the difference of a token's log-probability, in nats; `ratio_*` of the importance weights
    of completions, 1 where both agree and 0 where a completion was left out.
    """
    names = {"mean": "sampling_logp_difference/mean", "max": "sampling_logp_difference/max"}
    names |= {f"ratio_{name}": f"importance_sampling_ratio/{name}" for name in ("min", "mean", "max")}
    combine = {"min": min, "max": max}
    found: dict[str, float] = {}
    for name, logged in names.items():
        values = [step[key] for step in history if (key := f"sampling/{logged}") in step]
        if values:
            found[name] = combine.get(name.removeprefix("ratio_"), fmean)(values)
    return found
