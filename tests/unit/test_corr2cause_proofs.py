"""Proofs of every length and style, checked step by step by a checker of its own; and that it refuses what is wrong."""

from __future__ import annotations

import random
import re
from itertools import permutations
from string import ascii_uppercase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.recipe import TaskChoice
from pipeline.scoring.answers import split_thought
from pipeline.tasks.corr2cause import Corr2Cause, wording
from pipeline.tasks.corr2cause.graphs import RELATIONS, EquivalenceClass, Semantics, classes, sampled
from pipeline.tasks.corr2cause.parse_premise import Claim
from pipeline.tasks.corr2cause.parse_thought import agreement, read_structure, true_structure
from pipeline.tasks.corr2cause.proof_checker import check_proof
from pipeline.tasks.corr2cause.proof_writer import Form, write_proof
from pipeline.tasks.task import Example, resolved_params, task_of

FORMS: tuple[Form, ...] = ("full", "short", "steps")
MEANINGS = (Semantics(), Semantics("strict", "descendant", "ancestor"), Semantics("strict", "child", "parent"))


def question(mec: EquivalenceClass, relation: str, i: int, j: int) -> str:
    names = "ABCDEFGHIJ"[: mec.n]
    premise = wording.premise(names, *wording.relations(mec))
    return f"Premise: {premise}\nHypothesis: {wording.hypothesis(relation, names[i], names[j])}"


def gold(mec: EquivalenceClass, relation: str, i: int, j: int, semantics: Semantics, three: bool) -> str:
    if mec.entails(relation, i, j, semantics):
        return "Yes"
    return "Unknown" if three and mec.allows(relation, i, j, semantics) else "No"


def told(mec: EquivalenceClass, *asked: object, form: Form = "full", three: bool = False) -> str:
    relation, i, j, semantics = asked
    assert isinstance(relation, str)
    assert isinstance(i, int)
    assert isinstance(j, int)
    assert isinstance(semantics, Semantics)
    claim = Claim(relation, i, j)
    return write_proof(mec, "ABCDEFGHIJ"[: mec.n], claim, None, semantics, form=form, three=three)


def check_refusal(asked: str, lines: str, old: str, new: str, problem: str) -> None:
    """The proof is valid as it is; with one change it has the problem, and no other."""
    assert check_proof(asked, lines).valid
    assert old in lines
    problems = check_proof(asked, lines.replace(old, new, 1)).problems
    assert len(problems) == 1
    assert problem in problems[0]


@pytest.mark.slow
@pytest.mark.parametrize("three", [False, True])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_proof_of_every_length_in_every_semantics_is_valid(n: int, three: bool) -> None:
    for mec in classes(n):
        for relation in RELATIONS:
            for i, j in permutations(range(n), 2):
                for semantics in MEANINGS:
                    for form in FORMS:
                        asked = (relation, i, j, semantics)
                        found = check_proof(
                            question(mec, relation, i, j),
                            told(mec, *asked, form=form, three=three),
                            semantics,
                            three=three,
                        )
                        assert found.problems == []
                        assert found.verdict == gold(mec, *asked, three)


@pytest.mark.parametrize(("n", "count"), [(5, 1500), (6, 600)])
def test_proofs_of_larger_classes_are_valid(n: int, count: int) -> None:
    """Drawn claims; of the entailed ones more, because cases are where a listing might stop early."""
    rng, listed = random.Random(n), classes(n)
    while count:
        mec, relation = rng.choice(listed), rng.choice(RELATIONS)
        i, j = rng.sample(range(n), 2)
        if mec.entails(relation, i, j) or rng.random() < 0.3:
            count -= 1
            found = check_proof(
                question(mec, relation, i, j), told(mec, relation, i, j, Semantics(), form=FORMS[count % 3])
            )
            assert found.problems == []
            assert found.verdict == ("Yes" if mec.entails(relation, i, j) else "No")


def test_a_yes_about_a_large_class_argues_by_cases_that_cover_it() -> None:
    """Entailed claims that no shared arrow shows, in the largest classes: no listing of members, and none left out."""
    found = 0
    for mec in [
        *sorted(classes(6), key=lambda mec: -mec.size)[:120],
        *sampled(8, 40, edge_probability=0.7, seed="large"),
    ]:
        for relation in ("ancestor", "collider", "confounder"):
            for i, j in permutations(range(mec.n), 2):
                if mec.entails(relation, i, j):
                    lines = told(mec, relation, i, j, Semantics(), form="short")
                    if "Case:" not in lines:
                        continue
                    found += 1
                    assert lines.count("Case:") <= 4
                    words = question(mec, relation, i, j)
                    assert check_proof(words, lines).valid
                    # the same argument with a case left out is none
                    parts = lines.split("\nCase:")
                    fewer = "\nCase:".join([parts[0], *parts[2:]])
                    assert not check_proof(words, fewer).valid
    assert found > 20


@given(st.integers(0, 10**6))
@settings(max_examples=400, deadline=None)
def test_no_change_of_a_word_makes_a_wrong_verdict_pass(seed: int) -> None:
    """One word of a proof is replaced; the checker refuses it, unless what it says is still true."""
    rng = random.Random(seed)
    n = rng.choice((4, 5))
    mec, relation = rng.choice(classes(n)), rng.choice(RELATIONS)
    i, j = rng.sample(range(n), 2)
    lines = told(mec, relation, i, j, Semantics(), form=rng.choice(FORMS))
    names = "ABCDE"[:n]
    word = rng.choice(list(re.finditer(r"->|<-|--|\||\b[A-E]\b|\b[a-z]+\b|Holds|Fails", lines)))
    like = [
        {"->", "<-", "--", "|"},
        set(names),
        {"Holds", "Fails"},
        {"passes", "collides"},
        {"linked", "apart", "open"},
    ]
    others = next((sorted(kind - {word[0]}) for kind in like if word[0] in kind), ["nothing"])
    changed = lines[: word.start()] + rng.choice(others) + lines[word.end() :]
    found = check_proof(question(mec, relation, i, j), changed)
    assert not found.valid or found.verdict == ("Yes" if mec.entails(relation, i, j) else "No")


@pytest.mark.parametrize(
    ("old", "new", "told_"),
    [
        ("A C apart given B", "A C linked", "in the premise they are independent"),
        ("A B linked", "A B apart given C", "the premise does not state this"),
        ("B passes", "B collides A B -> B C <-", "does not follow"),
        ("Graph: A B --.", "Graph: A B ->.", "not the arrows shown so far"),
        ("Neighbours: A: B.", "Neighbours: A: B C.", "neighbours of A"),
        ("Fails: not shared", "Holds: shared", "the arrow is not there"),
        ("Link: A open B", "Link: A into B", "not the link's orientation in the graph"),
        ("Claim: A direct B.\nLink", "Claim: A direct C.\nLink", "this is not the hypothesis"),
        ("Forced: none.\n", "", "Graph cannot come after Arrows"),
        ("Fails: not shared.", "", "no decision"),
        ("Arrows:", "Perhaps:", "not a step of a proof"),
        ("Between: A C given B: B passes.", "Between: A C", "cannot be read"),
    ],
)
def test_each_kind_of_wrong_step_is_named(old: str, new: str, told_: str) -> None:
    chain = next(mec for mec in classes(3) if len(mec.pattern.lines) == 2).renamed((1, 0, 2))
    chain = next(chain.renamed(o) for o in permutations(range(3)) if chain.renamed(o).independences == ((0, 2, (1,)),))
    lines = told(chain, "parent", 0, 1, Semantics())
    check_refusal(question(chain, "parent", 0, 1), lines, old, new, told_)


FORK = "Pairs: A B --. A C --. A D |. B C --. B D |. C D --."  # D and A meet at C, B is forced


def fork() -> EquivalenceClass:
    renamed = (mec.renamed(order) for mec in classes(4) for order in permutations(range(4)))
    return next(mec for mec in renamed if FORK in told(mec, "parent", 0, 1, Semantics(), form="steps"))


@pytest.mark.parametrize(
    ("old", "new", "told_"),
    [
        ("A D |.", "A D --.", "in the premise they are independent"),
        ("A D |.", "A D | B C D.", "the premise does not state this"),
        ("At A: B C. B C --.", "At A: B C D. B C --.", "neighbours of A"),
        ("At A: B C. B C --.", "At A: B C.", "not every pair of neighbours of A once"),
        ("At A: B C. B C --.\n", "", "not the next variable"),
        ("At D: C.\n", "", "not every variable was looked at"),
        ("A D | collides A C -> C D <-.", "A D | passes.", "C is not in the set"),
        ("A D | collides A C -> C D <-.", "A D | collides A C <- C D <-.", "does not follow"),
        ("A D | collides", "A D | B collides", "another set was cited"),
        ("C A from B from;", "C A open B from;", "not what was shown"),
        ("D A apart B apart; A B --.", "A B --.", "what a variable is to its ends is missing"),
        ("D A apart B apart; A B --.", "D A apart B apart; A B ->.", "no rule forces it"),
        ("Link: A B --.", "Link: A B ->.", "not the link's orientation in the graph"),
        ("Link: A B --.", "Link: A C ->.", "not the pair of the claim"),
    ],
)
def test_each_kind_of_wrong_step_of_a_proof_in_steps_is_named(old: str, new: str, told_: str) -> None:
    lines = told(fork(), "parent", 0, 1, Semantics(), form="steps")
    check_refusal(question(fork(), "parent", 0, 1), lines, old, new, told_)


@pytest.mark.parametrize(
    ("old", "new", "told_"),
    [
        ("Names: X A. M B.", "Names: M A. X B.", "not the variables, in their order"),
        ("Names: X A. M B.", "Names: X B. M A.", "not the first letters of the alphabet"),
        ("X M --, A B --.", "X M --, A C --.", "X M --: not A C --"),
        ("X M --, A B --.", "A B --.", "A B --: not "),
        ("Names: X A. M B. Q C. B D.\n", "", "neither linked nor apart"),
        ("Claim: A direct B.", "Claim: X direct M.", "this is not the hypothesis"),
    ],
)
def test_variables_with_other_names_are_called_by_letters(old: str, new: str, told_: str) -> None:
    mec, names = fork(), ("X", "M", "Q", "B")
    premise = wording.premise(names, *wording.relations(mec))
    asked = f"Premise: {premise}\nHypothesis: {wording.hypothesis('parent', 'X', 'M')}"
    lines = write_proof(mec, names, Claim("parent", 0, 1), None, Semantics(), form="steps")
    assert agreement(read_structure(lines, names, premise), true_structure(mec)) == dict.fromkeys(
        ("skeleton", "separating_sets", "v_structures", "cpdag", "compelled"), 1.0
    )
    check_refusal(asked, lines, old, new, told_)


@pytest.mark.parametrize(
    ("old", "new", "told_"),
    [
        ("Open From A: B. B: A C. C: B.", "Open From A: B. B: A. ", "not the nodes that follow B"),
        ("Open From A: B. B: A C. C: B.", "Open From C: B. B: A C. A: B.", "not the variable of the claim"),
        ("Open From A: B. B: A C. C: B.", "Open To A: B. B: A C. C: B.", "only a common cause is searched"),
    ],
)
def test_what_could_follow_is_checked_too(old: str, new: str, told_: str) -> None:
    chain = next(mec for mec in classes(3) if len(mec.pattern.lines) == 2).renamed((1, 0, 2))
    chain = next(chain.renamed(o) for o in permutations(range(3)) if chain.renamed(o).independences == ((0, 2, (1,)),))
    lines = told(chain, "ancestor", 0, 2, Semantics(), form="steps")
    check_refusal(question(chain, "ancestor", 0, 2), lines, old, new, told_)


@pytest.mark.parametrize("form", ["full", "steps"])
def test_the_structure_of_every_proof_is_read_whole(form: Form) -> None:
    for mec in [*classes(4), *classes(5)[::7]]:
        true, names = true_structure(mec), "ABCDE"[: mec.n]
        stated = read_structure(told(mec, "parent", 0, 1, Semantics(), form=form), names)
        assert all(share == 1.0 for share in agreement(stated, true).values()), (mec, stated)


# ---------------------------------------------------------------- rows of the task


def test_a_thought_is_a_proof_of_the_verdict_that_is_given_or_none() -> None:
    task, sft = rows(phases=[{"n": [3, 4], "rows": 20, "proof": "steps"}])
    example = next(one for one in sft if one.gold == "Yes")
    assert task.check_thought(example, example.target, False) == 1
    assert task.check_thought(example, example.target.replace("Therefore: Yes", "Therefore: No"), False) != 1
    assert task.check_thought(example, example.target.replace("Arrows:", "Perhaps:"), False) != 1
    assert task.check_thought(example, "Therefore: Yes", False) == 0  # right, and no reason
    bare, _ = rows(phases=[{"n": [3, 4], "rows": 20, "proof_fraction": 0.0}])
    assert bare.check_thought(example, example.target, False) is None  # it was not taught to prove
    assert task.check_thought(task.example_from_text("Does A cause B?"), example.target, False) is None


def test_phases_may_draw_any_letters_and_other_words() -> None:
    plain = {"n": [4, 5], "rows": 200, "proof": "steps"}
    task, sft = rows(phases=[plain, {**plain, "other_names": 0.5, "paraphrased": 0.25}])
    first, second = resolved_params(task)["phases"]
    assert "other_names" not in first  # steps of before the shares existed stay finished
    assert (second["other_names"], second["paraphrased"]) == (0.5, 0.25)
    before, after = sft[:200], sft[200:]
    assert {example.tags["names"] for example in before} == {"ABCD", "ABCDE"}
    drawn = [example for example in after if example.tags["names"] not in ("ABCD", "ABCDE")]
    assert 70 <= len(drawn) <= 130
    assert any(list(example.tags["names"]) != sorted(example.tags["names"]) for example in drawn)
    assert {letter for example in drawn for letter in example.tags["names"]} == set(ascii_uppercase[4:])
    assert 30 <= sum(example.tags["style"] == "paraphrased" for example in after) <= 70
    assert all(example.tags["style"] == "published" for example in before)


def rows(seed: int = 0, **params: object) -> tuple[Corr2Cause, list[Example]]:
    small = {"n": [4, 5], "phases": [{"n": [3, 4, 5], "rows": 60}], "grpo_rows": 20, "validation_rows": 20}
    few = {"test_rows": 40, "perturbed_rows": 20}
    task = task_of(TaskChoice("corr2cause", "auto", None, None, "error", {**small, **few, **params}), seed)
    assert isinstance(task, Corr2Cause)
    return task, task.load().sft


@pytest.mark.parametrize("premise", ["full", "minimal"])
@pytest.mark.parametrize("style", ["published", "paraphrased", "refactored", "plusplus", "story"])
@pytest.mark.parametrize("labels", ["two", "three"])
def test_every_target_in_every_style_is_a_valid_proof_of_its_gold(style: str, labels: str, premise: str) -> None:
    forms = ("short", "steps") if labels == "three" else ("full", "steps")
    shares = {"shuffled": 0.5, "paraphrased": 0.3, "other_names": 0.3}
    phases = [{"n": [3, 4, 5], "rows": 45, "proof": form, **shares} for form in forms]
    task, sft = rows(style=style, labels=labels, premise=premise, phases=phases)
    for example in sft:
        thought = split_thought(example.target, False).thought
        assert thought is not None
        found = check_proof(example.question, thought, task.semantics, three=labels == "three")
        assert found.problems == []
        assert found.verdict == example.gold
        assert task.grade(example, example.target, False).correct
        assert task.is_well_formed(example.target, False)
    assert {example.gold for example in sft} == set(task.golds)


def test_drawn_classes_of_many_variables_have_valid_proofs() -> None:
    phase = {"n": [7, 9], "rows": 30, "proof": "short"}
    task, sft = rows(n=[7, 9], sampled_classes=30, edge_probability=0.4, premise="minimal", phases=[phase])
    assert {example.tags["n"] for example in sft} == {7, 9}
    for example in sft:
        thought = split_thought(example.target, False).thought
        assert thought is not None
        assert check_proof(example.question, thought, task.semantics).valid
        assert example.tags["premise_tokens"] < 1000
