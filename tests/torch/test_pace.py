"""What training will take is measured on its first steps, reported once, and compared with an attempt's limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from pipeline.config.cluster import read_cluster
from pipeline.training.pace import PaceCallback, too_slow
from pipeline.workflow.progress import ProgressFile, read_progress
from pipeline.workflow.runtime import Runtime


def run_steps(
    folder: Path, seconds: list[float], *, first: int = 0, total: int = 500, rank: int = 0, **job: Any
) -> PaceCallback:
    """A trainer's steps, each of which takes so long."""
    cluster, problems = read_cluster("2x2080ti", [f"{key}={value}" for key, value in job.items()])
    assert cluster is not None, problems
    runtime = Runtime(cluster, ProgressFile(folder, "grpo"), rank, 2, folder, None, None)
    now = [1000.0]
    pace = PaceCallback(runtime, "grpo", clock=lambda: now[0])
    state = TrainerState(max_steps=total, global_step=first)
    arguments, control = TrainingArguments(output_dir=str(folder), use_cpu=True), TrainerControl()
    for step in seconds:
        now[0] += step
        state.global_step += 1
        pace.on_step_end(arguments, state, control)
    return pace


def warnings_of(folder: Path) -> tuple[str, ...]:
    progress = read_progress(folder)
    assert progress is not None
    return progress.warnings


def test_hours_are_told_after_the_first_steps_and_more_than_the_limit_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two RTX 2080 Ti: 8 minutes a step. The first step, which compiles, does not count."""
    run_steps(tmp_path, [900, 480, 480, 480, 100])
    told = capsys.readouterr().out
    assert "pace: 480 s a step, 66.3 h for the 497 steps that are left" in told
    assert told.count("pace: ") == 1
    (warning,) = warnings_of(tmp_path)
    assert (
        "take 66.3 h, and an attempt has 13.7 h (cluster.slurm.time.grpo): about 5 attempts, each of which " in warning
    )
    assert "Fix: raise cluster.slurm.time.grpo, use more GPUs, or lower grpo.max_steps" in warning


def test_steps_that_fit_an_attempt_are_only_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_steps(tmp_path, [30, 10, 10])
    assert "pace: 10 s a step, 1.4 h for the 497 steps that are left" in capsys.readouterr().out
    assert warnings_of(tmp_path) == ()


def test_a_resumed_attempt_counts_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_steps(tmp_path, [480, 480, 480], first=440)
    assert "7.6 h for the 57 steps that are left" in capsys.readouterr().out
    assert warnings_of(tmp_path) == ()


@pytest.mark.parametrize(("steps", "total"), [([480, 480], 500), ([480, 480, 480], 3)])
def test_a_short_run_says_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: list[float], total: int
) -> None:
    run_steps(tmp_path, steps, total=total)
    assert "pace" not in capsys.readouterr().out


def test_only_rank_0_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_steps(tmp_path, [480, 480, 480], rank=1)
    assert "pace" not in capsys.readouterr().out


def test_this_machine_has_a_limit_only_inside_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    run_steps(tmp_path, [480, 480, 480], launcher="local", gpus=0)
    assert warnings_of(tmp_path) == ()
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(1000 + 3 * 480 + 1200 + 7200))  # two hours, and signal_before_limit
    run_steps(tmp_path, [480, 480, 480], launcher="local", gpus=0)
    assert "an attempt has 2.0 h" in warnings_of(tmp_path)[0]


def test_a_step_that_no_attempt_can_hold_is_said() -> None:
    said = too_slow(4000, 10, 3600, "sft")
    assert said is not None
    assert "not one step fits an attempt" in said
    assert "lower sft.max_steps or sft.epochs" in said
    assert too_slow(100, 36, 3600, "sft") is None
    assert "about 2 attempts" in (too_slow(100, 37, 3600, "sft") or "")


def test_a_run_tells_its_hours(nano: Path) -> None:
    (log,) = nano.glob("tiny/sft-*/log.txt")
    assert log.read_text(encoding="utf-8").count("pace: ") == 1
