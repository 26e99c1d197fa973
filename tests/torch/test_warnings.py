"""What the user should read before they trust a result reaches the log, status, the artifact, the report, the end."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import only, run_cli

from pipeline.config.cluster import read_cluster
from pipeline.launchers.local import _Bar
from pipeline.scoring.results import Metrics, SplitMetrics
from pipeline.training.trainer import warn_of_long_rows
from pipeline.workflow.artifact import Artifact, open_artifact
from pipeline.workflow.figures import recorded_metrics
from pipeline.workflow.progress import ProgressFile, read_progress
from pipeline.workflow.runtime import Runtime

ROW = '{"question": "one more than %d?", "answer": "%d + 1\\n#### %d"}\n'


def runtime(folder: Path | None, rank: int = 0) -> Runtime:
    cluster, _ = read_cluster("local")
    assert cluster is not None
    return Runtime(cluster, ProgressFile(folder, "sft"), rank, 1, folder or Path(), None, None)


def test_bad_rows_that_are_skipped_are_counted_and_named_where_the_user_looks(tmp_path: Path) -> None:
    rows, runs = tmp_path / "rows.jsonl", tmp_path / "runs"
    good = [ROW % (k, k, k + 1) for k in range(20)]
    rows.write_text("".join(good[:5]) + '{"question": "x"}\n' * 5 + "".join(good[5:]))
    words = ["task.source=path", f"task.path={rows}", "task.on_bad_row=skip", "task.params.rows=null"]
    done = run_cli("run", "gsm8k", *words, "--stages", "preprocess", "--runs", str(runs))
    assert done.returncode == 0, done.stderr
    place = f"{rows}:6: no answer (it has question)"
    sentence = f"5 rows cannot be read and were left out (splits.json names all): {place}; "
    step = only(runs, "gsm8k/preprocess-*")
    (warning,) = open_artifact(step).warnings
    assert warning.startswith(sentence)
    assert warning.endswith(" and 2 more")
    progress = read_progress(step)
    assert progress is not None
    assert progress.warnings == (warning,)
    assert f"warning: {warning}" in (step / "log.txt").read_text()
    assert f"warning: {warning}" in done.stderr
    assert f"warning: gsm8k/preprocess: {warning}" in done.stdout
    assert f"warning: {warning}" in run_cli("status", "--runs", str(runs)).stdout


def test_rows_that_are_too_long_are_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = runtime(tmp_path)
    warn_of_long_rows(here, [f"row-{k}" for k in range(9)], [1, 2, 3, 5], "SFT rows", "sft.max_length 64 tokens")
    told = "5 of 9 SFT rows are longer than sft.max_length 64 tokens and were left out: row-0, row-4, row-6 and 2 more"
    assert here.progress.now.warnings == (told,)
    warn_of_long_rows(here, ["a", "b"], [0, 1], "SFT rows", "sft.max_length 64 tokens")
    assert here.progress.now.warnings == (told,)
    assert capsys.readouterr().out == f"warning: {told}\n"


def test_a_warning_counts_once_and_is_printed_by_one_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = runtime(tmp_path), runtime(None, rank=1)
    for here in (first, second, first):
        here.warn("nothing was learned")
    assert first.progress.now.warnings == ("nothing was learned",)
    assert capsys.readouterr().out == "warning: nothing was learned\n"
    _Bar("[1/1] tiny/sft").end(first.progress.now, 1.0, done=True)
    assert "warning: nothing was learned" in capsys.readouterr().err


def test_an_evaluation_with_a_warning_keeps_its_splits(tmp_path: Path) -> None:
    metrics = {"test": {"all": {"rows": {"value": 3}}}, "warnings": ["ran on the CPU"]}
    artifact = Artifact("evaluate-sft", "evaluate", "tiny", "", {}, {}, {}, metrics, {}, tmp_path)
    assert recorded_metrics(artifact) == {"test": SplitMetrics(Metrics(3, 0, 0, {}))}
    assert artifact.warnings == ["ran on the CPU"]
