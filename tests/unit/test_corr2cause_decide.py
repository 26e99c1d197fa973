"""Claims about large classes are decided without listing their members, and as listing them would; sets are bounded."""

from __future__ import annotations

import json
import random
from itertools import combinations, permutations
from pathlib import Path

import pytest

from pipeline.cli.main import command
from pipeline.core.errors import DataError, PlanError, RecipeError
from pipeline.tasks.corr2cause import decide as deciding
from pipeline.tasks.corr2cause.audit import Solver, audit_rows
from pipeline.tasks.corr2cause.decide import decide
from pipeline.tasks.corr2cause.generate import MOST_ROWS
from pipeline.tasks.corr2cause.graphs import (
    MAX_N,
    PLUSPLUS,
    PUBLISHED,
    RELATIONS,
    Dag,
    Semantics,
    bits,
    classes,
    cpdag_of,
    dag_of,
    equivalent_dags,
    holds,
)
from pipeline.tasks.corr2cause.parse_thought import parse_question

MEANINGS = [PUBLISHED, PLUSPLUS, Semantics("strict", "descendant", "ancestor")]
CLAIMS = {
    "A directly causes B.": "parent",
    "A causes something else which causes B.": "ancestor",
    "There exists at least one collider (i.e., common effect) of A and B.": "collider",
    "There exists at least one confounder (i.e., common cause) of A and B.": "confounder",
}


def by_members(members: tuple[Dag, ...], relation: str, i: int, j: int, semantics: Semantics) -> str:
    held = {holds(dag, relation, i, j, semantics) for dag in members}
    return "undetermined" if len(held) == 2 else "entailed" if True in held else "contradicted"


@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_claim_about_every_class_is_decided_as_its_members_say(n: int) -> None:
    for mec in classes(n):
        for (i, j), relation, meaning in (
            (pair, relation, meaning)
            for pair in permutations(range(n), 2)
            for relation in RELATIONS
            for meaning in MEANINGS
        ):
            expected = by_members(mec.members, relation, i, j, meaning)
            assert decide(mec.pattern, relation, i, j, meaning) == expected, (mec, relation, i, j, meaning)


def test_claims_about_drawn_classes_are_decided_as_their_members_say() -> None:
    """Of five to nine variables, sparse to dense, also moral graphs, whose classes are large."""
    rng, seen = random.Random(0), set()
    for _ in range(150):
        n, edge_probability = rng.randint(5, 9), rng.choice((0.2, 0.4, 0.6, 0.9))
        dag = dag_of(n, [pair for pair in combinations(range(n), 2) if rng.random() < edge_probability])
        if rng.random() < 0.5:
            dag = moral(dag)
        members = equivalent_dags(dag, 1000)
        if members is None:
            continue
        pattern = cpdag_of(dag)
        for _ in range(12):
            (i, j), relation, meaning = rng.sample(range(n), 2), rng.choice(RELATIONS), rng.choice(MEANINGS)
            expected = by_members(members, relation, i, j, meaning)
            assert decide(pattern, relation, i, j, meaning) == expected, (dag, relation, i, j, meaning)
            seen.add((relation, expected))
    assert len(seen) == 3 * len(RELATIONS)


def moral(dag: Dag) -> Dag:
    """The graph with all parents of a node joined: it has no v-structure, so its pattern is undirected."""
    out = list(dag)
    for node in reversed(range(len(out))):
        for a, b in combinations([k for k in range(node) if out[k] >> node & 1], 2):
            out[a] |= 1 << b
    return tuple(out)


def complete(n: int) -> str:
    names = [chr(65 + k) for k in range(n)]
    pairs = " ".join(f"{a} correlates with {b}." for a, b in combinations(names, 2))
    return (
        f"Premise: Suppose there is a closed system of {n} variables, {', '.join(names[:-1])} and {names[-1]}. All the "
        f"statistical relations among these {n} variables are as follows: {pairs}"
    )


@pytest.mark.parametrize("n", [9, MAX_N])
@pytest.mark.parametrize("claim", CLAIMS)
def test_a_complete_graph_costs_a_few_dozen_graphs_and_not_all_its_members(
    n: int, claim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has n! members, and 17 seconds of processor time for nine variables, minutes for ten, were spent on them."""
    monkeypatch.setattr(deciding, "LIMIT", 100)
    assert Solver().solve(f"{complete(n)}\nHypothesis: {claim}").status == "undetermined"


def test_no_claim_about_ten_variables_comes_near_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deciding, "LIMIT", deciding.LIMIT // 8)
    rng = random.Random(5)
    for _ in range(12):
        edge_probability = rng.choice((0.5, 0.8, 0.95))
        dag = moral(dag_of(MAX_N, [pair for pair in combinations(range(MAX_N), 2) if rng.random() < edge_probability]))
        assert sum(len(bits(children)) for children in dag) > 20
        for relation in RELATIONS:
            i, j = rng.sample(range(MAX_N), 2)
            assert decide(cpdag_of(dag), relation, i, j) in ("entailed", "contradicted", "undetermined")


def test_a_claim_beyond_the_limit_is_a_row_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.tasks.rows import file_rows

    monkeypatch.setattr(deciding, "LIMIT", 3)
    path = tmp_path / "rows.jsonl"
    row = {"input": f"{complete(6)}\nHypothesis: A causes something else which causes B.", "label": 0}
    path.write_text(json.dumps(row) + "\n")
    (found,) = audit_rows(file_rows(path)).malformed
    assert found["problem"] == "the claim is not decided after 3 graphs of its class, the limit"


@pytest.mark.parametrize("n", ["11", "30", "9" * 5000])
def test_more_variables_than_can_be_decided_are_told_before_anything_is_made(n: str) -> None:
    """Thirty variables would have asked for 2^30 sets of each pair."""
    words = complete(11).replace("system of 11", f"system of {n}")
    with pytest.raises(ValueError, match=r"got \d+ variables; expected at most 10"):
        Solver().solve(f"{words}\nHypothesis: A directly causes B.")
    assert parse_question(words) is None


# ---------------------------------------------------------------- sets that would never end


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--n", "6-2"], "--n: got '6-2'; expected the smaller number first. Fix: --n 2-6"),
        (["--n", "2-999"], "--n: got '2-999', 998 numbers; expected at most 20"),
        (["--n", "2-99999999999999"], "expected numbers of variables"),
        (["--n", "1"], "task.params.n[0]: got 1; expected a whole number from 2 to 10"),
        (["--n", "0"], "task.params.n[0]: got 0; expected a whole number from 2 to 10"),
        (["--n", "11"], "task.params.n[0]: got 11; expected a whole number from 2 to 10"),
        (["--n", ""], "--n: got ''; expected numbers"),
        (["--n", "nan"], "--n: got 'nan'; expected numbers"),
        (["--n", "3,,4"], "--n: got '3,,4'; expected numbers"),
        (["--n", "3", "--copies", "0"], "--copies: got 0; expected a whole number ≥ 1"),
        (
            ["--n", "3", "--copies", "1000000000000"],
            "--copies: got 1000000000000, which is up to 90,000,000,000,000 rows",
        ),
        (["--n", "10", "--copies", "1000000000000"], "expected at most 1,000,000,000 rows. Fix: --copies "),
        (["--n", "3", "--processes", "1000000"], "--processes: got 1000000; expected 1 to "),
        (["--n", "3", "--processes", "0"], "--processes: got 0; expected 1 to "),
        (["--n", "3", "--seed", "99999999999"], "--seed: got 99999999999; expected 0 to 2147483647"),
        (["--n", "3", "--seed", "-1"], "--seed: got -1; expected 0 to"),
        (["--n", "9", "sampled_classes=1000000000000"], "task.params.sampled_classes"),
        (["--n", "9", "max_members=1000000000000", "edge_probability=1"], "task.params.max_members"),
        (["--n", "9", "edge_probability=nan"], "task.params.edge_probability"),
        (["--n", "9", "edge_probability=inf"], "task.params.edge_probability"),
        (["--n", "9", "edge_probability=-1"], "task.params.edge_probability"),
        (["--n", "3", "test_classes=2"], "task.params.test_classes"),
        (["--n", "3", "grpo_rows=1000000000000"], "task.params.grpo_rows"),
        (["--n", "3", "phases=[{n: [3], rows: 1000000000000}]"], "task.params.phases"),
    ],
)
def test_a_set_that_would_never_end_or_be_empty_is_refused_in_one_sentence(
    words: list[str], told: str, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    with pytest.raises((PlanError, DataError, RecipeError)) as caught:
        command(["generate", "corr2cause", "--out", str(out), *words])
    (problem,) = caught.value.problems
    assert told in problem
    assert caught.value.exit_code == 2
    assert not out.exists()


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("mine")
    with pytest.raises(DataError, match="is a file; give a new folder"):
        command(["generate", "corr2cause", "--out", str(tmp_path / "set"), "--n", "3"])


def test_several_numbers_in_any_order_are_one_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(["generate", "corr2cause", "--out", str(tmp_path / "set"), "--n", "4, 3-4,3"])
    assert "n 3 " in capsys.readouterr().out
    assert MOST_ROWS > 2201 * 3 * 30 * 1000  # a thousand renamings of every claim about six variables
