"""What transformers, TRL and accelerate do not restore by themselves when a trainer resumes from a checkpoint.

Each process writes `process_N.safetensors` into a checkpoint, before its manifest: the losses and counts since the last
log, and GRPO's completions where the checkpoint is inside a generation cycle. On resume:

    loss        transformers forgets the steps since the last log, and divides the sum of the later steps by all steps
    rows        TRL's sampler takes the first epoch's order again (rollouts.EpochSampler), and accelerate does not tell
                it of the epoch where several processes have skipped batches
    GRPO        TRL counts micro-batches from 0 again and drops the completions that are left of the generation cycle
    redraws     how the last groups of the prompts were (redraw.py)
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.training import distributed
from pipeline.training.redraw import Redraw

STATE = "state"  # the key of the JSON in a file's metadata


@runtime_checkable
class GeneratesAhead(Protocol):
    """What rollouts.EngineTrainer has and SFT's trainer lacks; SFT need not import all of GRPO to ask for it."""

    redraw: Redraw | None

    def cycle(self) -> dict[str, torch.Tensor]: ...

    def restore_cycle(self, saved: dict[str, torch.Tensor]) -> None: ...

    def count_micro_batches(self) -> None: ...

    def skip_micro_batch(self, inputs: Any) -> None: ...


class ResumeCallback(TrainerCallback):
    """Saves and restores the state of a process that the libraries lose. Must stand before CheckpointCallback."""

    def __init__(self, trainer: Trainer, checkpoint: Path | None) -> None:
        self.trainer = trainer
        self.checkpoint = checkpoint

        if trainer.args.device.type == "cpu":  # of several processes it is cpu:0, where torch loads no optimizer to
            vars(trainer.args)["_setup_devices"] = torch.device("cpu")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if self.checkpoint:
            restore(self.trainer, self.checkpoint)

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader[Any],
        **_: object,
    ) -> None:
        sampler: Any = train_dataloader
        while hasattr(sampler, "batch_sampler"):
            sampler = sampler.batch_sampler
        sampler = getattr(sampler, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(state.global_step // steps_per_epoch(train_dataloader, args))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        save(self.trainer, Path(args.output_dir) / f"checkpoint-{state.global_step}")


def steps_per_epoch(loader: DataLoader[Any], args: TrainingArguments) -> int:
    """Return the optimizer steps of an epoch; the last may have fewer micro-batches. As transformers counts them."""
    accumulation: int = args.gradient_accumulation_steps
    return max(1, math.ceil(len(loader) / accumulation))


def process_file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"process_{rank}.safetensors"


def save(trainer: Trainer, checkpoint: Path) -> None:
    """Write this process's file into a checkpoint."""
    state = {
        "loss": trainer._tr_loss.item(),  # of this process, since the last log
        "loss_logged": trainer._total_loss_scalar,
        "last_logged": trainer._globalstep_last_logged,
        "metrics": dict(trainer._metrics["train"]),
        "tokens": trainer._total_train_tokens,
    }
    cycle = trainer.cycle() if isinstance(trainer, GeneratesAhead) else {}
    if isinstance(trainer, GeneratesAhead) and trainer.redraw:
        state["redraw"] = trainer.redraw.state()
    save_file(cycle, process_file(checkpoint, distributed.rank()), {STATE: json.dumps(state)})


def restore(trainer: Trainer, checkpoint: Path) -> None:
    """Restore what `save` wrote, at the beginning of training. Older checkpoints lack it.

    With another number of processes the open loss is the mean of those that saved, and a generation cycle begins anew.
    """
    if isinstance(trainer, GeneratesAhead):
        trainer.count_micro_batches()
    files = sorted(checkpoint.glob("process_*.safetensors"))
    if not files:
        return
    own = process_file(checkpoint, distributed.rank())
    same = len(files) == distributed.world_size() and own in files
    states, cycle = [], {}
    for path in [own] if same else files:
        with safe_open(path, "pt", device="cpu") as file:
            states.append(json.loads(file.metadata()[STATE]))
            if same:
                cycle = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    state = states[0]
    trainer._tr_loss += sum(one["loss"] for one in states) / len(states)
    trainer._total_loss_scalar = state["loss_logged"]
    trainer._globalstep_last_logged = state["last_logged"]
    trainer._metrics["train"].update(state["metrics"])
    trainer._total_train_tokens = state["tokens"]
    if isinstance(trainer, GeneratesAhead):
        trainer.restore_cycle(cycle)
        if trainer.redraw:
            trainer.redraw.restore(state.get("redraw", {}))
