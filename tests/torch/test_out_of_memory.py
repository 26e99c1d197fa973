"""out_of_memory: which setting is made smaller after which failure, and what the next attempt makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import cluster_of, recipe_of
from trl.trainer.utils import split_tensor_dict

from pipeline.config.cluster import Batches, Cluster, batches
from pipeline.engines.transformers import TransformersEngine
from pipeline.training.out_of_memory import LEAST_SHARE, ROWS, apply_shrinks, next_smaller
from pipeline.training.rollouts import _joined
from pipeline.workflow.attempts import decide, read_attempts, shrinks
from pipeline.workflow.progress import ProgressFile, Shrink

RECIPE = recipe_of("tiny", "sft.global_batch_size=30", "grpo.global_batch_size=32", "grpo.num_generations=4")


def cluster(*words: str) -> Cluster:
    return cluster_of("local", "processes=2", *[word.removeprefix("cluster.") for word in words])


def full() -> torch.OutOfMemoryError:
    """As the trainer's own code raises it."""
    try:
        raise torch.OutOfMemoryError("CUDA out of memory")
    except torch.OutOfMemoryError as error:
        return error


def full_while_generating() -> torch.OutOfMemoryError:
    class Model:
        def parameters(self) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        def modules(self) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine: Any = TransformersEngine.__new__(TransformersEngine)
    engine.model = Model()
    try:
        list(engine.generate([], None))
    except torch.OutOfMemoryError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("stage", "generates", "words", "wanted"),
    [
        ("sft", False, [], ("cluster.sft.per_device_batch_size", 15, 5)),  # divisors of the 15 rows of a process
        ("sft", False, ["cluster.sft.per_device_batch_size=1"], None),
        ("grpo", False, [], ("cluster.grpo.per_device_batch_size", 16, 8)),
        ("grpo", True, [], (ROWS, 16, 8)),
        ("grpo", True, ["cluster.generation.grpo.rows=1"], None),
        ("evaluate", True, ["cluster.evaluate_batch_size=7"], ("cluster.evaluate_batch_size", 7, 3)),
        ("evaluate", True, [], ("cluster.evaluate_batch_size", 100, 50)),
        (
            "evaluate",
            True,
            ["cluster.generation.evaluate.engine=vllm"],
            ("cluster.generation.evaluate.gpu_memory", 0.9, 0.72),
        ),
        (
            "grpo",
            False,
            ["cluster.generation.grpo.engine=vllm", "cluster.grpo.per_device_batch_size=1"],
            ("cluster.generation.grpo.gpu_memory", 0.35, 0.28),
        ),
    ],
)
def test_what_is_made_smaller(
    stage: str, generates: bool, words: list[str], wanted: tuple[str, float, float] | None
) -> None:
    error = full_while_generating() if generates else full()
    found = next_smaller(error, RECIPE, cluster(*words), stage, 2)
    assert found == (Shrink(*wanted) if wanted else None)


@pytest.mark.parametrize("stage", ["sft", "grpo", "evaluate"])
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
@pytest.mark.parametrize("generates", [True, False])
def test_it_ends_and_the_global_batch_stays(stage: str, engine: str, generates: bool) -> None:
    words = [f"cluster.generation.{name}.engine={engine}" for name in ("grpo", "evaluate")]
    error = full_while_generating() if generates else full()
    now, found = cluster(*words), []
    while shrink := next_smaller(error, RECIPE, now, stage, 2):
        found.append(shrink)
        assert len(found) < 20
        now, notes = apply_shrinks(found, RECIPE, cluster(*words), stage, 2)
        assert notes
        for kind, rows in (("sft", 30), ("grpo", 32)):
            sizes, problems = batches(now, RECIPE, "sft" if kind == "sft" else "grpo", 2)
            assert not problems
            assert sizes == Batches(2, sizes.per_device, rows // 2 // sizes.per_device) if sizes else False
        assert getattr(now.generation.grpo, "gpu_memory") >= LEAST_SHARE  # noqa: B009
    assert found


def test_a_setting_that_the_user_has_changed_since_is_the_users() -> None:
    found = [Shrink("cluster.sft.per_device_batch_size", 15, 5)]
    changed = cluster("cluster.sft.per_device_batch_size=3")
    assert apply_shrinks(found, RECIPE, changed, "sft", 2) == (changed, [])
    now, notes = apply_shrinks(found, RECIPE, cluster(), "sft", 2)
    assert now == replace(cluster(), sft=replace(cluster().sft, per_device_batch_size=5))
    assert notes == [
        "cluster.sft.per_device_batch_size: 15 was out of memory, so it is 5; sums of another order differ in their "
        "last bits"
    ]


def test_what_was_too_large_is_known_to_later_commands(tmp_path: Path) -> None:
    progress = ProgressFile(tmp_path, "sft")
    shrink = Shrink("cluster.sft.per_device_batch_size", 8, 4)
    progress.update(state="failed", problems=("out of memory",), exit_code=1, kind="memory", shrink=shrink)
    assert decide(tmp_path, 3).sentence == (
        "out of memory with cluster.sft.per_device_batch_size=8; the step starts again with 4"
    )
    assert shrinks(tmp_path) == [shrink]
    assert read_attempts(tmp_path).attempts[0].shrink == shrink
    assert not decide(tmp_path, 1).again


def test_halved_micro_batches_share_out_an_open_generation_cycle() -> None:
    batch = {"ids": torch.arange(8).reshape(4, 2), "tokens": torch.tensor(9)}
    first, second = split_tensor_dict(batch, 2)
    assert (first["ids"].tolist(), second["ids"].tolist()) == ([[0, 1], [2, 3]], [[4, 5], [6, 7]])
    assert first["tokens"] == second["tokens"] == 9
    whole = _joined([first, second])
    assert (whole["ids"].tolist(), int(whole["tokens"])) == (batch["ids"].tolist(), 9)
