"""A recipe: what is learned, from what, how. Its values live in configs/, its types here.

    recipe, problems = read("tiny", ["grpo.beta=0.01"])

`configs/base.yaml` ← `configs/<name>.yaml` ← `key=value`, merged by OmegaConf, typed by the frozen dataclasses
below. A recipe is an identity: nothing about where or how wide it runs is in it (that is `cluster.py`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pipeline.config.architectures import ModelType
from pipeline.config.endpoint import NAME, Endpoint
from pipeline.config.former import recipe_renames, task_name
from pipeline.config.load import read_typed
from pipeline.config.trainer_names import LossName, OptimizerName, RewardScale, SchedulerName, scheduler_problems
from pipeline.core.errors import RecipeError, did_you_mean
from pipeline.core.hashing import file_identity
from pipeline.core.schema import (
    Constraint,
    Fraction,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Renames,
    added,
)

CONFIGS = Path("configs")

Even = Annotated[int, Constraint("a whole number ≥ 2", lambda v: v >= 2)]
Epochs = Annotated[float, Constraint("a number > 0 of at most 100000", lambda v: 0 < v <= 100_000)]
Probability = Annotated[float, Constraint("a number from 0.01 to 1", lambda v: 0.01 <= v <= 1)]
Draws = Annotated[int, Constraint("a whole number from 1 to 1000000", lambda v: 1 <= v <= 1_000_000)]
Samples = Annotated[int, Constraint("a whole number from 1 to 1024", lambda v: 1 <= v <= 1024)]
MODEL_FILES = 10_000  # in a model's folder: more is another kind of folder


@dataclass(frozen=True)
class RandomInit:
    """A randomly initialised model: its tokenizer is trained on the task's text, its weights are random."""

    architecture: ModelType
    vocabulary: PositiveInt  # at most this many tokens
    hidden_size: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    key_value_heads: PositiveInt
    intermediate_size: PositiveInt
    context: PositiveInt  # tokens
    rope_theta: PositiveFloat
    initializer_range: PositiveFloat
    tokens: Literal["words", "phrases"] = added("words")  # phrases: a frequent phrase of the prompts is one token


@dataclass(frozen=True)
class Model:
    """The base model: a hub id with a pinned revision, a local folder, or one made from scratch."""

    name: str
    revision: str | None
    random_init: RandomInit | None
    gguf: str | None  # a .gguf file, or package/file of an installed Python package: unpacked once, by preprocess
    chat_template: str | None  # None: the tokenizer's own; a name of `model_files.TEMPLATES`; or a .jinja file
    quantization: Literal["none", "nf4", "int8"]
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021). Off means full fine-tuning."""

    enabled: bool
    r: PositiveInt
    alpha: PositiveFloat
    dropout: Fraction
    targets: tuple[str, ...]  # module names, or ["all-linear"]


@dataclass(frozen=True)
class TaskChoice:
    """Which task, from where. `params` are the task's own settings, typed by the task's file."""

    name: str
    source: Literal["auto", "generated", "path", "hub", "sample"]
    path: str | None
    revision: str | dict[str, str] | None  # the hub commit; of several data sets {name: commit}
    on_bad_row: Literal["error", "skip"]
    params: dict[str, Any]
    validation_path: str | None = added(None)  # a file of its own; None: a share of the training rows
    test_path: str | None = added(None)  # likewise; all its rows

    @property
    def files(self) -> dict[str, str]:
        """The files of rows it names, by their key."""
        named = {"path": self.path, "validation_path": self.validation_path, "test_path": self.test_path}
        return {f"task.{name}": path for name, path in named.items() if path}

    def problems(self) -> list[str]:
        """Files that would be ignored or read twice, and a source without its file."""
        found, wanted = [], "name a .jsonl, .json, .csv or .parquet file"
        for key, path in self.files.items() if self.source not in ("auto", "path") else ():
            found.append(
                f"{key}: got {path[:80]}, but task.source is {self.source!r}, which reads no file. "
                f"Fix: task.source=path, or {key}=null"
            )
        if self.source == "path" and not self.files:
            found.append(f"task.path: got null with task.source 'path'; expected a file. Fix: {wanted}")
        elif self.source in ("auto", "path") and self.files and not (self.path or self.test_path):
            found.append(
                f"task.path: got null with task.validation_path set; expected a file of training rows. Fix: {wanted}"
            )
        seen: dict[str, str] = {}
        for key, path in self.files.items():
            if is_path(path) and (before := seen.setdefault(os.path.realpath(path), key)) != key:
                found.append(
                    f"{key}: got {path}, the file of {before} too; expected another one. "
                    f"Fix: {key}=null holds out a share of {before}"
                )
        return found


@dataclass(frozen=True)
class Optimizer:
    """How weights move: shared by SFT and GRPO."""

    name: OptimizerName  # an `optim` of transformers, or muon (Jordan et al. 2024) by DeepSpeed
    learning_rate: PositiveFloat
    muon_learning_rate: PositiveFloat  # muon: of the hidden matrices; everything else moves by AdamW at learning_rate
    lr_scheduler_type: SchedulerName
    lr_scheduler_kwargs: dict[str, Any] | None
    warmup: NonNegativeFloat  # a share of the steps when < 1, else steps
    weight_decay: NonNegativeFloat
    adam_beta2: Fraction
    max_grad_norm: NonNegativeFloat


@dataclass(frozen=True)
class Sft:
    """Supervised fine-tuning on the task's targets."""

    optimizer: Optimizer
    epochs: Epochs
    max_steps: PositiveInt | None
    global_batch_size: PositiveInt  # rows in one optimizer step, over all processes
    max_length: PositiveInt  # tokens of prompt and completion; longer rows are dropped and counted
    order: Literal["shuffled", "by_length", "curriculum"]
    full_loss_fraction: Fraction  # of the rows, the first in their order: the loss falls on their prompts too
    packing: bool
    eval_steps: PositiveInt | None  # steps between two losses on the validation rows
    early_stopping_patience: PositiveInt | None  # validations without a better loss before it stops at the best


@dataclass(frozen=True)
class Reward:
    """One function of `rewards/`, its weight, and what it is called with."""

    weight: float
    params: dict[str, Any]


@dataclass(frozen=True)
class Grpo:
    """Group relative policy optimization (Shao et al. 2024)."""

    optimizer: Optimizer
    init_from: Literal["sft", "base", "none"]  # none: the recipe has no GRPO
    rewards: dict[str, Reward]
    epochs: Epochs
    max_steps: PositiveInt | None
    global_batch_size: Even  # completions in one optimizer step, over all processes
    num_generations: Even  # completions of one prompt
    num_iterations: PositiveInt  # optimizer passes over each completion
    temperature: PositiveFloat
    top_p: Fraction
    top_k: NonNegativeInt  # 0: all
    max_prompt_length: PositiveInt  # tokens; longer prompts are dropped and counted
    max_completion_length: PositiveInt
    beta: NonNegativeFloat  # weight of the KL term; 0 keeps no reference model
    epsilon: PositiveFloat
    epsilon_high: PositiveFloat
    loss_type: LossName
    scale_rewards: RewardScale
    mask_truncated_completions: bool
    redraw_without_spread: Probability = added(1.0)  # of a prompt whose last group had no spread, in a later epoch


@dataclass(frozen=True)
class Goal:
    """What a figure has to be for a run to count as a success."""

    below: float | None = None
    above: float | None = None


@dataclass(frozen=True)
class Evaluate:
    """How a model is asked."""

    splits: tuple[str, ...]
    limit: PositiveInt | None  # rows of each split; None: all
    temperature: NonNegativeFloat  # 0: greedy
    top_p: Fraction
    top_k: NonNegativeInt
    repetition_penalty: PositiveFloat  # 1: none; above, repeated tokens become less likely (Keskar et al. 2019)
    max_new_tokens: PositiveInt
    prompts: tuple[str, ...]  # questions whose answers stand side by side in the report, model by model
    samples: Samples = added(1)  # completions of each row, each drawn by itself; above 1 also pass@k and majority@k
    endpoints: dict[str, Endpoint] = added({})  # models behind servers, which stand beside the recipe's in the report


@dataclass(frozen=True)
class Report:
    """How answers are counted and compared. Nothing here makes a model answer again."""

    bootstrap_samples: Draws
    confidence: Fraction
    success_criteria: dict[str, Goal]  # a figure of SFT's validation or of the last model -> its bound


@dataclass(frozen=True)
class Recipe:
    """All of it, resolved. `name` is where it came from and is not part of its identity."""

    name: Name  # a folder of runs/
    smoke_test: bool  # a shrunken copy by --smoke-test: its figures are no result
    seed: NonNegativeInt
    model: Model
    lora: Lora
    task: TaskChoice
    sft: Sft
    grpo: Grpo
    evaluate: Evaluate
    report: Report

    @classmethod
    def renames(cls, *sources: Any) -> Renames:
        """The settings that had another name; those of a task by the last source that names one."""
        return recipe_renames(next(filter(None, map(task_name, reversed(sources))), ""))

    @property
    def stages(self) -> tuple[Literal["sft", "grpo"], ...]:
        """The training stages it has, in their order."""
        return {"sft": ("sft", "grpo"), "base": ("grpo",), "none": ("sft",)}[self.grpo.init_from]  # type: ignore[return-value]

    def training(self, stage: str) -> Sft | Grpo:
        """Return the settings of a training stage, sft or grpo."""
        stages: dict[str, Sft | Grpo] = {"sft": self.sft, "grpo": self.grpo}
        return stages[stage]

    def problems(self) -> list[str]:
        """Combinations that cannot work, each with what would."""
        found = []
        batch, group = self.grpo.global_batch_size, self.grpo.num_generations
        if batch % group and "grpo" in self.stages:
            near = [n for n in divisors(batch) if n > 1]
            below = [n for n in near if n < group][-1:]
            above = [n for n in near if n > group][:1]
            found.append(
                f"grpo.num_generations: got {group}; expected a divisor of grpo.global_batch_size {batch}. "
                f"Fix: {' or '.join(str(n) for n in below + above)}"
            )
        for stage, optimizer in (("sft", self.sft.optimizer), ("grpo", self.grpo.optimizer)):
            key, kwargs = f"{stage}.optimizer.lr_scheduler_kwargs", optimizer.lr_scheduler_kwargs or {}
            found += scheduler_problems(key, optimizer.lr_scheduler_type, kwargs)
            if optimizer.name == "muon" and optimizer.max_grad_norm:
                found.append(
                    f"{stage}.optimizer.max_grad_norm: got {optimizer.max_grad_norm:g}; expected 0 with muon, whose "
                    "gradients are orthogonal matrices of a far larger norm: clipping would shrink every step. "
                    f"Fix: {stage}.optimizer.max_grad_norm=0"
                )
        if self.sft.early_stopping_patience and not self.sft.eval_steps:
            found.append(
                f"sft.early_stopping_patience: got {self.sft.early_stopping_patience} without sft.eval_steps. "
                "Fix: sft.eval_steps=100"
            )
        if not self.grpo.rewards and "grpo" in self.stages:
            found.append(
                "grpo.rewards: got none; expected at least one. Fix: grpo.rewards.correctness={weight: 1.0, params: {}}"
            )
        if self.model.quantization != "none" and not self.lora.enabled:
            found.append(
                f"model.quantization: got {self.model.quantization!r}; expected none where all weights are trained. "
                "Fix: lora.enabled=true, or model.quantization=none"
            )
        if self.lora.enabled and not self.lora.targets:
            found.append("lora.targets: got none; expected the modules to adapt. Fix: lora.targets=[all-linear]")
        if self.model.random_init and self.model.gguf:
            found.append(
                "model.gguf: got a file with model.random_init; expected one of them. Fix: model.gguf=null, or "
                "model.random_init=null"
            )
        if scratch := self.model.random_init:
            found.extend(self._scratch_problems(scratch))
        paths = {"model.name": self.model.name, "model.gguf": self.model.gguf, **self.task.files}
        for key, path in {**paths, "model.chat_template": self.model.chat_template}.items():
            if path is not None and not is_path(path):
                found.append(f"{key}: got {path[:40]!r}…; expected a name or path. Fix: shorten it, on one line")
        if self.evaluate.samples > 1 and not self.evaluate.temperature:
            found.append(
                f"evaluate.samples: got {self.evaluate.samples} with evaluate.temperature 0, which gives one answer "
                "each time; expected a temperature above 0. Fix: evaluate.temperature=0.7, or evaluate.samples=1"
            )
        for name in self.evaluate.endpoints:
            if not NAME.fullmatch(name):
                found.append(
                    f"evaluate.endpoints: got the name {name[:60]!r}; expected at most 40 letters, digits and _ . -, "
                    "the first a letter or digit"
                )
        return [*found, *self.task.problems()]

    def _scratch_problems(self, scratch: RandomInit) -> list[str]:
        found = []
        if scratch.hidden_size % scratch.heads:
            found.append(
                f"model.random_init.heads: got {scratch.heads}; expected a divisor of hidden_size {scratch.hidden_size}"
            )
        elif scratch.hidden_size // scratch.heads % 2:
            found.append(
                f"model.random_init.hidden_size: got {scratch.hidden_size}, which gives heads of odd width; expected "
                "an even one, for rotary positions"
            )
        if scratch.heads % scratch.key_value_heads:
            found.append(
                f"model.random_init.key_value_heads: got {scratch.key_value_heads}; expected a divisor of heads "
                f"{scratch.heads}"
            )
        longest = {
            "sft.max_length": self.sft.max_length,
            "grpo.max_prompt_length + grpo.max_completion_length": self.grpo.max_prompt_length
            + self.grpo.max_completion_length,
        }
        for name, tokens in longest.items():
            if tokens > scratch.context:
                found.append(
                    f"{name}: got {tokens} tokens; expected at most model.random_init.context {scratch.context}"
                )
        if self.model.quantization != "none" and not self.smoke_test:
            found.append("model.quantization: got quantized weights with model.random_init; expected none")
        return found


def is_path(text: str) -> bool:
    """Whether a file system could hold such a path at all."""
    parts = text.encode(errors="replace").split(b"/")
    return bool(text) and "\0" not in text and "\n" not in text and max(map(len, parts)) < 256 and len(text) < 4096


def divisors(number: int) -> list[int]:
    """What divides a number, in ascending order. Time grows with the square root of the number."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return [*small, *(number // n for n in reversed(small) if n * n != number)]


def recipe_names(configs: Path = CONFIGS) -> list[str]:
    """The recipes that can be named: every configs/*.yaml but base."""
    return sorted(file.stem for file in configs.glob("*.yaml") if file.stem != "base")


def read(name: str, overrides: Sequence[str] = (), configs: Path = CONFIGS) -> tuple[Recipe | None, list[str]]:
    """A recipe by name or by the path of its YAML file, and everything that is wrong with it."""
    file = find_yaml(name, "recipe", configs, recipe_names(configs))
    return read_typed(Recipe, [configs / "base.yaml", file], overrides, {"name": file.stem})


def find_yaml(name: str, what: str, folder: Path, known: list[str]) -> Path:
    """`folder/name.yaml`, or `name` itself where it is the path of a YAML file."""
    if not is_path(name):
        raise RecipeError(f"{what}: got {name[:40]!r}…; expected its name or the path of its YAML file")
    direct = Path(name)
    if direct.suffix in (".yaml", ".yml"):
        if direct.is_file():
            return direct
        raise RecipeError(f"{what} {name!r}: no such file; {did_you_mean(direct.stem, known)}")
    file = folder / f"{name}.yaml"
    if not file.is_file() or name not in known:
        raise RecipeError(f"unknown {what} {name!r} in {folder}/; {did_you_mean(name, known)}")
    return file


def local_files(recipe: Recipe) -> dict[str, str]:
    """The identity of every local file the recipe names, so that its content enters the identity."""
    named = {**recipe.task.files, "model.chat_template": recipe.model.chat_template}
    found = {}
    for key, name in named.items():
        if name and Path(name).is_file():
            found[key] = file_identity(Path(name))
    folder = Path(recipe.model.name)
    if not recipe.model.random_init and folder.is_dir() and _holds_model(folder):
        for file in sorted(folder.iterdir()):
            if file.is_file():
                found[f"model.name/{file.name}"] = file_identity(file)
    return found


def local_problems(recipe: Recipe) -> list[str]:
    """Paths of the recipe that are not what they should be. Nothing is opened: a device or a pipe may never end."""
    found = []
    for key, name in {**recipe.task.files, "model.chat_template": recipe.model.chat_template}.items():
        path = Path(name or "")
        if name and path.exists() and not path.is_dir() and not path.is_file():
            found.append(f"{key}: got {name}, a device or pipe; expected a regular file. Fix: copy it into a file")
        elif name and path.is_file() and not path.stat().st_size:
            found.append(f"{key}: got {name}, an empty file; expected one with content. Fix: name another file")
    folder = Path(recipe.model.name)
    if recipe.model.random_init or recipe.model.gguf:
        return found
    if folder.exists() and not folder.is_dir():
        return [
            *found,
            f"model.name: got {folder}, which is not a folder; expected a model's folder or a hub id. "
            "Fix: name the folder that holds config.json and the weights (a GGUF file is named by model.gguf)",
        ]
    if not folder.is_dir():
        return found
    if not _holds_model(folder):
        found.append(
            f"model.name: got {folder}, a folder without config.json; expected a model's folder or a hub id. "
            "Fix: name the folder that holds config.json and the weights"
        )
    elif sum(1 for _ in islice(folder.iterdir(), MODEL_FILES + 1)) > MODEL_FILES:
        found.append(
            f"model.name: got {folder}, a folder of more than {MODEL_FILES} files; expected a model's folder. "
            "Fix: move the model into a folder of its own"
        )
    return found


def _holds_model(folder: Path) -> bool:
    """Whether a folder is a model's, an adapter's or a step's."""
    return any((folder / name).exists() for name in ("config.json", "adapter_config.json", "artifact.json"))
