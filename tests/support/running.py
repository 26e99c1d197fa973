"""A small run of the whole pipeline, and the command line as a user types it: what the tests of runs share."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import warnings
from pathlib import Path

from pipeline.cli.main import command

ROOT = Path(__file__).parents[2]

# the tiny recipe, smaller still: every stage runs for real in seconds and learns nothing
NANO = [
    "task.params.n=[4]",
    "task.params.validation_classes=0",
    "task.params.test_classes=0.4",
    "task.params.phases=[{n: [3, 4], rows: 96}]",
    "task.params.grpo_rows=32",
    "task.params.validation_rows=0",
    "task.params.test_rows=12",
    "task.params.perturbed_rows=6",
    "model.random_init.architecture=qwen2",
    "model.random_init.tokens=words",
    "model.random_init.hidden_size=32",
    "model.random_init.layers=1",
    "model.random_init.heads=2",
    "model.random_init.key_value_heads=2",
    "model.random_init.intermediate_size=64",
    "sft.max_steps=6",
    "sft.global_batch_size=8",
    "sft.optimizer.lr_scheduler_type=linear",
    "sft.optimizer.lr_scheduler_kwargs=null",
    "grpo.max_steps=2",
    "grpo.global_batch_size=8",
    "grpo.num_generations=4",
    "grpo.max_completion_length=12",
    "evaluate.max_new_tokens=12",
    "report.bootstrap_samples=200",
    "cluster.processes=2",
    "cluster.grpo.deepspeed=zero3",
    "cluster.save_steps=2",
    "cluster.logging_steps=1",
]


def run_cli(
    *words: str, env: dict[str, str] | None = None, timeout: float = 300, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """`python -m pipeline …`, its output captured."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
    )


def run_here(*words: str) -> None:
    """`python -m pipeline …` in this process, its stages too (`--launcher debug`); raises what would end it."""
    gc.freeze()  # each trainer collects several times; what the tests before have imported is none of its business
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # what libraries say to each other in a stage is no error
        code = command([*words, "--launcher", "debug"])
    assert code == 0


def only(runs: Path, pattern: str) -> Path:
    """The one folder that matches."""
    found = sorted(runs.glob(pattern))
    assert len(found) == 1, f"{pattern}: {found}"
    return found[0]


def is_alive(pid: int) -> bool:
    """Whether a process runs, or could go on: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def pid_of_rank(rank: int, folder: Path) -> int:
    """The process of a step that has this rank."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (place / "cmdline").read_bytes(), (place / "environ").read_bytes()
        except OSError:
            continue
        wrapper = b"pipeline.training.distributed" in command
        if str(folder).encode() in command and not wrapper and f"\0RANK={rank}\0".encode() in environment:
            return int(place.name)
    raise AssertionError(f"rank {rank} does not run")
