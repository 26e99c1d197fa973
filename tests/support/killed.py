"""Train small models straight, and again with SIGKILL in the middle and a resume, in every layout.

    python tests/support/killed.py OUT [WAY …]

Leaves OUT/WAY/{straight,killed}/ as a step's folder is left, and OUT/WAY/"2 zero3"/ where the checkpoint of the
straight run was resumed by two processes under ZeRO-3; tests/train/test_resume.py compares them. The libraries are
imported once: every run is a group of processes forked from this one, each of them a process of its own that joins a
process group of its own and dies by its own signal.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
from running import NANO
from torch.utils import tensorboard
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline import grpo, preprocess, sft
from pipeline.core import hashing
from pipeline.core.files import read_json, write_json
from pipeline.rewards.reward import Sample
from pipeline.training import distributed
from pipeline.training import trainer as training
from pipeline.training.checkpoints import numbered
from pipeline.training.harness import StageFunction
from pipeline.workflow.artifact import Artifact
from pipeline.workflow.plan import Plan, make_plan
from pipeline.workflow.progress import ProgressFile
from pipeline.workflow.runtime import Runtime
from pipeline.workflow.signing import MANIFEST

IMPORTED = (deepspeed, tensorboard)  # here, and not by every process
SFT = [
    "task.params.phases=[{n: [3, 4], rows: 40}]",  # an epoch has 5 steps
    "task.params.grpo_rows=8",
    "sft.max_steps=11",
    "sft.order=shuffled",
    "sft.full_loss_fraction=0",
    "sft.optimizer.name=adamw_torch",
    "sft.optimizer.lr_scheduler_type=cosine",
    "cluster.logging_steps=4",  # a log tells of steps before and after the checkpoint
    "cluster.save_steps=7",
    "cluster.keep_checkpoints=9",
]
GRPO = ["grpo.init_from=base", "grpo.max_steps=8", "cluster.save_steps=5"]  # two prompts a step
LORA = ["lora.enabled=true", "lora.r=4"]


@dataclass(frozen=True)
class Way:
    """One way to train: its stage, its processes, and the step after which the killed run dies."""

    stage: str
    processes: int
    layout: str
    words: tuple[str, ...] = ()
    kill: int = 8
    moves: tuple[
        str, ...
    ] = ()  # processes, layout (and rows at once) in which the straight run's checkpoint is resumed


MOVES = {
    "none": ("1 zero3",),
    "zero2": ("1 zero2", "2 zero3", "2 none"),
    "zero3": ("1 zero2",),
}


def two(layout: str) -> dict[str, Way]:
    """SFT into its third epoch, and GRPO that is killed in a generation cycle, in two processes."""
    return {
        f"sft {layout}": Way("sft", 2, layout, moves=MOVES[layout]),
        f"grpo {layout}": Way(
            "grpo",
            2,
            layout,
            (*GRPO, "task.params.grpo_rows=4", "grpo.num_iterations=2"),
            6,
            ("1 none",) if layout == "zero2" else (),
        ),
    }


MICRO = ("cluster.sft.per_device_batch_size=4", "cluster.grpo.per_device_batch_size=4")  # two micro-batches a step
WAYS: dict[str, Way] = {
    "sft": Way("sft", 1, "none", (*MICRO, *LORA, "lora.dropout=0"), moves=("2 zero3",)),
    "sft early": Way(
        "sft",
        1,
        "none",
        (
            "task.params.validation_rows=8",
            "task.params.validation_classes=0.3",
            "sft.eval_steps=2",
            "sft.early_stopping_patience=2",
            "sft.order=curriculum",
            "sft.full_loss_fraction=0.45",
            "sft.optimizer.learning_rate=0.3",
        ),
        9,
    ),
    "sft packed": Way(
        "sft",
        1,
        "zero2",
        ("sft.packing=true", "sft.max_length=256", "sft.global_batch_size=2", "model.dtype=bfloat16"),
        moves=("2 zero3",),
    ),
    "sft adafactor": Way("sft", 2, "zero2", ("sft.optimizer.name=adafactor",), moves=("1 zero2",)),
    "sft muon": Way("sft", 2, "zero2", ("sft.optimizer.name=muon",), moves=("1 zero2",)),
    "grpo": Way("grpo", 1, "none", (*GRPO, *MICRO, "grpo.num_iterations=2"), 6, ("1 none 2",)),
    "grpo lora": Way("grpo", 1, "zero2", (*GRPO, *MICRO, *LORA, "lora.dropout=0.1", "grpo.beta=0.1"), 6),
    "grpo redraw": Way(  # an epoch has four steps: the checkpoint is inside the third
        "grpo", 2, "none", (*GRPO, "grpo.max_steps=17", "grpo.redraw_without_spread=0.1"), 11, ("1 none",)
    ),
    **two("none"),
    **two("zero2"),
    **two("zero3"),
}


HEADS = [f"model.random_init.{word}" for word in ("hidden_size=64", "heads=2", "key_value_heads=2")]
WITH_VLLM = {  # in its environment: tests/vllm/test_training.py
    "grpo vllm": Way(
        "grpo",
        2,
        "none",
        (
            *(*GRPO, *HEADS, "task.params.grpo_rows=4", "grpo.num_iterations=2"),
            *("cluster.generation.grpo.engine=vllm", "cluster.generation.grpo.sleep=false"),
        ),
        6,
    ),
}


CLOCK = ("runtime", "per_second", "step_time")  # what a log tells of time


def history(step: Path) -> list[dict[str, Any]]:
    """What a step has logged, but for times."""
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in CLOCK)}
        for entry in read_json(step / "history.json")
    ]


def plan_of(way: Way, out: Path) -> Plan:
    layout = [f"cluster.{stage}.deepspeed={way.layout}" for stage in ("sft", "grpo")]
    return make_plan(["tiny"], [*NANO, *SFT, *way.words, *layout, f"cluster.processes={way.processes}"], runs=out)


def main(out: Path, names: list[str]) -> None:
    for name in names or WAYS:
        way = (WAYS | WITH_VLLM)[name]
        plan = plan_of(way, out)
        base = out / f"preprocess-{plan.steps[0].fingerprint}"
        if not base.exists():
            forked(1, base, partial(run, plan, "preprocess", base))
        straight, killed = out / name / "straight", out / name / "killed"
        forked(way.processes, straight, partial(run, plan, way.stage, straight, base))
        forked(way.processes, killed, partial(run, plan, way.stage, killed, base, way.kill), dies=True)
        forked(way.processes, killed, partial(run, plan, way.stage, killed, base))
        for move in way.moves:
            moved, (processes, layout, *rows) = out / name / move, move.split()
            first = numbered(straight / "checkpoints")[0]
            shutil.copytree(first, moved / "checkpoints" / first.name)
            words = [*way.words, *(f"cluster.{way.stage}.per_device_batch_size={number}" for number in rows)]
            other = plan_of(replace(way, processes=int(processes), layout=layout, words=tuple(words)), out)
            forked(int(processes), moved, partial(run, other, way.stage, moved, base))


def forked(processes: int, folder: Path, work: Callable[[], None], *, dies: bool = False) -> None:
    """Run `work` in forked processes of one group, as torchrun would start them; `dies`: by SIGKILL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    children: list[int] = []
    for rank in range(processes):
        if child := os.fork():
            children.append(child)
            os.setpgid(child, children[0])
            continue
        code = 1
        try:
            os.setpgid(0, children[0] if children else 0)
            log = os.open(folder / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in ranks.items()}, MASTER_ADDR="127.0.0.1")
            work()
            distributed.barrier()  # rank 0 holds the store that the others may still ask
            distributed.finish()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    for rank, child in enumerate(children):
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != (-signal.SIGKILL if dies else 0):
            raise SystemExit(f"{folder}: {status}\n" + (folder / f"log-{rank}.txt").read_text()[-6000:])


class Killer(TrainerCallback):  # type: ignore[misc]
    """Ends all processes of the run after a step, as the kernel or a node's power would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step == self.step:
            distributed.barrier()
            newest = numbered(Path(args.output_dir))[-1]
            while not (newest / MANIFEST).is_file():  # it is committed while training goes on
                time.sleep(0.05)
            os.killpg(0, signal.SIGKILL)


def letters(sample: Sample) -> float:
    """A reward that tells the completions of a model that has learned nothing apart."""
    return len(set(sample.completion)) / 10


def letters_of_yes(sample: Sample) -> float:
    """A reward that makes prompts whose answer is No always wrong."""
    return letters(sample) if sample.example.gold == "Yes" else 0.0


def record_rows(trainer: Any, out: Path) -> None:
    """Write which rows this process takes in each step."""
    file = out / f"rows-{distributed.rank()}.jsonl"

    def written(rows: Any) -> Any:
        if isinstance(rows, dict):
            tokens = rows["input_ids"]
            if "position_ids" in rows:  # packed: rows one after another
                starts = (rows["position_ids"][0] == 0).nonzero()[1:, 0].tolist()
                tokens = tokens[0].tensor_split(starts)
            names = [zlib.crc32(bytes(str(ids[ids != 0].tolist()), "ascii")) for ids in tokens]
        else:
            names = [row["id"] for row in rows]
        with file.open("a") as lines:
            lines.write(json.dumps([trainer.state.global_step, names]) + "\n")
        return rows

    prepare = trainer._prepare_inputs
    trainer._prepare_inputs = lambda rows: prepare(written(rows) if trainer.model.training else rows)


class Hashed(TrainerCallback):  # type: ignore[misc]
    """Counts the bytes of files that this process hashes, and writes their number when training begins."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.bytes = 0
        hashing.hashlib = SimpleNamespace(sha256=self.sha256)  # type: ignore[assignment,attr-defined]

    def sha256(self, data: bytes = b"") -> Any:
        digest = hashlib.sha256(data)

        def update(more: Any) -> None:
            self.bytes += len(more)
            digest.update(more)

        return SimpleNamespace(update=update, hexdigest=digest.hexdigest)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        (self.out / f"hashed-{distributed.rank()}.txt").write_text(str(self.bytes))


def run(plan: Plan, stage: str, folder: Path, base: Path | None = None, kill: int | None = None) -> None:
    """One stage in this process, which dies after the step `kill`."""
    train = training.train

    def watched(trainer: Trainer, *words: Any) -> dict[str, Any]:
        record_rows(trainer, folder)
        trainer.add_callback(Hashed(folder))
        if kill is not None:
            trainer.add_callback(Killer(kill))
        return train(trainer, *words)

    sft.train = grpo.train = watched  # type: ignore[assignment,attr-defined]
    reward = letters_of_yes if plan.steps[0].recipe.grpo.redraw_without_spread < 1 else letters
    grpo.find_rewards = lambda wanted: (dict.fromkeys(wanted, reward), [])  # type: ignore[attr-defined]
    rank, world = distributed.rank(), distributed.world_size()
    runtime = Runtime(plan.cluster, ProgressFile(None, stage), rank, world, folder, None, None)
    inputs = {}
    if base is not None:
        inputs["data"] = Artifact("", "", "", "", {}, {}, {}, read_json(base / "m.json"), {}, base)
    stages: dict[str, StageFunction] = {"preprocess": preprocess.run, "sft": sft.run, "grpo": grpo.run}
    metrics = stages[stage](plan.steps[0].recipe, inputs, folder, runtime)
    if rank == 0:
        write_json(folder / "m.json", metrics)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
