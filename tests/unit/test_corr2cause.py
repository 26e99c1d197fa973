"""Corr2Cause: counts, d-separation, relations, words and splits, against the published figures and networkx."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from functools import partial
from itertools import combinations, permutations
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from bench_generate import rows_of_ours
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.recipe import TaskChoice
from pipeline.core.errors import DataError, RecipeError
from pipeline.scoring.answers import verdict
from pipeline.tasks.corr2cause import Corr2Cause, claims_of, enumeration, wording
from pipeline.tasks.corr2cause.graphs import (
    CPDAG,
    RELATIONS,
    Dag,
    EquivalenceClass,
    Semantics,
    bits,
    classes,
    consistent_extension,
    cpdag_of,
    d_separated,
    dag_of,
    holds,
    is_acyclic,
    sampled,
    v_structures,
)
from pipeline.tasks.corr2cause.parse_premise import Claim
from pipeline.tasks.corr2cause.proof_writer import write_proof
from pipeline.tasks.corr2cause.published import published_classes
from pipeline.tasks.task import Splits, task_of

MEANINGS = (Semantics(), Semantics("strict", "descendant", "ancestor"), Semantics("path", "child", "parent"))
FIXTURES = Path(__file__).parents[1] / "fixtures"
SMALL = {"phases": [{"n": [3, 4, 5], "rows": 300}], "grpo_rows": 100, "validation_rows": 60, "test_rows": 300}


def make_task(seed: int = 0, **params: object) -> Corr2Cause:
    task = task_of(TaskChoice("corr2cause", "auto", None, None, "error", {**SMALL, **params}), seed)
    assert isinstance(task, Corr2Cause)
    return task


@pytest.fixture(scope="module")
def splits() -> Splits:
    return make_task().load()


@st.composite
def dags(draw: st.DrawFn, most: int = 6) -> Dag:
    n = draw(st.integers(2, most))
    order = draw(st.permutations(range(n)))
    pairs = list(combinations(range(n), 2))
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True))
    return dag_of(n, [(order[i], order[j]) for i, j in chosen])


# ---------------------------------------------------------------- graphs


@pytest.mark.parametrize(
    ("n", "graphs", "count", "positive"),
    [(2, 2, 2, 0), (3, 6, 5, 3), (4, 31, 20, 57), (5, 302, 142, 1248), (6, 5984, 2201, 42524)],
)
def test_the_counts_of_graphs_classes_and_positive_rows(n: int, graphs: int, count: int, positive: int) -> None:
    """One class per isomorphism class, unordered pairs × 6 types, in the published semantics."""
    assert len(enumeration.dags(n)) == graphs
    found = classes(n)
    assert len(found) == len({mec.id for mec in found}) == count
    labels = [mec.entails(r, i, j) for mec in found for i, j in combinations(range(n), 2) for r in RELATIONS]
    assert len(labels) == count * n * (n - 1) // 2 * 6
    assert sum(labels) == positive


def test_the_sums_over_all_sizes() -> None:
    sizes = range(2, 7)
    assert sum(len(enumeration.dags(n)) for n in sizes) == 6325
    assert sum(len(classes(n)) for n in sizes) == 2370
    assert sum(len(classes(n)) * 3 * n * (n - 1) for n in sizes) == 207_432


def test_all_rows_of_up_to_six_variables_are_made_with_their_text() -> None:
    """How long it takes: scripts/bench generate."""
    assert sum(1 for n in range(2, 7) for _ in rows_of_ours(n)) == 207_432


@pytest.mark.parametrize(
    ("relations", "semantics", "positive"),
    [
        (("ancestor", "descendant"), Semantics(), 9558),
        (("ancestor", "descendant"), Semantics(indirect="strict"), 5248),
        (("collider",), Semantics(), 13138),
        (("collider",), Semantics(collider="descendant"), 16119),
        (("collider",), Semantics(collider="child"), 10687),
        (("confounder",), Semantics(), 5436),
        (("confounder",), Semantics(confounder="ancestor"), 6004),
        (("confounder",), Semantics(confounder="parent"), 4573),
    ],
)
def test_the_positive_rows_of_six_variables_in_each_semantics(
    relations: tuple[str, ...], semantics: Semantics, positive: int
) -> None:
    pairs = list(combinations(range(6), 2))
    assert sum(mec.entails(r, i, j, semantics) for mec in classes(6) for r in relations for i, j in pairs) == positive


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_the_arrays_say_what_the_plain_functions_say(n: int) -> None:
    """Members, independences and every relation in every semantics, of all classes; some with other letters."""
    rng = random.Random(n)
    for mec in classes(n):
        plain = EquivalenceClass(cpdag_of(mec.members[0]))
        assert plain.pattern == mec.pattern
        assert plain.members == mec.members
        assert (
            plain.independences
            == mec.independences
            == tuple(
                (i, j, given_)
                for i, j in combinations(range(n), 2)
                for given_ in sorted(s for k in range(n - 1) for s in combinations(sorted({*range(n)} - {i, j}), k))
                if d_separated(mec.members[0], i, j, sum(1 << k for k in given_))
            )
        )
        order = tuple(rng.sample(range(n), n))
        for shown in (mec, mec.renamed(order)):
            for semantics in MEANINGS:
                for relation in RELATIONS:
                    for i, j in permutations(range(n), 2):
                        held = [holds(dag, relation, i, j, semantics) for dag in shown.members]
                        assert shown.entails(relation, i, j, semantics) == all(held)
                        assert shown.allows(relation, i, j, semantics) == any(held)


@pytest.mark.parametrize(("n", "labelled"), [(2, 2), (3, 11), (4, 185), (5, 8782)])
def test_the_orbits_add_up_to_the_known_labelled_counts(n: int, labelled: int) -> None:
    total = 0
    for mec in classes(n):
        total += len({mec.pattern.renamed(order).code for order in permutations(range(n))})
    assert total == labelled


def test_the_orbits_of_six_variables_add_up_to_the_known_labelled_count() -> None:
    matrices = np.array([mec.pattern.matrix for mec in classes(6)]).reshape(-1, 36).astype(np.float64)
    codes = enumeration.renaming_weights(6) @ matrices.T
    assert sum(len(np.unique(column)) for column in codes.T) == 1_067_825


@given(dags(10), st.data())
@settings(max_examples=150, deadline=None)
def test_the_identity_of_a_class_does_not_depend_on_names_up_to_ten_variables(dag: Dag, data: st.DataObject) -> None:
    pattern = cpdag_of(dag)
    order = tuple(data.draw(st.permutations(range(len(dag)))))
    assert pattern.renamed(order).canonical_code() == pattern.canonical_code()
    extension = consistent_extension(pattern)
    assert extension is not None
    assert cpdag_of(extension) == pattern


@pytest.mark.parametrize("n", [8, 10])
def test_the_identity_of_large_classes_tells_different_ones_apart(n: int) -> None:
    """Refinement leaves ties here: all skeletons are rings or paths of lines, told apart only by trying."""
    one = frozenset((k, k + 1) for k in range(n - 1))
    ring = [(k, (k + 1) % (n // 2)) for k in range(n // 2)]
    two = frozenset((min(e), max(e)) for e in ring) | {(min(a, b) + n // 2, max(a, b) + n // 2) for a, b in ring}
    codes = {CPDAG(n, frozenset(), lines).canonical_code() for lines in (one, two, one | {(0, n - 1)}, frozenset())}
    assert len(codes) == 4


def test_a_pattern_that_no_dag_fits_has_no_extension() -> None:
    square = CPDAG(4, frozenset(), frozenset({(0, 1), (1, 2), (2, 3), (0, 3)}))
    assert consistent_extension(square) is None
    with pytest.raises(ValueError, match="no DAG"):
        _ = EquivalenceClass(square).members


def test_drawn_classes_differ_keep_their_bounds_and_depend_on_the_seed_alone() -> None:
    draw = partial(sampled, 8, 30, edge_probability=0.6, most_members=40, most_independences=60)
    found = draw(seed="a")
    assert len({mec.id for mec in found}) == 30
    assert all(len(mec.members) <= 40 and len(mec.independences) <= 60 for mec in found)
    assert found == draw(seed="a") != draw(seed="b")
    for mec in found[:5]:
        assert mec.pattern == cpdag_of(mec.members[0])
        assert mec.id == f"8-{mec.pattern.canonical_code():x}"


@given(dags(8), st.data())
@settings(max_examples=200, deadline=None)
def test_d_separation_is_that_of_networkx(dag: Dag, data: st.DataObject) -> None:
    i, j = data.draw(st.sampled_from(list(combinations(range(len(dag)), 2))))
    rest = [k for k in range(len(dag)) if k not in (i, j)]
    given_ = set(data.draw(st.lists(st.sampled_from(rest), unique=True))) if rest else set()
    graph = nx.DiGraph([(a, b) for a in range(len(dag)) for b in bits(dag[a])])
    graph.add_nodes_from(range(len(dag)))
    apart, mask = nx.is_d_separator(graph, {i}, {j}, given_), sum(1 << k for k in given_)
    assert d_separated(dag, i, j, mask) == apart
    pair = list(combinations(range(len(dag)), 2)).index((i, j))
    assert enumeration.independent(np.array([dag], dtype=np.uint16))[0, pair, mask] == apart


@given(dags())
@settings(max_examples=100)
def test_a_class_has_exactly_the_dags_with_its_skeleton_and_v_structures(dag: Dag) -> None:
    mec = EquivalenceClass(cpdag_of(dag))
    assert dag in mec.members
    links = {(min(i, j), max(i, j)) for i in range(len(dag)) for j in bits(dag[i])}
    for member in mec.members:
        assert is_acyclic(member)
        assert v_structures(member) == v_structures(dag)
        assert {(min(i, j), max(i, j)) for i in range(len(dag)) for j in bits(member[i])} == links
        assert cpdag_of(member) == mec.pattern


@pytest.mark.parametrize("n", [3, 4, 5])
def test_the_arrows_of_a_pattern_are_those_all_members_share(n: int) -> None:
    for mec in classes(n):
        shared = {(i, j) for i, j in permutations(range(n), 2) if all(dag[i] >> j & 1 for dag in mec.members)}
        assert shared == mec.pattern.arrows


@given(dags(5), st.data())
@settings(max_examples=100)
def test_labels_and_independences_do_not_depend_on_names(dag: Dag, data: st.DataObject) -> None:
    mec = EquivalenceClass(cpdag_of(dag))
    order = tuple(data.draw(st.permutations(range(mec.n))))
    renamed, fresh = mec.renamed(order), EquivalenceClass(mec.pattern.renamed(order))
    assert renamed.independences == fresh.independences
    assert set(renamed.members) == set(fresh.members)
    assert renamed.id == fresh.pattern.canonical_code().__format__("x").join([f"{mec.n}-", ""])
    for relation in RELATIONS:
        for i, j in permutations(range(mec.n), 2):
            for semantics in MEANINGS:
                label = mec.entails(relation, i, j, semantics)
                assert label == renamed.entails(relation, order[i], order[j], semantics)
                assert label == fresh.entails(relation, order[i], order[j], semantics)


def test_the_relations_of_one_graph() -> None:
    chain = dag_of(4, [(0, 1), (1, 2), (0, 3), (2, 3)])  # A → B → C, A → D ← C
    assert holds(chain, "parent", 0, 1)
    assert holds(chain, "child", 1, 0)
    assert holds(chain, "ancestor", 0, 2)
    assert not holds(chain, "ancestor", 0, 1)
    assert holds(chain, "ancestor", 0, 3)  # also beside a direct arrow
    assert holds(chain, "descendant", 2, 0)
    assert holds(chain, "collider", 0, 2)
    assert not holds(chain, "confounder", 0, 2)
    assert holds(chain, "confounder", 1, 3)
    with pytest.raises(ValueError, match="known: parent"):
        holds(chain, "cousin", 0, 1)


# ---------------------------------------------------------------- words


def published() -> list[dict[str, str]]:
    rows: list[dict[str, str]] = json.loads((FIXTURES / "corr2cause_published.json").read_text(encoding="utf-8"))
    return rows


@pytest.mark.parametrize("row", published(), ids=lambda row: row["label"] + row["input"][-30:])
def test_premises_and_claims_are_worded_as_published(row: dict[str, str]) -> None:
    """Our words for the class of a published premise are that premise, letter for letter."""
    premise, claim = row["input"].removeprefix("Premise: ").split("\nHypothesis: ")
    names = premise.split("variables, ")[1].split(". All")[0].replace(" and ", ", ").split(", ")
    apart = {
        (names.index(a), names.index(b))
        for a, b in re.findall(r"([A-Z]) is independent of ([A-Z])\.", premise)
        + re.findall(r"([A-Z]) and ([A-Z]) are independent", premise)
    }
    linked = set(combinations(range(len(names)), 2)) - apart
    found = [
        EquivalenceClass(mec.pattern.renamed(order))
        for mec in classes(len(names))
        for order in permutations(range(len(names)))
        if {(min(e), max(e)) for e in mec.pattern.renamed(order).arrows} | mec.pattern.renamed(order).lines == linked
    ]
    assert premise in {wording.premise(names, *wording.relations(mec)) for mec in found}
    wordings = {
        words.format(i=i, j=j)
        for options in wording.PUBLISHED.values()
        for words in options
        for i in names
        for j in names
    }
    assert claim in wordings


def test_every_type_has_a_paraphrase_in_other_words() -> None:
    assert set(wording.PARAPHRASED) == set(wording.PUBLISHED) == set(RELATIONS)
    for relation in RELATIONS:
        assert not set(wording.PARAPHRASED[relation]) & set(wording.PUBLISHED[relation])


def test_refactored_letters() -> None:
    assert wording.refactored(["A", "B", "E"]) == ["Z", "Y", "V"]
    assert wording.series(["A"]) == "A"
    assert wording.series(["A", "B", "C"]) == "A, B and C"


# ---------------------------------------------------------------- proofs


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_every_proof_ends_in_the_label_and_says_only_what_holds(n: int) -> None:
    """All claims about all classes: the last line decides; pairs, arrows, cases and members are checked."""
    names = "ABCDE"[:n]
    for mec in classes(n):
        apart = {(i, j) for i, j, _ in mec.independences}
        for relation in RELATIONS:
            for i, j in permutations(range(n), 2):
                lines = write_proof(mec, names, Claim(relation, i, j)).splitlines()
                assert lines[-1].startswith("Holds" if mec.entails(relation, i, j) else "Fails")
                pairs = lines[1].removeprefix("Pairs: ").rstrip(".").split(". ")
                assert {(names.index(w[0]), names.index(w[2])) for w in pairs if " apart" in w} == apart
                for words in lines:
                    if words.startswith(("Case:", "Member:")):
                        arrows = arrows_in(words)
                        fits = [d for d in mec.members if all(d[a] >> b & 1 for a, b in arrows)]
                        assert fits
                        if words.startswith("Member:"):
                            assert len(fits) == 1
                            assert not holds(fits[0], relation, i, j)
                # the marks are the class's own: first what the colliders show, at last every shared arrow
                told = {
                    head: [w for w in lines if w.startswith(head)] for head in ("Between", "Arrows", "Forced", "Graph")
                }
                colliders = {arrow for a, c, b in mec.pattern.v_structures for arrow in ((a, c), (b, c))}
                assert set(arrows_in(told["Between"][0])) == set(arrows_in(told["Arrows"][0])) == colliders
                assert colliders | set(arrows_in(" ".join(told["Forced"]))) == mec.pattern.arrows
                assert set(arrows_in(told["Graph"][0])) == mec.pattern.arrows


def arrows_in(words: str) -> list[tuple[int, int]]:
    """The arrows (tail, head) that a line of a proof names."""
    found = re.findall(r"([A-E]) ([A-E])(?: |: [^:]*: )(->|<-)", words)
    return [tuple("ABCDE".index(x) for x in ((a, b) if mark == "->" else (b, a))) for a, b, mark in found]  # type: ignore[misc]


@pytest.mark.parametrize("n", [4, 5])
def test_cases_cover_every_member(n: int) -> None:
    names = "ABCDE"[:n]
    for mec in classes(n):
        for relation in ("ancestor", "collider", "confounder"):
            for i, j in permutations(range(n), 2):
                cases = [
                    w for w in write_proof(mec, names, Claim(relation, i, j)).splitlines() if w.startswith("Case:")
                ]
                if cases:
                    covered = set()
                    for words in cases:
                        arrows = arrows_in(words)
                        covered |= {d for d in mec.members if all(d[a] >> b & 1 for a, b in arrows)}
                    assert covered == set(mec.members)


@pytest.mark.parametrize(
    ("fixture", "arrows", "claim"),
    [
        ("proof_chain", [(0, 1), (1, 2)], ("parent", 0, 1)),
        ("proof_collider", [(0, 1), (2, 1)], ("collider", 0, 2)),
        ("proof_member", [(0, 3), (2, 3), (0, 1), (1, 2), (3, 4)], ("confounder", 0, 3)),
    ],
)
def test_a_proof_in_full(fixture: str, arrows: list[tuple[int, int]], claim: tuple[str, int, int]) -> None:
    """A chain, a collider and a claim that only one member of a class refutes, as a model reads them."""
    n = 1 + max(max(arrow) for arrow in arrows)
    mec = EquivalenceClass(cpdag_of(dag_of(n, arrows)))
    assert write_proof(mec, "ABCDE"[:n], Claim(*claim)) + "\n" == (FIXTURES / f"{fixture}.txt").read_text(
        encoding="utf-8"
    )


# ---------------------------------------------------------------- rows and splits


def test_no_canonical_class_is_in_two_splits(splits: Splits) -> None:
    groups = {
        "sft": {e.group for e in splits.sft},
        "grpo": {e.group for e in splits.grpo},
        "validation": {e.group for e in splits.validation},
        "test": {e.group for rows in splits.tests.values() for e in rows},
    }
    for one, other in (("sft", "test"), ("grpo", "test"), ("validation", "test"), ("sft", "validation")):
        assert not groups[one] & groups[other]
    assert splits.proof["overlap"] == 0
    listed = splits.proof["classes"]
    assert sum(len(ids) for ids in listed.values()) == 5 + 20 + 142
    assert groups["test"] <= set(listed["test"])


def test_neither_size_nor_type_tells_the_label(splits: Splits) -> None:
    rows = splits.tests["test"]
    assert Counter(e.gold for e in rows)["Yes"] == len(rows) // 2
    counts: Counter[tuple[object, ...]] = Counter()
    for e in make_task(test_rows=3000, perturbed_rows=0).load().tests["test"]:
        kind = {"child": "parent", "descendant": "ancestor"}.get(e.tags["relation"], e.tags["relation"])
        counts[e.tags["n"], kind, e.gold] += 1
    for n, kind in {(n, kind) for n, kind, _ in counts}:
        yes, no = counts[n, kind, "Yes"], counts[n, kind, "No"]
        assert yes
        assert no
        if yes + no > 200:
            assert 0.4 < yes / (yes + no) < 0.6


def test_letter_order_tells_nothing_beyond_the_type() -> None:
    """In the published set every "later causes earlier" claim is negative; renaming takes that away."""
    rows = make_task(test_rows=3000, perturbed_rows=0).load().tests["test"]
    for relation in ("child", "descendant"):
        mine = [e.gold == "Yes" for e in rows if e.tags["relation"] == relation]
        assert 0.4 < sum(mine) / len(mine) < 0.6


Seen = tuple[str, bool, str]  # type of claim, both directions taken together; whether the earlier letter causes; gold


def accuracy_of_the_best_guess(rows: list[Seen], *, letters: bool) -> float:
    """By type, or by type and letter order: learned on one half, tried on the other."""
    votes: dict[tuple[object, ...], Counter[str]] = {}
    for kind, earlier, gold in rows[::2]:
        votes.setdefault((kind, earlier and letters), Counter())[gold] += 1
    guesses = {key: count.most_common(1)[0][0] for key, count in votes.items()}
    return sum(guesses[kind, earlier and letters] == gold for kind, earlier, gold in rows[1::2]) / len(rows[1::2])


def test_type_and_letter_order_predict_no_better_than_type_alone_after_renaming() -> None:
    """Of the published rows they do: there a later letter never causes an earlier one."""
    turned = {"child": "parent", "descendant": "ancestor"}
    rng = random.Random(0)

    def gain(rows: list[Seen]) -> float:
        rng.shuffle(rows)
        kinds = {kind for kind, _, _ in rows}
        yes = {kind: [row for row in rows if row[0] == kind and row[2] == "Yes"] for kind in kinds}
        no = {kind: [row for row in rows if row[0] == kind and row[2] == "No"] for kind in kinds}
        even = [row for kind in sorted(kinds) for row in yes[kind] + no[kind][: len(yes[kind])]]
        rng.shuffle(even)
        by_type, by_letters = (accuracy_of_the_best_guess(even, letters=letters) for letters in (False, True))
        return by_letters - by_type

    ours = make_task(n=[5], test_rows=6000, perturbed_rows=0, test_classes=0.8).load().tests["test"]
    seen = [(turned.get(r := e.tags["relation"], r), r not in turned, e.gold) for e in ours]
    assert abs(gain(seen)) < 0.03
    theirs = [slot for one in published_classes(5) for slot in claims_of(one)]
    assert gain([(turned.get(s.relation, s.relation), s.relation not in turned, s.gold) for s in theirs]) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("balance", ["balanced", "natural"])
def test_rows_of_six_variables_have_the_share_that_was_asked_for(balance: str) -> None:
    phases = [{"n": [6], "rows": 200}]
    found = make_task(n=[6], balance=balance, phases=phases, max_independences=60, perturbed_rows=10).load()
    share = sum(e.gold == "Yes" for e in found.tests["test"]) / len(found.tests["test"])
    assert share == 0.5 if balance == "balanced" else 0.15 < share < 0.45
    assert found.proof["overlap"] == 0
    assert not {e.group for e in found.sft} & {e.group for e in found.tests["test"]}
    assert {e.tags["n"] for e in found.sft} == {6}


def test_rows_of_the_published_program_keep_its_letters_and_have_no_proofs() -> None:
    make = partial(make_task, mode="paper", n=[4, 5], phases=[{"n": [4, 5], "rows": 60, "proof_fraction": 0.0}])
    found = make(perturbed_rows=10).load()
    rows = [*found.sft, *found.grpo, *found.tests["test"]]
    assert all(e.tags["names"] == "ABCDE"[: e.tags["n"]] and e.tags["mode"] == "paper" for e in rows)
    assert all("Claim:" not in e.target for e in rows)
    assert found.proof["overlap"] == 0
    with pytest.raises(RecipeError, match="a proof cannot end in a wrong label"):
        make_task(mode="paper")
    with pytest.raises(RecipeError, match=r"task\.params\.labels: mode paper"):
        make(labels="three")


def test_semantics_are_settings_of_the_task() -> None:
    """Strict claims differ from the published ones exactly where a direct arrow stands beside a path."""
    strict = make_task(semantics={"indirect": "strict"}, balance="natural", test_rows=400).load()
    by_id = {mec.id: mec for n in (3, 4, 5) for mec in classes(n)}
    plain = make_task(balance="natural", test_rows=400).load()
    assert [e.question for e in strict.tests["test"]] == [e.question for e in plain.tests["test"]]
    changed = [(a, b) for a, b in zip(strict.tests["test"], plain.tests["test"], strict=True) if a.gold != b.gold]
    assert changed
    for one, other in changed:
        assert (one.gold, other.gold) == ("No", "Yes")
        assert one.tags["relation"] in ("ancestor", "descendant")
        assert by_id[one.group].id == other.group
    with pytest.raises(RecipeError, match="did you mean 'strict'"):
        make_task(semantics={"indirect": "strickt"})


def test_every_label_is_the_solvers(splits: Splits) -> None:
    by_id = {mec.id: mec for n in (3, 4, 5) for mec in classes(n)}
    for example in [*splits.sft, *splits.tests["test"]][:300]:
        mec = by_id[example.group]
        names = list(example.tags["names"])
        premise = example.question.split("\n")[0].removeprefix("Premise: ")
        matches = [
            renamed
            for order in permutations(range(mec.n))
            if wording.premise(names, *wording.relations(renamed := mec.renamed(order))) == premise
        ]
        assert matches
        entailed = matches[0].entails(example.tags["relation"], example.tags["i"], example.tags["j"])
        assert example.gold == ("Yes" if entailed else "No")


def test_perturbed_rows_are_test_rows_in_other_words(splits: Splits) -> None:
    plain = {e.id: e for e in splits.tests["test"]}
    for name in ("paraphrased", "refactored"):
        for example in splits.tests[name]:
            origin = plain[example.id.replace(name, "test")]
            assert (example.gold, example.group) == (origin.gold, origin.group)
            premise, claim, _ = example.question.split("\n")
            old_premise, old_claim, _ = origin.question.split("\n")
            assert claim != old_claim
            assert (premise == old_premise) == (name == "paraphrased")
            if name == "refactored":
                assert not set(re.findall(r"\b([A-E])\b", example.question))


def test_targets_are_graded_correct(splits: Splits) -> None:
    task = make_task()
    for example in splits.sft:
        completion = example.target.removeprefix("<think>")
        assert verdict(completion, prompt_opens_think=True) == example.gold
        assert task.grade(example, completion, True).correct


def test_label_targets_state_the_verdict_at_once() -> None:
    rows = make_task(phases=[{"n": [3, 4], "rows": 60, "proof_fraction": 0.0}]).load().sft
    assert {e.target for e in rows} == {f"<think>\n</think>\nTherefore: {gold}" for gold in ("Yes", "No")}


def test_phases_come_in_their_order() -> None:
    rows = make_task(phases=[{"n": [3], "rows": 20}, {"n": [5], "rows": 30}]).load().sft
    assert [e.tags["n"] for e in rows] == [3] * 20 + [5] * 30
    assert [e.tags["phase"] for e in rows] == [0] * 20 + [1] * 30


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    assert make_task(seed=3).load() == make_task(seed=3).load()
    assert make_task(seed=3).load().sft != make_task(seed=4).load().sft


def test_a_shuffled_premise_says_the_same_in_another_order_and_its_proof_cites_what_it_says_first() -> None:
    plain, shuffled = (
        make_task(phases=[{"n": [4, 5], "rows": 40, "shuffled": share}]).load().sft for share in (0.0, 1.0)
    )
    assert all(e.question.split("follows: ")[1] for e in shuffled)
    moved = 0
    for example in shuffled:
        premise = example.question.split("\n")[0]
        statements = [s for s in re.split(r"(?<=\.) (?:However, )?", premise.split("follows: ")[1]) if s]
        correlations = [s for s in statements if "correlates" in s]
        moved += correlations != sorted(correlations)
        for a, b, cited in re.findall(r"(\w) (\w) apart given ([\w ]+)\.", example.target):
            mine = [s for s in statements if re.match(rf"{a} (is independent of|and) {b}\b", s)]
            first = re.findall(r"given (.*)\.", mine[0])
            assert cited == (" ".join(re.findall(r"[A-Z]", first[0])) if first else "nothing")
    assert moved > 30
    assert Counter(e.gold for e in plain) == Counter(e.gold for e in shuffled)


def test_grpo_may_have_classes_of_its_own() -> None:
    found = make_task(grpo_only_classes=0.5).load()
    assert {e.group for e in found.grpo} - {e.group for e in found.sft}
    assert found.proof["classes"]["grpo"]


# ---------------------------------------------------------------- rows from a file

OPENING = (
    "Suppose there is a closed system of 2 variables, A and B. All the statistical relations among these 2 variables"
)
GOOD = {
    "input": f"Premise: {OPENING} are as follows: A correlates with B.\nHypothesis: A directly causes B.",
    "label": 0,
}


def from_file(path: Path, on_bad_row: str = "error") -> Splits:
    choice = TaskChoice("corr2cause", "path", str(path), None, on_bad_row, {})  # type: ignore[arg-type]
    return task_of(choice, 0).load()


def test_rows_of_the_published_schema_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(GOOD) for _ in range(3)), encoding="utf-8")
    found = from_file(file)
    rows = [*found.sft, *found.validation, *found.tests["test"]]
    assert [e.gold for e in rows] == ["No"] * 3
    assert len({e.group for e in rows}) == 1


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{not json", "not JSON (Expecting property name enclosed in double quotes at character 2)"),
        (json.dumps({"input": GOOD["input"]}), "no label"),
        (json.dumps({**GOOD, "label": "maybe"}), "label: got 'maybe'; expected 0, 1 or one of"),
        (json.dumps({**GOOD, "input": "A causes B"}), 'input is not "Premise: …"'),
        ("[1]", "not a mapping with input and label"),
    ],
)
def test_a_broken_line_is_named_by_file_and_line(tmp_path: Path, line: str, told: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n{line}\n{json.dumps(GOOD)}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        from_file(file)
    assert f"{file}:2: {told}" in str(caught.value)
    assert "task.on_bad_row=skip" in str(caught.value)
    assert from_file(file, "skip").proof["skipped"] == [caught.value.problems[0]]


@pytest.mark.parametrize(
    ("name", "told"), [("none.csv", "does not exist"), ("rows.xlsx", "expected .jsonl, .json, .csv or .parquet")]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, told: str) -> None:
    if name != "none.csv":
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=re.escape(told)):
        from_file(tmp_path / name)
