"""N steps straight are k steps, SIGKILL and a resume, to the last bit: SFT and GRPO, in one process and in two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import WAYS, history
from running import ROOT
from safetensors.torch import load_file

from pipeline.core.files import read_json, read_lines
from pipeline.training.checkpoints import numbered, validation_error
from pipeline.workflow.signing import MANIFEST


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("killed")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "tests/support/killed.py", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **settings})
    assert done.returncode == 0, done.stderr[-6000:]
    return out


MOVES = [(name, move) for name, way in WAYS.items() for move in way.moves]


def rows(step: Path) -> dict[int, list[Any]]:
    """The rows of each step, of all processes together; TRL passes them with every micro-batch."""
    found: dict[int, list[Any]] = {}
    for file in step.glob("rows-*.jsonl"):
        for number, names in map(json.loads, file.read_text().splitlines()):
            found.setdefault(number, []).extend(names)
    return {number: sorted(set(names)) for number, names in found.items()}


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


@pytest.mark.parametrize(("name", "move"), MOVES)
def test_another_layout_goes_on_with_the_same_rows_weights_and_optimizer(trained: Path, name: str, move: str) -> None:
    """Not to the last bit: other processes add gradients in another order, and ZeRO-3 rounds at other places."""
    straight, moved = trained / name / "straight", trained / name / move
    resumed = int(read_json(moved / "m.json")["resumed_from"].rpartition("-")[2])
    expected = {number: names for number, names in rows(straight).items() if number >= resumed}
    assert rows(moved) == expected
    rates = [[entry.get("learning_rate") for entry in history(step)] for step in (straight, moved)]
    assert rates[0] == rates[1]
    log = (moved / "log-0.txt").read_text()
    assert ("schedule and the order of the rows are kept" in log) == (len(move.split()) == 2)
    assert ("the optimizer begins anew" in log) == (name == "sft adafactor")
    assert ("other random numbers" in log) == (move[0] != str(WAYS[name].processes))
    if name in ("sft adafactor", "grpo zero2", "grpo redraw"):  # other random numbers draw other completions
        return
    tolerance = 2e-3 if name == "sft packed" else 2e-7  # bfloat16 has 8 bits
    losses = [[entry["loss"] for entry in history(step) if "loss" in entry] for step in (straight, moved)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance, abs=tolerance)
    file = next(iter(sorted(straight.glob("*/*.safetensors"))))
    wanted, got = load_file(file), load_file(moved / file.relative_to(straight))
    before = load_file(numbered(straight / "checkpoints")[0] / file.name)
    same = wanted.keys() & got.keys() & before.keys()
    apart, steps = (
        sum((wanted[key].float() - other[key].float()).abs().mean().item() for key in same) for other in (got, before)
    )
    assert apart < (0.01 if name == "sft packed" else 1e-4) * steps


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.processes == 2 and not way.moves])
def test_a_resume_hashes_each_byte_once_in_one_process(trained: Path, name: str) -> None:
    step = trained / name / "killed"
    manifest = read_json(step / "checkpoints" / read_json(step / "m.json")["resumed_from"] / MANIFEST)
    hashed = [int((step / f"hashed-{rank}.txt").read_text()) for rank in range(2)]
    assert hashed == [sum(entry["size"] for entry in manifest.values()), 0]


def test_prompts_that_are_always_wrong_are_drawn_less_often_and_that_is_recorded(trained: Path) -> None:
    """The rewards of this run make every second prompt always wrong; two processes take a prompt each in a step."""
    step = trained / "grpo redraw" / "straight"
    lines = read_lines(step / "draws.jsonl")
    assert lines == read_lines(step.parent / "killed" / "draws.jsonl")
    wrong = {line["id"] for line in lines if line["last"] == "all wrong"}
    assert wrong == {f"grpo-{k}" for k in (1, 3, 5, 7)}
    assert {line["last"] for line in lines if line["id"] not in wrong} == {"none yet", "spread"}
    recorded = [Counter({line["id"]: line["drawn"] for line in lines if line["epoch"] == k}) for k in range(4)]
    taken = [Counter[str]() for _ in range(5)]
    for file in step.glob("rows-*.jsonl"):
        for number, names in map(json.loads, file.read_text().splitlines()):
            taken[number // 4].update(set(names))  # each process has one prompt in a step
    assert taken[:4] == recorded
    assert recorded[0] == Counter(f"grpo-{k}" for k in range(8))
    later = sum(recorded[1:], Counter())
    assert sum(later.values()) == 24
    assert sum(later[name] for name in wrong) <= 5  # of 12 if they were drawn as the others
    metrics = read_json(step / "m.json")
    assert metrics["prompts_drawn"] == 40
    assert metrics["prompts_left_out"] == sum(line["left_out"] for line in lines) > 0
    assert (metrics["last_group_all_wrong"], metrics["last_group_spread"]) == (4, 4)


def test_the_runs_cross_what_they_are_about(trained: Path) -> None:
    """An epoch before the checkpoint, an open log, a generation cycle that is half used, a stop by patience."""
    saved = read_json(trained / "sft none" / "killed" / "checkpoints" / "checkpoint-7" / "trainer_state.json")
    assert 1 < saved["epoch"] < 2
    assert saved["log_history"][-1]["step"] == 4
    for name in ("grpo", "grpo none", "grpo zero2", "grpo zero3"):
        file = trained / name / "straight" / "checkpoints" / "checkpoint-5" / "process_0.safetensors"
        assert "completion_ids" in load_file(file)
    assert read_json(trained / "sft early" / "killed" / "m.json")["steps"] == 10  # of 11
