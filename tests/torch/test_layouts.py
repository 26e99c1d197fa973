"""layouts: what a checkpoint of another layout keeps, and what is refused, both said before anything is queued."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from recipes import recipe_of
from running import NANO, only, run_cli

from pipeline.config.cluster import Cluster, read_cluster
from pipeline.core.files import read_json
from pipeline.training.checkpoints import write_manifest
from pipeline.workflow.layouts import (
    LAYOUT,
    Layout,
    keeps_optimizer,
    layout_change,
    layout_mismatch,
    loads_as_it_is,
    saved_layout,
    stage_layout,
)
from pipeline.workflow.signing import MANIFEST, SIGNATURE

ZERO2 = Layout(2, 2, "zero2", False, "full", "muon", "float32")
HERE = Path("runs/tiny/sft-1/checkpoints/checkpoint-4")


def cluster_of(*words: str) -> Cluster:
    cluster, problems = read_cluster("local", words)
    assert cluster is not None, problems
    return cluster


def test_the_layout_of_a_run_is_read_from_recipe_and_cluster() -> None:
    cluster = cluster_of("processes=2", "sft.deepspeed=zero3_offload")
    assert stage_layout(recipe_of("tiny"), cluster, "sft") == Layout(2, 3, "zero3_offload", True, "full", "muon")
    assert stage_layout(recipe_of("deepseek7b"), cluster, "grpo").trained == "lora"
    alone = stage_layout(recipe_of("tiny"), cluster_of("sft.deepspeed=none"), "sft", processes=8)
    assert (alone.processes, alone.zero_stage) == (8, 0)


UNCHANGED = {"the same": ZERO2, "offload": replace(ZERO2, deepspeed="zero2_offload", offload=True)}
KEPT = "weights, optimizer states, schedule and the order of the rows are kept"
CHANGED = {  # each is run by tests/train/test_resume.py
    "processes": (replace(ZERO2, processes=1), f"zero2 on 1 process: {KEPT}; other random numbers"),
    "stage": (replace(ZERO2, zero_stage=3, deepspeed="zero3"), f"zero3 on 2 processes: {KEPT}"),
    "plain": (replace(ZERO2, zero_stage=0, deepspeed="none"), f"no DeepSpeed on 2 processes: {KEPT}"),
}
REFUSED = {
    "precision": (replace(ZERO2, precision="float16"), "model.dtype: got float16 on this hardware; expected float32"),
    "optimizer": (replace(ZERO2, optimizer="adamw_torch"), "optimizer.name: got adamw_torch; expected muon"),
    "trained": (replace(ZERO2, trained="lora"), "lora.enabled: got lora; expected full"),
}


@pytest.mark.parametrize("now", UNCHANGED.values(), ids=list(UNCHANGED))
def test_what_changes_nothing(now: Layout) -> None:
    assert layout_mismatch(ZERO2, now, HERE) is None
    assert layout_change(ZERO2, now, "sft", cluster_of()) is None
    assert loads_as_it_is(ZERO2, now)


@pytest.mark.parametrize(("now", "described"), CHANGED.values(), ids=list(CHANGED))
def test_what_is_converted_says_what_it_keeps(now: Layout, described: str) -> None:
    assert layout_mismatch(ZERO2, now, HERE) is None
    assert layout_change(ZERO2, now, "sft", cluster_of()) == f"zero2 on 2 processes -> {described}"
    assert not loads_as_it_is(ZERO2, now)
    assert keeps_optimizer(ZERO2, now)


@pytest.mark.parametrize(("now", "told"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_refused_says_what_it_needs(now: Layout, told: str) -> None:
    sentence = layout_mismatch(ZERO2, now, HERE)
    assert sentence is not None
    assert told in sentence
    assert f"delete {HERE.parent}" in sentence


def test_without_deepspeed_any_number_of_processes_loads_it_as_it_is() -> None:
    plain = replace(ZERO2, zero_stage=0, deepspeed="none", optimizer="adafactor")
    assert loads_as_it_is(plain, replace(plain, processes=8))
    changed = layout_change(plain, replace(plain, processes=8), "grpo", cluster_of())
    assert changed is not None
    assert changed.endswith(f"{KEPT}; other random numbers and so other completions")


def test_an_optimizer_that_begins_anew_is_named_with_the_words_that_keep_it() -> None:
    saved = replace(ZERO2, processes=8, optimizer="paged_adamw_8bit")
    now, nodes = replace(saved, processes=4), replace(cluster_of(), launcher="slurm", nodes=2)
    changed = str(layout_change(saved, now, "sft", nodes))
    assert "weights, schedule and the order of the rows are kept; other random numbers; the optimizer begins" in changed
    assert "cluster.sft.deepspeed=zero2 cluster.processes=4 keeps them" in changed
    three = str(layout_change(saved, now, "sft", replace(nodes, nodes=3)))
    assert "cluster.sft.deepspeed=zero2 cluster.nodes=1 cluster.processes=8 keeps them" in three


@pytest.mark.parametrize(
    ("files", "layout"),
    [
        (["rng_state.pth"], "no DeepSpeed on 1 process"),
        (["rng_state_0.pth", "rng_state_1.pth"], "no DeepSpeed on 2 processes"),
        (["global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt", "rng_state.pth"], "zero2 on 1 process"),
        (["global_step4/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "adapter_config.json"], "zero2 on 1 process"),
        ([f"global_step4/zero_pp_rank_{r}_mp_rank_00_{w}_states.pt" for r in (0, 1) for w in ("model", "optim")], "3"),
        (["global_step4/mp_rank_00_model_states.pt"], "None"),
        (["model.safetensors"], "None"),
    ],
)
def test_older_checkpoints_are_read_from_their_files(tmp_path: Path, files: list[str], layout: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = saved_layout(tmp_path)
    assert layout.replace("3", "zero3 on 2 processes") == str(found)
    assert found is None or found.trained == ("lora" if "adapter_config.json" in files else "full")


# ---------------------------------------------------------------- of real checkpoints


@pytest.fixture
def half_done(nano: Path, tmp_path: Path) -> Path:
    """A runs folder whose SFT (ZeRO-2) and GRPO (ZeRO-3), each in two processes, were stopped at a checkpoint."""
    for name in ("preprocess", "sft", "grpo"):
        done = only(nano, f"tiny/{name}-*")
        shutil.copytree(done, tmp_path / "tiny" / done.name)
        if name != "preprocess":
            (tmp_path / "tiny" / done.name / "artifact.json").unlink()
    return tmp_path


def test_a_checkpoint_records_its_layout_and_its_files_tell_the_same(nano: Path) -> None:
    for stage, zero in (("sft", 2), ("grpo", 3)):
        for checkpoint in nano.glob(f"tiny/{stage}-*/checkpoints/checkpoint-*"):
            recorded = saved_layout(checkpoint)
            assert recorded is not None
            assert (recorded.processes, recorded.zero_stage, recorded.precision) == (2, zero, "float32")
            assert LAYOUT in read_json(checkpoint / MANIFEST)  # covered by hashes and signature
    sft = max(nano.glob("tiny/sft-*/checkpoints/checkpoint-*"))
    old = nano.parent / "without-layout"
    shutil.copytree(sft, old, ignore=shutil.ignore_patterns(LAYOUT))
    assert str(saved_layout(old)) == str(saved_layout(sft))
    shutil.rmtree(old)


def test_another_layout_is_described_by_plan_and_check_and_resumed_by_run(half_done: Path) -> None:
    words = [*NANO, "--stages", "sft", "--runs", str(half_done)]
    other = [*words, "cluster.sft.deepspeed=none", "cluster.processes=1", "sft.optimizer.name=muon"]
    assert run_cli("check", "tiny", *other).returncode == 2  # muon is DeepSpeed's
    other = [*words, "cluster.sft.deepspeed=zero2_offload", "cluster.processes=1"]
    change = "resumes from checkpoint-6, zero2 on 2 processes -> zero2_offload on 1 process: weights, optimizer states"
    assert change in run_cli("plan", "tiny", *other).stdout
    assert change in run_cli("check", "tiny", *other).stdout
    done = run_cli("run", "tiny", *other)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_json(only(half_done, "tiny/sft-*/artifact.json"))["metrics"]["resumed_from"] == "checkpoint-6"
    assert change in done.stderr


def test_another_users_checkpoint_is_refused_before_anything_runs(half_done: Path) -> None:
    env = {"XDG_STATE_HOME": str(half_done / "other"), "THEREFORE_KEY_FILE": ""}
    done = run_cli("run", "tiny", *NANO, "--stages", "sft", "--runs", str(half_done), env=env)
    assert done.returncode == 2
    assert "got the signature of another key" in done.stderr
    assert "python -m pipeline.workflow.signing" in done.stderr


def test_an_older_manifest_without_layout_is_read_from_its_files(half_done: Path) -> None:
    """As the version before wrote it: no layout, no signature."""
    for checkpoint in half_done.glob("tiny/sft-*/checkpoints/checkpoint-*"):
        (checkpoint / LAYOUT).unlink()
        write_manifest(checkpoint)
        assert (checkpoint / SIGNATURE).is_file()
    words = [*NANO, "--stages", "sft", "--runs", str(half_done), "cluster.processes=1"]
    assert "zero2 on 2 processes -> zero2 on 1 process" in run_cli("check", "tiny", *words).stdout
