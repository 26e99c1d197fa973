"""The published program repeated, premises read back, and files of rows audited."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cli.main import command
from pipeline.config.recipe import Report, TaskChoice
from pipeline.core.errors import DataError
from pipeline.scoring.predictions import Prediction
from pipeline.tasks.corr2cause import wording
from pipeline.tasks.corr2cause.audit import audit_rows
from pipeline.tasks.corr2cause.graphs import RELATIONS, classes, sampled
from pipeline.tasks.corr2cause.parse_premise import class_of, read_claim, read_premise
from pipeline.tasks.corr2cause.published import published_classes, wrong_labels
from pipeline.tasks.rows import Row, file_rows
from pipeline.tasks.task import Example, task_of
from pipeline.workflow.figures import count

RELEASED = Path(__file__).parents[1] / "fixtures" / "corr2cause_released.csv"  # 23 rows of the published training split


# ---------------------------------------------------------------- the published set


@pytest.mark.parametrize(
    ("n", "count"), [(2, 2), (3, 5), (4, 20), (5, 142), pytest.param(6, 2207, marks=pytest.mark.slow)]
)
def test_the_published_counts_of_classes(n: int, count: int) -> None:
    found = published_classes(n)
    assert len(found) == len({one.independences for one in found}) == count


@pytest.mark.slow
def test_the_published_count_of_rows_and_share_of_positive_ones() -> None:
    """207,972 rows; 18.57 % positive over ordered pairs (415,944 rows)."""
    listed = [one for n in range(2, 7) for one in published_classes(n)]
    assert sum(3 * one.n * (one.n - 1) for one in listed) == 207_972
    asked = [(one, r, i, j) for one in listed for r in RELATIONS for i, j in permutations(range(one.n), 2)]
    assert len(asked) == 415_944
    assert round(sum(one.entails(r, i, j) for one, r, i, j in asked) / len(asked), 4) == 0.1857


@pytest.mark.slow
def test_the_wrong_labels_of_the_published_set() -> None:
    found = {n: wrong_labels(n) for n in range(2, 7)}
    labels = {n: one["false no"] + one["false yes"] for n, one in found.items()}
    assert labels == {2: 0, 3: 0, 4: 7, 5: 200, 6: 7234}
    assert sum(one["false no"] for one in found.values()) == 6548
    assert sum(one["false yes"] for one in found.values()) == 893
    # 23 classes with a wrong premise, of which 20 describe no graph and 3 repeat a class: 2,070 rows
    six = found[6]
    assert (six["premises"], six["unfaithful"], six["duplicates"]) == (20, 20, 3)
    assert (six["premises"] + six["duplicates"]) * 90 == 2070


def test_released_rows_are_reproduced_premise_and_label() -> None:
    found = audit_rows(file_rows(RELEASED), paper=True)
    assert (found.rows, found.reproduced) == (23, 23)
    # one other label, one other statement, other letters: no row of the published set any more
    rows = [row.values for row in file_rows(RELEASED)]
    first = dict(rows[0])
    turned = {**first, "label": str(1 - int(first["label"]))}
    renamed = {**first, "input": first["input"].replace("A", "Q")}
    assert audit_rows([Row("x", 1, turned), Row("x", 2, renamed)], paper=True).reproduced == 0


# ---------------------------------------------------------------- reading premises


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_every_premise_is_read_back_to_its_class(n: int) -> None:
    for mec in classes(n):
        names = ["rain", "ice cream sales", "B", "mood", "age"][:n]
        read = read_premise(wording.premise(names, *wording.relations(mec)))
        assert read.names == tuple(names)
        assert read.independences == mec.independences
        found = class_of(n, read.independences)
        assert found is not None
        assert found.pattern == mec.pattern


@given(st.integers(0, 2200), st.data())
@settings(max_examples=25, deadline=None)
def test_one_statement_less_is_another_premise(k: int, data: st.DataObject) -> None:
    """No other class may be found for a premise that lacks or adds a statement."""
    mec = classes(6)[k]
    everything = [
        (i, j, given_)
        for i, j in combinations(range(6), 2)
        for size in range(5)
        for given_ in combinations(sorted({*range(6)} - {i, j}), size)
    ]
    changed = set(mec.independences) ^ {data.draw(st.sampled_from(everything))}
    found = class_of(6, changed)
    assert found is None or set(found.independences) == changed


def test_large_premises_are_read_back_too() -> None:
    for mec in sampled(9, 5, edge_probability=0.6, seed="read", most_independences=400):
        names = [f"variable {k}" for k in range(9)]
        found = class_of(9, read_premise(wording.premise(names, *wording.relations(mec))).independences)
        assert found is not None
        assert found.pattern == mec.pattern


def test_every_wording_of_every_claim_is_read() -> None:
    names = ("A", "rainy days", "C")
    for wordings in (wording.PUBLISHED, wording.PARAPHRASED):
        for relation, options in wordings.items():
            for words in options:
                for i, j in permutations(range(3), 2):
                    claim = read_claim(words.format(i=names[i], j=names[j]), names)
                    turned = {"parent": "child", "child": "parent", "ancestor": "descendant", "descendant": "ancestor"}
                    known = {(relation, i, j), (turned.get(relation, relation), j, i)}
                    assert (claim.relation, claim.i, claim.j) in known
                    assert claim.i < claim.j or relation in ("collider", "confounder")


INDEP = (
    "Premise:\nSuppose there is a closed system of 3 variables, X, Z, and Y, whose causal structure forms a directed "
    "acyclic graph and satisfies faithfulness. All the conditional independence relations are: {}.\n\n"
    "Hypothesis: {}"
)
COLLIDER = " There exists at least one collider (i.e., a common child) of X and Z."


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ({"query": INDEP.format("X indep Z", COLLIDER), "label": 1}, None),
        ({"query": INDEP.format("X indep Z", COLLIDER), "label": 0}, (0, 1)),
        ({"query": INDEP.format("X indep Z | Y", COLLIDER), "label": 1}, (1, 0)),
        ({"query": INDEP.format("X indep Z | Y", "X directly affects Y."), "relation": "neutral"}, None),
        (
            {"query": INDEP.format("X indep Z | Y", "X directly affects Z."), "relation": "neutral"},
            ("undetermined", "contradicted"),
        ),
        ({"query": INDEP.format("X indep Z", "Y is directly affected by Z."), "gold": "Yes"}, None),
    ],
)
def test_the_indep_wording_is_solved_in_its_own_semantics(row: dict[str, Any], wrong: tuple[Any, Any] | None) -> None:
    found = audit_rows([Row("x", 1, row)])
    assert not found.malformed
    assert [(one["said"], one["right"]) for one in found.wrong] == ([wrong] if wrong else [])


def test_a_premise_that_no_dag_is_faithful_to() -> None:
    """A ring of four variables without a v-structure, and two statements that contradict each other."""
    ring = "Premise: Suppose there is a closed system of 4 variables, A, B, C and D, whose causal structure forms a "
    ring += "directed acyclic graph and satisfies faithfulness. All the conditional independence relations are: "
    ring += "A indep C | B, D; B indep D | A, C.\nHypothesis: A directly affects B."
    found = audit_rows([Row("x", 7, {"query": ring, "label": 0})])
    assert found.unfaithful == [{"line": 7, "n": 4, "said": 0}]
    assert not found.clean


OPENING = (
    "Suppose there is a closed system of {} variables, {}. All the statistical relations among these 3 variables are"
)


@pytest.mark.parametrize(
    ("premise", "told"),
    [
        ("Three variables.", 'no "closed system of N variables'),
        (OPENING.format(3, "A, B and C") + " good", "no list of relations"),
        (
            OPENING.format(4, "A, B and C") + " as follows: A correlates with B.",
            "got 3 different names for 4 variables",
        ),
        (OPENING.format(2, "A and B") + " as follows: A causes B.", "cannot read 'A causes B'"),
        (OPENING.format(2, "A and B") + " as follows: A correlates with B. A correlates with B.", "is stated twice"),
        (OPENING.format(2, "A and B") + " as follows: A correlates with C.", "cannot read"),
        (
            OPENING.format(2, "A and B") + " as follows: A correlates with B. However, A is independent of B.",
            "A and B both correlate and are independent",
        ),
        (
            OPENING.format(3, "A, B and C") + " as follows: A correlates with B. A correlates with C.",
            "B and C have neither a correlation nor an independence",
        ),
        (
            OPENING.format(2, "A and B") + " as follows: A correlates with B. A and B are independent given B.",
            "conditions on a variable twice, or on one of the two",
        ),
    ],
)
def test_a_premise_that_cannot_be_read_says_why(premise: str, told: str) -> None:
    with pytest.raises(ValueError, match=told.replace("(", r"\(")):
        read_premise(premise)


# ---------------------------------------------------------------- the command


def write(rows: list[dict[str, Any]], path: Path) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_the_audit_finds_the_wrong_labels_of_released_rows_in_every_format(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row.values for row in file_rows(RELEASED)]
    file = write(rows, tmp_path / f"rows.{suffix}")
    assert command(["audit", "corr2cause", "--data", str(file), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["wrong_labels"], found["clean"]) == (23, 5, False)
    lines = {row.line: k for k, row in enumerate(file_rows(file))}
    wrong = [rows[lines[one["line"]]] for one in found["wrong"]]
    assert [one["said"] for one in found["wrong"]] == [int(row["label"]) for row in wrong]
    assert found["by_n"]["4"]["false_no"] + found["by_n"]["5"]["false_no"] == 4
    assert sum(cell["rows"] for cell in found["by_relation"].values()) == 23
    # mended rows are clean: exit code 0
    for one in found["wrong"]:
        rows[lines[one["line"]]]["label"] = str(one["right"])
    file = write(rows, tmp_path / f"mended.{suffix}")
    assert command(["audit", "corr2cause", "--data", str(file)]) == 0
    assert "23 rows, 0 wrong labels" in capsys.readouterr().out


def test_a_row_that_cannot_be_read_is_named_by_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = next(row.values for row in file_rows(RELEASED))
    assert isinstance(good, dict)
    file = tmp_path / "rows.jsonl"
    bad = ["{", json.dumps({**good, "label": "maybe"}), json.dumps({"label": 1})]
    bad.append(json.dumps({**good, "input": good["input"].replace("Hypothesis: ", "Hypothesis: perhaps ")}))
    file.write_text("\n".join([json.dumps(good), *bad]), encoding="utf-8")
    assert command(["audit", "corr2cause", "--data", str(file)]) == 1
    told = capsys.readouterr().out
    assert f"{file}:2: not JSON" in told
    assert f"{file}:3: label: got 'maybe'; expected 0, 1 or one of" in told
    assert f"{file}:4: no input (or query" in told
    assert f"{file}:5: cannot read the hypothesis 'perhaps " in told


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.csv", None, "does not exist"),
        ("empty.jsonl", "", "no rows"),
        ("rows.parquet", "x", "not a parquet file"),
        ("rows.xlsx", "x", "expected .jsonl, .json, .csv or .parquet"),
    ],
)
def test_a_file_that_cannot_be_audited_is_a_users_mistake(
    name: str, content: str | None, told: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=told) as caught:
        command(["audit", "corr2cause", "--data", str(tmp_path / name)])
    assert caught.value.exit_code == 2


# ---------------------------------------------------------------- the solver beside the models


@pytest.mark.parametrize(
    "params",
    [{}, {"style": "plusplus", "labels": "three"}, {"style": "story", "premise": "minimal"}, {"style": "refactored"}],
)
def test_the_solver_answers_every_generated_row_from_its_words(params: dict[str, Any]) -> None:
    few = {"n": [4, 5], "phases": [{"n": [4], "rows": 1}], "grpo_rows": 0, "validation_rows": 0, "test_rows": 40}
    task = task_of(TaskChoice("corr2cause", "auto", None, None, "error", {**few, **params}), 0)
    for example in task.load().tests["test"]:
        assert task.solve(example) == example.gold


def test_on_published_rows_the_solver_is_the_ceiling_of_the_label_noise() -> None:
    task = task_of(TaskChoice("corr2cause", "path", str(RELEASED), None, "error", {}), 0)
    splits = task.load()
    rows = [*splits.sft, *splits.validation, *splits.tests["test"]]
    graded: dict[str, Any] = {"split": "test", "correct": True, "answered": True, "tokens": 1}
    predictions = [
        Prediction(id=e.id, group=e.group, tags=e.tags, gold=e.gold, solved=task.solve(e), **graded) for e in rows
    ]
    found = count(predictions, task, Report(10, 0.95, {}), 0)["test"].baselines["exact solver"]
    assert found["accuracy"] == pytest.approx(18 / 23)
    assert 0 < found["f1"] < 1
    assert task.solve(Example("1", "What is 2 + 2?", "Yes", "g")) is None
    # where it cannot answer a row it is not shown as one that was wrong
    predictions[0] = replace(predictions[0], solved=None)
    assert "exact solver" not in count(predictions, task, Report(10, 0.95, {}), 0)["test"].baselines
