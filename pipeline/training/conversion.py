"""Resume a checkpoint in another layout: weights, optimizer states and schedule, parameter by parameter.

    convert_on_resume(trainer, checkpoint, optimizer=True)      before trainer.train(resume_from_checkpoint=checkpoint)

The trainer then builds its model and optimizer as for a new run, and this module fills in what the checkpoint holds:
one that was written without DeepSpeed, under ZeRO-1 or 2, or under ZeRO-3, by any number of processes. Every process
maps the shards into memory, reads one parameter at a time and keeps its own part, so nothing is written and no process
holds a whole state. DeepSpeed's universal checkpoints would write the states a second time, know neither LoRA's frozen
weights nor training without DeepSpeed, and expect settings that transformers does not make.

The shards are pickles: only a checkpoint whose signed manifest was verified may come here.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import Trainer

from pipeline.core.errors import ArtifactError
from pipeline.workflow.layouts import Layout, loads_as_it_is, saved_layout

MOMENTUM = (
    "momentum_buffer"  # Muon's, which under ZeRO-2 has each parameter whole in every process that has a part of it
)
WEIGHTS = "weights"  # in the states of a parameter, beside the optimizer's own names, such as exp_avg


@dataclass(frozen=True)
class Part:
    """Where a part of a parameter lies in a flat tensor of an optimizer."""

    name: str
    flat: torch.Tensor  # its float32 weights; the optimizer's states of it have the same shape
    start: int  # in the flat tensor
    first: int  # element of the parameter
    count: int
    whole: tuple[int, int] | None = None  # its start in a buffer of whole parameters, and the length of that


def convert_on_resume(trainer: Trainer, checkpoint: Path, *, optimizer: bool) -> None:
    """Have the trainer fill in a checkpoint of another layout when it resumes; without `optimizer` that begins anew."""
    prepare = trainer._prepare_for_training

    def prepare_and_fill(max_steps: int, loader: Any, _: str | None) -> Any:
        found = prepare(max_steps, loader, None)
        fill(trainer, checkpoint, optimizer=optimizer)
        restore_schedule(trainer, checkpoint)
        return found

    trainer._prepare_for_training = prepare_and_fill


def fill(trainer: Trainer, checkpoint: Path, *, optimizer: bool) -> None:
    """Set the trainable weights, and the optimizer's states, to those of a checkpoint. Every process must call it."""
    layout = saved_layout(checkpoint)
    assert layout is not None
    shapes = {name: _shape(weights) for name, weights in trainer.model.named_parameters() if weights.requires_grad}
    reader = _reader(trainer, checkpoint, layout, {name: math.prod(shape) for name, shape in shapes.items()})
    parts: dict[str, list[Part]] = {}
    for part in _parts(trainer):
        parts.setdefault(part.name, []).append(part)
    base = _base_optimizer(trainer)
    for name, weights in trainer.model.named_parameters():
        if name not in shapes:
            continue
        states = reader.states(name)
        value = states.pop(WEIGHTS)
        _set_weights(weights, value.view(shapes[name]))
        for part in parts.get(name, []):
            part.flat.data.view(-1)[part.start : part.start + part.count] = _slice(value, part)
            if optimizer:
                _set_states(base.state[part.flat], states, part)


def _set_states(live: dict[str, Any], states: dict[str, Any], part: Part) -> None:
    for key, value in states.items():
        if not isinstance(value, torch.Tensor) or value.numel() == 1:
            live[key] = value.clone() if isinstance(value, torch.Tensor) else value
            continue
        if key == MOMENTUM and part.whole:
            start, length = part.whole
            live.setdefault(key, part.flat.data.new_zeros(length))[start : start + value.numel()] = value
            continue
        if key not in live:
            live[key] = torch.zeros_like(part.flat, requires_grad=False)
        live[key].view(-1)[part.start : part.start + part.count] = _slice(value, part)


def _slice(value: torch.Tensor, part: Part) -> torch.Tensor:
    return value.view(-1)[part.first : part.first + part.count].to(part.flat.device)


def restore_schedule(trainer: Trainer, checkpoint: Path) -> None:
    """Set the learning rates to those of a checkpoint's step, and the loss scale of float16 where both are DeepSpeed's.

    The number of parameter groups may differ: DeepSpeed drops empty ones. Their rates are the same, but for Muon.
    """
    path, states = checkpoint / "scheduler.pt", sorted(checkpoint.glob("global_step*/*model_states.pt"))
    if path.is_file():
        saved = torch.load(path, weights_only=True, map_location="cpu")
    else:  # Muon's scheduler is made by DeepSpeed
        saved = torch.load(states[0], weights_only=False, map_location="cpu", mmap=True)["lr_scheduler"]
    groups = _base_optimizer(trainer).param_groups
    for key, value in saved.items():
        if isinstance(value, list) and len(value) != len(groups):
            saved[key] = [value[0]] * len(groups)
    trainer.lr_scheduler.load_state_dict(saved)
    for group, rate in zip(groups, saved["_last_lr"], strict=True):
        group["lr"] = rate
    if trainer.deepspeed is not None:
        trainer.deepspeed.global_steps = trainer.state.global_step  # it names the folder of the next checkpoint
        if shards := _shards(checkpoint):
            scaler = torch.load(shards[0], weights_only=False, map_location="cpu", mmap=True)["optimizer_state_dict"]
            trainer.deepspeed.optimizer.loss_scaler = scaler["loss_scaler"]


def load_best_of_any_layout(trainer: Trainer, layout: Layout) -> None:
    """Have early stopping come back to its best weights although their checkpoint is of another layout."""
    load = trainer._load_best_model

    def load_best() -> None:
        best = Path(trainer.state.best_model_checkpoint)
        saved = saved_layout(best)
        if saved is None or loads_as_it_is(saved, layout):
            load()
        else:
            fill(trainer, best, optimizer=False)

    trainer._load_best_model = load_best


# ---------------------------------------------------------------- the trainer's own parameters and optimizer


def _base_optimizer(trainer: Trainer) -> Any:
    """Return torch's optimizer below those of DeepSpeed and accelerate."""
    return (trainer.deepspeed or trainer).optimizer.optimizer


def _shape(weights: Any) -> torch.Size:
    shape: torch.Size = getattr(weights, "ds_shape", weights.shape)
    return shape  # under ZeRO-3 the parameter itself is empty


def _parts(trainer: Trainer) -> Iterator[Part]:
    """Yield this process's part of each trainable parameter."""
    names = {id(weights): name for name, weights in trainer.model.named_parameters()}
    if trainer.deepspeed is None:
        for name, weights in trainer.model.named_parameters():
            if weights.requires_grad:
                yield Part(name, weights, 0, 0, weights.numel())
        return
    optimizer = trainer.deepspeed.optimizer
    if trainer.deepspeed.zero_optimization_stage() < 3:
        for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            here = [weights for weights in group if weights._hp_mapping]
            starts = [0, *itertools.accumulate(weights.numel() for weights in here)]
            for weights, start in zip(here, starts, strict=False):
                own, of = weights._hp_mapping.hp_fragment_address, weights._hp_mapping.lp_fragment_address
                whole = None if optimizer.cpu_offload else (start, starts[-1])
                yield Part(names[id(weights)], flat, own.start, of.start, own.numel, whole)
        return
    rank = torch.distributed.get_rank()
    for group in optimizer.fp16_groups:
        for weights in group:
            number, start, share = optimizer.grad_position[optimizer.get_param_id(weights)]
            first = rank * share
            count = min(share, weights.ds_numel - first)
            if count > 0:
                yield Part(names[id(weights)], optimizer.fp32_partitioned_groups_flat[number], start, first, count)


def _set_weights(weights: Any, value: torch.Tensor) -> None:
    """Set a parameter, in the precision that it computes in, whole or shared out."""
    if not hasattr(weights, "ds_id"):
        weights.data.copy_(value)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weights], modifier_rank=0):
        if torch.distributed.get_rank() == 0:
            weights.data.copy_(value)


# ---------------------------------------------------------------- what a checkpoint holds


def _reader(trainer: Trainer, checkpoint: Path, layout: Layout, sizes: dict[str, int]) -> Any:
    if layout.zero_stage == 0:
        return PlainStates(trainer, checkpoint)
    return Zero3States(checkpoint, sizes) if layout.zero_stage == 3 else Zero2States(checkpoint, sizes)


def _shards(checkpoint: Path) -> list[Path]:
    """Return the files of optimizer states, by rank."""
    found = checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt")
    return sorted(found, key=lambda path: int(path.name.partition("pp_rank_")[2].partition("_")[0]))


def _load(path: Path) -> Any:
    return torch.load(path, weights_only=False, map_location="cpu", mmap=True)


class PlainStates:
    """What was saved without DeepSpeed: weights by name, and states by number in the order of the optimizer."""

    def __init__(self, trainer: Trainer, checkpoint: Path) -> None:
        decayed = set(trainer.get_decay_parameter_names(trainer.model))
        names = [name for name, weights in trainer.model.named_parameters() if weights.requires_grad]
        order = [name for name in names if name in decayed] + [name for name in names if name not in decayed]
        path = checkpoint / "optimizer.pt"
        saved = torch.load(path, weights_only=True, map_location="cpu", mmap=True)["state"]
        self.saved = {name: saved[number] for number, name in enumerate(order) if number in saved}
        index = checkpoint / "model.safetensors.index.json"
        if index.is_file():
            files = sorted({checkpoint / name for name in json.loads(index.read_text())["weight_map"].values()})
        else:
            files = list(checkpoint.glob("*model.safetensors"))
        self.files: list[Any] = [safe_open(path, "pt", device="cpu") for path in files]
        self.where = {key: file for file in self.files for key in file.keys()}  # noqa: SIM118 (it is no dict)

    def states(self, name: str) -> dict[str, Any]:
        """Return the states of a parameter, flat."""
        for key in (name, name.replace(".default.", ".")):  # PEFT leaves the adapter's name out
            if file := self.where.get(key):
                return {WEIGHTS: file.get_tensor(key).float().view(-1), **self.saved.get(name, {})}
        raise ArtifactError(f"{name}: got no weights of it in the checkpoint; expected those of the same model")


class Zero2States:
    """What ZeRO-1 or 2 saved: flat groups, cut anywhere, with the place of each parameter in each process's piece."""

    def __init__(self, checkpoint: Path, sizes: dict[str, int]) -> None:
        self.shards = [_load(path)["optimizer_state_dict"] for path in _shards(checkpoint)]
        self.sizes = sizes

    def states(self, name: str) -> dict[str, Any]:
        found: dict[str, list[torch.Tensor]] = {}
        single: dict[str, Any] = {}
        for shard in self.shards:
            for group, places in enumerate(shard["param_slice_mappings"]):
                if name not in places:
                    continue
                start, count = places[name].start, places[name].numel
                flat = shard["single_partition_of_fp32_groups"][group]
                found.setdefault(WEIGHTS, []).append(flat[start : start + count])
                for key, value in shard["base_optimizer_state"]["state"][group].items():
                    if not isinstance(value, torch.Tensor) or value.numel() == 1:
                        single[key] = value
                    elif key == MOMENTUM and value.numel() == sum(self.sizes[other] for other in places):
                        before = itertools.takewhile(lambda other: other != name, places)
                        first = sum(self.sizes[other] for other in before)
                        single[key] = value[first : first + self.sizes[name]]
                    else:
                        found.setdefault(key, []).append(value[start : start + count])
        if not found:
            raise ArtifactError(f"{name}: got no states of it in the checkpoint; expected those of the same model")
        return {key: torch.cat(pieces) for key, pieces in found.items()} | single


class Zero3States:
    """What ZeRO-3 saved: each process's share of each parameter, one after another, padded to equal length."""

    def __init__(self, checkpoint: Path, sizes: dict[str, int]) -> None:
        self.shards = [_load(path)["optimizer_state_dict"] for path in _shards(checkpoint)]
        self.sizes = sizes
        model = _load(min(checkpoint.glob("global_step*/*zero_pp_rank_0_*model_states.pt")))
        lengths = [flat.numel() for flat in self.shards[0]["fp32_flat_groups"]]
        self.places: dict[str, tuple[int, int, int]] = {}
        group = start = 0
        for name, shape in ((name, shape) for shapes in model["param_shapes"] for name, shape in shapes.items()):
            share = -(-math.prod(shape) // len(self.shards))
            if start + share > lengths[group]:
                group, start = group + 1, 0
            self.places[name] = (group, start, share)
            start += share

    def states(self, name: str) -> dict[str, Any]:
        if name not in self.places:
            raise ArtifactError(f"{name}: got no states of it in the checkpoint; expected those of the same model")
        group, start, share = self.places[name]
        found: dict[str, list[torch.Tensor]] = {}
        single: dict[str, Any] = {}
        for shard in self.shards:
            saved = {WEIGHTS: shard["fp32_flat_groups"][group], **shard["optimizer_state_dict"]["state"][group]}
            for key, value in saved.items():
                if not isinstance(value, torch.Tensor) or value.numel() == 1:
                    single[key] = value
                else:
                    found.setdefault(key, []).append(value[start : start + share])
        return {key: torch.cat(pieces)[: self.sizes[name]] for key, pieces in found.items()} | single
