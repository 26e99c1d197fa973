"""Where a plan runs and how wide: launcher, nodes, processes, per-device sizes, ZeRO, what a job asks Slurm for.

    cluster, problems = read_cluster("slurm", ["sft.deepspeed=none", "slurm.partition=gpu"])

`configs/clusters/local.yaml` ← `configs/clusters/<name>.yaml` ← the command line's `cluster.key=value`. Nothing
here is ever part of a result's identity: the same recipe on another cluster is the same step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pipeline.config import former
from pipeline.config.endpoint import EndpointCalls, calls_problems
from pipeline.config.load import read_typed
from pipeline.config.recipe import CONFIGS, Recipe, divisors, find_yaml
from pipeline.config.site import Slurm, site_problems
from pipeline.core import nvidia
from pipeline.core.schema import Constraint, Name, NonNegativeInt, PositiveFloat, PositiveInt, Renames, added

CLUSTERS = CONFIGS / "clusters"
DEEPSPEED = Path("deepspeed")
AMPERE = 8.0  # the compute capability with which bfloat16 and FlashAttention came
Memory = Annotated[float, Constraint("a number of GB from 0 to 100000", lambda v: 0 <= v <= 100_000)]


@dataclass(frozen=True)
class TrainingStage:
    """How one training stage is laid out on the devices."""

    per_device_batch_size: PositiveInt | Literal["auto"]
    deepspeed: str  # none, the name of a file in deepspeed/, or auto: the cheapest that fits
    gradient_checkpointing: bool | Literal["auto"]  # auto: on GPUs whose memory asks for it


@dataclass(frozen=True)
class MaxMemory:
    """What a model that is asked, not trained, may take; the rest of it lies on the CPU, then on disk."""

    gpu: PositiveFloat | None = None  # GiB of each GPU; None: what is free
    cpu: PositiveFloat | None = None  # GiB; None: what is free


EngineName = Literal["auto", "transformers", "vllm"]
Share = Annotated[float, Constraint("a number from 0.05 to 0.95", lambda v: 0.05 <= v <= 0.95)]


@dataclass(frozen=True)
class RolloutEngine:
    """What generates the completions of GRPO."""

    engine: EngineName = "auto"  # auto: vllm on GPUs where it is installed and works with the recipe, else transformers
    gpu_memory: Share = 0.35  # the share of each GPU that vLLM takes, beside the model that is trained
    sleep: bool | Literal["auto"] = "auto"  # vLLM gives its memory back while the optimizer works; auto: on GPUs
    rows: PositiveInt | None = added(None)  # that transformers computes at once; None: all of generation_batch_size


@dataclass(frozen=True)
class EvaluationEngine:
    """What generates the answers of an evaluation, and of chat."""

    engine: EngineName = "auto"  # auto: as in GRPO
    gpu_memory: Share = 0.9  # the share of each GPU that vLLM takes
    tensor_parallel: PositiveInt | Literal["auto"] = "auto"  # GPUs that hold one copy of the model; auto: as few as can


@dataclass(frozen=True)
class Generation:
    """Which engine generates text, of GRPO and of evaluations separately; it decides no result's identity."""

    grpo: RolloutEngine = added(RolloutEngine())
    evaluate: EvaluationEngine = added(EvaluationEngine())


@dataclass(frozen=True)
class Cluster:
    name: Name
    launcher: Literal["local", "debug", "slurm", "submitit"]  # debug: in the command's own process, for a debugger
    nodes: PositiveInt  # of a training stage or an evaluation
    gpus: NonNegativeInt | Literal["auto"]  # of each node; auto: those of this machine
    gpu_memory: Memory | None  # GB of each GPU; None or 0: not known, or not to be compared
    compute_capability: PositiveFloat | None  # of each GPU, such as 7.5: what the hardware can do
    processes: PositiveInt | Literal["auto"]  # of each node; auto: one a GPU, on a CPU one a core, two at most
    threads: PositiveInt | Literal["auto"]  # per process; auto: cores ÷ processes
    sft: TrainingStage
    grpo: TrainingStage
    generation_batch_size: PositiveInt | Literal["auto"]  # completions that each process generates at once in GRPO
    evaluate_batch_size: PositiveInt | Literal["auto"]  # prompts that each process generates for at once
    max_memory: MaxMemory | None  # of a model in `evaluate` and `ask`; None: the whole of it on one device
    save_steps: PositiveInt
    keep_checkpoints: PositiveInt
    logging_steps: PositiveInt
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...]
    kill_timeout: PositiveInt  # seconds between the request to stop and the kill
    slurm: Slurm
    endpoint: EndpointCalls = added(EndpointCalls())
    # rows of a micro-batch in one line, and in GRPO a prompt once for its completions; auto: where that saves computing
    padding_free: bool | Literal["auto"] = added("auto")
    max_idle_steps: PositiveInt | None = added(None)  # GRPO steps in a row without spread that end it; None: only warn
    generation: Generation = added(Generation())
    max_failures: PositiveInt = added(3)  # of one kind at one step that end a step's restarts; 1: it is never restarted
    checkpoint_copy: str | None = added(None)  # a second folder that every checkpoint is copied to
    hang_timeout: PositiveInt | Literal["auto"] | None = added("auto")  # seconds without a sign of life; None: no end
    # decides no result's identity: without it a run whose loss is not finite has no result
    skip_bad_batches: NonNegativeInt = added(0)  # batches of a step that may be left out where the loss is not finite

    @property
    def submits(self) -> bool:
        """Whether steps become jobs of Slurm; else they run on this machine."""
        return self.launcher in ("slurm", "submitit")

    def layout(self, stage: str) -> TrainingStage:
        """Return how a training stage, sft or grpo, is laid out."""
        return {"sft": self.sft, "grpo": self.grpo}[stage]

    @classmethod
    def renames(cls, *sources: object) -> Renames:
        """The settings that had another name."""
        return former.CLUSTER

    def problems(self) -> list[str]:
        """What cannot be, before any recipe is looked at."""
        found = []
        if not self.submits and self.nodes > 1:
            found.append(
                f"cluster.nodes: got {self.nodes}; expected 1 with the launcher {self.launcher}. Fix: --launcher slurm"
            )
        if self.launcher == "debug" and self.processes not in (1, "auto"):
            found.append(
                f"cluster.processes: got {self.processes}; expected 1, because the launcher debug runs a stage in the "
                "command's own process. Fix: cluster.processes=1"
            )
        if self.submits and self.gpus == "auto":
            found.append(
                "cluster.gpus: got 'auto', which counts the GPUs of this machine; expected a number, because jobs run "
                "on others. Fix: cluster.gpus=N of each node"
            )
        if self.slurm.gpu_type and self.gpus == 0:
            found.append(
                f"cluster.slurm.gpu_type: got {self.slurm.gpu_type!r} with cluster.gpus 0; expected GPUs. "
                "Fix: cluster.gpus=N, or cluster.slurm.gpu_type=null"
            )
        found += [*site_problems(self.slurm, submits=self.submits), *calls_problems(self.endpoint)]
        known = deepspeed_names()
        for name, stage in (("sft", self.sft), ("grpo", self.grpo)):
            if stage.deepspeed not in (*known, "auto"):
                found.append(
                    f"cluster.{name}.deepspeed: got {stage.deepspeed!r}; expected a file of {DEEPSPEED}/. "
                    f"Fix: {' or '.join([*known, 'auto'])}"
                )
        return found


def deepspeed_file(name: str) -> dict[str, Any] | None:
    """Read a file of deepspeed/ by its name; None for none, and for auto until it is decided."""
    if name in ("none", "auto"):
        return None
    return dict(json.loads((DEEPSPEED / f"{name}.json").read_text(encoding="utf-8")))


def zero_stage(deepspeed: str) -> int:
    """Return the ZeRO stage of a file of deepspeed/; 0 without one."""
    settings = deepspeed_file(deepspeed)
    return int(settings["zero_optimization"]["stage"]) if settings else 0


def deepspeed_names() -> list[str]:
    return ["none", *sorted(file.stem for file in DEEPSPEED.glob("*.json"))]


def cluster_names() -> list[str]:
    return sorted(file.stem for file in CLUSTERS.glob("*.yaml"))


def read_cluster(name: str, overrides: Sequence[str] = ()) -> tuple[Cluster | None, list[str]]:
    """A cluster by name or by the path of its YAML file, and everything that is wrong with it."""
    file = find_yaml(name, "cluster", CLUSTERS, cluster_names())
    files = list(dict.fromkeys([CLUSTERS / "local.yaml", file]))
    cluster, problems = read_typed(Cluster, files, overrides, {"name": file.stem})
    if cluster is not None and not cluster.submits:
        cluster = _with_this_machine(cluster)
    return cluster, [f"cluster.{text}" if not text.startswith(("cluster.", "'")) else text for text in problems]


def _with_this_machine(cluster: Cluster) -> Cluster:
    """The cluster with memory and capability of this machine's GPUs, where its file leaves them open."""
    if cluster.gpu_memory is not None and cluster.compute_capability is not None:
        return cluster
    found = nvidia.smallest_gpu() if wanted_gpus(cluster) and gpu_count() else None
    if found is None:
        return cluster
    memory, capability = found
    return replace(
        cluster,
        gpu_memory=memory if cluster.gpu_memory is None else cluster.gpu_memory,
        compute_capability=capability if cluster.compute_capability is None else cluster.compute_capability,
    )


def driver_devices() -> list[str]:
    """The GPUs of this machine as its drivers name them, of NVIDIA or else of AMD, whether they are hidden or not."""
    nvidia = [p.name for p in Path("/dev").glob("nvidia[0-9]*") if p.name.removeprefix("nvidia").isdigit()]
    if nvidia or not Path("/dev/kfd").exists():
        return sorted(nvidia)
    nodes = Path("/sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id")  # 0 for a processor
    return sorted(f"kfd{path.parent.name}" for path in nodes if path.read_text().strip() not in ("", "0"))


def gpu_count() -> int:
    """The GPUs this process may use, without importing torch; none where no driver has made a device."""
    devices = driver_devices()
    hidden_by = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES") if devices and devices[0].startswith("kfd") else ()
    settings = (os.environ.get(name) for name in (*hidden_by, "CUDA_VISIBLE_DEVICES"))
    visible = next((setting for setting in settings if setting is not None), None)
    if visible is None or not devices:
        return len(devices)
    return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])


def wanted_gpus(cluster: Cluster) -> int:
    """GPUs of a node that the cluster's file asks for."""
    return gpu_count() if cluster.gpus == "auto" else cluster.gpus


def core_count() -> int:
    """The cores this process may use: those it is bound to, and no more than Slurm has granted."""
    granted = os.environ.get("SLURM_CPUS_PER_TASK", "")
    bound = len(os.sched_getaffinity(0))
    return min(int(granted), bound) if granted.isdigit() else bound


def half_precision(compute_capability: float) -> Literal["bfloat16", "float16"]:
    """The 16-bit format that a GPU computes in: bfloat16 from Ampere (8.0) on, by emulation alone before."""
    return "bfloat16" if compute_capability >= AMPERE else "float16"


def thread_count(cluster: Cluster, processes: int) -> int:
    """Threads of each process of a node: together no more than the cores, or everything becomes many times slower."""
    return cluster.threads if cluster.threads != "auto" else max(1, core_count() // processes)


def process_count(cluster: Cluster) -> int:
    """Training processes on one node."""
    if cluster.processes != "auto":
        return cluster.processes
    if cluster.launcher == "debug":
        return 1
    return wanted_gpus(cluster) or min(2, cluster.slurm.cpus or 2 if cluster.submits else core_count())


@dataclass(frozen=True)
class Batches:
    """How a global batch is made of devices: global = processes × per_device × accumulation."""

    processes: int
    per_device: int
    accumulation: int


AUTO_PER_DEVICE = 16
AUTO_EVALUATE = 100


def generation_sizes(recipe: Recipe, sizes: Batches) -> list[int]:
    """How many completions each process may generate at once, the most first: whole groups, a whole share of a step."""
    rows = [sizes.per_device * n for n in reversed(divisors(sizes.accumulation))]
    return [n for n in rows if n * sizes.processes % recipe.grpo.num_generations == 0] or rows[:1]


def batches(
    cluster: Cluster, recipe: Recipe, stage: Literal["sft", "grpo"], processes: int | None = None
) -> tuple[Batches | None, list[str]]:
    """The layout of one training stage, or what does not divide and the nearest values that do."""
    processes = processes or cluster.nodes * process_count(cluster)
    settings, layout = recipe.training(stage), cluster.layout(stage)
    wanted = settings.global_batch_size
    if settings.optimizer.name == "muon" and layout.deepspeed == "none":
        return None, [
            f"{stage}.optimizer.name: got 'muon', which is DeepSpeed's, with cluster.{stage}.deepspeed 'none'. "
            f"Fix: cluster.{stage}.deepspeed=zero2, or {stage}.optimizer.name=adamw_torch"
        ]
    if settings.optimizer.name == "muon" and zero_stage(layout.deepspeed) == 3:
        return None, [
            f"cluster.{stage}.deepspeed: got {layout.deepspeed}; expected ZeRO-2, because DeepSpeed refuses muon under "
            f"ZeRO-3 (it scatters gradients). Fix: cluster.{stage}.deepspeed=zero2, or "
            f"{stage}.optimizer.name=adamw_torch"
        ]
    if wanted % processes:
        lower, upper = wanted // processes * processes, -(-wanted // processes) * processes
        return None, [
            f"{stage}.global_batch_size: got {wanted}; expected a multiple of the {processes} processes. "
            f"Fix: {' or '.join(str(n) for n in (lower, upper) if n)}, or other numbers of cluster.nodes and processes"
        ]
    share = wanted // processes
    shares = divisors(share)
    if layout.per_device_batch_size == "auto":
        per_device = max(n for n in shares if n <= AUTO_PER_DEVICE)
    else:
        per_device = layout.per_device_batch_size
    if share % per_device:
        near = [n for n in shares if n < per_device][-1:] + [n for n in shares if n > per_device][:1]
        return None, [
            f"cluster.{stage}.per_device_batch_size: got {per_device}; expected a divisor of the {share} rows "
            f"that each of {processes} processes has of {stage}.global_batch_size {wanted}. "
            f"Fix: {' or '.join(str(n) for n in near)}"
        ]
    made = Batches(processes, per_device, share // per_device)
    if stage == "grpo" and cluster.generation_batch_size not in ("auto", *(known := generation_sizes(recipe, made))):
        return None, [
            f"cluster.generation_batch_size: got {cluster.generation_batch_size}; expected a divisor of the {share} "
            f"completions of each process that holds whole groups of {recipe.grpo.num_generations}. Fix: "
            f"{' or '.join(str(n) for n in known[:8])}, or auto"
        ]
    return made, []
