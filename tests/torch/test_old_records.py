"""Runs of an earlier version stay readable and usable: tests/fixtures/records-v1, whose README says how it was made."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from running import ROOT, only, run_cli, run_here
from safetensors.torch import load_file

from pipeline.config.former import identity, present_names
from pipeline.core.files import read_json, read_lines
from pipeline.core.hashing import fingerprint, plain
from pipeline.report import gather
from pipeline.scoring.results import to_json
from pipeline.tasks.task import task_of
from pipeline.workflow import status
from pipeline.workflow.artifact import open_artifact
from pipeline.workflow.progress import read_progress
from pipeline.workflow.stage import STAGES, EvaluateCheckpoint, Export, ReportModels, read_spec

RECORDS = ROOT / "tests" / "fixtures" / "records-v1"
STEPS = sorted(path.parent for path in RECORDS.glob("*/*/artifact.json"))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder whose `runs/` is the old one, as its records name it."""
    shutil.copytree(RECORDS, tmp_path / "runs")
    for name in ("configs", "deepspeed"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def test_the_fixture_is_whole() -> None:
    names = [folder.name.rpartition("-")[0] for folder in STEPS]
    assert len(names) == 9
    assert {"preprocess", "sft", "grpo", "evaluate-base", "evaluate-sft", "evaluate-grpo", "report"} <= set(names)


@pytest.mark.parametrize("folder", STEPS, ids=lambda folder: folder.name)
def test_every_record_is_read_and_keeps_its_fingerprint(folder: Path) -> None:
    order, artifact = read_spec(folder), open_artifact(folder, deep=True)
    progress = read_progress(folder)
    assert progress is not None
    assert (progress.state, progress.warnings, artifact.warnings) == ("done", (), [])
    assert order.fingerprint == artifact.fingerprint == fingerprint(artifact.payload) == fingerprint(order.payload)
    assert folder.name.endswith(order.fingerprint)
    name = folder.name.rpartition("-")[0]
    if folder.parent.name == "tiny-rehearsal":
        stage, _, role = name.partition("-")
        assert (order.name, order.stage, order.role) == (artifact.step, artifact.stage, artifact.role)
        assert (artifact.step, artifact.stage, artifact.role) == (name, stage, role or None)
        assert order.options == (ReportModels() if stage == "report" else None)
    elif folder.parent.name == "exports":
        assert isinstance(order.options, Export)
        assert (order.options.format, order.options.quant, order.options.trained_in) == ("merged16", None, "none")
        assert "/grpo-" in order.options.checkpoint
    else:
        assert isinstance(order.options, EvaluateCheckpoint)
        assert (artifact.step, artifact.stage, artifact.role) == ("evaluate-checkpoint", "evaluate", None)
    if folder.parent.name == "tiny-rehearsal":  # settings added since are neutral, so they leave no trace
        reads = STAGES[order.stage].reads
        now, was = identity(plain(order.recipe), reads), order.payload["settings"]
        shown, before = present_names(now), present_names(was)
        assert shown == {name: before[name] for name in shown}
        moved = ("model", "evaluate", "report")  # a setting of theirs is gone, or another stage's
        kept = {path: value for path, value in now.items() if path not in moved}
        assert kept == {path: was[path] for path in kept}  # hashed under the former names


def test_status_shows_every_step_done(project: Path) -> None:
    rows, troubles = status.table(Path("runs"))
    assert not troubles
    assert [row.state for row in rows] == ["done"] * len(STEPS)


def test_the_report_is_made_again_from_old_metrics_and_predictions(project: Path) -> None:
    folder = only(project, "runs/tiny-rehearsal/report-*").relative_to(project)
    spec = read_spec(folder)
    inputs = {label: open_artifact(Path(where)) for label, where in spec.inputs.items()}
    task = task_of(spec.recipe.task, spec.recipe.seed)
    again = to_json(gather(inputs, task, spec.recipe, {}))
    before = read_json(folder / "report.json")
    for name in ("models", "baselines", "differences", "headline", "curves", "goals", "splits", "main_split"):
        assert again[name] == before[name], name
    assert [one["id"] for one in again["samples"]] == [one["id"] for one in before["samples"]]
    recount = replace(spec.recipe.report, bootstrap_samples=spec.recipe.report.bootstrap_samples + 10)
    counted = gather(inputs, task, replace(spec.recipe, report=recount), {})
    for old, new in zip(before["models"], to_json(counted)["models"], strict=True):
        for split in before["splits"]:
            values = [{k: v["value"] for k, v in one["splits"][split]["all"].items()} for one in (old, new)]
            assert values[0] == values[1]


def test_a_model_can_be_asked(project: Path) -> None:
    model = only(project, "runs/tiny-rehearsal/grpo-*").relative_to(project)
    done = run_cli("ask", "--ckpt", str(model), "--max-new-tokens", "4", "Does A cause B?", cwd=project)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_model_can_be_evaluated_on_the_rows_of_its_own_run(project: Path) -> None:
    model = only(project, "runs/tiny-rehearsal/grpo-*").relative_to(project)
    words = ["--limit", "2", "--split", "test", "cluster.processes=1", "evaluate.draws=50"]
    before = only(project, "runs/evaluations/*")
    run_here("evaluate", "--ckpt", str(model), *words)
    (after,) = set(project.glob("runs/evaluations/*")) - {before}
    assert read_spec(after).inputs == read_spec(before).inputs
    old = {line["id"]: line["prompt_sha256"] for line in read_lines(before / "predictions.jsonl")}
    new = {line["id"]: line["prompt_sha256"] for line in read_lines(after / "predictions.jsonl")}
    assert len(new) == 2
    assert new.items() <= old.items()


def test_a_model_can_be_exported_as_it_was(project: Path) -> None:
    model = only(project, "runs/tiny-rehearsal/grpo-*").relative_to(project)
    run_here("export", "--ckpt", str(model), "--format", "merged16", "--out", "mine")
    before = load_file(only(project, "runs/exports/*") / "model" / "model.safetensors")
    after = load_file(project / "mine" / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)
