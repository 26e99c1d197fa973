"""GRPO's completions come from an engine, in the place of the trainer's own generation."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from trl import GRPOTrainer
from trl.extras.profiling import profiling_context
from trl.models import unwrap_model_for_generation

from pipeline.engines.engine import Engine, Request, Sampling, seed_of


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
        """Return the completion of each prompt of this process; the trainer computes log-probabilities itself."""
        where = [self.state.global_step, self.accelerator.process_index]
        requests = []
        for _, places in groupby(range(len(prompt_ids)), key=lambda k: prompt_ids[k]):
            group = list(places)  # samples of one prompt stand together
            requests.append(Request(prompt_ids[group[0]], seed_of(self.args.seed, [*where, group[0]]), len(group)))
        first = [0]
        for request in requests:
            first.append(first[-1] + request.samples)
        found: list[list[int]] = [[] for _ in prompt_ids]
        with (
            profiling_context(self, "engine.generate"),
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as policy,
        ):
            self.engine.update(policy)
            for answer in self.engine.generate(requests, self.sampling):
                found[first[answer.request] + answer.sample] = answer.completion.token_ids
        return found, None
