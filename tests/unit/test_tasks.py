"""Tasks: rows of every source, bad ones named, splits without overlap, one judge however an answer is written."""

from __future__ import annotations

import csv
import importlib
import json
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import run_cli

import pipeline.tasks
from pipeline import preprocess
from pipeline.config.cluster import read_cluster
from pipeline.config.recipe import TaskChoice, read
from pipeline.core.errors import DataError, RecipeError
from pipeline.hub.download import Repository, repositories
from pipeline.rewards.audit import FINAL, audit_rewards
from pipeline.rewards.reward import find_rewards
from pipeline.tasks.rows import SAMPLES, file_rows
from pipeline.tasks.task import Example, Task, example_of, hold_out, make_task, task_names, task_of
from pipeline.workflow.progress import ProgressFile
from pipeline.workflow.runtime import Runtime

ROOT = Path(__file__).parents[2]
READ = ("gsm8k", "math_science", "medical", "human_like")


def sample_task(name: str, **params: Any) -> Task:
    """A task on its own rows, as a smoke test has it."""
    cls = importlib.import_module(f"pipeline.tasks.{name}").TASK
    return task_of(TaskChoice(name, "sample", None, None, "error", {**cls.smoke_test_params(cls), **params}), 0)


def path_task(name: str, path: Path, *, on_bad_row: Any = "error", **params: Any) -> Task:
    return task_of(TaskChoice(name, "path", str(path), None, on_bad_row, params), 0)


def rows_of(task: Task) -> list[Example]:
    splits = task.load()
    return [*splits.sft, *splits.grpo, *splits.validation, *(e for rows in splits.tests.values() for e in rows)]


def test_the_tasks_there_are() -> None:
    assert task_names() == ["corr2cause", "gsm8k", "human_like", "math_science", "medical"]


# ---------------------------------------------------------------- rows


SCHEMAS = {  # the columns as the hub publishes them
    "gsm8k": {"question", "answer"},
    "human_like": {"prompt", "chosen", "rejected"},
    "mathcode": {"messages"},
    "medical": {"Question", "Complex_CoT", "Response"},
    "medical_verifiable": {"Open-ended Verifiable Question", "Ground-True Answer"},
    "scibench": {
        *("problem_text", "answer_latex", "answer_number", "unit"),
        *("source", "problemid", "comment", "solution"),
    },
}


def test_sample_rows_have_exactly_the_published_columns() -> None:
    assert {path.stem for path in SAMPLES.glob("*")} == set(SCHEMAS)
    for name, columns in SCHEMAS.items():
        rows = list(file_rows(SAMPLES / f"{name}.jsonl"))
        assert len(rows) >= 16
        assert all(set(row.values) == columns for row in rows)


def test_the_samples_are_installed_with_the_package() -> None:
    assert '"tasks/samples/*.jsonl"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", READ)
def test_sample_rows_load_and_no_question_is_on_both_sides(name: str) -> None:
    task = sample_task(name)
    splits = task.load()
    assert splits.sft
    assert splits.validation
    assert set(splits.tests) <= set(task.split_names())
    assert splits.proof["overlap"] == 0
    trained = {example.group for example in splits.sft + splits.grpo}
    assert not trained & {e.group for rows in [splits.validation, *splits.tests.values()] for e in rows}
    assert all(example.target for example in splits.sft)
    ids = [example.id for example in rows_of(task)]
    assert len(set(ids)) == len({(e.id, e.question) for e in rows_of(task)})
    assert task.load() == splits  # the same seed, the same rows


@pytest.mark.parametrize("name", READ)
def test_a_completion_made_from_the_gold_is_right_and_one_with_another_answer_is_not(name: str) -> None:
    """For every sample row; where nothing verifies, nothing is called right."""
    task = sample_task(name)
    for example in rows_of(task):
        for completion in [example.target] * bool(example.target):
            verdict = task.grade(example, completion, False)
            assert verdict.answered
            assert verdict.correct is (True if example.gold and task.proxy is None else None)
            assert task.is_well_formed(completion, False) or name == "math_science"
        if example.gold and task.answer_kind:
            honest = f"x</think>{FINAL[task.answer_kind].format(example.gold)}"
            wrong = f"x</think>{FINAL[task.answer_kind].format('424242')}"
            said, other = task.grade(example, honest, True), task.grade(example, wrong, True)
            assert (said.correct, other.correct) == ((None, None) if task.proxy else (True, False))
            assert (said.proxy, other.proxy) == ((True, False) if task.proxy else (None, None))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_file_of_any_kind_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    values = [row.values for row in file_rows(SAMPLES / "human_like.jsonl")]
    path = tmp_path / f"mine{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(values), path)
    elif suffix == ".csv":
        datasets.Dataset.from_list(values).to_pandas().to_csv(path, index=False)
    else:
        lines = [json.dumps(row) for row in values]
        path.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{', '.join(lines)}]")
    mine = path_task("human_like", path, validation=4, test=8).load()
    ours = sample_task("human_like").load()
    for got, expected in ((mine.sft, ours.sft), (mine.tests["test"], ours.tests["test"])):
        assert [(e.question, e.target, e.tags) for e in got] == [(e.question, e.target, e.tags) for e in expected]


BAD = [
    ("gsm8k", '{"question": "q"}', "no answer (it has question)"),
    ("gsm8k", '{"question": " ", "answer": "1 + 1\\n#### 2"}', "no question"),
    ("gsm8k", '{"question": "q", "answer": "so it is two"}', 'answer does not end with one number after "####"'),
    ("gsm8k", '{"question": "q", "answer": "x\\n#### 2 or 3"}', 'answer does not end with one number after "####"'),
    ("gsm8k", '{"question": "q", "answer": "#### 2"}', "answer has no steps"),
    ("gsm8k", '{"question": ["q"], "answer": "x\\n#### 2"}', "question is not a text"),
    ("gsm8k", '{"question": "q", "answer": NaN}', "no answer (it is nan)"),
    ("gsm8k", '{"question": "nan", "answer": "x\\n#### 2"}', "no question (it is nan)"),
    ("gsm8k", '{"question": true, "answer": "x\\n#### 2"}', "question is true, not a text"),
    ("human_like", '{"prompt": "p", "chosen": true, "rejected": "r"}', "chosen is true, not a text"),
    (
        "human_like",
        '{"prompt": "p", "chosen": null, "rejected": NaN}',
        "no chosen (it is None); no rejected (it is nan)",
    ),
    (
        "human_like",
        '{"prompt": "p", "chosen": Infinity, "rejected": "r"}',
        "chosen is inf, not a text or a finite number",
    ),
    ("medical", '{"Question": "q", "Complex_CoT": NaN, "Response": "r"}', "no Complex_CoT (it is nan)"),
    ("medical", '{"Question": "q", "Complex_CoT": "t", "Response": false}', "Response is false, not a text"),
    (
        "medical",
        '{"Open-ended Verifiable Question": "q", "Ground-True Answer": NaN}',
        "no Ground-True Answer (it is nan)",
    ),
    ("math_science", '{"problem_text": "q", "answer_number": NaN}', "no answer_number (it is nan)"),
    ("math_science", '{"problem_text": "q", "answer_number": "2", "unit": true}', "unit is true, not a text"),
    ("math_science", '{"problem_text": "q", "answer_number": "2", "solution": false}', "solution is false, not a text"),
    ("math_science", '{"messages": [{"role": "user", "content": true}]}', "a message is not a {role, content}"),
    (
        "math_science",
        '{"messages": [{"role": "user", "content": NaN}, {"role": "assistant", "content": "4"}]}',
        "messages have no turn of the user",
    ),
    ("gsm8k", "{oops", "not JSON"),
    ("gsm8k", "[1]", "not a mapping with question and answer"),
    ("human_like", '{"prompt": "p", "chosen": "c"}', "no rejected"),
    ("human_like", '{"prompt": "p", "chosen": "c", "rejected": "c "}', "chosen and rejected are the same"),
    ("medical", '{"Question": "q", "Response": "r"}', "no Complex_CoT"),
    ("medical", '{"Open-ended Verifiable Question": "q", "Ground-True Answer": "?"}', "'?' has no words"),
    ("math_science", '{"messages": "hello"}', "no messages, a list of turns"),
    ("math_science", '{"messages": [{"role": "user"}]}', "a message is not a {role, content}"),
    ("math_science", '{"messages": [{"role": "user", "content": "q"}]}', "messages have no turn of the assistant"),
    ("math_science", '{"problem_text": "q", "answer_number": "many"}', "answer_number 'many' is not a number"),
]
GOOD = {
    "gsm8k": '{"question": "one more? %d", "answer": "x\\n#### 2"}',
    "human_like": '{"prompt": "p %d", "chosen": "c", "rejected": "r"}',
    "medical": '{"Question": "q %d", "Complex_CoT": "t", "Response": "r"}',
    "math_science": '{"problem_text": "q %d", "answer_number": "2", "solution": "s"}',
}


@pytest.mark.parametrize(("name", "row", "told"), BAD, ids=[f"{name}-{told[:24]}" for name, _, told in BAD])
def test_a_bad_row_is_named_by_file_and_line_or_skipped_and_counted(
    tmp_path: Path, name: str, row: str, told: str
) -> None:
    path = tmp_path / "rows.jsonl"
    good = [GOOD[name] % k for k in range(6)]
    path.write_text("\n".join([*good[:2], "", row, *good[2:]]) + "\n")
    few = {"test": 1, "validation": 1}
    with pytest.raises(DataError) as caught:
        path_task(name, path, **few).load()
    assert f"{path}:4: " in str(caught.value)
    assert told in str(caught.value)
    assert "task.on_bad_row=skip" in str(caught.value)
    splits = path_task(name, path, on_bad_row="skip", **few).load()
    assert len(splits.sft) == 4
    assert [text.partition(": ")[0] for text in splits.proof["skipped"]] == [f"{path}:4"]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_what_is_missing_is_never_a_target(tmp_path: Path, suffix: str) -> None:
    """Missing values as files of each kind have them: NaN of a float column, null, NaT, an empty cell."""
    path = tmp_path / f"rows{suffix}"
    columns: dict[str, list[Any]] = {
        "prompt": [f"p {k}" for k in range(9)],
        "chosen": ["a", "b", "c", "d", "e", "f", "nan", "NaT", None],
        "rejected": [1.5, float("nan"), 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
    }
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns))
            writer.writeheader()
            writer.writerows(rows)
    splits = path_task("human_like", path, on_bad_row="skip", test=1, validation=1).load()
    kept = [*splits.sft, *splits.validation, *splits.tests["test"]]
    assert {example.target for example in kept} == {"a", "c", "d", "e", "f"}
    assert {example.tags["rejected"] for example in kept} == {"1.5", "2.0", "3.0", "4.0", "5.0"}
    assert len(splits.proof["skipped"]) == 4


def test_missing_units_and_solutions_are_left_out_of_a_target(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"problem_text": "How far?", "answer_number": "2", "unit": float("nan"), "solution": float("nan")}
    path.write_text("\n".join(json.dumps({**row, "problem_text": f"How far? {k}"}) for k in range(4)))
    splits = path_task("math_science", path, test=1, validation=1).load()
    assert [(example.tags["unit"], example.target) for example in splits.grpo] == [("", "")] * 2
    assert not any("nan" in example.question for example in splits.grpo)
    assert splits.sft == []
    parts = [{"type": "text", "content": "so"}, {"type": "code", "content": None}, {"type": "text", "content": "4"}]
    turns = [[{"role": "user", "content": f"q {k}"}, {"role": "assistant", "content": parts}] for k in range(4)]
    path.write_text("\n".join(json.dumps({"messages": both}) for both in turns))
    splits = path_task("math_science", path, test=1, validation=1).load()
    assert len(splits.sft) == 2
    assert all("None" not in example.target for example in splits.sft)


def test_labels_of_a_column_with_missing_values_are_read(tmp_path: Path) -> None:
    with (ROOT / "tests" / "fixtures" / "corr2cause_released.csv").open(newline="") as file:
        rows = [(row["input"], float(row["label"])) for row in csv.DictReader(file)]
    path = tmp_path / "rows.parquet"
    inputs, labels = zip(*rows, (rows[0][0], float("nan")), strict=True)
    pq.write_table(pa.table({"input": inputs, "label": labels}), path)
    splits = path_task("corr2cause", path, on_bad_row="skip", test_classes=0, validation_classes=0).load()
    found, skipped = {example.id: example.gold for example in splits.sft}, splits.proof["skipped"]
    assert found == {f"rows-{k}": "Yes" if label else "No" for k, (_, label) in enumerate(rows, 1)}
    assert [text.partition(": ")[2] for text in skipped] == ["no label (it is nan)"]


def test_every_bad_row_is_told_at_once_and_too_many_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n" * 50)
    with pytest.raises(DataError) as caught:
        path_task("gsm8k", path).load()
    assert len([text for text in caught.value.problems if text.startswith(f"{path}:")]) == 20
    assert "… and 30 more bad rows" in str(caught.value)
    with pytest.raises(DataError, match=re.escape(f"{path}: no rows are left")):
        path_task("gsm8k", path, on_bad_row="skip").load()


def test_files_that_are_no_such_files_are_told(tmp_path: Path) -> None:
    broken, latin = tmp_path / "rows.parquet", tmp_path / "rows.jsonl"
    broken.write_text("x")
    latin.write_bytes(b'{"question": "\xe9"}\n')
    for path, told in ((broken, "not a parquet file"), (latin, "not UTF-8"), (tmp_path / "x.csv", "does not exist")):
        with pytest.raises(DataError, match=told):
            path_task("gsm8k", path).load()


# ---------------------------------------------------------------- splits


@given(st.lists(st.integers(0, 8), min_size=4, max_size=40), st.floats(0, 0.6), st.integers(0, 5))
def test_a_split_keeps_groups_apart_and_loses_nothing(groups: list[int], share: float, seed: int) -> None:
    examples = [Example(str(k), "q", "", str(group)) for k, group in enumerate(groups)]
    kept, held, left = hold_out(examples, share, seed, "test")
    assert sorted([*(e.id for e in kept + held), *left]) == sorted(e.id for e in examples)
    assert not {e.group for e in kept} & {e.group for e in held}


def test_a_split_is_the_one_that_datasets_draws_with_the_same_seed() -> None:
    """So the seed document's 90/10 split with seed 42 is the same rows here."""
    examples = [Example(str(k), "q", "", str(k)) for k in range(101)]
    kept, held, _ = hold_out(examples, 0.1, 42, "validation")
    theirs = datasets.Dataset.from_dict({"id": [e.id for e in examples]}).train_test_split(test_size=0.1, seed=42)
    assert [e.id for e in kept] == theirs["train"]["id"]
    assert [e.id for e in held] == theirs["test"]["id"]


def test_a_split_that_would_leave_nothing_is_told() -> None:
    examples = [Example(str(k), "q", "", str(k)) for k in range(5)]
    with pytest.raises(DataError, match=r"\.test: 5 would hold out 5 of 5 rows and leave none for training"):
        hold_out(examples, 5, 0, "test")


def test_questions_that_both_medical_sets_hold_are_not_learned_and_asked(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    opened = [{"Question": f"Which? {k}", "Complex_CoT": "t", "Response": "r"} for k in range(20)]
    short = [{"Open-ended Verifiable Question": f"which {k}", "Ground-True Answer": "a b"} for k in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in opened + short))
    splits = path_task("medical", path, test=4, validation=2, short=5).load()
    assert splits.proof["overlap"] == 0
    trained = {example.group for example in splits.sft + splits.grpo}
    assert not trained & {example.group for rows in splits.tests.values() for example in rows}
    left = splits.proof["same_question"]
    assert left
    assert sum(len(rows) for rows in (splits.sft, splits.grpo, splits.validation, *splits.tests.values(), left)) == 40


# ---------------------------------------------------------------- what each task makes of its rows


def test_gsm8k_makes_thought_and_number_without_the_calculators_marks() -> None:
    example = next(e for e in rows_of(sample_task("gsm8k")) if "bakery" in e.question or "baker" in e.question)
    assert example.target.startswith("<think>\nThe baker makes 6*8=48 rolls.\n")
    assert example.target.endswith("\n</think>\n#### 17")
    assert "<<" not in example.target
    text = next(e for e in rows_of(sample_task("gsm8k", format="text")) if "baker" in e.question)
    assert text.question.startswith("Solve this problem step-by-step:\nQuestion: A baker fills")
    assert text.question.endswith("\nAnswer:")


def test_gsm8k_reads_rows_of_the_shape_that_the_seed_shows(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    answer = "1. Total fruits = 15 + 12 = 27\n2. Remaining fruits = 27 - 8 = 19\nFinal answer: 19"
    path.write_text(json.dumps([{"question": f"How many remain? {k}", "answer": answer} for k in range(4)]))
    example = path_task("gsm8k", path, test=1, validation=1).load().sft[0]
    assert example.gold == "19"
    assert example.target.endswith("27 - 8 = 19\n</think>\n#### 19")


GRADED = [
    ("18", "x</think>#### 18", True),
    ("18", "x</think>#### $18.00", True),
    ("18", "x</think>so \\boxed{18}", True),
    ("18", "x</think>The answer is 18 dollars.", True),
    ("1248", "x</think>#### 1,248", True),
    ("-5", "x</think>#### −5", True),
    ("18", "x</think>#### 18\n#### 19", False),
    ("18", "x</think>The answer is 19. #### 18", False),
    ("18", "x</think>18", False),
    ("18", "#### 18</think>x", False),
    ("18", "#### 18", False),
    ("18", "x</think>#### 1e999", False),
    ("18", "x</think>#### ١٨", False),
]


@pytest.mark.parametrize(("gold", "completion", "right"), GRADED)
def test_gsm8k_grades_one_number_however_it_is_written(gold: str, completion: str, right: bool) -> None:
    assert sample_task("gsm8k").grade(Example("1", "q", gold, "g"), completion, True).correct is right


SCIENCE = [  # gold, unit, what was said, whether it is right within 5 %
    ("50", "$\\mathrm{~N}$", "50 N", True),
    ("50", "$\\mathrm{~N}$", "52.4", True),
    ("50", "$\\mathrm{~N}$", "52.6", False),
    ("240", "$\\mathrm{~kJ}$", "240000\\ \\mathrm{J}", True),
    ("240", "$\\mathrm{~kJ}$", "240 J", False),
    ("240", "$\\mathrm{~kJ}$", "2.4 \\times 10^{5}\\ \\mathrm{J}", True),
    ("3.97", "$10^{-19} \\mathrm{~J}$", "3.97 \\times 10^{-19}\\ \\mathrm{J}", True),
    ("3.97", "$10^{-19} \\mathrm{~J}$", "3.97", True),
    ("3.97", "$10^{-19} \\mathrm{~J}$", "3.97e-19", True),
    ("3.97", "$10^{-19} \\mathrm{~J}$", "3.97 J", False),
    ("-60", "$\\mathrm{~kJ} \\mathrm{~mol}^{-1}$", "-60 \\text{ kJ/mol}", True),
    ("-60", "$\\mathrm{~kJ} \\mathrm{~mol}^{-1}$", "60 kJ/mol", False),
    ("2", "$\\mathrm{~cm}^3$", "2e-6 m^3", True),
    ("0", "", "0.0001", False),
]


@pytest.mark.parametrize(("gold", "unit", "said", "right"), SCIENCE)
def test_scibench_folds_units_and_powers_of_ten_in(gold: str, unit: str, said: str, right: bool) -> None:
    example = Example("1", "q", gold, "g", {"set": "scibench", "unit": unit})
    verdict = sample_task("math_science").grade(example, f"x</think>\\boxed{{{said}}}", True)
    assert (verdict.correct, verdict.answered) == (right, True)


@given(
    st.fractions(min_value=Fraction(1, 1000), max_value=1000).filter(lambda v: v.denominator <= 1000),
    st.integers(-12, 12),
    st.sampled_from([("", 0), ("k", 3), ("m", -3), ("M", 6), ("n", -9)]),
)
def test_a_quantity_is_the_same_under_any_power_and_prefix(
    value: Fraction, power: int, prefix: tuple[str, int]
) -> None:
    from pipeline.scoring.answers import quantity_in, same_quantity

    said = quantity_in(f"{float(value):.12g} \\times 10^{{{power}}}\\ \\mathrm{{{prefix[0]}J}}")
    assert said is not None
    gold = value * Fraction(10) ** (power + prefix[1])
    assert same_quantity(gold, "J", said, 1e-6)
    assert not same_quantity(gold * Fraction(11, 10), "J", said, 0.05)


def test_math_rows_interleave_text_code_and_its_output() -> None:
    rows = {e.gold: e for e in rows_of(sample_task("math_science")) if e.target}
    target = rows["210"].target
    assert target == (
        "<think>\nIt is n(n+1)/2 with n = 20.\n```python\nprint(20 * 21 // 2)\n```\n```output\n210\n```\n</think>\n\n"
        "The sum is $\\boxed{210}$."
    )
    assert rows["3.97"].target.endswith("Final Answer: $\\boxed{3.97 \\times 10^{-19} \\mathrm{~J}}$")
    unsolved = [e for e in rows_of(sample_task("math_science")) if not e.target]
    assert unsolved  # SciBench has rows without a solution: they are asked, not learned from
    splits = sample_task("math_science").load()
    assert all(example.target for example in splits.sft)
    assert all(example.gold for example in splits.grpo)


def test_what_cannot_be_verified_is_never_called_right() -> None:
    task = sample_task("human_like")
    example = task.load().tests["test"][0]
    assert task.grade(example, "Oh, I love that!", False).correct is None
    assert task.grade(example, " ", False).answered is False
    assert example.tags["rejected"]
    medical = sample_task("medical")
    opened, short = (medical.load().tests[name][0] for name in ("test", "short"))
    assert medical.grade(opened, "x</think>Rest and fluids.", True).correct is None
    right = medical.grade(short, f"x</think>**Final answer:** {short.gold.upper()}.", True)
    assert (right.correct, right.proxy) == (None, True)
    assert medical.grade(short, f"x</think>Final answer: not {short.gold}", True).proxy is False


# ---------------------------------------------------------------- recipes that use them


def test_a_smoke_test_reads_the_samples_in_the_hubs_place_and_a_file_of_the_users(tmp_path: Path) -> None:
    from pipeline.sizing.smoke import smoke_test_of

    recipe, _ = read("gsm8k", ["task.revision=abc"])
    assert recipe is not None
    assert smoke_test_of(recipe, None).task.source == "sample"
    assert smoke_test_of(recipe, None).task.revision is None
    mine = replace(recipe, task=replace(recipe.task, source="path", path="mine.jsonl"))
    assert smoke_test_of(mine, None).task.source == "path"


def test_every_data_set_of_a_task_is_fetched_at_its_own_commit() -> None:
    recipe, _ = read("math_science", ["task.revision={MathLLMs/MathCodeInstruct: aaa, xw27/scibench: bbb}"])
    assert recipe is not None
    assert repositories(recipe)[1:] == [
        Repository("MathLLMs/MathCodeInstruct", "dataset", "aaa"),
        Repository("xw27/scibench", "dataset", "bbb"),
    ]
    one = TaskChoice("math_science", "hub", None, "abc", "error", {})
    assert (
        "is one commit, but math_science reads MathLLMs/MathCodeInstruct and xw27/scibench" in make_task(one, 0)[1][0]
    )
    unknown = replace(one, revision={"xw27/scibenc": "abc"})
    assert "did you mean 'xw27/scibench'?" in make_task(unknown, 0)[1][0]


# ---------------------------------------------------------------- docs/tasks.md


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_the_task_of_the_document_is_built_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its three files are written as the page says; preprocess, grading, audit and a smoke test's plan take them."""
    (code,), (rows,), (recipe_text,) = blocks("python"), blocks("json"), blocks("yaml")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "quiz.py").write_text(code, encoding="utf-8")
    (tmp_path / "quiz.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "quiz.yaml").write_text(recipe_text, encoding="utf-8")
    monkeypatch.setattr(pipeline.tasks, "__path__", [*pipeline.tasks.__path__, str(tmp_path / "tasks")])
    assert "quiz" in task_names()
    recipe, problems = read(str(tmp_path / "quiz.yaml"), [f"task.path={tmp_path / 'quiz.jsonl'}"])
    assert recipe is not None, problems
    cluster, _ = read_cluster("local")
    assert cluster is not None
    runtime = Runtime(cluster, ProgressFile(None, "preprocess"), 0, 1, tmp_path, None, None)
    metrics = preprocess.run(recipe, {}, tmp_path, runtime)
    assert metrics["rows"] == {"sft": 6, "grpo": 6, "validation": 0, "test": 2}
    assert metrics["overlap"] == 0
    task = task_of(recipe.task, recipe.seed)
    for row in pq.read_table(tmp_path / "data" / "sft.parquet").to_pylist():
        example = example_of(row)
        completion = row["completion"][0]["content"]
        assert task.grade(example, completion, False).correct
        assert not task.grade(example, f"{completion} Or the answer is E.", False).answered
        rewards, _ = find_rewards(recipe.grpo.rewards)
        assert audit_rewards(task, rewards, dict.fromkeys(rewards, 1.0), example) == []
    broken = rows.replace('"answer": "D"', '"answer": "F"', 1)
    (tmp_path / "quiz.jsonl").write_text(broken, encoding="utf-8")
    with pytest.raises(DataError, match=r"quiz\.jsonl:3: answer: got 'F'; expected A, B, C or D"):
        task.load()


def test_list_shows_every_task_with_its_settings() -> None:
    done = run_cli("list")
    assert done.returncode == 0
    for told in ("gsm8k", "source: hub, path, sample", "task.params.tolerance = 0.05", "match"):
        assert told in done.stdout


def test_a_split_that_a_task_does_not_have_is_told() -> None:
    from pipeline.workflow.plan import make_plan

    with pytest.raises(RecipeError, match="medical with source 'hub' has no split 'tset'; did you mean 'test'"):
        make_plan(["medical"], ["evaluate.splits=[tset]"])
