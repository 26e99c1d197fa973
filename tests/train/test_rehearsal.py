"""--smoke-test: every recipe runs from rows to report in small, with its own wires, and is never taken for a result."""

from __future__ import annotations

from pathlib import Path

import pytest
from published import PUBLISHED
from recipes import recipe_of
from running import only, run_cli, run_here

from pipeline import preprocess
from pipeline.config.cluster import cluster_names
from pipeline.config.model_files import BUNDLED, model_config
from pipeline.config.recipe import recipe_names
from pipeline.core.errors import RecipeError
from pipeline.core.files import read_json
from pipeline.models.loading import load_tokenizer, prompt_ids
from pipeline.preflight import checks as preflight
from pipeline.sizing.smoke import STEPS
from pipeline.workflow.artifact import Artifact, open_artifact, read_split
from pipeline.workflow.plan import make_plan
from pipeline.workflow.progress import ProgressFile
from pipeline.workflow.runtime import Runtime
from pipeline.workflow.weights import find_checkpoint


@pytest.mark.parametrize("name", recipe_names())
def test_what_a_model_is_is_known_without_the_hub(name: str) -> None:
    """The bundled configuration gives exactly the published number of parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = recipe_of(name).model
    if model.random_init:
        assert model_config(model) is None
        return
    config = model_config(model)
    assert config is not None
    values = {key: value for key, value in config.items() if key != "architectures"}
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    assert type(empty).__name__ == config["architectures"][0]
    assert sum(weights.numel() for weights in empty.parameters()) == PUBLISHED[model.name]


def test_no_configuration_is_bundled_that_no_recipe_names() -> None:
    named = {recipe_of(name).model.name.replace("/", "--") for name in recipe_names()}
    assert {path.stem for path in BUNDLED.glob("*.json")} <= named


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_smoke_tested_with_its_own_wires(name: str, tmp_path: Path) -> None:
    full, small = (make_plan([name], smoke_test=flag, runs=tmp_path).steps[1].recipe for flag in (False, True))
    assert small.smoke_test
    assert small.name == f"{name}-smoke-test"
    for part in ("quantization", "attention", "dtype"):
        assert getattr(small.model, part) == getattr(full.model, part)
    assert small.lora == full.lora
    assert small.grpo.rewards == full.grpo.rewards
    assert small.model.chat_template == (full.model.chat_template or "chatml")
    assert small.sft.optimizer.name == full.sft.optimizer.name


@pytest.mark.parametrize("cluster", cluster_names())
def test_a_smoke_test_fits_every_cluster(cluster: str, tmp_path: Path) -> None:
    for name in recipe_names():
        plan = make_plan([name], cluster=cluster, smoke_test=True, runs=tmp_path)
        assert preflight.problems(plan)[0] == []  # whatever the model itself would need


OFFLOAD = ["cluster.sft.deepspeed=zero2_offload", "cluster.grpo.deepspeed=zero3_offload"]


# one recipe of each task runs whole; what the others differ in (architecture, quantization, chat format) is trained in
# tests/support/every_way.py and read in tests/torch/test_chat_formats.py
OFFLOADED = "phi3.5"
WHOLE = ("gsm8k", "math_science", "medical", "human_like", OFFLOADED)


@pytest.mark.parametrize("name", [name for name in recipe_names() if name not in WHOLE])
def test_every_recipe_makes_its_rows_and_its_small_model(name: str, tmp_path: Path) -> None:
    plan = make_plan([name], smoke_test=True, runs=tmp_path)
    step = plan.steps[0]
    step.folder.mkdir(parents=True)
    runtime = Runtime(plan.cluster, ProgressFile(None, step.name), 0, 1, step.folder, None, None)
    preprocess.run(step.recipe, {}, step.folder, runtime)
    config = read_json(step.folder / "model" / "config.json")
    model = recipe_of(name).model
    small = {"model_type": model.random_init.architecture if model.random_init else "qwen2"}
    assert config["model_type"] == (model_config(model) or small)["model_type"]
    tokenizer = load_tokenizer(find_checkpoint(str(step.folder / "model")), step.recipe.model)
    for split in ("sft", "grpo"):
        rows = read_split(Artifact("preprocess", "preprocess", name, "", {}, {}, {}, {}, {}, step.folder), split)
        prompt = prompt_ids(tokenizer, [rows["prompt"][0].as_py()])[0]
        assert tokenizer.decode(prompt).count(rows["prompt"][0].as_py()[-1]["content"].strip()[:40]) == 1


@pytest.fixture(scope="module")
def smoke_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder that the recipes share."""
    return tmp_path_factory.mktemp("smoke")


@pytest.mark.parametrize("name", WHOLE)
def test_a_smoke_test_runs_from_rows_to_report_and_says_what_it_is(
    smoke_tests: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """The recipe's own quantization, adapters, ZeRO-2 for SFT and ZeRO-3 for GRPO; then its export.

    In this process, but for the one that two processes train with offload: their number decides its batch.
    """
    words = ["run", name, "--smoke-test", "cluster.threads=1", "--runs", str(smoke_tests)]
    if name == OFFLOADED:
        done = run_cli(*words, *OFFLOAD, "cluster.processes=2", timeout=900)
        assert done.returncode == 0, done.stderr
        told = done.stdout
    else:
        run_here(*words)
        told = capsys.readouterr().out
    assert "SMOKE TEST of a shrunken model" in told
    runs = smoke_tests / f"{name}-smoke-test"
    trained = [stage for stage in ("sft", "grpo") if list(runs.glob(f"{stage}-*"))]
    assert trained
    for stage in trained:
        artifact = open_artifact(only(runs, f"{stage}-*"))
        assert artifact.metrics["steps"] == (STEPS if stage == "sft" else STEPS // 2)
        assert artifact.provenance["smoke_test"]
        weights = "adapter" if recipe_of(name).lora.enabled else "model"
        assert list((artifact.folder / weights).glob("*model.safetensors"))
    config = read_json(only(runs, "preprocess-*") / "model" / "config.json")
    known = model_config(recipe_of(name).model) or {"model_type": "qwen2"}
    assert config["model_type"] == known["model_type"]
    assert "SMOKE TEST" in (only(runs, "report-*") / "report.html").read_text()
    if name == OFFLOADED:
        return
    exported = smoke_tests / "exports" / name
    ckpt = str(only(runs, f"{trained[-1]}-*"))
    run_here("export", "--ckpt", ckpt, "--format", "merged16", "--out", str(exported), "--runs", str(smoke_tests))
    assert list(exported.glob("model/*.safetensors"))
    assert "smoke test" in next(exported.rglob("README.md")).read_text().lower()
    if name == "math_science":  # the seed's questions to each model, and its success indicators
        report = read_json(only(runs, "report-*") / "report.json")
        assert [len(one["answers"]) for one in report["prompts"]] == [3, 3, 3]
        assert {goal["name"] for goal in report["goals"]} == {"validation_loss", "validation_loss_gap", "thoughts"}
        assert all(goal["met"] is not None for goal in report["goals"])
    if name == "human_like":  # answers: preferences
        figures = read_json(only(runs, "evaluate-sft-*") / "metrics.json")["test"]["all"]
        assert 0 <= figures["preference"]["value"] <= 1
        assert "accuracy" not in figures


def test_a_model_that_nobody_knows_cannot_be_smoke_tested(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {name: someone/unknown}\n")
    with pytest.raises(RecipeError, match=r"someone/unknown cannot be smoke-tested, its config\.json is neither"):
        make_plan([str(mine)], smoke_test=True, runs=tmp_path)
