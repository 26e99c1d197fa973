"""Data sets of the hub: fetched once at a pinned commit, read from the cache by jobs that have no internet."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from fake_hub import COMMIT, serve
from running import only, run_cli

from pipeline.tasks.rows import SAMPLES

NAME = "openai/gsm8k"
CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
---
"""
RECIPE = """# rows of the hub, a model from nothing
model:
  name: small
  random_init: {architecture: qwen2, vocabulary: 600, hidden_size: 32, layers: 1, heads: 2, key_value_heads: 2,
            intermediate_size: 64, context: 2048, rope_theta: 10000.0, initializer_range: 0.02}
task: {name: gsm8k, source: hub}
evaluate: {splits: [test]}
"""


def published(folder: Path) -> list[dict[str, str]]:
    """The project's sample rows, laid out as the hub lays out GSM8K."""
    rows = [json.loads(line) for line in (SAMPLES / "gsm8k.jsonl").read_text(encoding="utf-8").splitlines()]
    (folder / "main").mkdir(parents=True)
    for split, part in (("train", rows[:24]), ("test", rows[24:])):
        pq.write_table(pa.Table.from_pylist(part), folder / "main" / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return rows


def test_a_data_set_is_fetched_once_and_read_without_the_hub(tmp_path: Path) -> None:
    rows = published(tmp_path / "hub")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(RECIPE)
    home = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    words = [str(recipe), f"task.revision={COMMIT}", "--runs", str(tmp_path / "runs")]
    before = run_cli("run", *words, "--launcher", "slurm", env=home)
    assert before.returncode == 2
    assert f"dataset {NAME} is not in the local cache (no revision {COMMIT})" in before.stderr

    with serve(NAME, tmp_path / "hub", "dataset") as (address, asked):
        done = run_cli("download", *words, env={**home, "HF_ENDPOINT": address})
        assert done.returncode == 0, done.stderr
        assert f"mine: dataset {NAME} at {COMMIT}" in done.stdout
        assert any(line == f"GET /datasets/{NAME}/resolve/{COMMIT}/main/test-00000-of-00001.parquet" for line in asked)

    offline = {**home, "HF_HUB_OFFLINE": "1"}
    done = run_cli("run", *words, "--stages", "preprocess", env=offline)
    assert done.returncode == 0, done.stderr
    data = only(tmp_path / "runs" / "mine", "preprocess-*") / "data"
    test = pq.read_table(data / "test.parquet").to_pylist()
    assert [row["question"].partition("\n")[0] for row in test] == [row["question"] for row in rows[24:]]
    train, validation = (len(pq.read_table(data / f"{name}.parquet")) for name in ("sft", "validation"))
    assert (train, validation) == (21, 3)  # a tenth, rounded up

    nothing = {"HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1"}
    done = run_cli("run", *words, "--stages", "preprocess", "seed=1", env=nothing)
    assert done.returncode == 2
    assert f"data set {NAME}: split 'train' cannot be read" in done.stderr
    assert "python -m pipeline download" in done.stderr
    assert "Traceback" not in done.stderr
