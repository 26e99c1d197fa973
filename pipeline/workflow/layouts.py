"""The layout of a training stage over processes and ZeRO stages, and which checkpoints resume in it.

    layout = stage_layout(recipe, cluster, "sft")                    of a run that begins
    saved = saved_layout(Path("…/checkpoint-400"))                   of a checkpoint: its layout.json, or file names
    layout_mismatch(saved, layout, checkpoint, "sft", cluster)       None, or why it cannot resume and what would
    resume_problems(folder, recipe, cluster, "sft")                  before a job is queued: why checkpoints are refused

DeepSpeed 0.19 stores optimizer states in one shard per process, in a format of its own for each ZeRO stage. It refuses
or misreads them in any other layout. transformers loads a plain checkpoint in any number of processes. This module
imports no torch and loads no weights.
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


def layout_mismatch(saved: Layout, now: Layout, checkpoint: Path, stage: str, cluster: Cluster) -> str | None:
    """Explain why a checkpoint cannot resume in this layout, with the overrides that resume it; None where it can.

    Without DeepSpeed on both sides the number of processes may differ: every process reads the whole state.
    """
    anew = f"or delete {checkpoint.parent} to start this step again from its beginning"
    for what, before, after in (("lora.enabled", saved.trained, now.trained), *_same_optimizer(saved, now)):
        if before != after:
            return f"{what}: got {after}; expected {before}, as {checkpoint} was trained. Fix: use that again, {anew}"
    same_stage = saved.zero_stage == now.zero_stage or {saved.zero_stage, now.zero_stage} <= {1, 2}
    same_world = saved.processes == now.processes or saved.zero_stage == now.zero_stage == 0
    if not (same_stage and same_world):
        return (
            f"cluster.{stage}.deepspeed: got {now}; expected {saved}, the layout of {checkpoint}, whose optimizer "
            f"states cannot be converted. Fix: {resume_overrides(saved, stage, cluster)} resumes it; {anew}"
        )
    if saved.zero_stage and UNKNOWN not in (saved.precision, now.precision) and saved.precision != now.precision:
        return (
            f"model.dtype: got {now.precision} on this hardware; expected {saved.precision}, in which {checkpoint} was "
            f"trained, with its loss scale. Fix: resume on GPUs that compute in {saved.precision}, {anew}"
        )
    return None


def resume_problems(
    folder: Path, recipe: Recipe, cluster: Cluster, stage: str, processes: int | None = None
) -> list[str]:
    """Explain why a step's checkpoints cannot resume on this cluster: another user's, or of another layout.

    Hashes no file. `processes`: those that run, where the step has started already.
    """
    whole = [path.parent for path in folder.glob(f"checkpoints/checkpoint-*/{MANIFEST}")]
    whole = [path for path in whole if path.name.rpartition("-")[2].isdigit()]
    if not whole:
        return []
    if problems := [problem for path in sorted(whole) if (problem := origin_problem(path))]:
        return problems[:1]
    newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]))
    saved, now = saved_layout(newest), stage_layout(recipe, cluster, stage, processes=processes)
    refused = layout_mismatch(saved, now, newest, stage, cluster) if saved else None
    return [refused] if refused else []


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
