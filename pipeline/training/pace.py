"""Estimate the training time from the first steps: print hours, and warn if one attempt's time limit is too short."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.config.site import minutes
from pipeline.core.slurm_client import job_end
from pipeline.workflow.runtime import Runtime

MEASURED_STEPS = 2  # after an attempt's first step, which also compiles and fills caches


class PaceCallback(TrainerCallback):
    """Times a few steps after an attempt's first, then prints once how long the remaining steps will take."""

    def __init__(self, runtime: Runtime, stage: str, clock: Callable[[], float] = time.time) -> None:
        self.runtime, self.stage, self.clock = runtime, stage, clock
        self.ends: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if len(self.ends) > MEASURED_STEPS:
            return
        self.ends.append(self.clock())
        left = state.max_steps - state.global_step
        if len(self.ends) <= MEASURED_STEPS or left <= 0:
            return
        seconds = (self.ends[-1] - self.ends[0]) / MEASURED_STEPS
        if self.runtime.rank == 0:
            print(
                f"pace: {seconds:.3g} s a step, {hours(seconds * left)} for the {left} steps that are left", flush=True
            )
        if warning := too_slow(seconds, left, self._attempt(), self.stage):
            self.runtime.warn(warning)

    def _attempt(self) -> float | None:
        """Return the seconds that an attempt may train before it must save; None without a limit."""
        slurm = self.runtime.cluster.slurm
        if self.runtime.cluster.submits:
            return minutes(getattr(slurm.time, self.stage)) * 60.0 - slurm.save_seconds(self.stage)
        end = job_end() if self.runtime.rank == 0 else None  # a user's Slurm job around the local launcher
        return None if end is None else end - slurm.save_seconds(self.stage) - self.clock()


def too_slow(seconds: float, left: int, attempt: float | None, stage: str) -> str | None:
    """Return the warning for steps that need more than one attempt, with their number; None if one is enough."""
    if attempt is None or seconds * left <= attempt:
        return None
    if attempt < seconds:
        how = "not one step fits an attempt"
    else:
        how = f"about {math.ceil(left / (attempt // seconds))} attempts, each of which saves, queues again and resumes"
    shorter = "sft.max_steps or sft.epochs" if stage == "sft" else "grpo.max_steps or grpo.max_completion_length"
    return (
        f"at {seconds:.3g} s a step the {left} steps that are left take {hours(seconds * left)}, and an attempt has "
        f"{hours(max(attempt, 0))} (cluster.slurm.time.{stage}): {how}. Fix: raise cluster.slurm.time.{stage}, use "
        f"more GPUs, or lower {shorter}"
    )


def hours(seconds: float) -> str:
    """Format a duration: `2.5 h`; below an hour `12 min`."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
