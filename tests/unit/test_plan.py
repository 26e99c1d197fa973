"""plan: what runs again and what does not, why, and where everything lives, before anything runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config.cluster import Cluster
from pipeline.config.recipe import Goal
from pipeline.core.errors import ArtifactError, PlanError, RecipeError
from pipeline.core.files import read_json, write_json
from pipeline.workflow.artifact import STEP, Artifact, finalize
from pipeline.workflow.lock import lock
from pipeline.workflow.plan import Plan, Step, explain, make_plan, spec_of
from pipeline.workflow.stage import EvaluateCheckpoint, Export, Options, ReportModels, read_spec, write_spec


def step(plan: Plan, name: str) -> Step:
    return next(step for step in plan.steps if step.name == name)


def finish(step: Step, cluster: Cluster) -> None:
    """What a finished step leaves for the plan to see."""
    write_spec(step.folder, spec_of(step, cluster))
    finalize(
        Artifact(step.name, step.stage, step.recipe.name, step.fingerprint, step.payload, {}, {}, {}, {}, step.folder)
    )


def finish_all(plan: Plan) -> None:
    for each in plan.to_run:
        finish(each, plan.cluster)


def names(steps: list[Step]) -> list[str]:
    return [step.name for step in steps]


ALL = ["preprocess", "sft", "grpo", "evaluate-base", "evaluate-sft", "evaluate-grpo", "report"]


def test_a_recipe_is_seven_steps_each_after_its_inputs(tmp_path: Path) -> None:
    plan = make_plan(["tiny"], runs=tmp_path)
    assert names(list(plan.steps)) == ALL
    seen: set[str] = set()
    for each in plan.steps:
        assert {needed.label for needed in each.inputs.values()} <= seen
        seen.add(each.label)
    assert step(plan, "sft").folder == tmp_path / "tiny" / f"sft-{step(plan, 'sft').fingerprint}"


def test_a_recipe_without_grpo_has_no_such_step_and_says_so(tmp_path: Path) -> None:
    plan = make_plan(["human_like"], runs=tmp_path)
    assert names(list(plan.steps)) == ["preprocess", "sft", "evaluate-base", "evaluate-sft", "report"]
    with pytest.raises(PlanError, match="human_like has no grpo step"):
        make_plan(["human_like"], stages=["grpo"], runs=tmp_path)
    for words in (["grpo.init_from=sft"], ["grpo.init_from=base"]):
        with pytest.raises(RecipeError, match="nothing of human_like can be rewarded; use none"):
            make_plan(["human_like"], words, runs=tmp_path)
    with pytest.raises(RecipeError, match="nothing of human_like can be rewarded; use none"):
        make_plan(["human_like"], skip_sft=True, runs=tmp_path)


def test_a_recipe_may_ask_no_model_anything(tmp_path: Path) -> None:
    plan = make_plan(["gsm8k"], ["evaluate.splits=[]"], runs=tmp_path)
    assert names(list(plan.steps)) == ["preprocess", "sft", "grpo", "report"]


def test_a_second_run_starts_nothing(tmp_path: Path) -> None:
    finish_all(make_plan(["tiny"], runs=tmp_path))
    assert make_plan(["tiny"], runs=tmp_path).to_run == []


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("grpo.beta=0.01", ["grpo", "evaluate-grpo", "report"]),
        ("sft.epochs=2", ["sft", "grpo", "evaluate-sft", "evaluate-grpo", "report"]),
        ("evaluate.limit=10", ["evaluate-base", "evaluate-sft", "evaluate-grpo", "report"]),
        ("task.params.test_rows=10", ALL),
        ("seed=7", ALL),
        ("cluster.processes=1", []),
        ("cluster.grpo.deepspeed=none", []),
        ("grpo.rewards.format.weight=0.1", ["grpo", "evaluate-grpo", "report"]),
        ("grpo.beta=0", []),
    ],
)
def test_a_setting_runs_again_what_depends_on_it_and_no_more(tmp_path: Path, override: str, again: list[str]) -> None:
    finish_all(make_plan(["tiny"], runs=tmp_path))
    assert names(make_plan(["tiny"], [override], runs=tmp_path).to_run) == again


def test_why_is_told_field_by_field(tmp_path: Path) -> None:
    finish_all(make_plan(["tiny"], runs=tmp_path))
    plan = make_plan(["tiny"], ["grpo.beta=0.01", "grpo.optimizer.learning_rate=0.5"], runs=tmp_path)
    assert explain(step(plan, "sft")) == ["done"]
    reasons = explain(step(plan, "grpo"))
    assert reasons[0].startswith("grpo.optimizer.learning_rate: ")
    assert reasons[0].endswith(" -> 0.5")
    assert reasons[1] == "grpo.beta: 0 -> 0.01"
    old = step(make_plan(["tiny"], runs=tmp_path), "grpo").fingerprint
    assert explain(step(plan, "evaluate-grpo")) == [f"input model: {old} -> {step(plan, 'grpo').fingerprint}"]


def test_what_a_step_is_in_the_middle_of_is_told(tmp_path: Path) -> None:
    plan = make_plan(["tiny"], runs=tmp_path)
    sft = step(plan, "sft")
    assert explain(sft) == ["new"]
    write_spec(sft.folder, spec_of(sft, plan.cluster))
    assert explain(sft) == ["restart: the previous attempt saved no checkpoint"]
    (sft.folder / "checkpoints" / "checkpoint-200").mkdir(parents=True)
    assert explain(sft) == ["resumes from checkpoint-200"]
    with lock(sft.folder) as owner:
        assert explain(sft) == [f"running: {owner}"]


def test_without_sft_grpo_starts_from_the_base_model(tmp_path: Path) -> None:
    plan = make_plan(["tiny"], skip_sft=True, runs=tmp_path)
    assert names(list(plan.steps)) == ["preprocess", "grpo", "evaluate-base", "evaluate-grpo", "report"]
    assert set(step(plan, "grpo").inputs) == {"data"}
    assert step(plan, "grpo").fingerprint != step(make_plan(["tiny"], runs=tmp_path), "grpo").fingerprint


def test_some_stages_only(tmp_path: Path) -> None:
    plan = make_plan(["tiny"], stages=["preprocess", "sft"], runs=tmp_path)
    assert names(plan.to_run) == ["preprocess", "sft"]
    with pytest.raises(PlanError, match="tiny/preprocess is not done, and sft, grpo need it"):
        make_plan(["tiny"], stages=["sft", "grpo"], runs=tmp_path)
    finish(step(plan, "preprocess"), plan.cluster)
    assert names(make_plan(["tiny"], stages=["sft", "grpo"], runs=tmp_path).to_run) == ["sft", "grpo"]


def test_several_recipes_share_one_report(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(Path("configs/tiny.yaml").read_text().replace("hidden_size: 128", "hidden_size: 64"))
    plan = make_plan(["tiny", str(other)], runs=tmp_path)
    assert names(list(plan.steps)) == [*ALL[:-1], *ALL[:-1], "report"]
    report = step(plan, "report")
    assert report.folder.parent.name == "tiny+other"
    assert len(report.inputs) == 12
    assert len({each.label for each in plan.steps}) == 13


def test_the_order_of_a_step_is_all_its_process_needs(tmp_path: Path) -> None:
    plan = make_plan(["tiny"], ["cluster.processes=2"], runs=tmp_path)
    grpo = step(plan, "grpo")
    write_spec(grpo.folder, spec_of(grpo, plan.cluster))
    order = read_spec(grpo.folder)
    assert order == spec_of(grpo, plan.cluster)
    assert order.recipe == grpo.recipe
    assert order.inputs["model"] == str(step(plan, "sft").folder)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("evaluate", EvaluateCheckpoint("runs/x")),
        ("export", Export("runs/x", "gguf", "sft-1", "q8_0", "nf4")),
        ("report", ReportModels({"tiny": {"f1": Goal(above=0.5)}})),
        ("sft", None),
    ],
)
def test_the_options_of_a_step_survive_its_file(tmp_path: Path, stage: str, options: Options | None) -> None:
    plan = make_plan(["tiny"], runs=tmp_path)
    spec = replace(spec_of(step(plan, "sft"), plan.cluster), stage=stage, options=options)
    write_spec(tmp_path / "x", spec)
    assert read_spec(tmp_path / "x") == spec


@pytest.mark.parametrize(
    ("stage", "options", "problem"),
    [
        ("export", {"format": "gguf", "source": "x"}, "options.checkpoint: missing"),
        ("report", {"success_criteria": {"tiny": {"f1": {"abov": 1}}}}, "abov"),
        ("report", {"success_criteria": "{"}, "success_criteria"),
    ],
)
def test_options_that_cannot_be_used_are_named(tmp_path: Path, stage: str, options: object, problem: str) -> None:
    plan = make_plan(["tiny"], runs=tmp_path)
    first = plan.steps[0]
    write_spec(first.folder, spec_of(first, plan.cluster))
    record = read_json(first.folder / STEP) | {"stage": stage, "options": options}
    for changes in ({}, {"checkpoint": None}):  # as it is written now, and as it was before schema 3
        write_json(first.folder / STEP, record | changes)
        with pytest.raises(ArtifactError, match=problem):
            read_spec(first.folder)


def test_the_content_of_a_local_file_enters_the_identity(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    overrides = ["task.source=path", f"task.path={rows}", "evaluate.splits=[test]"]
    rows.write_text("a")
    before = make_plan(["tiny"], overrides, runs=tmp_path).steps[0].fingerprint
    assert make_plan(["tiny"], overrides, runs=tmp_path).steps[0].fingerprint == before
    rows.write_text("b")
    assert make_plan(["tiny"], overrides, runs=tmp_path).steps[0].fingerprint != before
