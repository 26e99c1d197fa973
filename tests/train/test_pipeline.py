"""The pipeline as a user runs it: real training under torchrun and DeepSpeed, on a model of a few thousand weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from running import NANO, ROOT, only, run_cli, run_here
from safetensors.torch import load_file

from pipeline.config.cluster import core_count
from pipeline.core.errors import ArtifactError
from pipeline.core.files import read_json, read_lines
from pipeline.launchers.local import run_plan, run_step
from pipeline.launchers.stops import StopRequests
from pipeline.training.checkpoints import numbered, validation_error
from pipeline.workflow.artifact import open_artifact
from pipeline.workflow.lock import is_alive, lock, read_holder
from pipeline.workflow.plan import make_plan
from pipeline.workflow.progress import ProgressFile, read_progress


def sub_run(runs: Path, *overrides: str, stages: str = "sft", timeout: float = 300) -> None:
    done = run_cli("run", "tiny", *NANO, *overrides, "--stages", stages, "--runs", str(runs), timeout=timeout)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def with_data(nano: Path, tmp_path: Path) -> Path:
    """A runs folder in which preprocess is done."""
    runs = tmp_path / "runs"
    done = only(nano, "tiny/preprocess-*")
    shutil.copytree(done, runs / "tiny" / done.name)
    return runs


@pytest.fixture
def with_sft(with_data: Path, nano: Path) -> Path:
    """A runs folder in which preprocess and SFT are done."""
    done = only(nano, "tiny/sft-*")
    shutil.copytree(done, with_data / "tiny" / done.name)
    return with_data


# ---------------------------------------------------------------- the whole run


def test_every_step_leaves_a_verified_artifact(nano: Path) -> None:
    folders = {path.name.rpartition("-")[0] for path in nano.glob("tiny/*")}
    assert folders == {"preprocess", "sft", "grpo", "evaluate-base", "evaluate-sft", "evaluate-grpo", "report"}
    for folder in nano.glob("tiny/*"):
        artifact = open_artifact(folder, deep=True)
        assert artifact.provenance["versions"]["trl"]
        assert read_holder(folder) is None
        progress = read_progress(folder)
        assert progress is not None
        assert progress.state == "done"


def test_the_end_of_a_run_says_where_everything_is_and_what_to_type_next(nano: Path) -> None:
    told = (nano / "stdout.txt").read_text()
    for words in (
        "tiny SFT",
        "always No",
        "report.html",
        str(only(nano, "tiny/grpo-*")),
        "next:\n  python -m pipeline",
    ):
        assert words in told


def test_every_second_of_a_step_is_in_a_part(nano: Path) -> None:
    spent = {path.name.rpartition("-")[0]: open_artifact(path).seconds_by_part for path in nano.glob("tiny/*")}
    told = (nano / "stdout.txt").read_text()
    for folder in nano.glob("tiny/*"):
        artifact = open_artifact(folder)
        written = (folder / "artifact.json").stat().st_mtime
        whole = written - artifact.provenance["started"]  # from the lock on, which the processes' start precedes
        start = artifact.seconds_by_part["start"]
        assert whole - 0.1 <= sum(artifact.seconds_by_part.values()) <= whole + start + 0.1
        assert f"\ntiny/{artifact.step} " in told.partition("\ntime ")[2]
    trained = {"start", "load", "rows", "forward/backward", "optimizer", "save", "wait", "other"}
    assert set(spent["sft"]) == trained
    assert set(spent["grpo"]) == trained | {"generate", "rewards"}
    assert {"load", "rows", "generate", "evaluate", "wait"} <= set(spent["evaluate-sft"])
    assert min(spent["sft"][part] for part in ("forward/backward", "optimizer")) > 0


def test_a_second_run_starts_nothing(nano: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in nano.rglob("*")}
    done = run_cli("run", "tiny", *NANO, "--runs", str(nano))
    assert done.returncode == 0
    assert "everything is done already" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in nano.rglob("*")} == before


def test_data_are_records_that_datasets_reads(nano: Path) -> None:
    from datasets import load_dataset

    folder = only(nano, "tiny/preprocess-*")
    rows = load_dataset("parquet", data_files=str(folder / "data" / "sft.parquet"), cache_dir=str(nano / "cache"))[
        "train"
    ]
    assert len(rows) == 96
    assert rows[0]["prompt"][0]["role"] == "user"
    assert rows[0]["completion"][0]["content"].startswith("<think>\n")
    assert {"id", "gold", "group", "tags"} <= set(rows.column_names)
    proof = read_json(folder / "splits.json")
    assert proof["overlap"] == 0
    assert not set(proof["classes"]["test"]) & set(rows["group"])


def test_rows_are_tokenized_once(nano: Path) -> None:
    """By preprocess, which has the tokenizer; both processes of SFT found its file."""
    (tokens,) = only(nano, "tiny/preprocess-*").glob("tokens/*")
    begun = open_artifact(only(nano, "tiny/sft-*")).provenance["started"]
    assert tokens.stat().st_mtime < begun


def test_training_leaves_a_model_curves_and_tensorboard_logs(nano: Path) -> None:
    for stage, steps in (("sft", 6), ("grpo", 2)):
        folder = only(nano, f"tiny/{stage}-*")
        assert (folder / "model" / "model.safetensors").is_file()
        assert list((folder / "tensorboard").glob("events.*"))
        history = read_json(folder / "history.json")
        assert max(entry["step"] for entry in history) == steps
        assert open_artifact(folder).metrics["steps"] == steps
        assert 0.1 < open_artifact(folder).metrics["peak_memory_gb"] < 64
    names = {key for entry in read_json(only(nano, "tiny/grpo-*") / "history.json") for key in entry}
    assert {"reward", "rewards/correctness/mean", "rewards/format/mean", "completions/mean_length"} <= names


def test_grpo_goes_on_from_the_weights_of_sft(nano: Path) -> None:
    sft, grpo, base = (
        load_file(only(nano, pattern) / "model" / "model.safetensors")
        for pattern in ("tiny/sft-*", "tiny/grpo-*", "tiny/preprocess-*")
    )
    name = "model.layers.0.mlp.down_proj.weight"
    moved = (sft[name].float() - base[name].float()).abs().max()
    assert moved > 0
    assert (grpo[name].float() - sft[name].float()).abs().max() < moved


def test_predictions_are_one_line_a_row(nano: Path) -> None:
    folder = only(nano, "tiny/evaluate-sft-*")
    records = read_lines(folder / "predictions.jsonl")
    assert len(records) == 12 + 6 + 6
    assert {"id", "prompt_sha256", "gold", "answer", "correct", "completion", "tokens", "truncated"} <= set(records[0])
    metrics = read_json(folder / "metrics.json")
    assert metrics["test"]["all"]["rows"]["value"] == 12
    assert all((record["reason"] is None) is record["answered"] for record in records)
    assert all(record["reason"] == "truncated" for record in records if record["truncated"])
    for split in metrics:
        reasons = [one["reason"] for one in records if one["split"] == split and not one["answered"]]
        assert metrics[split]["reasons"] == dict(Counter(reasons))
    assert set(metrics) == {"test", "paraphrased", "refactored"}
    assert not list(folder.glob("partial-*"))
    by_split: dict[str, set[str]] = {}
    for record in records:
        by_split.setdefault(record["id"].split("-")[1], set()).add(record["prompt_sha256"])
    assert all(len(hashes) == 3 for key, hashes in by_split.items() if int(key) < 6)  # the three sets ask differently


def test_the_report_is_three_files_and_needs_no_network(nano: Path) -> None:
    folder = only(nano, "tiny/report-*")
    page = (folder / "report.html").read_text()
    for word in ("http://", "https://", "<script", "<link", "url("):
        assert word not in page
    for word in (
        "balanced accuracy",
        "always No",
        "RoBERTa",
        "<svg",
        "completion length",
        "relation",
        "Settings of tiny",
    ):
        assert word in page
    assert (folder / "report.md").read_text().startswith("# tiny: Corr2Cause")
    for name in ("report.html", "report.md"):
        assert "cpu, precision float32, attention sdpa, layout zero2 on 2 processes; held at most: resident" in (
            (folder / name).read_text()
        )
    report = read_json(folder / "report.json")
    assert [model["role"] for model in report["models"]] == ["base", "sft", "grpo"]
    assert [d["after"] for d in report["differences"]] == ["tiny SFT", "tiny GRPO"]
    assert report["curves"]["tiny/sft"]["loss"]


def test_status_and_list(nano: Path) -> None:
    told = run_cli("status", "--time", "--runs", str(nano)).stdout
    assert "\nseconds of rank 0" in told
    heading, *lines = told.partition("\n\n")[0].splitlines()
    assert heading.startswith("state")
    rows = [line for line in lines if not line.startswith(" ")]
    assert [line.split()[0] for line in rows] == ["done"] * 7
    (warning,) = [line.strip() for line in lines if line.startswith(" ")]  # under its step: two steps of GRPO in small
    assert lines.index(rows[2]) + 1 == next(n for n, line in enumerate(lines) if line.startswith(" "))
    assert rows[2].split()[1].startswith("tiny/grpo-")
    assert warning.startswith("warning: in 2 of 2 steps no group of completions had rewards that differ")
    assert f"report: {only(nano, 'tiny/report-*')}/report.html" in told
    table = json.loads(run_cli("status", "--json", "--runs", str(nano)).stdout)
    assert {row["state"] for row in table} == {"done"}
    assert "tiny" in run_cli("list").stdout


# ---------------------------------------------------------------- the same again


def test_the_same_seed_gives_the_same_data_and_models(nano: Path, tmp_path: Path) -> None:
    """The same answers too: test_any_checkpoint_can_be_evaluated."""
    runs = tmp_path / "runs"
    sub_run(runs, stages="preprocess,sft,grpo")
    for pattern in ("tiny/preprocess-*/data/*.parquet", "tiny/*/model/*"):
        first, second = ({p.relative_to(r): p.read_bytes() for p in r.glob(pattern)} for r in (nano, runs))
        assert first == second
        assert first


def test_another_seed_gives_other_rows(nano: Path, tmp_path: Path) -> None:
    run_here("run", "tiny", *NANO, "seed=2", *ONE, "--stages", "preprocess", "--runs", str(tmp_path))
    one, other = (pq.read_table(only(r, "tiny/preprocess-*") / "data" / "test.parquet") for r in (nano, tmp_path))
    assert one["question"] != other["question"]


# ---------------------------------------------------------------- layouts

ONE = ["cluster.processes=1"]
ADAMW = ["sft.optimizer.name=adamw_torch"]
PLAIN = ["sft.full_loss_fraction=0", "sft.packing=true", "sft.order=shuffled"]


def test_packed_rows_train_without_deepspeed(with_sft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And go on in another number of processes, each attempt in the same run of W&B and trackio."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    shutil.rmtree(only(with_sft, "tiny/sft-*"))
    words = [*ADAMW, "cluster.sft.deepspeed=none", *PLAIN, "cluster.loggers=[wandb,trackio]"]
    sub_run(with_sft, *words, "cluster.keep_checkpoints=3", stages="sft")
    step = only(with_sft, "tiny/sft-*")
    artifact = open_artifact(step)
    assert artifact.metrics["steps"] == 6
    assert artifact.provenance["processes"] == 2
    hardware = artifact.provenance["hardware"]
    assert (hardware["device"], hardware["precision"]) == ("cpu", "float32")
    assert hardware["layout"] == "no DeepSpeed on 2 processes"
    assert hardware["measured"]["resident_gib"] > 0.1
    history = read_json(step / "history.json")
    assert [path.name for path in numbered(step / "checkpoints")] == [f"checkpoint-{n}" for n in (2, 4, 6)]

    (step / "artifact.json").unlink()  # as if it had been killed after step 4
    shutil.rmtree(step / "checkpoints" / "checkpoint-6")
    sub_run(with_sft, *words, "cluster.processes=1", "cluster.keep_checkpoints=1", stages="sft")
    assert open_artifact(step).metrics["resumed_from"] == "checkpoint-4"
    figures = [
        [(entry["step"], round(entry["loss"], 3), entry["learning_rate"]) for entry in entries if "loss" in entry]
        for entries in (history, read_json(step / "history.json"))
    ]
    assert figures[0] == figures[1]  # neither the optimizer nor the schedule began again
    assert [path.name for path in numbered(step / "checkpoints")] == ["checkpoint-6"]
    attempts = [path.name.split("-", 3)[3] for path in step.glob("wandb/offline-run-*")]
    assert len(attempts) == 2
    assert attempts[0] == attempts[1]
    assert attempts[0].startswith(f"{step.name}-")
    assert len(list(step.glob("wandb/offline-run-*/*.wandb"))) == 2
    with sqlite3.connect(next(step.glob("trackio/*.db"))) as logged:
        assert len(logged.execute("SELECT DISTINCT run_id FROM metrics").fetchall()) == 1


def test_early_stopping_ends_at_the_best_weights(tmp_path: Path) -> None:
    """A learning rate that breaks the model: the validation loss is best at once, and training ends two looks later."""
    rows = ["task.params.validation_classes=0.3", "task.params.validation_rows=8"]
    stop = [
        "sft.eval_steps=1",
        "sft.early_stopping_patience=2",
        "sft.max_steps=12",
        "sft.optimizer.learning_rate=0.5",
    ]
    words = [
        *rows,
        *stop,
        *ADAMW,
        *PLAIN[:1],
        "cluster.sft.deepspeed=zero2",
        *ONE,
    ]
    run_here("run", "tiny", *NANO, *words, "--stages", "preprocess,sft", "--runs", str(tmp_path))
    step = only(tmp_path, "tiny/sft-*")
    metrics = open_artifact(step).metrics
    best = metrics["validation_step"]
    assert metrics["steps"] == best + 2 < 12
    losses = [entry["eval_loss"] for entry in read_json(step / "history.json") if "eval_loss" in entry]
    assert metrics["validation_loss"] == min(losses) == losses[best - 1]
    assert metrics["validation_loss_gap"] == pytest.approx(
        min(losses) - next(e["loss"] for e in read_json(step / "history.json") if e.get("step") == best and "loss" in e)
    )
    kept, shard = load_file(step / "model" / "model.safetensors"), f"checkpoints/checkpoint-{best}/model.safetensors"
    assert all((weights == load_file(step / shard)[name]).all() for name, weights in kept.items())
    assert list(step.glob("tensorboard/**/events.*"))


def test_direct_grpo_starts_from_the_base_model(with_data: Path) -> None:
    """Here with half of a step's completions generated at once, and then the other half."""
    halves = ["cluster.grpo.per_device_batch_size=1", "cluster.generation_batch_size=4", *ONE]
    run_here("run", "tiny", *NANO, *halves, "--skip-sft", "--stages", "grpo", "--runs", str(with_data))
    history = read_json(only(with_data, "tiny/grpo-*") / "history.json")
    assert [entry["num_tokens"] > 0 for entry in history if "reward" in entry] == [True, True]
    assert "model" not in open_artifact(only(with_data, "tiny/grpo-*")).inputs
    assert not list(with_data.glob("tiny/sft-*"))


def test_torchrun_by_hand(with_data: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = ["-m", "pipeline.sft", "tiny", *NANO, "--runs", str(with_data)]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert open_artifact(only(with_data, "tiny/sft-*")).provenance["processes"] == 2


def test_a_core_that_sft_leaves_free_evaluates_the_base_model(with_data: Path) -> None:
    """At the same time, and with the same results as in a run in which each step has the whole machine."""
    words = ["cluster.processes=1", "cluster.threads=1", "grpo.init_from=none"]
    sub_run(with_data, *words, stages="sft,evaluate")
    sft, base, after = (only(with_data, f"tiny/{name}-*") for name in ("sft", "evaluate-base", "evaluate-sft"))
    begun, seconds = (open_artifact(sft).provenance[name] for name in ("started", "seconds"))
    beside = open_artifact(base).provenance["started"] < begun + seconds
    assert beside == (core_count() > 1)
    last = open_artifact(after)
    ended = last.provenance["started"] + last.provenance["seconds"]
    assert ended - sum(last.seconds_by_part.values()) > begun + seconds - 1  # its process started after SFT had ended


def test_a_stage_by_hand_and_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.preprocess", "tiny", *NANO, "--runs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [path.name.split("-")[0] for path in tmp_path.glob("tiny/*")] == ["preprocess"]


# ---------------------------------------------------------------- any checkpoint


@pytest.mark.parametrize(
    "what", ["sft-*", "sft-*/checkpoints/checkpoint-6", "grpo-*/checkpoints/checkpoint-2", "grpo-*/model"]
)
def test_any_checkpoint_can_be_evaluated(nano: Path, tmp_path: Path, what: str) -> None:
    checkpoint = only(nano, f"tiny/{what}")
    run_here("evaluate", "--ckpt", str(checkpoint), "--split", "test", "--limit", "4", *ONE, "--runs", str(tmp_path))
    folder = only(tmp_path, "evaluations/*")
    records = read_lines(folder / "predictions.jsonl")
    assert len(records) == 4
    if what in ("sft-*", "sft-*/checkpoints/checkpoint-6"):  # the same weights give the same answers
        whole = only(nano, "tiny/evaluate-sft-*") / "predictions.jsonl"
        known = {r["id"]: r["completion"] for r in read_lines(whole)}
        assert [known[r["id"]] for r in records] == [r["completion"] for r in records]


def test_a_plain_model_folder_is_asked_the_tasks_own_rows(nano: Path, tmp_path: Path) -> None:
    """No step, no recipe: the task generates its rows."""
    shutil.copytree(only(nano, "tiny/sft-*") / "model", tmp_path / "plain")
    words = ["--task", "corr2cause", "--limit", "3", "evaluate.max_new_tokens=8", "evaluate.splits=[validation]", *ONE]
    command = [sys.executable, "-m", "pipeline.evaluate", "--ckpt", str(tmp_path / "plain"), *words]
    done = subprocess.run(
        [*command, "--runs", str(tmp_path / "runs")], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "validation: 3 rows" in done.stdout


# ---------------------------------------------------------------- never lose work


STEPS = 100
LONG = [f"sft.max_steps={STEPS}", "task.params.phases=[{n: [3, 4], rows: 800}]"]


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with the rows of a SFT step of many short steps."""
    runs = tmp_path_factory.mktemp("long")
    run_here("run", "tiny", *NANO, *LONG, *ONE, "--stages", "preprocess", "--runs", str(runs))
    return runs


def start_long(long_rows: Path, runs: Path, *overrides: str) -> subprocess.Popen[str]:
    """A SFT step of many short steps; returns when it trains."""
    shutil.copytree(long_rows, runs, dirs_exist_ok=True)
    words = ["run", "tiny", *NANO, *LONG, *overrides, "--stages", "sft", "--runs", str(runs)]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until = time.time() + 240
    while not any((progress := read_progress(folder)) and progress.done for folder in runs.glob("tiny/sft-*")):
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < until
        time.sleep(0.1)
    return process


def test_a_killed_stage_goes_on_from_its_newest_good_checkpoint(long_rows: Path, tmp_path: Path) -> None:
    """SIGKILL of the launcher, the newest checkpoint damaged: the same command goes on from the one before."""
    process = start_long(long_rows, tmp_path, "cluster.save_steps=5", "cluster.keep_checkpoints=3")
    folder = only(tmp_path, "tiny/sft-*")
    while len(list(folder.glob("checkpoints/*/manifest.json"))) < 2:
        time.sleep(0.1)
    owner = read_holder(folder)
    assert owner is not None
    process.kill()  # the launcher alone: torchrun ends with it, and the ranks with torchrun
    process.communicate()
    until = time.time() + 20
    while is_alive(owner) and time.time() < until:
        time.sleep(0.1)
    assert not is_alive(owner)
    assert '"lost"' in run_cli("status", "--json", "--runs", str(tmp_path)).stdout
    saved = sorted(folder.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    newest = [path for path in saved if (path / "manifest.json").exists()][-1]
    next(newest.glob("global_step*/*optim*")).write_bytes(b"cut")
    assert validation_error(newest) is not None
    sub_run(tmp_path, *LONG, "cluster.save_steps=50", stages="sft")
    metrics = open_artifact(folder).metrics
    assert metrics["steps"] == STEPS
    assert metrics["resumed_from"] in {path.name for path in saved if path != newest}
    assert any(newest.name in sentence for sentence in metrics["passed_over"])


def test_ctrl_c_saves_leaves_nothing_running_and_the_next_command_goes_on(long_rows: Path, tmp_path: Path) -> None:
    process = start_long(long_rows, tmp_path, "cluster.save_steps=1000")
    folder = only(tmp_path, "tiny/sft-*")
    owner = read_holder(folder)
    assert owner is not None
    with pytest.raises(ArtifactError, match=f"is being written by process {owner.pid} on {owner.host}"):
        run_plan(make_plan(["tiny"], [*NANO, *LONG], stages=["sft"], runs=tmp_path))  # two runs of one step
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=120)[0]
    assert process.returncode == 75, told
    assert "stopping: tiny/sft saves at its next optimizer step and exits" in told
    assert "Fix: run the same command to resume" in told
    assert read_holder(folder) is None
    with pytest.raises(ProcessLookupError):
        os.kill(owner.pid, 0)
    progress = read_progress(folder)
    assert progress is not None
    assert progress.state == "stopped"
    assert 0 < progress.done < STEPS
    assert validation_error(folder / "checkpoints" / f"checkpoint-{progress.done}") is None  # no step was lost
    sub_run(tmp_path, *LONG, "cluster.save_steps=1000", stages="sft")
    metrics = open_artifact(folder).metrics
    assert metrics["resumed_from"] == f"checkpoint-{progress.done}"
    assert metrics["steps"] == STEPS


def test_the_loser_of_two_simultaneous_runs_says_who_has_the_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both have looked, and then both start: the second one's process finds the folder taken."""
    plan = make_plan(["tiny"], NANO, stages=["preprocess"], runs=tmp_path)
    step = plan.to_run[0]
    with lock(step.folder):
        winner = ProgressFile(step.folder, step.name)
        winner.update(state="running", done=3, total=6, figures={"loss": 0.123})
        with (
            pytest.raises(ArtifactError, match=f"is being written by process {os.getpid()} on "),
            StopRequests() as stops,
        ):
            run_step(step, "[1/1] second", {}, plan=plan, stops=stops)
        shown = capfd.readouterr()
        assert "0.123" not in shown.out + shown.err
        progress = read_progress(step.folder)
        assert progress is not None
        assert progress.state == "running"  # the winner's own


def test_ctrl_c_in_a_stage_that_cannot_save_is_written_down(tmp_path: Path) -> None:
    words = ["run", "tiny", "--stages", "preprocess", "--runs", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until = time.time() + 60
    while not list(tmp_path.glob("tiny/preprocess-*/progress.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 75, told
    progress = read_progress(only(tmp_path, "tiny/preprocess-*"))
    assert progress is not None
    assert progress.state == "stopped"
    assert not list(tmp_path.glob("tiny/preprocess-*/artifact.json"))
