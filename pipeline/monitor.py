"""What a trainer tells while it runs: the progress file, and the history that the report draws."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.artifact import HISTORY
from pipeline.files import write_json
from pipeline.runtime import Runtime

SHOWN = ("loss", "eval_loss", "reward", "completions/mean_length")  # on the progress bar, where they are logged


class Watch(TrainerCallback):
    """Keeps progress.json up to date; stops the run when its loss is no number any more."""

    def __init__(self, runtime: Runtime) -> None:
        self.progress = runtime.progress
        self.broken: str | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.progress.update(
            state="running", done=state.global_step, first=state.global_step, total=state.max_steps, note=""
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.progress.update(done=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: object,
    ) -> None:
        figures = {name.rpartition("/")[2]: float(value) for name, value in (logs or {}).items() if name in SHOWN}
        self.progress.update(figures=figures)
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(float((logs or {}).get(name, 0.0)))]
        if bad and not control.should_training_stop:
            self.broken = f"{bad[0]} is {(logs or {})[bad[0]]} at step {state.global_step}"
            control.should_training_stop = True


def write_history(history: list[dict[str, Any]], out: Path) -> None:
    """The trainer's log, one entry a logging step, for the report's curves."""
    write_json(out / HISTORY, history)
