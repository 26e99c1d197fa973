"""The measuring scripts: each way of training runs and is counted, and a whole command prints its table."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import bench_training
import bench_worker
import pytest
from pyarrow.parquet import read_table
from running import NANO, ROOT, only, run_cli, run_here
from transformers import Trainer

from pipeline.core.files import read_json
from pipeline.launchers.torchrun import environment, single_rank
from pipeline.training import distributed
from pipeline.workflow.stage import STAGES, read_spec

STEPS = 4
OF_A_BENCH = ("task.params.phases", "task.params.grpo_rows", "sft.max_steps", "grpo.max_steps", "cluster.processes")
FEW = "task.params.phases=[{n: [3], rows: 8}]"
SMALL = [word for word in NANO if not word.startswith(OF_A_BENCH)]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a step of each stage, with its step.json."""
    found = {}
    for stage in ("sft", "grpo"):
        runs = tmp_path_factory.mktemp(stage)
        words = bench_training.overrides(stage, "tiny", STEPS, ["cluster.processes=1", *SMALL])
        run_here("run", "tiny", *words, "--stages", "preprocess", "--runs", str(runs))
        done = run_cli("prepare", "tiny", *words, "--stages", stage, "--runs", str(runs))
        assert done.returncode == 0, done.stderr
        found[stage] = Path(done.stdout.splitlines()[-1])
    return found


def measured(
    way: str, folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *, profile: bool = False
) -> bench_training.Run:
    """Run a way in this process, as the only one of a run."""
    spec = read_spec(folder)
    before = dict(os.environ)
    os.environ.update({**environment(STAGES[spec.stage], spec.cluster, folder), **single_rank()})
    monkeypatch.setattr(Trainer, "train", Trainer.train)  # the meter replaces it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            bench_worker.work(way, folder, out, warmup=1, profile=profile)
    finally:
        distributed.reset()
        os.environ.clear()  # libraries write to it too
        os.environ.update(before)
    return bench_training.combined([json.loads((out / "0.json").read_text())])


@pytest.mark.parametrize("way", ["seed", "trl", "padded", "ours"])
def test_sft_is_measured_without_padding(
    way: str, steps: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first step: all tokens of the rows, but those of that step."""
    cost = measured("machine", steps["sft"], tmp_path / "machine", monkeypatch)
    found = measured(way, steps["sft"], tmp_path / way, monkeypatch, profile=way == "ours")
    assert cost["rate"] > 1e6
    assert cost["rows"] == 8 * STEPS
    batch = cost["tokens"] / STEPS
    assert 0 < found["tokens"] < cost["tokens"]
    if way != "trl":  # packed rows are fewer or more steps
        assert found["steps"] == STEPS - 1
        assert found["tokens"] == pytest.approx(cost["tokens"] - batch, rel=0.2)
    assert found["places"] >= found["tokens"]
    assert (found["places"] > 2 * found["tokens"]) is (way == "seed")  # rows of 100 to 300 tokens in 1024 places
    assert found["seconds"] > 0
    if way == "ours":
        assert found["profile"]["seconds"]["matrix products"] > 0
        assert "aten::" in found["profile"]["table"]
    assert 3 < found["loss"] < 8  # the weights are random: log 1024 is 6.9


@pytest.mark.parametrize("way", ["seed", "trl", "ours"])
def test_grpo_is_measured_with_its_generation(
    way: str, steps: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measured(way, steps["grpo"], tmp_path, monkeypatch)
    assert (found["steps"], found["completions"]) == (STEPS - 1, 8 * (STEPS - 1))
    assert found["completions"] < found["completion_tokens"] <= 12 * found["completions"]
    assert 0 < found["generation_seconds"] < found["seconds"]
    assert 0 <= found["flat_groups"] <= 1


def test_a_comparison_prints_a_table_and_keeps_every_run(tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    words = ["--runs", "1", "--steps", "3", "--ways", "ours", "--processes", "1", "--work", str(tmp_path / "work")]
    out = run_bench("sft", *words, "--json", str(file), *SMALL)
    assert "| ours | " in out
    kept = read_json(file)
    assert kept is not None
    assert [run["steps"] for run in kept["tiny, sft"]["ways"]["ours"]] == [2]
    assert only(tmp_path / "work", "tiny/sft-*/artifact.json")


def test_ratios_are_taken_run_by_run() -> None:
    seconds = {"trl": (1.0, 2.0), "ours": (0.5, 0.5)}
    runs = {way: [{"steps": 2, "seconds": one} for one in of_run] for way, of_run in seconds.items()}
    assert bench_training.ratios(runs, "ours", lambda run: run["steps"] / run["seconds"]) == "3.00 (2.00 … 4.00)"
    assert bench_training.exponent([10, 40, 160], [1.0, 16.0, 256.0]) == pytest.approx(2)


def run_bench(*words: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        ["bash", "scripts/bench", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_start_of_commands_and_of_a_stage_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    words = ["--runs", "1", "--stages", "evaluate", "--work", str(tmp_path / "work"), "--json", str(file)]
    out = run_bench("startup", *words, "cluster.processes=1", *SMALL, FEW)
    assert "| `plan` | " in out
    kept = read_json(file)
    assert kept is not None
    (stage,) = kept["stages"]["evaluate"]
    assert 0 < stage["start"] < stage["start"] + stage["rows"] + stage["load"] <= stage["seconds"] + 0.5
    assert stage["processor"] > 0.5
    (status,) = kept["commands"]["status"]
    assert status["processor"] > 0


def test_stages_are_measured_beside_another_revision(tmp_path: Path) -> None:
    """In a repository of two commits; the older one makes fewer rows for GRPO."""
    project = tmp_path / "project"
    for name in ("pipeline", "configs", "deepspeed", "scripts", "tests/support"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(project), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    recipe = project / "configs" / "tiny.yaml"
    for before, rows in ((2000, 4), (4, 8)):
        recipe.write_text(recipe.read_text().replace(f"grpo_rows: {before}", f"grpo_rows: {rows}"))
        for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", f"{rows} rows"]):
            subprocess.run([*git, *words], check=True)
    work, file = tmp_path / "work", tmp_path / "runs.json"
    words = ["--ref", "HEAD~1", "--runs", "1", "--stages", "preprocess", "--work", str(work), "--json", str(file)]
    out = run_bench("pipeline", *words, *SMALL, FEW, cwd=project)
    assert "| step | s here | s at HEAD~1 | here ÷ HEAD~1 |" in out
    kept = read_json(file)
    assert kept is not None
    assert list(kept) == ["HEAD~1", "here"]
    assert all(0 < run["preprocess"] < run["all"] for (run,) in kept.values())
    assert read_table(only(work, "tiny/preprocess-*/data/grpo.parquet")).num_rows == 8  # the last run was here
    assert subprocess.check_output([*git, "worktree", "list"], text=True).count("\n") == 1


def test_preprocess_is_measured_by_rows(tmp_path: Path) -> None:
    words = ["--runs", "1", "--rows", "20,40", "--n", "3", "--work", str(tmp_path / "work")]
    out = run_bench("preprocess", *words, *SMALL)
    lines = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    assert [line[1] for line in lines] == ["20, 40"]
    assert float(lines[0][4].strip(" |")) < 1.5
