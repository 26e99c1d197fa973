"""The code that SFT and GRPO share: rows, models, trainer arguments, and the training loop with resume and stop.

It maps the typed recipe and cluster to transformers' Trainer.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from pipeline.config.cluster import Batches, TrainingStage, batches, deepspeed_file, zero_stage
from pipeline.config.model_files import model_config
from pipeline.config.recipe import Model, Optimizer, Recipe
from pipeline.core import heartbeat, stopwatch
from pipeline.core.errors import DataError, Diverged, LaunchError, RecipeError, Stopped, join_first
from pipeline.models.loading import add_lora, choose_dtype, load_model
from pipeline.training import conversion, distributed
from pipeline.training.callbacks import (
    MINIMUM_SCALE_MESSAGE,
    HeartbeatCallback,
    LearningSignalCallback,
    NoStepsLeft,
    ProgressCallback,
    StopwatchCallback,
    restore_callbacks,
    write_history,
)
from pipeline.training.checkpoints import checkpoint_to_resume
from pipeline.training.divergence import DivergenceCallback, NameRows
from pipeline.training.pace import PaceCallback
from pipeline.training.resume import ResumeCallback
from pipeline.training.saves import CheckpointCallback
from pipeline.workflow.artifact import Artifact, read_split
from pipeline.workflow.attempts import bad_batches
from pipeline.workflow.layouts import Layout, keeps_optimizer, layout_change, loads_as_it_is, saved_layout, stage_layout
from pipeline.workflow.runtime import Deadline, Runtime
from pipeline.workflow.weights import Checkpoint

LOGGER_FOLDERS = {"TENSORBOARD_LOGGING_DIR": "tensorboard", "WANDB_DIR": "", "TRACKIO_DIR": "trackio"}
PROJECT = "therefore"  # the project of the runs in wandb and trackio
MAX_ROWS_NAMED = 256  # of a bad batch, in the records
LEAST_BUCKET = 2**22  # gradients that ZeRO sums over the processes at once: 16 MB in float32
SKIPPED_SHARE_WARNING = 0.1  # share of skipped steps above which a warning is given


def load_rows(data: Artifact, split: str) -> Dataset:
    """Return a split of the preprocess step."""
    return Dataset(read_split(data, split))


def load_for_training(recipe: Recipe, checkpoint: Checkpoint, layout: TrainingStage) -> PreTrainedModel | PeftModel:
    """Load the model to train: with the checkpoint's adapter, else a new adapter for LoRA, else all weights.

    Trained weights are stored in float32 (DeepSpeed and autocast compute in the lower precision).
    """
    full = not recipe.lora.enabled and checkpoint.adapter is None
    keep_dtype = recipe.model.quantization == "none" and zero_stage(layout.deepspeed) == 3
    model = load_model(
        checkpoint,
        recipe.model,
        dtype=torch.float32 if full else choose_dtype(recipe.model),
        train_adapter=True,
        keep_dtype=keep_dtype,
    )
    if recipe.lora.enabled and checkpoint.adapter is None:
        torch.manual_seed(recipe.seed)  # the adapter is initialised here, before the trainer seeds
        model = add_lora(model, recipe.lora, keep_dtype=keep_dtype)
    if isinstance(model, PeftModel):
        # the trainer calls this to resume; PEFT's default device is the first GPU, for every rank
        model.load_adapter = functools.partial(model.load_adapter, torch_device="cpu")
    model.config.use_cache = False
    return model


@contextlib.contextmanager
def preserve_adapter_dtype(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Keep the adapters of a quantized model unchanged while a trainer is constructed.

    TRL casts them to bfloat16. Then float16's gradient scaler fails (trl#4901), and rounding loses what SFT learned and
    most of an update of size 1e-6.
    """
    before = {name: weights.data for name, weights in model.named_parameters() if weights.requires_grad}
    yield
    for name, weights in model.named_parameters():
        if name in before:
            weights.data = before[name]


def read_deepspeed(layout: TrainingStage) -> dict[str, Any] | None:
    """Return the stage's DeepSpeed settings, from their file; None without DeepSpeed."""
    return deepspeed_file(layout.deepspeed)


def deepspeed_settings(model: Model, optimizer: Optimizer, layout: TrainingStage) -> dict[str, Any] | None:
    """Return the stage's DeepSpeed settings, with the optimizer section for Muon.

    A bucket of gradients has `LEAST_BUCKET` elements even for a small model: transformers makes it the square of the
    hidden size, so that each matrix of a small model would be summed over the processes by itself.

    Muon orthogonalizes the update of each hidden matrix. For an update of AdamW's size, its learning rate is larger by
    1 / (0.2 · √(longer side)).
    """
    settings = read_deepspeed(layout)
    width = model.random_init.hidden_size if model.random_init else (model_config(model) or {}).get("hidden_size", 0)
    zero = settings["zero_optimization"] if settings else {}
    if 0 < width**2 < LEAST_BUCKET and zero.get("reduce_bucket_size") == "auto":
        zero["reduce_bucket_size"] = LEAST_BUCKET
    if settings and optimizer.name == "muon":
        params = {
            "lr": "auto",
            "muon_lr": optimizer.muon_learning_rate,
            "adam_lr": optimizer.learning_rate,
            "betas": "auto",
            "momentum": 0.95,
            "weight_decay": "auto",
            "ns_method": "standard",
            "torch_adam": True,  # DeepSpeed's own Adam needs a compiler
        }
        settings["optimizer"] = {"type": "Muon", "params": params}
    return settings


def layout_and_batches(recipe: Recipe, runtime: Runtime, stage: str) -> tuple[TrainingStage, Batches]:
    """Return the stage's layout and batch sizes for the actual number of processes. Raises RecipeError."""
    layout = runtime.cluster.layout(stage)
    sizes, problems = batches(runtime.cluster, recipe, "sft" if stage == "sft" else "grpo", runtime.world)
    if sizes is None:
        raise RecipeError(*problems)
    return layout, sizes


def training_arguments(
    recipe: Recipe, optimizer: Optimizer, layout: TrainingStage, sizes: Batches, out: Path, runtime: Runtime
) -> dict[str, Any]:
    """Return the arguments that SFTConfig and GRPOConfig share."""
    cluster, dtype = runtime.cluster, choose_dtype(recipe.model)
    return {
        "output_dir": str(out / "checkpoints"),
        "per_device_train_batch_size": sizes.per_device,
        "gradient_accumulation_steps": sizes.accumulation,
        "optim": "adamw_torch" if optimizer.name == "muon" else optimizer.name,
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": optimizer.lr_scheduler_type,
        "lr_scheduler_kwargs": optimizer.lr_scheduler_kwargs,
        "warmup_steps": optimizer.warmup,
        "weight_decay": optimizer.weight_decay,
        "adam_beta2": optimizer.adam_beta2,
        "max_grad_norm": optimizer.max_grad_norm,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "gradient_checkpointing": layout.gradient_checkpointing is True,  # auto is decided before a step starts
        "deepspeed": deepspeed_settings(recipe.model, optimizer, layout),
        "save_strategy": "steps",
        "save_steps": cluster.save_steps,
        "save_total_limit": None,  # saves.py deletes older ones, after the newer one was read back
        "logging_steps": cluster.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "report_to": list(cluster.loggers) or "none",
        "project": PROJECT,
        "run_name": f"{recipe.name}/{out.name}",
        "disable_tqdm": True,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "ddp_timeout": int(distributed.TIMEOUT.total_seconds()),
    }


@contextlib.contextmanager
def logger_environment(out: Path, runtime: Runtime) -> Iterator[None]:
    """Set the environment variables of TensorBoard, W&B and trackio while a trainer runs.

    The user's W&B variables are kept. Afterwards the environment is restored, because another step in the same process
    is another run.
    """
    wanted = {name: str(out / place) for name, place in LOGGER_FOLDERS.items()}
    defaults = {"WANDB_PROJECT": PROJECT}
    if runtime.rank == 0:  # all attempts of a step are one run; trackio identifies it by the run's name
        defaults |= {"WANDB_RUN_ID": run_id(out), "WANDB_RESUME": "allow"}
    wanted |= {name: value for name, value in defaults.items() if name not in os.environ}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def run_id(out: Path) -> str:
    """Return the id of a step's run at Weights & Biases: its name and fingerprint, and a random part per folder.

    Thus the same step of another user, or in a new folder, is another run.
    """
    path = out / ".run-id"
    if not path.is_file():
        path.write_text(f"{out.name}-{secrets.token_hex(3)}", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def train(
    trainer: Trainer, recipe: Recipe, stage: str, out: Path, runtime: Runtime, name_rows: NameRows
) -> dict[str, Any]:
    """Resume from the latest valid checkpoint, train, save the result. Returns the stage's metrics.

    `name_rows` names the rows of a step at which training diverges. Raises Stopped after a requested stop, with a
    checkpoint saved; Diverged; LaunchError if training took no step; ArtifactError for a checkpoint that another user
    wrote or that was trained otherwise.
    """
    stopwatch.enter("load")
    precision = str(choose_dtype(recipe.model)).removeprefix("torch.")
    layout = stage_layout(recipe, runtime.cluster, stage, processes=runtime.world, precision=precision)
    stopper = CheckpointCallback(runtime, layout, Deadline(runtime, stage), out)
    progress, signal = ProgressCallback(runtime, trainer), LearningSignalCallback(runtime)
    save_adapter_alone(trainer)
    resume, skipped = checkpoint_to_resume(out / "checkpoints", layout, runtime)
    trainer.callback_handler.callbacks.insert(0, progress)  # first, so that the loggers get the figures that it adds
    trainer.add_callback(ResumeCallback(trainer, resume))
    trainer.add_callback(stopper)
    trainer.add_callback(signal)
    trainer.add_callback(PaceCallback(runtime, stage))
    bad = bad_batches(out)
    divergence = DivergenceCallback(trainer, name_rows, [one.step for one in bad])
    trainer.add_callback(divergence)
    trainer.add_callback(StopwatchCallback(trainer))
    trainer.add_callback(HeartbeatCallback())
    if runtime.rank == 0:
        for message in skipped:
            print(message, flush=True)
        print(f"resumes from {resume.name}" if resume else "begins at step 0", flush=True)
    if resume:
        restore_callbacks(trainer, resume)
        convert_layout(trainer, resume, layout, stage, runtime)
    try:
        with logger_environment(out, runtime):
            loss = run_trainer(trainer, progress, resume)
        if runtime.rank == 0:
            write_history(trainer.state.log_history, out)
        raise_if_diverged(divergence)
        if progress.skipped and progress.skipped >= trainer.state.global_step:
            stopper.finish()  # no step was taken, so the checkpoints are deleted next
        raise_if_training_failed(trainer, progress, signal, stopped=stopper.stopped, out=out)
        if stopper.stopped:
            raise Stopped(f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, saved")
        signal.warn()
        for one in bad:
            runtime.warn(
                f"the batch of step {one.step} was skipped, because training diverged at it: {join_first(one.rows)}"
            )
        runtime.progress.update(state="saving", note="saving the model")
        save(trainer, out)
        stopper.commit()  # the last checkpoint, which was hashed and read back meanwhile
    finally:
        heartbeat.beat(long=True)
        stopper.finish()  # a failure loses no checkpoint that is written
    steps = {"steps": trainer.state.global_step, "epochs": trainer.state.epoch, "train_loss": loss}
    scaled = {"skipped_steps": progress.skipped, "loss_scale": loss_scale(trainer)} if trainer.args.fp16 else {}
    found = {"peak_memory_gb": round(peak_memory(), 3), "resumed_from": resume.name if resume else None}
    missing = {"skipped_batches": [asdict(one) for one in bad]} if bad else {}
    return {**steps, **scaled, **missing, **signal.metrics(), **found, "passed_over": skipped}


def convert_layout(trainer: Trainer, resume: Path, layout: Layout, stage: str, runtime: Runtime) -> None:
    """Have the trainer resume from a checkpoint of another layout, and print what changes."""
    conversion.load_best_of_any_layout(trainer, layout)
    saved = saved_layout(resume)
    if saved is None:
        return
    if runtime.rank == 0 and (changed := layout_change(saved, layout, stage, runtime.cluster)):
        print(changed, flush=True)
    if not loads_as_it_is(saved, layout):
        conversion.convert_on_resume(trainer, resume, optimizer=keeps_optimizer(saved, layout))


def run_trainer(trainer: Trainer, progress: ProgressCallback, resume: Path | None) -> float | None:
    """Run the trainer's loop. Returns the mean loss; None if the checkpoint left no step to take."""
    try:
        return float(trainer.train(resume_from_checkpoint=str(resume) if resume else None).training_loss)
    except NoStepsLeft:
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trainer._load_best_model()
    except Exception as error:
        if MINIMUM_SCALE_MESSAGE not in str(error):
            raise
        progress.broken = (
            f"the gradients of {progress.in_a_row + 1} steps in a row overflowed float16, down to a loss scale of 1"
        )
    return None


def raise_if_diverged(found: DivergenceCallback) -> None:
    """Raise Diverged with the rows of the batch, which go to the log in full."""
    if found.problem is None:
        return
    if distributed.rank() == 0:
        print(f"the rows of step {found.step}: {', '.join(found.rows)}", flush=True)
    error = Diverged(
        f"training diverged: {found.problem} at step {found.step}, whose rows are {join_first(found.rows, 8)}; the "
        "newest checkpoint is from before. Fix: lower the learning rate, raise the warm-up, compute with "
        f"model.dtype=float32, correct these rows, or skip the batch: cluster.skip_bad_batches=1"
    )
    error.step, error.rows = found.step, tuple(found.rows[:MAX_ROWS_NAMED])
    raise error


def raise_if_training_failed(
    trainer: Trainer, progress: ProgressCallback, signal: LearningSignalCallback, *, stopped: bool, out: Path
) -> None:
    """Raise LaunchError if training diverged, had no learning signal for too long, or took no optimizer step."""
    if progress.broken:
        raise LaunchError(
            f"training diverged: {progress.broken}. Fix: lower the learning rate, raise the warm-up, "
            "or compute with model.dtype=float32"
        )
    if signal.broken:
        raise LaunchError(
            f"GRPO had nothing to learn: {signal.broken}; cluster.max_idle_steps ended it. Fix: change the rewards, "
            "the prompts or grpo.max_completion_length, or set cluster.max_idle_steps=null to be warned only"
        )
    steps = trainer.state.global_step
    if progress.skipped and progress.skipped >= steps and not stopped:
        distributed.barrier()
        if progress.runtime.rank == 0:  # they hold the initial weights: a rerun must not resume at the last step
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
        raise LaunchError(
            f"no optimizer step was taken: the gradients of all {steps} steps overflowed float16, and the loss scale "
            "was still too high at the end. Fix: train more steps, lower fp16.initial_scale_power in the stage's file "
            "of deepspeed/, or compute with model.dtype=float32"
        )
    if progress.skipped >= SKIPPED_SHARE_WARNING * max(steps, 1):
        progress.runtime.warn(f"{progress.skipped} of {steps} steps were skipped: their gradients overflowed float16")


def loss_scale(trainer: Trainer) -> float:
    """Return the current loss scale of float16 training."""
    if trainer.deepspeed is not None:
        return float(trainer.deepspeed.optimizer.loss_scale)
    scaler = trainer.accelerator.scaler  # None on a CPU
    return float(scaler.get_scale()) if scaler else 1.0


def peak_memory() -> float:
    """Return this process's peak memory in GB: of its GPU, or of the host without a GPU."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def save(trainer: Trainer, out: Path) -> None:
    """Save `adapter/` for LoRA, `model/` for all weights, with the tokenizer. Every rank must call it."""
    adapter = isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel)
    folder = out / ("adapter" if adapter else "model")
    trainer.save_model(str(folder))
    (folder / "training_args.bin").unlink(missing_ok=True)
    distributed.barrier()


def save_adapter_alone(trainer: Trainer) -> None:
    """Make the trainer's saves copy only an adapter, not its base model.

    Below ZeRO-3, accelerate copies the whole state to the CPU at each save, in every process: 4 to 5 GiB for a 7B model
    in 4 bit. PEFT then writes only the adapter of it.
    """
    whole = trainer.accelerator.get_state_dict

    def state(model: Any, unwrap: bool = True) -> dict[str, torch.Tensor] | None:
        plain = trainer.accelerator.unwrap_model(model)
        if not isinstance(plain, PeftModel) or trainer.deepspeed.zero_optimization_stage() == 3:
            found: dict[str, torch.Tensor] | None = whole(model, unwrap)  # under ZeRO-3 only rank 0 has one
            return found
        own = {name: value for name, value in plain.state_dict().items() if ".base_layer." not in name}
        return {name: value.detach().cpu().clone() for name, value in own.items()}

    if trainer.is_deepspeed_enabled:
        trainer.accelerator.get_state_dict = state


def warn_of_long_rows(runtime: Runtime, ids: Sequence[str], kept: Sequence[int], name: str, limit: str) -> None:
    """Warn of rows that are longer than the limit, with their number and the first few ids."""
    dropped = sorted(set(range(len(ids))) - set(kept))
    if dropped:
        first = join_first([ids[k] for k in dropped])
        runtime.warn(f"{len(dropped)} of {len(ids)} {name} are longer than {limit} and were left out: {first}")


def require_rows(kept: int, name: str, limit: str) -> None:
    """Raise DataError if every row was too long."""
    if not kept:
        raise DataError(f"all {name} are longer than {limit}. Fix: raise it, or use a task with shorter prompts")
