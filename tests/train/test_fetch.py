"""fetch: everything is downloaded once, on the login node; a job never asks the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_hub import COMMIT, serve
from running import NANO, only, run_cli

from pipeline.workflow.artifact import open_artifact

NAME = "someone/small"


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A recipe whose model is on the hub."""
    file = tmp_path / "mine.yaml"
    file.write_text(f"# a model of the hub\nmodel:\n  name: {NAME}\n  dtype: float32\n")
    return str(file)


SMALL = [word for word in NANO if "random_init" not in word]


def test_a_fetched_model_is_evaluated_without_the_hub(nano: Path, tmp_path: Path, recipe: str) -> None:
    home = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    runs = ["--runs", str(tmp_path / "runs")]
    before = run_cli("run", recipe, *SMALL, "--launcher", "slurm", *runs, env=home)
    assert before.returncode == 2
    assert f"model {NAME} is not in the local cache (no file)" in before.stderr
    assert "Fix: python -m pipeline download mine" in before.stderr
    assert not (tmp_path / "runs").exists()

    model = only(nano, "tiny/sft-*") / "model"
    with serve(NAME, model) as (address, asked):
        done = run_cli("download", recipe, *SMALL, *runs, env={**home, "HF_ENDPOINT": address})
        assert done.returncode == 0, done.stderr
        assert f"mine: model {NAME} at {COMMIT}" in done.stdout
        assert f"pin it: model.revision={COMMIT}" in done.stdout
        downloads = [line for line in asked if line.startswith("GET") and "/resolve/" in line]
        assert len(downloads) >= 3
        again = run_cli("download", recipe, *SMALL, *runs, env={**home, "HF_ENDPOINT": address})
        assert again.returncode == 0
        assert len([line for line in asked if line.startswith("GET") and "/resolve/" in line]) == len(downloads)

    offline = {**home, "HF_HUB_OFFLINE": "1"}
    words = ["run", recipe, *SMALL, "task.params.perturbed_rows=0", "evaluate.splits=[test]", "--skip-sft", *runs]
    ready = run_cli(*words, "--launcher", "slurm", "--dry-run", "cluster.gpu_memory=0", env=offline)
    unpinned = "note: mine: model.revision is not pinned; python -m pipeline download mine prints the commit\n"
    assert (ready.returncode, ready.stderr) == (0, unpinned)
    data = run_cli(*words, "--stages", "preprocess", env=offline)
    assert data.returncode == 0, data.stderr
    checkpoint = ["evaluate", "--ckpt", NAME, recipe, *SMALL, "evaluate.splits=[test]", "--limit", "2"]
    done = run_cli(*checkpoint, *runs, env=offline)
    assert done.returncode == 0, done.stderr
    assert open_artifact(only(tmp_path / "runs", "evaluations/*")).metrics["test"]["all"]["rows"]["value"] == 2


def test_a_download_that_was_cut_off_is_told_before_anything_is_queued(nano: Path, tmp_path: Path, recipe: str) -> None:
    home = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with serve(NAME, only(nano, "tiny/sft-*") / "model") as (address, _):
        run_cli("download", recipe, *SMALL, env={**home, "HF_ENDPOINT": address})
    next((tmp_path / "cache").glob("hub/*/snapshots/*/model.safetensors")).unlink()
    done = run_cli("run", recipe, *SMALL, "--launcher", "slurm", "--runs", str(tmp_path / "runs"), env=home)
    assert done.returncode == 2
    assert f"model {NAME} is not in the local cache (1 file(s) are missing (model.safetensors))" in done.stderr


def test_what_the_hub_does_not_know_is_told(nano: Path, tmp_path: Path, recipe: str) -> None:
    with serve("someone/else", only(nano, "tiny/sft-*") / "model") as (address, _):
        done = run_cli("download", recipe, *SMALL, env={"HF_HOME": str(tmp_path), "HF_ENDPOINT": address})
    assert done.returncode == 1
    assert f"model {NAME}: not found on the hub, or not public" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_recipe_from_scratch_needs_nothing(tmp_path: Path) -> None:
    done = run_cli("download", "tiny", env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0
    assert "tiny: nothing to download: model and data are generated locally" in done.stdout
