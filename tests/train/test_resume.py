"""N steps straight are k steps, SIGKILL and a resume, to the last bit: SFT and GRPO, in one process and in two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import WAYS
from running import ROOT
from safetensors.torch import load_file

from pipeline.core.files import read_json
from pipeline.training.checkpoints import numbered, validation_error

CLOCK = ("runtime", "per_second", "step_time")  # what a log tells of time


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("killed")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "tests/support/killed.py", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **settings})
    assert done.returncode == 0, done.stderr[-6000:]
    return out


def history(step: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in CLOCK)}
        for entry in read_json(step / "history.json")
    ]


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two saved states differ, tensors bit by bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [where]
        return [found for key in one for found in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [found for k in range(len(one)) for found in differences(one[k], other[k], f"{where}/{k}")]
    if hasattr(one, "__dict__"):  # DeepSpeed's loss scaler and addresses
        return differences(vars(one), vars(other), where)
    return [] if str(one) == str(other) else [where]


def states(checkpoint: Path) -> dict[str, Any]:
    """Optimizer, scheduler and random states of every process, and what it has of GRPO's generation cycle."""
    found = {
        str(path.relative_to(checkpoint)): torch.load(path, weights_only=False, map_location="cpu")
        for path in checkpoint.rglob("*.pt*")
        if path.name != "training_args.bin"
    }
    return found | {path.name: load_file(path) for path in checkpoint.glob("process_*.safetensors")}


@pytest.mark.parametrize("name", WAYS)
def test_a_killed_run_ends_as_an_undisturbed_one(trained: Path, name: str) -> None:
    """The sums of a collective have the same order in both, so nothing may differ under DeepSpeed either."""
    straight, killed = trained / name / "straight", trained / name / "killed"
    metrics, wanted = read_json(killed / "m.json"), read_json(straight / "m.json")
    resumed = int(metrics["resumed_from"].rpartition("-")[2])
    assert wanted["resumed_from"] is None
    assert resumed < WAYS[name].kill <= metrics["steps"] == wanted["steps"]
    assert metrics["train_loss"] == wanted["train_loss"]
    assert len([entry for entry in history(straight) if "loss" in entry]) > 2
    assert history(killed) == history(straight)
    first = next(iter(sorted(straight.glob("*/*.safetensors"))))
    before = load_file(numbered(straight / "checkpoints")[0] / first.name)
    assert differences(before, load_file(first))  # the steps between changed something
    assert differences(load_file(first), load_file(killed / first.relative_to(straight))) == []
    last, other = numbered(straight / "checkpoints")[-1], numbered(killed / "checkpoints")[-1]
    assert last.name == other.name
    assert validation_error(other) is None
    assert differences(states(last), states(other)) == []


def test_the_runs_cross_what_they_are_about(trained: Path) -> None:
    """An epoch before the checkpoint, an open log, a generation cycle that is half used, a stop by patience."""
    saved = read_json(trained / "sft none" / "killed" / "checkpoints" / "checkpoint-7" / "trainer_state.json")
    assert 1 < saved["epoch"] < 2
    assert saved["log_history"][-1]["step"] == 4
    for name in ("grpo", "grpo none", "grpo zero2", "grpo zero3"):
        file = trained / name / "straight" / "checkpoints" / "checkpoint-5" / "process_0.safetensors"
        assert "0.completion_ids" in load_file(file)
    assert read_json(trained / "sft early" / "killed" / "m.json")["steps"] == 10  # of 11
