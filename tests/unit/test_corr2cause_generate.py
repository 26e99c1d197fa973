"""Whole sets of rows as files: every claim once, the same bytes for any number of processes, no class in two splits."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.cli.main import command
from pipeline.core.errors import DataError, PlanError, RecipeError
from pipeline.scoring.answers import split_thought
from pipeline.tasks.corr2cause.audit import audit_rows
from pipeline.tasks.corr2cause.generate import generate
from pipeline.tasks.corr2cause.graphs import PLUSPLUS, classes
from pipeline.tasks.corr2cause.proof_checker import check_proof
from pipeline.tasks.rows import Row, file_rows


def rows_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {path.stem: pq.read_table(path).to_pylist() for path in sorted(folder.glob("*.parquet"))}


def make(out: Path, *words: str) -> Path:
    assert command(["generate", "corr2cause", "--out", str(out), *words]) == 0
    return out


@pytest.fixture(scope="module")
def natural(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made") / "set", "--n", "2-5", "--seed", "3")


@pytest.mark.slow
def test_every_claim_about_every_class_is_there_once_and_right(natural: Path) -> None:
    """The counts are those of the table: 12 + 90 + 720 + 8,520 rows, 0 + 3 + 57 + 1,248 of them Yes."""
    rows = [row for mine in rows_of(natural).values() for row in mine]
    assert Counter(row["num_variables"] for row in rows) == {2: 12, 3: 90, 4: 720, 5: 8520}
    assert Counter(row["num_variables"] for row in rows if row["label"]) == {3: 3, 4: 57, 5: 1248}
    assert {row["class"] for row in rows} == {mec.id for n in (2, 3, 4, 5) for mec in classes(n)}
    assert len({row["id"] for row in rows}) == len(rows)
    for name in rows_of(natural):
        found = audit_rows(file_rows(natural / f"{name}.parquet"))
        assert found.clean
        assert found.solver()["f1"] == 1


def test_no_class_is_in_two_splits_and_the_card_says_so(natural: Path) -> None:
    groups = [{row["class"] for row in mine} for mine in rows_of(natural).values()]
    assert len(groups) == 3
    assert sum(len(group) for group in groups) == len(set().union(*groups)) == 2 + 5 + 20 + 142
    splits = json.loads((natural / "splits.json").read_text(encoding="utf-8"))
    assert splits["overlap"] == 0
    assert sorted(len(group) for group in groups) == sorted(len(ids) for ids in splits["classes"].values())
    card = (natural / "README.md").read_text(encoding="utf-8")
    assert "overlap 0" in card
    assert "| test | 5 | 1 |" in card


def test_the_fields_of_a_row_are_those_of_its_words(natural: Path) -> None:
    by_id = {mec.id: mec for n in (2, 3, 4, 5) for mec in classes(n)}
    for row in rows_of(natural)["test"]:
        premise = row["input"].split("\n")[0].removeprefix("Premise: ")
        assert row["premise_tokens"] == sum(
            word.isalnum() or word in ".,:" for word in re.split(r"(\W)", premise) if word
        )
        assert ", ".join(row["names"][:-1]) + f" and {row['names'][-1]}. All" in premise
        assert row["class_size"] == by_id[row["class"]].size
        assert (row["mode"], row["style"], row["seed"]) == ("correct", "published", 3)


def test_the_bytes_depend_on_the_seed_and_not_on_the_processes(tmp_path: Path) -> None:
    words = ["--n", "3,4", "--proofs", "short", "--copies", "2"]
    one, two = make(tmp_path / "one", *words), make(tmp_path / "two", *words, "--processes", "2")
    other = make(tmp_path / "other", *words, "--seed", "1")
    files = sorted(path.name for path in one.iterdir())
    assert files == ["README.md", "splits.json", "test.parquet", "train.parquet", "validation.parquet"]
    for name in files:
        assert (one / name).read_bytes() == (two / name).read_bytes()
        assert (one / name).read_bytes() != (other / name).read_bytes()
    rows = rows_of(one)["train"]
    assert len({row["input"] for row in rows}) > len(rows) * 0.8  # the second renaming is another
    for row in rows[::40]:
        thought = split_thought(row["completion"], False).thought
        assert thought
        assert check_proof(row["input"], thought).verdict == ("Yes" if row["label"] else "No")


def test_even_sets_tell_nothing_by_class_and_type(tmp_path: Path) -> None:
    rows = [row for mine in rows_of(make(tmp_path / "even", "--n", "5", "balance=balanced")).values() for row in mine]
    kind = {"child": "parent", "descendant": "ancestor"}  # renaming turns one into the other
    counts = Counter((row["class"], kind.get(row["relation_type"], row["relation_type"]), row["label"]) for row in rows)
    assert rows
    for (mec, relation, _), count in counts.items():
        assert counts[mec, relation, 0] == counts[mec, relation, 1] == count


def test_plusplus_rows_have_its_fields_and_the_edges_that_all_members_share(tmp_path: Path) -> None:
    out = make(tmp_path / "set", "--n", "4", "style=plusplus", "variable_names=alphabet", "--proofs", "full")
    by_id = {mec.id: mec for mec in classes(4)}
    for mine in rows_of(out).values():
        for row in mine:
            assert row["query"].startswith("Premise:\nSuppose")
            assert row["num_edges"] == len(row["forced_edges"]) == len(by_id[row["class"]].pattern.arrows)
            for tail, head in row["forced_edges"]:
                assert f"{tail} has a direct causal effect on {head}." in row["completion"]
            thought = split_thought(row["completion"], False).thought
            assert thought is not None
            assert check_proof(row["input"], thought, PLUSPLUS).valid
        assert audit_rows(
            Row("x", k, {"query": row["query"], "label": row["label"]}) for k, row in enumerate(mine)
        ).clean


def test_paper_mode_makes_the_published_rows(tmp_path: Path) -> None:
    out = make(tmp_path / "set", "--n", "3,4", "mode=paper")
    rows = [row for mine in rows_of(out).values() for row in mine]
    found = audit_rows((Row("x", k, row) for k, row in enumerate(rows)), paper=True)
    assert (found.rows, found.reproduced, len(found.wrong)) == (810, 810, 7)
    assert all(row["names"] == sorted(row["names"]) for row in rows)
    assert all(row["label"] == 0 for row in rows if row["relation_type"] == "child")  # the short cut is there too


def test_three_answers(tmp_path: Path) -> None:
    out = make(tmp_path / "set", "--n", "4", "labels=three", "style=story")
    rows = [row for mine in rows_of(out).values() for row in mine]
    assert {row["status"] for row in rows} == {"entailed", "contradicted", "undetermined"}
    assert audit_rows(
        Row("x", k, {"input": row["input"], "relation": row["status"]}) for k, row in enumerate(rows)
    ).clean
    assert all(len(row["names"]) == 4 for row in rows)


@pytest.mark.parametrize(
    ("words", "error", "told"),
    [
        (["--n", "11"], RecipeError, "task.params.n[0]: got 11; expected a whole number from 2 to 10"),
        (["--n", "three"], PlanError, "Fix: --n 6, or --n 3,5 or --n 2-6"),
        (["--n", "3", "stile=story"], RecipeError, "did you mean 'style'?"),
        (["--n", "3", "--copies", "0"], PlanError, "--copies: got 0; expected"),
        (["--n", "7", "mode=paper"], RecipeError, "ends at n = 6"),
        (
            ["--n", "3", "mode=paper", "style=story"],
            RecipeError,
            "got story; expected published, paraphrased or refactored in mode",
        ),
    ],
)
def test_a_set_that_cannot_be_made_says_why(
    words: list[str], error: type[Exception], told: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        command(["generate", "corr2cause", "--out", str(tmp_path / "set"), *words])
    assert told in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty"):
        generate(tmp_path, {"n": [3]})
