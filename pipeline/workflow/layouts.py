"""The layout of a training stage over processes and ZeRO stages, and which checkpoints resume in it.

    layout = stage_layout(recipe, cluster, "sft")                    of a run that begins
    saved = saved_layout(Path("…/checkpoint-400"))                   of a checkpoint: its layout.json, or file names
    layout_mismatch(saved, layout, checkpoint, "sft")                None, or why it cannot resume
    layout_change(saved, layout, "sft", cluster)                     None, or what changes where it resumes
    resume_problems(folder, recipe, cluster, "sft")                  before a job is queued: why checkpoints are refused
    resume_notes(folder, recipe, cluster, "sft")                     before a job is queued: what changes

DeepSpeed 0.19 stores optimizer states in one shard per process, in a format of its own for each ZeRO stage. It refuses
or misreads them in any other layout; training/conversion.py reads them. transformers loads a plain checkpoint in any
number of processes. This module imports no torch and loads no weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pipeline.config.cluster import Cluster, deepspeed_file, process_count
from pipeline.config.recipe import Recipe
from pipeline.core.files import read_json, write_json
from pipeline.workflow.signing import MANIFEST, origin_problem

LAYOUT = "layout.json"  # of a checkpoint, written before its manifest
UNKNOWN = "unknown"
CONVERTED = ("adamw_torch", "adamw_torch_fused", "muon")  # optimizers whose states have one number for each weight


@dataclass(frozen=True)
class Layout:
    """The settings that decide how a checkpoint stores its optimizer states."""

    processes: int  # of all nodes
    zero_stage: int  # 0: without DeepSpeed
    deepspeed: str  # the file's name, or none
    offload: bool  # optimizer states or weights on the CPU
    trained: str  # lora or full
    optimizer: str
    precision: str = UNKNOWN  # float32, bfloat16 or float16: decided on the node, so only a running stage knows it

    def __str__(self) -> str:
        many = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return f"{'no DeepSpeed' if self.zero_stage == 0 else self.deepspeed_name} on {many}"

    @property
    def deepspeed_name(self) -> str:
        return self.deepspeed if self.deepspeed != UNKNOWN else f"zero{self.zero_stage}"


def stage_layout(
    recipe: Recipe, cluster: Cluster, stage: str, *, processes: int | None = None, precision: str = UNKNOWN
) -> Layout:
    """Return the layout of a training stage; `processes` are those that run, else those of the cluster."""
    settings, name = recipe.training(stage), cluster.layout(stage).deepspeed
    zero = (deepspeed_file(name) or {}).get("zero_optimization", {})
    return Layout(
        processes=processes or cluster.nodes * process_count(cluster),
        zero_stage=int(zero.get("stage", 0)),
        deepspeed=name,
        offload=any(part in zero for part in ("offload_optimizer", "offload_param")),
        trained="lora" if recipe.lora.enabled else "full",
        optimizer=settings.optimizer.name,
        precision=precision,
    )


def write_layout(checkpoint: Path, layout: Layout) -> None:
    write_json(checkpoint / LAYOUT, asdict(layout))


def saved_layout(checkpoint: Path) -> Layout | None:
    """Return the layout that a checkpoint was written in; None where its files do not show it.

    Older checkpoints have no layout.json. The names of their shards show it: one `*_optim_states.pt` per process,
    model states of every process under ZeRO-3 only, and `rng_state_N.pth` without DeepSpeed.
    """
    record = read_json(checkpoint / LAYOUT)
    if isinstance(record, dict) and {f.name for f in fields(Layout)} == set(record):
        return Layout(**record)
    trained = "lora" if (checkpoint / "adapter_config.json").is_file() else "full"
    shards = list(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt"))
    if shards:
        in_parts = any(checkpoint.glob("global_step*/*zero_pp_rank_*_model_states.pt"))
        return Layout(len(shards), 3 if in_parts else 2, UNKNOWN, False, trained, UNKNOWN)
    if any(checkpoint.glob("global_step*")):
        return None  # DeepSpeed without ZeRO, or torn
    random = len(list(checkpoint.glob("rng_state_*.pth")))
    if random or (checkpoint / "rng_state.pth").is_file():
        return Layout(random or 1, 0, "none", False, trained, UNKNOWN)
    return None


def layout_mismatch(saved: Layout, now: Layout, checkpoint: Path) -> str | None:
    """Explain why a checkpoint cannot resume in this layout; None where it can, converted or not."""
    anew = f"or delete {checkpoint.parent} to start this step again from its beginning"
    for what, before, after in (("lora.enabled", saved.trained, now.trained), *_same_optimizer(saved, now)):
        if before != after:
            return f"{what}: got {after}; expected {before}, as {checkpoint} was trained. Fix: use that again, {anew}"
    if saved.zero_stage and UNKNOWN not in (saved.precision, now.precision) and saved.precision != now.precision:
        return (
            f"model.dtype: got {now.precision} on this hardware; expected {saved.precision}, in which {checkpoint} was "
            f"trained, with its loss scale. Fix: resume on GPUs that compute in {saved.precision}, {anew}"
        )
    return None


def loads_as_it_is(saved: Layout, now: Layout) -> bool:
    """Return whether DeepSpeed and transformers load a checkpoint of one layout in the other by themselves."""
    same_stage = saved.zero_stage == now.zero_stage or {saved.zero_stage, now.zero_stage} <= {1, 2}
    return same_stage and (saved.processes == now.processes or saved.zero_stage == now.zero_stage == 0)


def keeps_optimizer(saved: Layout, now: Layout) -> bool:
    """Return whether the optimizer's states come along into the other layout; else the optimizer begins anew."""
    return loads_as_it_is(saved, now) or now.optimizer in CONVERTED


def layout_change(saved: Layout, now: Layout, stage: str, cluster: Cluster) -> str | None:
    """Describe what a resume in another layout keeps and what begins anew; None for a layout that changes nothing."""
    if loads_as_it_is(saved, now) and saved.processes == now.processes:
        return None
    states = "optimizer states, " if keeps_optimizer(saved, now) else ""
    text = f"{saved} -> {now}: weights, {states}schedule and the order of the rows are kept"
    if saved.processes != now.processes:
        text += "; other random numbers" + (" and so other completions" if stage == "grpo" else "")
    if not states:
        text += (
            f"; the optimizer begins anew, because the states of {now.optimizer} cannot be converted "
            f"({resume_overrides(saved, stage, cluster)} keeps them)"
        )
    return text


def resume_problems(
    folder: Path, recipe: Recipe, cluster: Cluster, stage: str, processes: int | None = None
) -> list[str]:
    """Explain why a step's checkpoints cannot resume on this cluster: another user's, or of another training.

    Hashes no file. `processes`: those that run, where the step has started already.
    """
    whole = _whole(folder)
    if problems := [problem for path in whole if (problem := origin_problem(path))]:
        return problems[:1]
    saved = saved_layout(whole[-1]) if whole else None
    now = stage_layout(recipe, cluster, stage, processes=processes)
    refused = layout_mismatch(saved, now, whole[-1]) if saved else None
    return [refused] if refused else []


def resume_notes(folder: Path, recipe: Recipe, cluster: Cluster, stage: str) -> list[str]:
    """Describe what changes for a step whose checkpoints resume in another layout."""
    whole = _whole(folder)
    saved = saved_layout(whole[-1]) if whole else None
    changed = layout_change(saved, stage_layout(recipe, cluster, stage), stage, cluster) if saved else None
    return [f"{folder.name} resumes from {whole[-1].name}, {changed}"] if changed else []


def _whole(folder: Path) -> list[Path]:
    """Return a step's checkpoints that have their manifest, by step."""
    whole = [path.parent for path in folder.glob(f"checkpoints/checkpoint-*/{MANIFEST}")]
    whole = [path for path in whole if path.name.rpartition("-")[2].isdigit()]
    return sorted(whole, key=lambda path: int(path.name.rpartition("-")[2]))


def _same_optimizer(saved: Layout, now: Layout) -> list[tuple[str, str, str]]:
    if UNKNOWN in (saved.optimizer, now.optimizer):
        return []
    return [("optimizer.name", saved.optimizer, now.optimizer)]


def resume_overrides(saved: Layout, stage: str, cluster: Cluster) -> str:
    """Return the overrides that give a run the layout of a checkpoint."""
    overrides = [f"cluster.{stage}.deepspeed={saved.deepspeed_name}"]
    if saved.zero_stage:
        nodes = cluster.nodes if saved.processes % cluster.nodes == 0 else 1
        overrides += [f"cluster.nodes={nodes}"] if nodes != cluster.nodes else []
        overrides.append(f"cluster.processes={saved.processes // nodes}")
    return " ".join(overrides)
