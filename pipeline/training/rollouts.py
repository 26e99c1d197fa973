"""GRPO's completions come from an engine, in the place of the trainer's own generation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from statistics import fmean
from typing import Any

import torch
from trl import GRPOTrainer
from trl.extras.profiling import profiling_context
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import RepeatSampler, split_tensor_dict

from pipeline.core import stopwatch
from pipeline.engines.engine import Engine, Request, Sampling, seed_of


class EpochSampler(RepeatSampler):  # type: ignore[misc]
    """TRL's sampler, whose order follows from the epoch: TRL's own takes the first epoch's after every resume."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(epoch):
                torch.randperm(self.num_samples, generator=self.generator)


class EngineTrainer(GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPO trainer whose completions come from `engine`, drawn as `sampling` says.

    The random stream of a completion follows from the seed, the step, the process and its place in the batch, so that a
    run that resumes draws what it would have drawn.
    """

    engine: Engine
    sampling: Sampling

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
        return sampler

    # A checkpoint inside a generation cycle has the completions that are left of it. The alternative, saves only where
    # a cycle ends, would let a stop wait for num_iterations steps (minutes each), which a time limit may not leave, and
    # every cause of a save (save_steps, stop, deadline, validation) would have to know of cycles. They take kilobytes.

    def cycle(self) -> dict[str, torch.Tensor]:
        """Return the completions of a generation cycle that is not at its end; {} at its end."""
        batches = self._buffered_inputs or []
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
            return {}
        return {
            name: (torch.cat([batch[name] for batch in batches]) if value.ndim else value).detach().cpu().contiguous()
            for name, value in (batches[0] if batches else {}).items()
            if value is not None
        }

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


def _split(batch: dict[str, torch.Tensor], parts: int) -> list[dict[str, torch.Tensor]]:
    """Split the rows of a micro-batch; what is one number for all of them stays."""
    split = {name: value.chunk(parts) if value.dim() else (value,) * parts for name, value in batch.items()}
    return [{name: values[k] for name, values in split.items()} for k in range(parts)]


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
