"""Callbacks for a trainer's progress, history, skipped steps, divergence, and GRPO steps without a learning signal.

They write no weights. `ProgressCallback` and `LearningSignalCallback` save their counts in the trainer's checkpoints,
so that a resumed step continues to count.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from pipeline.core import heartbeat, stopwatch
from pipeline.core.files import read_json, write_json
from pipeline.training import distributed
from pipeline.workflow.artifact import HISTORY
from pipeline.workflow.runtime import Runtime

PROGRESS_METRICS = ("loss", "eval_loss", "reward", "completions/mean_length")  # shown on the progress bar
# Skipped float16 steps in a row that end a run. A scale of 2^16 reaches 1 after 17 of them, where DeepSpeed itself
# gives up; GradScaler never does.
MAX_SKIPPED_IN_A_ROW = 50
# DeepSpeed's message when its scale is 1 and the gradients still overflow
MINIMUM_SCALE_MESSAGE = "loss scale already at minimum"
IDLE_SHARE_WARNING = 0.9  # share of idle steps above which a warning is given at the end
IDLE_STEPS_WARNING = 10  # idle GRPO steps in a row after which the log and `status` show a warning


class NoStepsLeft(Exception):
    """Training resumed from its last checkpoint: all steps are done, or the early-stopping patience is used up."""


class ProgressCallback(TrainerCallback, ExportableState):
    """Updates progress.json, counts skipped steps, saves every `cluster.save_steps`, and ends a run that diverged.

    float16 gradients are those of a scaled loss. If they overflow, the optimizer skips the step and lowers the scale.
    This is normal; DeepSpeed and accelerate then report an infinite gradient norm. Thus a run has diverged if its loss
    is not finite, if a step was taken with a gradient norm that is not finite, or if `MAX_SKIPPED_IN_A_ROW` steps in a
    row were skipped.
    """

    def __init__(self, runtime: Runtime, trainer: Trainer) -> None:
        self.runtime = runtime
        self.trainer = trainer
        self.progress = runtime.progress
        self.broken: str | None = None
        self.skipped = 0
        self.in_a_row = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"skipped": self.skipped, "in_a_row": self.in_a_row}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ExportableState):  # checkpoints of older versions lack its state, and saves need it
                state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
        self.progress.update(
            state="running", done=state.global_step, first=state.global_step, total=state.max_steps, note=""
        )
        if state.global_step >= state.max_steps or any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.trainer.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        ):
            raise NoStepsLeft  # otherwise the trainer would take one more step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.progress.update(done=state.global_step)
        if state.global_step % self.runtime.cluster.save_steps == 0:
            control.should_save = True  # also if the trainer saves only at its validations
        if not (args.fp16 and self.trainer.accelerator.optimizer_step_was_skipped):
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        self.progress.update(figures={"skipped": self.skipped}, force=True)
        if self.runtime.rank == 0:
            print(
                f"step {state.global_step}: skipped, its gradients overflowed float16; the loss scale is lowered "
                f"({self.skipped} skipped so far)",
                flush=True,
            )
        if self.in_a_row >= MAX_SKIPPED_IN_A_ROW:
            self._end(control, f"the gradients of {self.in_a_row} steps in a row overflowed float16")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: object,
    ) -> None:
        logs = logs if logs is not None else {}
        figures = {name.rpartition("/")[2]: float(value) for name, value in logs.items() if name in PROGRESS_METRICS}
        self.progress.update(figures=figures)
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(float(logs.get(name, 0.0)))]
        if self.in_a_row and bad == ["grad_norm"]:
            state.log_history[-1]["grad_norm"] = None  # the step was not taken
        elif bad and not control.should_training_stop:
            self._end(control, f"{bad[0]} is {logs[bad[0]]} at step {state.global_step}")
        if args.fp16 and "loss" in logs:
            logs["skipped_steps"] = state.log_history[-1]["skipped_steps"] = self.skipped

    def _end(self, control: TrainerControl, reason: str) -> None:
        self.broken = reason
        control.should_training_stop = True
        control.should_evaluate = control.should_save = False  # a rerun would resume from the weights that diverged


class HeartbeatCallback(TrainerCallback):
    """Shows the launcher's watchdog that training continues; the last of the callbacks, which knows what comes next."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        heartbeat.beat(long=True)  # the first step compiles

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        heartbeat.beat()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        heartbeat.beat()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        heartbeat.beat(long=control.should_save or control.should_evaluate or control.should_training_stop)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        heartbeat.beat()


class StopwatchCallback(TrainerCallback):
    """Attributes the time of training to its parts (core/stopwatch.py). The last that changes the trainer's functions.

    Where a GPU computes, the host waits for it at the end of a step, so that counts as forward and backward.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.step_ends = "forward/backward" if trainer.args.device.type != "cpu" else "other"
        parts = {
            "get_batch_samples": "rows",
            "training_step": "forward/backward",
            "_calculate_rewards": "rewards",
            "_clip_grad_norm": "optimizer",
            "evaluate": "evaluate",
            "_save_checkpoint": "save",
        }
        for name, part in parts.items():
            if hasattr(trainer, name):
                vars(trainer)[name] = stopwatch.timed(part, getattr(trainer, name))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        stopwatch.enter("other")
        if self.trainer.deepspeed is not None:  # takes its step as the last part of backward
            vars(self.trainer.deepspeed)["step"] = stopwatch.timed("optimizer", self.trainer.deepspeed.step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        stopwatch.enter("optimizer")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        stopwatch.enter(self.step_ends)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        stopwatch.enter("other")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        stopwatch.enter("save")


class LearningSignalCallback(TrainerCallback, ExportableState):
    """Counts GRPO steps without a learning signal, warns of them, and ends the run at `cluster.max_idle_steps`.

    A step has no signal if all completions of each group have the same reward (TRL's `frac_reward_zero_std` is 1: every
    advantage is 0). It has little if every completion was truncated (`completions/clipped_ratio` is 1).
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.broken: str | None = None
        self.steps = self.flat = self.cut = self.idle = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {name: getattr(self, name) for name in ("steps", "flat", "cut", "idle")}}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: object,
    ) -> None:
        if not logs or "frac_reward_zero_std" not in logs:
            return
        flat, cut = (logs.get(name, 0.0) >= 1 for name in ("frac_reward_zero_std", "completions/clipped_ratio"))
        self.steps, self.flat, self.cut = self.steps + 1, self.flat + flat, self.cut + cut
        before, self.idle = self.idle, self.idle + 1 if flat or cut else 0
        reason = "no group has rewards that differ" if flat else "every completion is cut at its longest"
        if self.idle == IDLE_STEPS_WARNING:
            self.runtime.progress.update(note=reason)
            if self.runtime.rank == 0:
                print(
                    f"warning: {reason}, {IDLE_STEPS_WARNING} steps in a row up to step {state.global_step}", flush=True
                )
        elif before >= IDLE_STEPS_WARNING and not self.idle:
            self.runtime.progress.update(note="")
        limit = self.runtime.cluster.max_idle_steps
        if limit and self.idle >= limit and distributed.broadcast_flag(True):
            self.broken = f"{reason}, {self.idle} steps in a row up to step {state.global_step}"
            control.should_training_stop = True

    def warn(self) -> None:
        """Warn at the end of training if most of its steps had no learning signal."""
        if self.flat and self.flat >= IDLE_SHARE_WARNING * self.steps:
            self.runtime.warn(
                f"in {self.flat} of {self.steps} steps no group of completions had rewards that differ, so GRPO "
                "learned nothing from them. Fix: use prompts that the model can solve at times, more "
                "grpo.num_generations, or a reward that tells the completions apart"
            )
        if self.cut and self.cut >= IDLE_SHARE_WARNING * self.steps:
            self.runtime.warn(
                f"in {self.cut} of {self.steps} steps every completion was cut at grpo.max_completion_length tokens. "
                "Fix: raise it, or start from a model that ends its answers (the SFT step)"
            )

    def metrics(self) -> dict[str, int]:
        """Return the number of GRPO steps without reward spread and with only truncated completions; {} for SFT."""
        return {"steps_without_spread": self.flat, "steps_all_cut": self.cut} if self.steps else {}


def restore_callbacks(trainer: Trainer, checkpoint: Path) -> None:
    """Restore the state of the trainer's callbacks from a checkpoint: counts, and early stopping's patience.

    transformers' own `restore_callback_states_from_checkpoint` constructs new callbacks from the saved state, which
    fails for callbacks that hold a trainer.
    """
    saved = (read_json(checkpoint / "trainer_state.json") or {}).get("stateful_callbacks", {})
    for callback in trainer.callback_handler.callbacks:
        record = saved.get(type(callback).__name__)
        if isinstance(callback, ExportableState) and isinstance(record, dict):
            for name, value in record.get("attributes", {}).items():
                setattr(callback, name, value)


def write_history(history: list[dict[str, Any]], out: Path) -> None:
    """Write the trainer's log, one entry per logging step, for the report's curves."""
    write_json(out / HISTORY, history)
