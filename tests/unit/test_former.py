"""Settings under the names that they had: read with a notice, in files and on the command line, hashed as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import ROOT, run_cli

from pipeline.cli.main import FORMER_COMMANDS, FORMER_OPTIONS, command, parser, present_words
from pipeline.config import load
from pipeline.config.cluster import Cluster, read_cluster
from pipeline.config.former import CLUSTER, MOVED, RENAMED, TASK_PARAMS, VALUES, identity, present_names, recipe_renames
from pipeline.config.recipe import Recipe, TaskChoice, read
from pipeline.core.hashing import plain
from pipeline.core.schema import Renames, parse, value_at
from pipeline.tasks.gsm8k import Gsm8k, Gsm8kParams
from pipeline.workflow.plan import make_plan
from pipeline.workflow.stage import STAGES

# a value for each former name, other than the default
WORDS: dict[str, Any] = {
    "rehearsal": True,
    "model.scratch": {"layers": 2},
    "model.scratch.vocabulary": 600,
    "task.bad_rows": "skip",
    "sft.prompt_loss": 0.25,
    "sft.validate_every": 7,
    "sft.optimizer.schedule": "greedy",
    "sft.optimizer.schedule_args": {"num_decay_steps": 5},
    "sft.optimizer.beta2": 0.5,
    "grpo.optimizer.schedule": "cosine",
    "grpo.optimizer.schedule_args": {},
    "grpo.optimizer.beta2": 0.5,
    "grpo.start": "base",
    "grpo.mask_truncated": True,
    "evaluate.draws": 77,
    "evaluate.confidence": 0.5,
    "evaluate.goals": {"thoughts": {"above": 0.5}},
    "task.params.letters": "alphabet",
    "task.params.density": 0.3,
    "task.params.phases": [{"n": [3], "rows": 9, "traces": 0.5}],
    "task.params.balance": "even",
}
SITE_WORDS: dict[str, Any] = {
    "stop_grace": 3,
    "slurm.save_before": {"sft": 9},
    "slurm.save_before.grpo": 9,
    "slurm.options": ["--exclude=node7"],
}


def word(path: str, value: Any) -> str:
    """A setting as it is typed on the command line."""
    return f"{path}={value if isinstance(value, str) else json.dumps(value)}"


@pytest.fixture(autouse=True)
def no_notice_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_noticed", set())


def test_the_words_above_are_all_that_there_are() -> None:
    params = {f"task.params.{name.partition('[')[0]}" for name in TASK_PARAMS["corr2cause"]}
    assert {*RENAMED, *MOVED, *params} <= {*WORDS, "model.backend"}
    assert set(CLUSTER.names) <= set(SITE_WORDS)


@pytest.mark.parametrize("path", WORDS)
def test_every_former_name_is_read_and_noticed_once(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    typed = word(path, WORDS[path])
    for _ in range(2):
        recipe, problems = read("tiny", [typed])
        assert recipe is not None, problems
    notices = capsys.readouterr().err.splitlines()
    assert len(notices) == 1
    renames = recipe_renames("corr2cause")
    values, _ = renames.apply(nested(path, WORDS[path]))
    changed = paths_of(values)
    assert all(name.startswith(now(notices[0])) for name in changed)
    default, _ = read("tiny")
    assert plain(recipe) != plain(default) or WORDS[path] == "even"
    for name, value in changed.items():
        assert value_at(plain(recipe), name) == value


def now(notice: str) -> str:
    """The present name in a notice."""
    return notice.partition(" is now ")[2].partition(";")[0].partition("[")[0].partition("=")[0]


def nested(path: str, value: Any) -> dict[str, Any]:
    first, _, rest = path.partition(".")
    return {first: nested(rest, value) if rest else value}


def paths_of(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= paths_of(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return found


@pytest.mark.parametrize("path", SITE_WORDS)
def test_every_former_name_of_a_site_is_read_and_noticed(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps({"launcher": "slurm", "gpus": 2, **nested(path, SITE_WORDS[path])}))
    in_file, problems = read_cluster(str(file))
    assert in_file is not None, problems
    notice = capsys.readouterr().err
    assert notice.startswith(f"note: cluster.{'.'.join(path.split('.')[:2])} is now cluster.")
    typed, _ = read_cluster("slurm", [word(path, SITE_WORDS[path])])
    assert typed is not None
    assert plain(typed.slurm) == plain(in_file.slurm)
    assert typed.kill_timeout == in_file.kill_timeout
    assert (typed.slurm, typed.kill_timeout) != (read_cluster("slurm")[0].slurm, 60)  # type: ignore[union-attr]


def test_a_recipe_in_former_words_is_the_same_recipe(tmp_path: Path) -> None:
    """Each step has the fingerprint that the present words give it; a file's references follow its names."""
    old = tmp_path / "old" / "mine.yaml"
    new = tmp_path / "new" / "mine.yaml"
    for file in (old, new):
        file.parent.mkdir()
    old.write_text(
        "model: {name: x, chat_template: think, scratch: {architecture: qwen2, vocabulary: 600, hidden_size: 32,\n"
        "  layers: 1, heads: 2, key_value_heads: 2, intermediate_size: 64, context: 2048, rope_theta: 10000.0,\n"
        "  initializer_range: 0.02}}\n"
        "task: {bad_rows: stop, params: {balance: even, letters: alphabet, density: 0.3,\n"
        "  phases: [{n: [3], rows: 9, traces: 0.5}]}}\n"
        "sft: {prompt_loss: 0.5, validate_every: 4, max_length: '${model.scratch.context}', optimizer: {schedule:\n"
        "  cosine_with_min_lr, schedule_args: {min_lr_rate: 0.1}, beta2: 0.9}}\n"
        "grpo: {start: base, mask_truncated: true, max_steps: '${sft.validate_every}', optimizer: {schedule: linear,\n"
        "  beta2: 0.8}}\n"
        "evaluate: {draws: 9, confidence: 0.5, goals: {}}\n"
    )
    new.write_text(
        "model: {name: x, chat_template: think, random_init: {architecture: qwen2, vocabulary: 600, hidden_size: 32,\n"
        "  layers: 1, heads: 2, key_value_heads: 2, intermediate_size: 64, context: 2048, rope_theta: 10000.0,\n"
        "  initializer_range: 0.02}}\n"
        "task: {on_bad_row: error, params: {balance: balanced, variable_names: alphabet, edge_probability: 0.3,\n"
        "  phases: [{n: [3], rows: 9, proof_fraction: 0.5}]}}\n"
        "sft: {full_loss_fraction: 0.5, eval_steps: 4, max_length: 2048, optimizer: {lr_scheduler_type:\n"
        "  cosine_with_min_lr, lr_scheduler_kwargs: {min_lr_rate: 0.1}, adam_beta2: 0.9}}\n"
        "grpo: {init_from: base, mask_truncated_completions: true, max_steps: 4, optimizer: {lr_scheduler_type:\n"
        "  linear, adam_beta2: 0.8}}\n"
        "report: {bootstrap_samples: 9, confidence: 0.5, success_criteria: {}}\n"
    )
    before, after = make_plan([str(old)]), make_plan([str(new)])
    assert [step.fingerprint for step in before.steps] == [step.fingerprint for step in after.steps]
    settings = before.steps[0].payload["settings"]
    assert settings["task"]["bad_rows"] == "stop"
    assert settings["task"]["params"]["phases"][0]["traces"] == 0.5
    assert settings["model.scratch"]["layers"] == 1
    assert present_names(settings)["model"]["random_init"]["layers"] == 1


@given(st.sets(st.sampled_from(sorted(set(WORDS) - {"model.scratch.vocabulary"}))))
def test_any_mixture_of_names_has_one_identity(former: set[str]) -> None:
    """Values under former names come back from `identity` as they were, whatever the others are called."""
    values: dict[str, Any] = {"task": {"name": "corr2cause"}}
    for path in former:
        values = merged(values, nested(path, WORDS[path]))
    present, notices = recipe_renames("corr2cause").apply(values)
    assert len(notices) == len(former)
    again, none = recipe_renames("corr2cause").apply(present)
    assert (again, none) == (present, [])
    hashed = identity(present, ["model.scratch", *(path for path in WORDS if path not in MOVED)])
    for path in former - set(MOVED):
        assert hashed[path] == WORDS[path]


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    both = {**one, **other}
    for name in one.keys() & other.keys():
        both[name] = merged(one[name], other[name])
    return both


def test_where_both_names_are_set_the_present_one_counts() -> None:
    renames = Renames({"a.old": "a.new", "b": "a.c"}, {"a.new": {"yes": "on"}})
    assert renames.apply({"a": {"old": 1, "new": "yes"}, "b": 2})[0] == {"a": {"new": "on", "c": 2}}
    assert renames.undo({"a": {"new": "on", "c": 2}}) == {"a": {"old": "yes"}, "b": 2}
    assert renames.apply({"a": [1], "b": 2})[0] == {"a": {"c": 2}}
    assert renames.apply(["b"]) == (["b"], [])


def test_an_override_by_its_former_name_counts_more_than_the_file() -> None:
    recipe, _ = read("tiny", ["task.params.letters=alphabet", "sft.prompt_loss=0.1"])
    assert recipe is not None
    assert recipe.task.params["variable_names"] == "alphabet"
    assert recipe.sft.full_loss_fraction == 0.1


def test_a_name_of_another_task_means_nothing() -> None:
    with pytest.raises(Exception, match=r"task\.params\.letters: unknown setting"):
        make_plan(["gsm8k"], ["task.params.letters=alphabet"])


def test_old_records_are_read_without_a_notice(capsys: pytest.CaptureFixture[str]) -> None:
    for file in sorted((ROOT / "tests" / "fixtures" / "records-v1").glob("*/*/step.json")):
        record = json.loads(file.read_text())
        recipe, problems = parse(Recipe, record["recipe"])
        cluster, more = parse(Cluster, record["cluster"])
        assert recipe is not None, problems
        assert cluster is not None, more
        assert recipe.smoke_test == record["recipe"]["rehearsal"]
        assert cluster.kill_timeout == record["cluster"]["stop_grace"]
    assert capsys.readouterr().err == ""


def test_what_is_hashed_is_what_was_hashed_before_the_names_changed() -> None:
    """The identity of tiny's settings in former words, as version 0.1 wrote them."""
    recipe = {
        "seed": 1,
        "model": {"name": "tiny", "random_init": {"layers": 3}},
        "task": {"name": "corr2cause", "on_bad_row": "error", "params": {"balance": "balanced"}},
        "sft": {"full_loss_fraction": 0.45, "optimizer": {"lr_scheduler_type": "linear"}},
    }
    assert identity(recipe, ["seed", "model.name", "model.random_init", "task", "sft"]) == {
        "seed": 1,
        "model.name": "tiny",
        "model.scratch": {"layers": 3},
        "task": {"name": "corr2cause", "bad_rows": "stop", "params": {"balance": "even"}},
        "sft": {"prompt_loss": 0.45, "optimizer": {"schedule": "linear"}},
    }
    known, _ = read("tiny")
    assert known is not None
    for stage in STAGES.values():
        assert None not in [value_at(plain(known), path.partition(".")[0]) for path in stage.reads]
    assert set(VALUES) <= set(RENAMED.values())


def test_the_command_line_generates_rows_by_former_names(tmp_path: Path) -> None:
    done = run_cli(
        "generate", "corr2cause", "--out", str(tmp_path / "set"), "--n", "3", "letters=alphabet", "balance=even"
    )
    assert done.returncode == 0, done.stderr
    assert "task.params.letters is now task.params.variable_names" in done.stderr
    assert "task.params.balance=even is now task.params.balance=balanced" in done.stderr


@pytest.mark.parametrize("word", [*FORMER_COMMANDS, *FORMER_OPTIONS])
def test_every_former_word_of_the_command_line_is_read_and_noticed(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    known = parser().format_help()
    if word in FORMER_COMMANDS:
        assert present_words([word, word])[:] == [FORMER_COMMANDS[word], word]  # only the command itself
        assert f"\n    {FORMER_COMMANDS[word]}" in known
        assert f"\n    {word} " not in known
    else:
        assert present_words(["run", word]) == ["run", FORMER_OPTIONS[word]]
    now = {**FORMER_COMMANDS, **FORMER_OPTIONS}[word]
    assert capsys.readouterr().err == f"note: {word} is now {now}; the former word is read in this version\n"


def test_a_smoke_test_by_its_former_word_is_the_same_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for word in ("--rehearse", "--smoke-test"):
        assert command(["plan", "tiny", word, "--runs", str(tmp_path)]) == 0
        shown.append(capsys.readouterr())
    assert shown[0].out == shown[1].out
    assert "tiny-smoke-test/grpo" in shown[1].out
    assert ("--rehearse is now --smoke-test" in shown[0].err, shown[1].err) == (True, "")


def test_a_task_that_names_its_small_params_by_the_former_word_is_smoke_tested() -> None:
    with pytest.warns(FutureWarning, match=r"Mine\.rehearsal is now smoke_test_params"):

        class Mine(Gsm8k):
            def rehearsal(self) -> dict[str, Any]:
                return {"rows": 7}

    choice = TaskChoice("gsm8k", "sample", None, None, "error", {})
    assert Mine(choice, Gsm8kParams(), 0).smoke_test_params() == {"rows": 7}
