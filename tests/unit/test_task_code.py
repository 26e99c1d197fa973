"""An edited task or reward shows at the steps that were made with it; `--refresh` makes those again, and no others."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from running import only, run_cli

import pipeline.rewards
import pipeline.tasks
from pipeline.core.errors import ArtifactError, PlanError
from pipeline.core.files import read_json, write_json
from pipeline.workflow import refresh, status, task_code
from pipeline.workflow.artifact import ARTIFACT, open_artifact
from pipeline.workflow.plan import Plan, explain, make_plan, spec_of
from pipeline.workflow.stage import write_spec
from pipeline.workflow.task_code import code_of

WORDS = ["task.source=sample", "model.revision=null"]


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tasks and rewards that a test may edit."""
    for package in (pipeline.tasks, pipeline.rewards):
        folder = tmp_path / "code" / package.__name__.rpartition(".")[2]
        shutil.copytree(package.__path__[0], folder)
        monkeypatch.setattr(package, "__path__", [str(folder)])
        monkeypatch.setitem(task_code.FOLDERS, package.__name__, [str(folder)])
    return tmp_path / "code"


def finish(plan: Plan, *, record: bool = True) -> None:
    """Leave what every step of a plan leaves when it is done, with or without a record of its code."""
    for step in plan.steps:
        write_spec(step.folder, spec_of(step, plan.cluster))
        code = code_of(step.stage, step.recipe.task.name, step.recipe.grpo.rewards)
        provenance = {"code": code} if record else {}
        inputs = {role: str(needed.folder) for role, needed in step.inputs.items()}
        write_json(
            step.folder / ARTIFACT,
            {
                "stage": step.name,
                "recipe": step.recipe.name,
                "fingerprint": step.fingerprint,
                "payload": step.payload,
                "inputs": inputs,
                "files": {},
                "metrics": {},
                "provenance": provenance,
            },
        )


@pytest.fixture
def plan(code: Path, tmp_path: Path) -> Plan:
    made = make_plan(["gsm8k"], WORDS, runs=tmp_path / "runs")
    finish(made)
    return made


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def outdated(plan: Plan) -> set[str]:
    return {step.name for step in plan.steps if step.outdated}


# ---------------------------------------------------------------- what counts as a change


READERS = [
    f"pipeline/scoring/{name}.py"
    for name in ("answers", "arithmetic", "expressions", "quantities", "reading", "units", "verdicts")
]


def test_each_stage_records_the_modules_that_decide_it() -> None:
    assert list(code_of("preprocess", "gsm8k", ["correctness"])) == ["pipeline/tasks/gsm8k.py"]
    assert list(code_of("grpo", "gsm8k", ["correctness", "format"])) == [
        *sorted([*READERS, "pipeline/rewards/correctness.py", "pipeline/rewards/format.py", "pipeline/tasks/gsm8k.py"])
    ]
    assert list(code_of("evaluate", "medical", ["match"])) == sorted([*READERS, "pipeline/tasks/medical.py"])
    folder = code_of("grpo", "corr2cause", ["structure"])
    assert {"pipeline/tasks/corr2cause/__init__.py", "pipeline/tasks/corr2cause/graphs.py"} <= set(folder)
    assert "pipeline/tasks/corr2cause/parse_thought.py" in folder  # only the reward imports it
    assert "pipeline/tasks/corr2cause/generate.py" not in folder  # a command of its own
    assert code_of("sft", "gsm8k", ["correctness"]) == code_of("report", "gsm8k", []) == {}


def test_comments_docstrings_and_layout_are_no_change(plan: Plan, code: Path) -> None:
    task = code / "tasks" / "gsm8k.py"
    edit(task, "class Gsm8k(Task):", 'class Gsm8k(Task):  # a comment\n    """Another docstring."""\n\n')
    edit(task, '"""GSM8K: grade-school word problems', '"""Other words')
    edit(task, "Split a row's answer into steps and final number.", "What it returns.")
    assert outdated(plan) == set()
    edit(task, 'end with "####" and the number.', 'end with "####" and one number.')
    assert outdated(plan) == {"preprocess", "grpo", "evaluate-base", "evaluate-sft", "evaluate-grpo"}


def test_an_edited_reward_shows_at_the_steps_that_it_pays(plan: Plan, code: Path) -> None:
    edit(code / "rewards" / "correctness.py", "return ", "return 2 * ")
    assert outdated(plan) == {"grpo"}
    (step,) = (step for step in plan.steps if step.name == "grpo")
    told = "done, but its code has changed since: pipeline/rewards/correctness.py; rerun with --refresh grpo"
    assert explain(step) == [told]
    assert refresh.code_notes(plan) == [f"gsm8k/grpo is {told}"]
    rows, _ = status.table(plan.runs)
    shown = {row.step.rpartition("-")[0]: row for row in rows}
    assert shown["gsm8k/grpo"].reasons == ("its code has changed since: pipeline/rewards/correctness.py",)
    assert shown["gsm8k/grpo"].state == "done"
    assert shown["gsm8k/sft"].reasons == ()


def test_steps_of_an_earlier_version_say_nothing(code: Path, tmp_path: Path) -> None:
    plan = make_plan(["gsm8k"], WORDS, runs=tmp_path / "runs")
    finish(plan, record=False)
    edit(code / "tasks" / "gsm8k.py", "and the number.", "and one number.")
    assert outdated(plan) == set()
    assert refresh.outdated_folders(plan, ["changed"]) == ([], [])
    folders, _ = refresh.outdated_folders(plan, ["preprocess"])  # nobody knows, and the user asks for it
    assert len(folders) == len(plan.steps)


def test_a_file_that_is_no_python_is_a_change_and_no_traceback(plan: Plan, code: Path) -> None:
    edit(code / "rewards" / "format.py", "def format(", "def format((")
    assert outdated(plan) == {"grpo"}


# ---------------------------------------------------------------- making them again


def test_refresh_takes_what_depends_on_it_in_every_recipe(plan: Plan, code: Path, tmp_path: Path) -> None:
    other = make_plan(["gsm8k"], [*WORDS, "grpo.beta=0.5"], runs=plan.runs)
    finish(other)
    edit(code / "rewards" / "correctness.py", "return ", "return 2 * ")
    folders, notes = refresh.outdated_folders(plan, ["grpo", "sft"])
    mine = {step.folder for step in plan.steps if step.name in ("grpo", "evaluate-grpo", "report")}
    assert set(folders) == mine
    (note,) = notes
    assert note.startswith("gsm8k/sft stays: its code has not changed since")
    edit(code / "tasks" / "gsm8k.py", "and the number.", "and one number.")
    folders, _ = refresh.outdated_folders(plan, ["preprocess"])
    assert set(folders) == {step.folder for step in (*plan.steps, *other.steps)}
    assert folders[0] == plan.steps[0].folder


def test_results_are_moved_aside_whole_and_the_steps_run_again(plan: Plan, code: Path) -> None:
    edit(code / "rewards" / "correctness.py", "return ", "return 2 * ")
    folders, _ = refresh.outdated_folders(plan, ["changed"])
    told = refresh.move_aside(folders, plan.runs)
    assert {step.name for step in plan.to_run} == {"grpo", "evaluate-grpo", "report"}
    assert len(told) == 3
    kept = only(plan.runs, ".replaced/gsm8k/grpo-*")
    assert open_artifact(kept).stage == "grpo"
    assert str(kept) in " ".join(told)
    assert all(row.state == "done" for row in status.table(plan.runs)[0])  # what is aside is no row
    assert refresh.outdated_folders(plan, ["changed"]) == ([], [])  # the same command goes on, and loses nothing


def test_what_is_being_written_stays(plan: Plan, code: Path) -> None:
    from pipeline.workflow.lock import lock

    edit(code / "rewards" / "correctness.py", "return ", "return 2 * ")
    folders, _ = refresh.outdated_folders(plan, ["changed"])
    with lock(folders[-1]), pytest.raises(ArtifactError, match="is being written by"):
        refresh.move_aside(folders, plan.runs)
    assert all(step.done for step in plan.steps)


def test_words_of_refresh_that_cannot_be(plan: Plan, code: Path) -> None:
    with pytest.raises(PlanError, match="--refresh: got 'gpro'; did you mean 'grpo'"):
        refresh.outdated_folders(plan, ["gpro"])
    edit(code / "tasks" / "gsm8k.py", "and the number.", "and one number.")
    some = make_plan(["gsm8k"], WORDS, stages=["preprocess", "evaluate"], runs=plan.runs)
    with pytest.raises(PlanError, match=r"gsm8k/sft is made from what is made again, and .* needs it; add sft"):
        refresh.outdated_folders(some, ["preprocess"])


def test_a_real_step_records_its_code_and_is_made_again_by_one_command(tmp_path: Path) -> None:
    """The project's own files stay: it is the record that is changed, as if the file had been another then."""
    words = ["run", "gsm8k", *WORDS, "task.params.rows=8", "--stages", "preprocess", "--runs", str(tmp_path)]
    assert run_cli(*words).returncode == 0
    step = only(tmp_path, "gsm8k/preprocess-*")
    record = read_json(step / ARTIFACT)
    assert record["provenance"]["code"] == code_of("preprocess", "gsm8k", [])
    record["provenance"]["code"]["pipeline/tasks/gsm8k.py"] = "0000000000"
    write_json(step / ARTIFACT, record)
    again = run_cli(*words)
    assert "its code has changed since: pipeline/tasks/gsm8k.py; rerun with --refresh preprocess" in again.stderr
    shown = run_cli("plan", *words[1:], "--refresh", "changed")
    assert "made again: its code" in shown.stdout
    assert "1 of 1 steps to run" in shown.stdout
    assert read_json(step / ARTIFACT) == record  # plan moves nothing
    done = run_cli(*words, "--refresh", "preprocess")
    assert done.returncode == 0, done.stderr
    assert "is made again; its result is kept in" in done.stderr
    assert open_artifact(step).provenance["code"] == code_of("preprocess", "gsm8k", [])
    assert read_json(only(tmp_path, ".replaced/gsm8k/*") / ARTIFACT) == record
