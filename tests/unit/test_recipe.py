"""Recipes and clusters: every file of configs/ loads; everything wrong is told at once, with path and remedy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.config.cluster import batches, cluster_names, process_count, read_cluster, thread_count
from pipeline.config.recipe import CONFIGS, read, recipe_names
from pipeline.core.errors import PipelineError, RecipeError
from pipeline.workflow.plan import make_plan


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_can_be_planned(name: str) -> None:
    recipe, problems = read(name)
    assert problems == []
    assert recipe is not None
    assert recipe.name == name
    assert make_plan([name]).steps


@pytest.mark.parametrize("name", cluster_names())
def test_every_cluster_loads(name: str) -> None:
    cluster, problems = read_cluster(name)
    assert problems == []
    assert cluster is not None
    assert cluster.name == name


def test_every_recipe_opens_by_saying_what_it_is_and_how_to_run_it() -> None:
    for name in recipe_names():
        head = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").split("\nmodel:")[0]
        assert head.startswith("# ")
        assert f"bash run_pipeline.sh {name}" in head


def test_overrides_win_and_are_typed() -> None:
    recipe, problems = read("tiny", ["grpo.beta=0.01", "sft.optimizer.learning_rate=1e-3", "lora.targets=[q_proj]"])
    assert problems == []
    assert recipe is not None
    assert (recipe.grpo.beta, recipe.sft.optimizer.learning_rate, recipe.lora.targets) == (0.01, 1e-3, ("q_proj",))


def test_all_problems_at_once_with_path_value_and_remedy() -> None:
    with pytest.raises(RecipeError) as caught:
        make_plan(
            ["tiny"],
            [
                "sft.learning_rat=1",
                "grpo.num_generations=7",
                "sft.optimizer.warmup=soon",
                "seed",
                "cluster.sft.deepspeed=zero9",
                "cluster.processs=2",
            ],
        )
    text = str(caught.value)
    for told in (
        "sft.learning_rat: unknown setting; ",
        "sft.optimizer.warmup: got 'soon'; expected a number ≥ 0",
        "'seed': not an override; write key=value, such as grpo.beta=0.01",
        "cluster.processs: unknown setting; did you mean 'processes'?",
    ):
        assert told in text


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["grpo.num_generations=7"],
            "grpo.num_generations: got 7; expected a divisor of grpo.global_batch_size 64. Fix: 4",
        ),
        (["grpo.rewards.corectness.weight=1", "grpo.rewards.corectness.params={}"], "did you mean 'correctness'?"),
        (["grpo.rewards.format.params={strict: 1}"], "grpo.rewards.format.params: "),
        (["task.name=gsm9k"], "task.name: unknown task 'gsm9k'; "),
        (["task.params.rows=3"], "task.params.rows: unknown setting; "),
        (["task.params.n=[3, 11]"], "task.params.n[1]: got 11; expected a whole number from 2 to 10"),
        (["task.source=hub"], "task.source: got 'hub'; expected a source of corr2cause: generated, path"),
        (["task.source=path"], "task.path: got null with task.source 'path'"),
        (["task.params.test_classes=0.95"], "leave no class for training"),
        (["model.quantization=nf4"], "Fix: lora.enabled=true, or model.quantization=none"),
        (["model.random_init.heads=3"], "model.random_init.heads: got 3; expected a divisor of hidden_size 128"),
        (["sft.max_length=4096"], "sft.max_length: got 4096 tokens; expected at most model.random_init"),
        (
            ["sft.global_batch_size=7", "cluster.processes=2"],
            "sft.global_batch_size: got 7; expected a multiple of the 2 processes",
        ),
        (["cluster.grpo.per_device_batch_size=5", "cluster.processes=2"], "Fix: 4 or 8"),
        (
            ["cluster.sft.deepspeed=zero9"],
            "cluster.sft.deepspeed: got 'zero9'; expected a file of deepspeed/. Fix: none",
        ),
        (["grpo.init_from=nowhere"], "grpo.init_from: got 'nowhere'; expected one of its values; "),
        (["model.name=[1"], "the value is not YAML"),
    ],
)
def test_a_combination_that_cannot_be_is_told_with_what_can(overrides: list[str], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_plan(["tiny"], overrides)
    assert told in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("names", "stages", "cluster", "told"),
    [
        (["tinny"], [], "local", "unknown recipe 'tinny' in configs/; did you mean 'tiny'?"),
        (["nowhere/tiny.yaml"], [], "local", "recipe 'nowhere/tiny.yaml': no such file; did you mean 'tiny'?"),
        (["tiny"], ["sfft"], "local", "--stages: got 'sfft'; did you mean 'sft'?"),
        (["tiny"], [], "locl", "unknown cluster 'locl' in configs/clusters/; did you mean 'local'?"),
    ],
)
def test_unknown_names_get_a_suggestion(names: list[str], stages: list[str], cluster: str, told: str) -> None:
    with pytest.raises(PipelineError) as caught:
        make_plan(names, stages=stages, cluster=cluster)
    assert told in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_recipe_that_is_no_yaml_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model:\n  name: [x\n", encoding="utf-8")
    _, problems = read(str(file))
    assert any(str(file) in problem and "line" in problem for problem in problems)


def test_threads_fit_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.config.cluster.gpu_count", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    cluster, _ = read_cluster("local")
    assert cluster is not None
    assert (process_count(cluster), thread_count(cluster, 2)) == (2, 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})  # bound to fewer than were granted
    assert thread_count(cluster, 2) == 1
    monkeypatch.setattr("pipeline.config.cluster.gpu_count", lambda: 4)
    assert process_count(cluster) == 4


@pytest.mark.parametrize("size", [2, 8, 12, 64, 96])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_global_batch_is_the_product_of_its_parts(size: int, processes: int) -> None:
    recipe, _ = read("tiny", [f"sft.global_batch_size={size}"])
    cluster, _ = read_cluster("local", [f"processes={processes}"])
    assert recipe is not None
    assert cluster is not None
    layout, problems = batches(cluster, recipe, "sft")
    assert problems == []
    assert layout is not None
    assert layout.processes * layout.per_device * layout.accumulation == size


def test_muon_is_not_clipped() -> None:
    _, problems = read("tiny", ["sft.optimizer.max_grad_norm=1.0"])
    assert any("sft.optimizer.max_grad_norm: got 1; expected 0 with muon" in text for text in problems)
