"""Rows of files: one reader for every task and the audit; what is named is used or refused, what is bad is named."""

from __future__ import annotations

import csv
import io
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from running import run_cli

from pipeline.config.recipe import TaskChoice, read
from pipeline.core.errors import DataError, PlanError, RecipeError
from pipeline.preflight.checks import problems as preflight
from pipeline.tasks.row_files import Row, file_rows
from pipeline.tasks.rows import BadRows
from pipeline.tasks.task import Example, Splits, divide, task_of
from pipeline.workflow.plan import make_plan
from pipeline.workflow.single_step import evaluation_plan

NAMES = {"question": ("problem",), "answer": ("solution",)}
ROW = {"question": "q", "answer": "a"}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)  # half a character cannot be in a file
LINE = json.dumps(ROW).encode()


def read_bytes(folder: Path, name: str, content: bytes) -> list[Row]:
    path = folder / name
    path.write_bytes(content)
    return list(file_rows(path, NAMES))


# ---------------------------------------------------------------- every way to write the same rows


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", b"\xef\xbb\xbf" + LINE),
        ("crlf.jsonl", LINE + b"\r\n\r\n"),
        ("capital.JSONL", LINE),
        ("list.jsonl", b"[\n" + LINE + b"\n]"),
        ("list.json", b"\xef\xbb\xbf[" + LINE + b"]"),
        ("data.json", b'{"version": 1, "data": [' + LINE + b"]}"),
        ("one.json", json.dumps(ROW, indent=2).encode()),
        ("alias.jsonl", b'{"Problem ": "q", "SOLUTION": "a"}'),
        ("excel.csv", b"\xef\xbb\xbfQuestion;Answer\r\nq;a\r\n\r\n"),
        ("sep.csv", b"sep=;\r\nquestion;answer\r\nq;a\r\n"),
        ("tab.csv", b"question\tanswer\nq\ta"),
        ("tab.tsv", b"question\tanswer\nq\ta"),
        ("pandas.csv", b" question, answer\nq,a\n"),
        ("alias.csv", b"problem,solution\nq,a\n"),
    ],
)
def test_rows_are_the_same_however_they_are_written(tmp_path: Path, name: str, content: bytes) -> None:
    (row,) = read_bytes(tmp_path, name, content)
    assert (row.fault, row.values) == (None, {**row.values, **ROW})


def test_json_lines_in_a_json_file_keep_their_lines(tmp_path: Path) -> None:
    rows = read_bytes(tmp_path, "lines.json", LINE + b"\n\n{oops\n" + LINE)
    assert [(row.line, row.fault is None) for row in rows] == [(1, True), (3, False), (4, True)]
    rows = read_bytes(tmp_path, "broken.json", b"{oops\n" + LINE)
    assert [(row.line, row.fault is None) for row in rows] == [(1, False), (2, True)]


def test_a_name_that_the_task_reads_is_never_replaced_by_another(tmp_path: Path) -> None:
    (row,) = read_bytes(tmp_path, "both.csv", b"problem,question,SOLUTION\n1,q,a\n")
    assert row.values == {"problem": "1", "question": "q", "answer": "a"}


@settings(max_examples=60)
@given(
    rows=st.lists(st.fixed_dictionaries({"question": TEXT, "answer": TEXT}), min_size=1, max_size=6),
    delimiter=st.sampled_from(",;\t|"),
)
def test_a_table_gives_back_what_was_written(rows: list[dict[str, str]], delimiter: str, tmp_path_factory: Any) -> None:
    """Whatever is in the cells: line breaks, quotes, delimiters, characters of any script."""
    out = io.StringIO()
    writer = csv.DictWriter(out, ["question", "answer"], delimiter=delimiter, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    content = out.getvalue().encode()
    folder = tmp_path_factory.mktemp("table")
    assert [row.values for row in read_bytes(folder, "rows.csv", content)] == rows
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    assert [row.values for row in read_bytes(folder, "rows.jsonl", lines)] == rows


@settings(max_examples=80)
@given(st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet"]), st.binary(max_size=200))
def test_no_content_is_more_than_a_data_error(ending: str, content: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        try:
            rows = read_bytes(Path(folder), f"rows{ending}", content)
        except DataError:
            return
        assert all(isinstance(row.fault, str) or row.fault is None for row in rows)


# ---------------------------------------------------------------- bad rows, and bad files


@pytest.mark.parametrize(
    ("name", "content", "line", "fault"),
    [
        ("half.jsonl", b'{"question": "\\ud800", "answer": "a"}\n' + LINE, 1, "half a character"),
        ("digits.jsonl", b'{"question": 1' + b"0" * 5000 + b"}\n" + LINE, 1, "a number of more than 4300 digits"),
        ("deep.jsonl", b"[" * 100_000 + b"\n" + LINE, 1, "nested too deep"),
        ("deep.jsonl", b'{"a":' * 100_000 + b"\n" + LINE, 1, "nested too deep"),
        ("latin.jsonl", LINE + b'\n{"question": "\xe9"}\n' + LINE, 2, "not UTF-8"),
        ("latin.csv", b"question,answer\nq,\xe9\nq,a\n", 2, "not UTF-8"),
        ("many.csv", b'question,answer\n"q\nq",a\nq,a,b\n', 4, "3 cells for 2 columns"),
        ("open.csv", b'question,answer\nq,a\nq,"a\nq,a\n', 3, "a quote lacks its partner"),
    ],
)
def test_a_row_that_cannot_be_read_has_a_place_and_a_fault(
    tmp_path: Path, name: str, content: bytes, line: int, fault: str
) -> None:
    rows = read_bytes(tmp_path, name, content)
    bad = [row for row in rows if row.fault]
    assert [row.line for row in bad] == [line]
    assert fault in str(bad[0].fault)
    assert [row.values["answer"] for row in rows if not row.fault] == ["a"] * (len(rows) - 1) != []


@pytest.mark.parametrize("content", [b'""', b"null", b"3", b'"question"', b"true", b'[{"question": "q"}]'])
def test_a_line_that_is_no_mapping_is_a_bad_row(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    good = b'{"question": "%d?", "answer": "x\\n#### 2"}'
    path.write_bytes(b"\n".join([content, *(good.replace(b"%d", str(k).encode()) for k in range(4))]))
    with pytest.raises(DataError) as caught:
        load("gsm8k", path)
    assert f"{path}:1: not a mapping with question and answer" in str(caught.value)
    assert load("gsm8k", path, on_bad_row="skip").proof["skipped"] == [caught.value.problems[0]]


def test_a_cell_of_any_length_is_read(tmp_path: Path) -> None:
    (row,) = read_bytes(tmp_path, "long.csv", b"question,answer\nq," + b"x" * 200_000)
    assert len(row.values["answer"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.json", b'[{"a": 1', "not JSON"),
        ("rows.json", b"3", "not rows; expected a list of rows"),
        ("rows.jsonl", "[]".encode("utf-16"), "is UTF-16; expected UTF-8"),
        ("rows.csv", b"a,a\n1,2\n", "two columns are called a"),
        ("rows.parquet", b"PAR1" + b"x" * 100 + b"PAR1", "not a parquet file, or a damaged one"),
        ("rows.xlsx", b"x", "expected .jsonl, .json, .csv or .parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_bytes(tmp_path, name, content)


def test_a_parquet_file_that_is_damaged_inside_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    values = [str(number) * 9 for number in np.random.default_rng(0).permutation(5000)]
    pq.write_table(pa.table({"question": values, "answer": values}), path)
    content = bytearray(path.read_bytes())
    content[200 : len(content) // 2] = bytes(len(content) // 2 - 200)
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        list(file_rows(path))


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b.csv", "/dev/zero", "."])
def test_a_path_that_names_no_file_is_one_sentence(path: str) -> None:
    with pytest.raises(DataError, match="jsonl"):
        list(file_rows(Path(path)))


KINDS_OF_BAD_ROWS = [  # a line -> what is said about it
    (b'{"question": "cut', "not JSON"),
    (b'{"question": "no answer"}', "no answer (it has question)"),
    (b'{"question": 7, "answer": [1]}', "answer is not a text"),
    (b'{"question": "\\ud800", "answer": "a"}', "half a character"),
    (b'{"question": "q", "answer": 1' + b"0" * 5000 + b"}", "a number of more than 4300 digits"),
    (b"[" * 3000, "nested too deep"),
    (b'{"question": "q", "answer": true}', "answer is true, not a text"),
    (b'{"question": "\xe9", "answer": "x"}', "not UTF-8"),
    (b'{"question": NaN, "answer": "x"}', "no question (it is nan)"),
    (b'{"question": "q", "answer": 1e999}', "not a text or a finite number"),
]


def rows_with_bad_ones(path: Path, count: int) -> list[tuple[int, str]]:
    """Write rows of which each hundredth is bad. Returns the lines of the bad ones, and what is wrong with them."""
    good, bad = json.dumps({"question": "How many?", "answer": "1 + 2\n#### 3"}).encode() + b"\n", []
    with path.open("wb") as file:
        for line in range(1, count + 1):
            if line % 100:
                file.write(good)
                continue
            content, fault = KINDS_OF_BAD_ROWS[line // 100 % len(KINDS_OF_BAD_ROWS)]
            file.write(content + b"\n")
            bad.append((line, fault))
    return bad


@pytest.mark.slow
def test_a_thousand_bad_rows_of_a_hundred_thousand_are_all_named_at_once(tmp_path: Path) -> None:
    """By file and line, in a file where they fill the screen; of several files in one go."""
    from pipeline.preprocess import all_bad_rows

    path, test = tmp_path / "rows.jsonl", tmp_path / "test.jsonl"
    bad = rows_with_bad_ones(path, 100_000)
    more = rows_with_bad_ones(test, 300)
    assert len(bad) == 1000
    task = task_of(TaskChoice("gsm8k", "path", str(path), None, "error", {}, test_path=str(test)), 0)
    with pytest.raises(BadRows) as caught:
        task.load()
    error = all_bad_rows(caught.value, task, tmp_path)
    assert len(error.problems) == 22  # a screen
    assert error.problems[20] == f"… and 983 more bad rows; {tmp_path}/bad-rows.txt names all 1003"
    named = (tmp_path / "bad-rows.txt").read_text().splitlines()
    assert list(error.problems[:20]) == named[:20]
    for (file, line, fault), message in zip(
        [(file, *one) for file, known in ((path, bad), (test, more)) for one in known], named, strict=True
    ):
        assert message.startswith(f"{file}:{line}: ")
        assert fault in message
    assert max(map(len, named)) < 600


@pytest.mark.slow
def test_reading_takes_time_in_proportion_to_the_rows_and_keeps_none_of_them(tmp_path: Path) -> None:
    """Processor seconds, the better of two: eight times the rows take no more than sixteen times as long."""
    seconds = []
    for count in (2_500, 20_000):
        path = tmp_path / f"{count}.jsonl"
        rows_with_bad_ones(path, count)
        tries = []
        for _ in range(2):
            began = time.process_time()
            with pytest.raises(BadRows):
                load("gsm8k", path)
            tries.append(time.process_time() - began)
        seconds.append(min(tries))
    assert seconds[1] < 16 * seconds[0]
    tracemalloc.start()
    with pytest.raises(BadRows):
        load("gsm8k", path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size  # bad rows are not kept, and good ones only until the first bad one


# ---------------------------------------------------------------- what is named is used or refused


def load(name: str, path: Path | None, *, on_bad_row: Any = "error", test: Path | None = None, **params: Any) -> Splits:
    given = str(path) if path else None
    return task_of(
        TaskChoice(name, "path", given, None, on_bad_row, params, test_path=str(test) if test else None), 0
    ).load()


def gsm8k_file(path: Path, numbers: range, bad: int = 0) -> Path:
    rows = [{"question": f"{n} and 1?", "answer": f"{n} + 1\n#### {n + 1}"} for n in numbers]
    path.write_text("\n".join([*(json.dumps(row) for row in rows), *["{}"] * bad]))
    return path


def test_a_path_is_enough_and_another_source_beside_it_is_refused(tmp_path: Path) -> None:
    mine = gsm8k_file(tmp_path / "mine.jsonl", range(20))
    choice = TaskChoice("gsm8k", "auto", str(mine), None, "error", {})
    assert task_of(choice, 0).source == "path"
    for source in ("hub", "sample"):
        _, problems = read("gsm8k", [f"task.source={source}", f"task.path={mine}"])
        assert any(text.startswith("task.path: got ") and "Fix: task.source=path" in text for text in problems)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["task.path=a.jsonl", "task.test_path=a.jsonl"], "task.test_path: got a.jsonl, the file of task.path too"),
        (["task.path=a.jsonl", "task.test_path=./a.jsonl"], "the file of task.path too"),
        (["task.validation_path=a.jsonl"], "task.path: got null with task.validation_path set"),
        (["task.source=path"], "task.path: got null with task.source 'path'"),
    ],
)
def test_files_that_cannot_go_together_are_told(words: list[str], told: str) -> None:
    _, problems = read("gsm8k", ["task.source=path", *words])
    assert any(told in text for text in problems), problems


def test_a_run_needs_rows_to_learn_from(tmp_path: Path) -> None:
    test = gsm8k_file(tmp_path / "test.jsonl", range(20))
    with pytest.raises(RecipeError, match=r"task.path: got null with task\.test_path set"):
        make_plan(["gsm8k"], ["task.source=path", f"task.test_path={test}"])


def test_files_of_their_own_are_whole_splits_and_nothing_of_them_is_learned(tmp_path: Path) -> None:
    train, test = gsm8k_file(tmp_path / "train.jsonl", range(20)), gsm8k_file(tmp_path / "test.jsonl", range(15, 45))
    validation = gsm8k_file(tmp_path / "validation.jsonl", range(10, 15), bad=2)
    choice = TaskChoice("gsm8k", "path", str(train), None, "skip", {}, str(validation), str(test))
    splits = task_of(choice, 0).load()
    assert [len(splits.sft), len(splits.validation), len(splits.tests["test"])] == [10, 5, 30]
    assert len(splits.proof["same_question"]) == 10
    assert [text.rpartition("/")[2].partition(": ")[0] for text in splits.proof["skipped"]] == [
        "validation.jsonl:6",
        "validation.jsonl:7",
    ]
    only = TaskChoice("gsm8k", "path", None, None, "error", {}, None, str(test))
    assert [len(rows) for rows in (task_of(only, 0).load().sft, task_of(only, 0).load().tests["test"])] == [0, 30]


def test_corr2cause_takes_whole_files_too() -> None:
    path = Path(__file__).parents[1] / "fixtures" / "corr2cause_released.csv"
    rows = len(list(file_rows(path)))
    assert len(load("corr2cause", None, test=path).tests["test"]) == rows


@pytest.mark.parametrize(
    "row",
    [
        {"query": "Answer with Yes or No.\n\nPremise: {p}\n\nHypothesis: A directly causes B.\nYes or No?", "label": 0},
        {"premise": "{p}", "hypothesis": "A directly causes B.", "gold": "No"},
        {"question": "Premise: {p}\nHypothesis: A directly causes B.", "relation": "neutral"},
        {"Input": "Premise: {p}\nHypothesis: A directly causes B.", "Label": "0.0"},
    ],
)
def test_the_task_reads_the_rows_that_the_audit_reads(row: dict[str, Any], tmp_path: Path) -> None:
    premise = (
        "Suppose there is a closed system of 2 variables, A and B. All the statistical relations among these 2 "
        "variables are as follows: A correlates with B."
    )
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({key: str(value).replace("{p}", premise) for key, value in row.items()}))
    splits = load("corr2cause", path, test_classes=0, validation_classes=0)
    (example,) = splits.sft
    assert example.gold == "No"
    assert example.question.startswith(f"Premise: {premise}\nHypothesis: A directly causes B.")
    done = run_cli("audit", "corr2cause", "--data", str(path))
    assert (done.returncode, "1 rows, 0 wrong labels" in done.stdout) == (0, True)
    three = (
        load("corr2cause", path, test_classes=0, validation_classes=0, labels="three") if "relation" in row else None
    )
    assert three is None or three.sft[0].gold == "Unknown"


def test_a_file_of_other_columns_cannot_be_audited(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    done = run_cli("audit", "corr2cause", "--data", str(path))
    assert done.returncode == 2
    assert "none of its 1 rows can be read; line 2: no input (or query, or question" in done.stderr


def test_an_evaluation_takes_the_whole_file(tmp_path: Path) -> None:
    """Named by `task.path` or `task.test_path`, whatever rows the checkpoint's own recipe has."""
    mine = gsm8k_file(tmp_path / "mine.jsonl", range(20))
    folder = Path(__file__).parents[1] / "fixtures" / "records-v1"
    checkpoints = sorted(folder.glob("exports/*/model"))
    for key in ("task.path", "task.test_path"):
        plan = evaluation_plan(str(checkpoints[0]), [f"{key}={mine}"], task="gsm8k", runs=tmp_path)
        choice = plan.steps[0].recipe.task
        assert (choice.source, choice.path, choice.test_path) == ("path", None, str(mine))
        assert plan.steps[0].recipe.evaluate.splits == ("test",)
        assert not plan.steps[0].folders
        assert len(task_of(choice, 0).load().tests["test"]) == 20
    before = plan.steps[0].fingerprint
    gsm8k_file(mine, range(21))
    again = evaluation_plan(str(checkpoints[0]), [f"task.path={mine}"], task="gsm8k", runs=tmp_path)
    assert again.steps[0].fingerprint != before  # other rows are another evaluation
    with pytest.raises(PlanError, match=r"task\.path: got none.jsonl, which is not a file"):
        evaluation_plan(str(checkpoints[0]), ["task.path=none.jsonl"], task="gsm8k", runs=tmp_path)


# ---------------------------------------------------------------- check


def checked(*words: str) -> tuple[list[str], list[str]]:
    return preflight(make_plan(["tiny"], words))


def test_check_opens_the_files(tmp_path: Path) -> None:
    bad = gsm8k_file(tmp_path / "bad.jsonl", range(20), bad=5)
    words = ["task.name=gsm8k", "task.params={}", f"task.path={bad}", "evaluate.splits=[test]"]
    wrong, _ = checked(*words)
    assert any("5 of its first 25 rows cannot be read" in text and f"{bad}:21: " in text for text in wrong)
    wrong, notes = checked(*words, "task.on_bad_row=skip")
    assert not any("cannot be read" in text for text in wrong)
    assert any("5 of its first 25 rows cannot be read" in text for text in notes)
    wrong, _ = checked(*words, f"task.test_path={tmp_path}/none.jsonl")
    assert any(
        text.endswith("none.jsonl does not exist; expected a .jsonl, .json, .csv or .parquet file") for text in wrong
    )


# ---------------------------------------------------------------- splits


def test_a_share_is_drawn_before_bad_rows_are_dropped() -> None:
    """So GSM8K's 748 validation rows are those of the published split, whatever else cannot be read."""
    pool: list[Example | None] = [Example(str(k), "q", "", str(k)) for k in range(7473)]
    published = datasets.Dataset.from_dict({"id": [str(k) for k in range(7473)]}).train_test_split(0.1, seed=42)
    whole = divide(pool, 42, test=[], validation=0.1)
    assert [e.id for e in whole.validation] == published["test"]["id"]
    assert len(whole.validation) == 748
    for bad in range(0, 7473, 50):
        pool[bad] = None
    without = {str(bad) for bad in range(0, 7473, 50)}
    done = divide(pool, 42, test=[], validation=0.1)
    assert [e.id for e in done.validation] == [one for one in published["test"]["id"] if one not in without]
    assert [e.id for e in done.train] == [one for one in published["train"]["id"] if one not in without]


@given(
    st.lists(st.one_of(st.none(), st.integers(0, 8)), min_size=4, max_size=40),
    st.one_of(st.floats(0, 0.4), st.integers(1, 2)),
    st.integers(0, 5),
)
def test_a_division_keeps_groups_apart_and_loses_nothing(groups: list[int | None], part: float, seed: int) -> None:
    pool = [None if group is None else Example(str(k), "q", "", str(group)) for k, group in enumerate(groups)]
    try:
        done = divide(pool, seed, test=part, validation=part)
    except DataError:
        reject()  # what is left beside held-out groups may be too few for the second part
    parts = [done.train, done.validation, done.test]
    assert sorted([*(e.id for rows in parts for e in rows), *done.left]) == sorted(e.id for e in pool if e)
    first, *others = ({e.group for e in rows} for rows in parts)
    assert not any(first & other for other in others)
    if part >= 1:
        assert (len(done.test), len(done.validation)) == (part, part)
