"""Several samples of each row, end to end: the first is that of one sample, and what is there is not asked again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import only, run_here

from pipeline.config.recipe import RandomInit
from pipeline.core.files import read_json, read_lines
from pipeline.models.loading import make_random_model
from pipeline.workflow.artifact import ARTIFACT, open_artifact

WORDS = ["--task", "gsm8k", "task.source=sample", "--split", "validation", "task.params.validation=12"]
WORDS += ["evaluate.max_new_tokens=8", "evaluate.temperature=1", "report.bootstrap_samples=50"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampled") / "wild"
    scratch = RandomInit("qwen2", 400, 32, 1, 2, 2, 64, 2048, 10000.0, 0.1)
    make_random_model(scratch, ["The answer is #### 42 or #### 6"] * 20, "chatml", folder, 3)
    return folder


def evaluate(model: Path, runs: Path, *words: str) -> Path:
    run_here("evaluate", "--ckpt", str(model), *WORDS, *words, "--runs", str(runs))
    return only(runs, "evaluations/*")


def test_several_samples_of_each_row(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = read_lines(evaluate(model, tmp_path / "one") / "predictions.jsonl")
    folder = evaluate(model, tmp_path / "many", "evaluate.samples=5")
    told = capsys.readouterr().out
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    many = [json.loads(line) for line in lines]
    assert [(row["id"], row.get("sample", 0)) for row in many] == [(row["id"], k) for row in one for k in range(5)]
    assert [row for row in many if "sample" not in row] == one  # bit for bit
    assert len({row["completion"] for row in many if row["id"] == one[0]["id"]}) > 2
    metrics = open_artifact(folder, deep=True).metrics["validation"]
    assert metrics == read_json(folder / "metrics.json")["validation"]
    assert (metrics["samples"], metrics["all"]["rows"]["value"]) == (5, 12)
    assert {"pass@1", "pass@2", "pass@4", "majority@5"} <= set(metrics["all"])
    assert sum(metrics["reasons"].values()) == sum(not row["answered"] for row in many)
    assert "validation: 12 rows, 5 samples of each, 12 groups" in told
    assert "majority@5" in told

    # interrupted: samples of several rows are there, a last line is cut off
    before = {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name in ("metrics.json", "predictions.jsonl")
    }
    kept = [line for k, line in enumerate(lines) if k % 7 not in (2, 3)]
    for name in (ARTIFACT, *before):
        (folder / name).unlink()
    partial = folder / "partial-0-1.jsonl"
    partial.write_text("\n".join(kept) + "\n" + lines[2][:40], encoding="utf-8")
    assert evaluate(model, tmp_path / "many", "evaluate.samples=5") == folder
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert not partial.exists()
