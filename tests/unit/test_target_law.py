"""One law for targets: what SFT learns is graded right and paid in full, or the row has no gold and is reported."""

from __future__ import annotations

import importlib
import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import only, run_cli
from target_cases import BAD, BEGIN, CASES, DOCS, END, UNVERIFIED, Case, row, table

from pipeline import preprocess
from pipeline.config.cluster import read_cluster
from pipeline.config.recipe import Recipe, TaskChoice, read
from pipeline.core.errors import DataError
from pipeline.rewards.reward import make_sample
from pipeline.scoring import answers
from pipeline.tasks.gsm8k import Gsm8k
from pipeline.tasks.rows import SAMPLES
from pipeline.tasks.task import Example, Splits, Task, group_of, task_of
from pipeline.workflow.artifact import open_artifact
from pipeline.workflow.progress import Progress, ProgressFile, describe
from pipeline.workflow.runtime import Runtime

ROOT = Path(__file__).parents[2]
TASKS = {"mathcode": "math_science", "scibench": "math_science", "verifiable": "medical"}
FEW: dict[str, dict[str, Any]] = {
    "gsm8k": {"test": 1, "validation": 1},
    "math_science": {"test": 1, "validation": 1},
    "medical": {"test": 1, "validation": 1, "short": 1},
    "human_like": {"test": 1, "validation": 1},
}


def make(name: str, source: Any, path: Path | None = None, on_bad_row: Any = "error", **params: Any) -> Task:
    return task_of(TaskChoice(name, source, str(path) if path else None, None, on_bad_row, params), 0)


def every_row(splits: Splits) -> list[Example]:
    return [*splits.sft, *splits.grpo, *splits.validation, *(e for rows in splits.tests.values() for e in rows)]


def breach(task: Task, example: Example) -> str | None:
    """What is wrong with a row by the judge and the form reward themselves."""
    if not example.gold or not example.target:
        return None
    sample = make_sample(task, example, example.target, False, False)
    verdict = sample.grade
    if not (verdict.answered and (verdict.correct or verdict.proxy) and sample.well_formed):
        return f"{example.id}: {example.target[-200:]!r} for {example.gold!r}: {verdict}, form {sample.well_formed}"
    return None


# ---------------------------------------------------------------- every row that there is

CORR2CAUSE: dict[str, dict[str, Any]] = {
    "proofs": {"phases": [{"n": [3, 4, 5], "rows": 300}]},
    "short proofs": {"phases": [{"n": [3, 4], "rows": 100, "proof": "short", "shuffled": 0.5}]},
    "bare verdicts": {"phases": [{"n": [3, 4], "rows": 100, "proof_fraction": 0.0}]},
    "three answers": {"phases": [{"n": [3, 4], "rows": 100}], "labels": "three"},
    "stories": {"phases": [{"n": [3, 4], "rows": 100}], "style": "story"},
    "plusplus": {"phases": [{"n": [3, 4], "rows": 100}], "style": "plusplus"},
    "minimal": {"phases": [{"n": [3, 4], "rows": 100}], "premise": "minimal"},
    "paper": {"phases": [{"n": [3, 4], "rows": 100, "proof_fraction": 0.0}], "mode": "paper"},
}
SMALL: dict[str, Any] = {"n": [4], "grpo_rows": 8, "validation_rows": 8, "test_rows": 8, "perturbed_rows": 4}


@pytest.mark.parametrize("words", CORR2CAUSE)
def test_every_generated_row_is_graded_right_and_its_form_is_paid(words: str) -> None:
    task = make("corr2cause", "generated", **(SMALL | CORR2CAUSE[words]))
    splits = task.load()
    learned = [*splits.sft, *splits.validation]
    assert [text for text in (breach(task, example) for example in learned) if text] == []
    assert preprocess.target_problems(task, learned) == ([], [e.id for e in learned if "<think>\n</think>" in e.target])
    for example in every_row(splits):
        assert task.judge(example, example.target, False, False).correct


def test_rows_without_a_thought_among_proofs_are_counted_and_the_form_asks_for_one() -> None:
    """`proof_fraction: 0.5` teaches both; where nothing teaches a thought, the form has none either."""
    mixed = make("corr2cause", "generated", **{**SMALL, "phases": [{"n": [3, 4], "rows": 100, "proof_fraction": 0.5}]})
    splits = mixed.load()
    unpaid, thoughtless = preprocess.target_problems(mixed, splits.sft)
    assert unpaid == []
    assert 20 < len(thoughtless) < 80
    assert not mixed.is_well_formed("<think>\n</think>\nTherefore: Yes", False)
    bare = make("corr2cause", "generated", **{**SMALL, "phases": [{"n": [3, 4], "rows": 10, "proof_fraction": 0.0}]})
    assert bare.is_well_formed("<think>\n</think>\nTherefore: Yes", False)
    assert bare.is_well_formed("<think>so it is</think>\nTherefore: Yes", False)
    assert not bare.is_well_formed("<think>.</think>\nTherefore: Yes", False)
    assert not bare.is_well_formed("Therefore: Yes", False)


def test_every_published_row_of_corr2cause_is_graded_right_and_its_form_is_paid() -> None:
    task = make("corr2cause", "path", ROOT / "tests" / "fixtures" / "corr2cause_released.csv")
    splits = task.load()
    assert splits.sft
    assert [text for text in (breach(task, example) for example in every_row(splits)) if text] == []
    unpaid, thoughtless = preprocess.target_problems(task, splits.sft)
    assert (unpaid, len(thoughtless)) == ([], len(splits.sft))


@pytest.mark.parametrize("name", sorted(FEW))
@pytest.mark.parametrize("source", ["sample", "path"])
def test_every_sample_row_is_graded_right_and_its_form_is_paid(name: str, source: str, tmp_path: Path) -> None:
    cls = importlib.import_module(f"pipeline.tasks.{name}").TASK
    path = tmp_path / "all.jsonl"
    files = [path for path in sorted(SAMPLES.glob("*.jsonl")) if TASKS.get(path.stem, _of(path.stem)) == name]
    path.write_text("".join(file.read_text(encoding="utf-8") for file in files))
    task = make(name, source, path if source == "path" else None, **cls.smoke_test_params(cls))
    splits = task.load()
    found = every_row(splits)
    assert [text for text in (breach(task, example) for example in found) if text] == []
    assert splits.proof["skipped"] == []
    assert preprocess.target_problems(task, [*splits.sft, *splits.validation]) == ([], [])
    if name in ("gsm8k", "math_science"):
        without = {example.id for example in found if not example.gold}
        assert without == {text.partition(":")[0] for text in splits.proof.get("without_gold", [])}
        assert len(without) == (name == "math_science")  # the row that proves and states nothing


def _of(stem: str) -> str:
    return "medical" if stem.startswith("medical") else stem


# ---------------------------------------------------------------- the cases of the page


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.task}-{case.said[:30]!r}")
def test_what_becomes_of_a_row(case: Case, tmp_path: Path) -> None:
    name = TASKS.get(case.task, case.task)
    good = next(one for one in CASES if one.task == case.task and one.gold not in (BAD, UNVERIFIED))
    rows = [row(case), *(row(good, number) for number in range(1, 7))]
    if name == "medical":  # one kind alone would leave the other empty, which is fine
        rows += [row(next(one for one in CASES if one.task == "medical"), number) for number in range(7, 12)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(values) + "\n" for values in rows))
    task = make(name, "path", path, "skip", **FEW[name])
    splits = task.load()
    mine = {e.id: e for e in every_row(splits) if "number 0?" in e.question}
    told = [*splits.proof["skipped"], *splits.proof.get("without_gold", [])]
    if case.gold == BAD:
        assert mine == {}
        assert [f"{path}:1: " in text and case.ends in text for text in told] == [True]
        return
    assert [text for text in (breach(task, example) for example in mine.values()) if text] == []
    if case.gold == UNVERIFIED:
        assert [case.ends in text for text in told] == [True]
        assert not any("number 0?" in example.question for example in splits.grpo)
        for example in mine.values():  # none where it cannot be learned from either
            assert example.gold == ""
            assert task.judge(example, "<think>x</think>It is 9.", False, False).correct is None
        return
    (example,) = mine.values()
    assert told == []
    assert example.gold == case.gold
    learned = next((e for e in mine.values() if e.target), example)
    assert learned.target.endswith(case.ends) or (not learned.target and example in splits.grpo)


def test_the_table_of_the_docs_is_made_of_these_cases() -> None:
    """`python tests/support/target_cases.py` writes it."""
    page = DOCS.read_text(encoding="utf-8")
    assert page.partition(BEGIN)[2].partition(END)[0].strip() == table()


# ---------------------------------------------------------------- any row

WORDS = st.sampled_from(
    [
        *(
            "so",
            "5",
            "12.5",
            r"\boxed{15}",
            r"\boxed{9}",
            r"\boxed{}",
            "\\boxed{",
            "}",
            "$",
            r"\$",
            "####",
            "\n",
            " ",
            ".",
        ),
        *(
            "The answer is",
            "Answer:",
            "7",
            "= 3",
            "or",
            "<think>",
            "</think>",
            r"\sqrt{2}",
            "cm",
            "not",
            "apples",
            "x",
        ),
        *("**Final answer:**", "#### 5", "####\n5", "1,000", "-3", "3/4", "%", r"\text{m}", "(A)", "\u200b", "٧", "…"),
    ]
)
TEXTS = st.lists(WORDS, min_size=1, max_size=8).map(" ".join)


def learn(name: str, values: list[dict[str, Any]], folder: Path) -> tuple[Task, Splits]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in values))
    task = make(name, "path", path, "skip", **FEW[name])
    return task, task.load()


def is_lawful(name: str, values: list[dict[str, Any]], folder: Path) -> None:
    """Every row keeps the law or is told of, each once; the rows after the first ones are good ones."""
    good = [row(next(c for c in CASES if TASKS.get(c.task, c.task) == name), number) for number in range(90, 94)]
    task, splits = learn(name, [*values, *good], folder)
    assert [text for text in (breach(task, example) for example in every_row(splits)) if text] == []
    told = {text.partition(":")[0] for text in splits.proof.get("without_gold", [])}
    ids = {e.id for e in every_row(splits)} | set(splits.proof["same_question"]) | told
    assert len(splits.proof["skipped"]) + len(ids) == len(values) + len(good)
    without = {e.id for e in every_row(splits) if not e.gold}
    if name in ("gsm8k", "math_science"):
        assert without <= told
    assert preprocess.target_problems(task, splits.sft)[0] == []


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=4, max_size=12))
def test_any_answer_of_gsm8k_keeps_the_law_or_is_a_bad_row(texts: list[str]) -> None:
    is_lawful("gsm8k", [{"question": f"q {k}", "answer": text} for k, text in enumerate(texts)], _folder())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS, st.booleans()), min_size=4, max_size=12))
def test_any_message_keeps_the_law_or_has_no_gold(rows: list[tuple[str, str, bool]]) -> None:
    values = []
    for k, (first, last, one) in enumerate(rows):
        parts = [{"type": "text", "content": last}] if one else [{"type": "code", "content": first}]
        parts += [] if one else [{"type": "text", "content": last}]
        turns = [{"role": "user", "content": f"q {k}"}, {"role": "assistant", "content": parts}]
        values.append({"messages": turns})
    is_lawful("math_science", values, _folder())


UNITS = st.one_of(
    st.text(max_size=12),
    st.lists(
        st.sampled_from(
            ["$", r"\$", "{", "}", "\\", r"\mathrm{~N}", "10^{-3}", "m", "/", "=", "or", " ", "%", r"\frac", "^"]
        ),
        max_size=6,
    ).map("".join),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["5", "-2.5", "+7.30", "1e5", "0", "1,500", "3/4"]), UNITS), min_size=4, max_size=12
    )
)
def test_any_unit_of_scibench_keeps_the_law(rows: list[tuple[str, str]]) -> None:
    """A unit that cannot be read back is left out of the target; no row loses its gold for it."""
    fields = [
        {"problem_text": f"q {k}", "answer_number": number, "unit": unit} for k, (number, unit) in enumerate(rows)
    ]
    values = [{**one, "solution": "so"} for one in fields]
    folder = _folder()
    is_lawful("math_science", values, folder)
    assert learn("math_science", values, folder)[1].proof["without_gold"] == []


def _folder() -> Path:
    import tempfile

    return Path(tempfile.mkdtemp(prefix="therefore-law-"))


@given(st.fractions(min_value=-1000, max_value=1000), st.integers(0, 6))
def test_the_wording_of_a_number_is_kept_and_its_gold_is_the_number(value: Fraction, places: int) -> None:
    from pipeline.tasks.gsm8k import _digits, _solution

    assert Fraction(_digits(value)) == value
    for words in (
        f"{round(float(value), places):.{places}f}",
        f"{round(value):,}",
        f"{value.numerator}/{value.denominator}",
    ):
        solution = _solution(f"It is worked out.\n#### {words}")
        assert solution.problem is None
        assert solution.target.endswith(f"\n#### {words}")
        assert Fraction(solution.gold) == Fraction(words.replace(",", ""))


# ---------------------------------------------------------------- rewards and evaluation


ENDS = [
    *("Therefore: {}", "#### {}", r"So \boxed{{{}}}.", "The answer is {}", "Final answer: {}", "{}", "x", ""),
    *("Therefore: {} or not", "#### {} or 7", r"\boxed{{{}}} \boxed{{7}}"),
]


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(["gsm8k", "math_science", "medical", "corr2cause", "human_like"]),
    thought=st.sampled_from(["<think>so it is</think>", "so it is</think>", "<think></think>", "", "<think>so", "."]),
    end=st.sampled_from(ENDS),
    wrong=st.booleans(),
    cut=st.integers(0, 40),
    prompt_opens_think=st.booleans(),
    truncated=st.booleans(),
    which=st.integers(0, 30),
)
def test_rewards_and_evaluation_never_disagree(
    name: str, thought: str, end: str, wrong: bool, cut: int, prompt_opens_think: bool, truncated: bool, which: int
) -> None:
    """Correctness (or the proxy) pays exactly what evaluation counts as right, of whole and of cut-off answers."""
    from pipeline.rewards.correctness import correctness
    from pipeline.rewards.format import format
    from pipeline.rewards.match import match

    task, rows = _judged(name)
    example = rows[which % len(rows)]
    text = f"{thought}\n{end.format('987654' if wrong else example.gold)}"
    text = text[: len(text) - cut] if cut < len(text) else text
    sample = make_sample(task, example, text, prompt_opens_think, truncated)
    counted = task.judge(example, text, prompt_opens_think, truncated)
    assert sample.grade == counted
    assert correctness(sample) == (None if counted.correct is None else float(counted.correct))
    assert match(sample) == (None if counted.proxy is None else float(counted.proxy))
    if truncated:
        assert not correctness(sample)
        assert not match(sample)
        assert not format(sample)
        assert (counted.answered, counted.reason) == (False, "truncated")
    if not counted.answered:
        assert not counted.correct
        assert not counted.proxy
        assert counted.reason in answers.REASONS


_JUDGED: dict[str, tuple[Task, list[Example]]] = {}


def _judged(name: str) -> tuple[Task, list[Example]]:
    if name not in _JUDGED:
        cls = importlib.import_module(f"pipeline.tasks.{name}").TASK
        task = make(name, cls.sources[0] if name == "corr2cause" else "sample", **cls.smoke_test_params(cls))
        _JUDGED[name] = task, every_row(task.load())
    return _JUDGED[name]


# ---------------------------------------------------------------- kinds of rows, and nothing to learn


def recipe_on(path: Path, name: str, *words: str) -> Recipe:
    recipe, problems = read(name, ["task.source=path", f"task.path={path}", *words])
    assert recipe is not None, problems
    return recipe


def prepare(recipe: Recipe, out: Path) -> tuple[dict[str, Any], Progress]:
    cluster, _ = read_cluster("local")
    assert cluster is not None
    out.mkdir(exist_ok=True)
    runtime = Runtime(cluster, ProgressFile(None, "preprocess"), 0, 1, out, None, None)
    return preprocess.run(recipe, {}, out, runtime), runtime.progress.now


BOTH: list[dict[str, Any]] = [
    {"Question": f"Why {k}?", "Complex_CoT": "since", "Response": "so", "Open-ended Verifiable Question": None}
    | {"Ground-True Answer": None}
    for k in range(20)
]
SHORT: list[dict[str, Any]] = [
    {"Question": None, "Complex_CoT": None, "Response": "", "Open-ended Verifiable Question": f"Which {k}?"}
    | {"Ground-True Answer": "iron"}
    for k in range(10)
]


def test_a_kind_of_row_is_told_by_what_is_filled(tmp_path: Path) -> None:
    """A file with the columns of both kinds, null in one: it gave no SFT row at all."""
    both = [*BOTH, *SHORT, {**BOTH[0], **SHORT[0], "Question": "Both?", "Complex_CoT": "t", "Response": "r"}]
    _, splits = learn("medical", both, tmp_path)
    every = every_row(splits)
    assert len({e.id for e in every if e.target}) == 21
    assert len({e.id for e in every if e.gold == "iron"}) == 11
    assert splits.proof["skipped"] == []
    empty = {**BOTH[0], "Response": None}
    _, splits = learn("medical", [*BOTH, *SHORT, empty], tmp_path)
    assert [text.partition(": ")[2] for text in splits.proof["skipped"]] == ["no Response (it is None)"]
    science: dict[str, Any] = {
        "problem_text": "How far?",
        "answer_number": "2",
        "unit": "m",
        "solution": "s",
        "messages": None,
    }
    math: dict[str, Any] = row(Case("mathcode", r"So \boxed{4}", "4", ""), 1) | dict.fromkeys(science, None)
    math = math | {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": r"So \boxed{4}"}]}
    mixed = [{**science, "problem_text": f"How far? {k}"} for k in range(5)]
    mixed += [{**math, "messages": [{"role": "user", "content": f"q {k}"}, math["messages"][1]]} for k in range(5)]
    _, splits = learn("math_science", mixed, tmp_path)
    assert (
        sorted(e.tags["set"] for e in {e.id: e for e in every_row(splits)}.values())
        == ["mathcode"] * 5 + ["scibench"] * 5
    )


def test_a_preprocess_that_leaves_nothing_to_learn_fails_then_and_there(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [*SHORT, {**BOTH[0], "Response": ""}]))
    few = ["task.params={short: 2, test: 1, validation: 1}", "task.on_bad_row=skip"]
    with pytest.raises(DataError) as caught:
        prepare(recipe_on(path, "medical", *few), tmp_path / "out")
    (told,) = caught.value.problems
    assert told.startswith(f"task: got no row for sft to learn from in {path}; expected one at least")
    assert "a row needs Question, Complex_CoT and Response" in told
    assert "sft 0, grpo 8" in told
    assert "1 rows cannot be read and were left out" in told
    assert "no Response" in told
    assert "Fix: " in told
    assert caught.value.exit_code == 2
    metrics, _ = prepare(recipe_on(path, "medical", *few, "grpo.init_from=base"), tmp_path / "out")  # --skip-sft
    assert metrics["rows"]["grpo"] == 8
    path.write_text("".join(json.dumps(one) + "\n" for one in BOTH))
    with pytest.raises(DataError, match="got no row for grpo to learn from"):
        prepare(recipe_on(path, "medical", *few), tmp_path / "out")
    assert prepare(recipe_on(path, "medical", *few, "grpo.init_from=none"), tmp_path / "out")[0]["rows"]["sft"] == 18


def test_the_command_line_says_so_with_exit_code_2_before_anything_trains(tmp_path: Path) -> None:
    path, runs = tmp_path / "rows.jsonl", tmp_path / "runs"
    path.write_text("".join(json.dumps(one) + "\n" for one in SHORT))
    words = ["task.source=path", f"task.path={path}", "task.params.short=2", "task.params.rows=null"]
    done = run_cli("run", "medical", *words, "--runs", str(runs), "--stages", "preprocess")
    assert done.returncode == 2, done.stderr
    assert "got no row for sft to learn from" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(runs.glob("medical/sft-*"))


def test_rows_without_a_gold_are_counted_named_and_not_rewarded(tmp_path: Path) -> None:
    chosen = [case for case in CASES if case.task == "mathcode" and "15}, then" in case.said] * 3
    chosen += [case for case in CASES if case.said.startswith("Half")] * 9
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row(case, k)) + "\n" for k, case in enumerate(chosen)))
    metrics, progress = prepare(
        recipe_on(path, "math_science", "task.params={test: 1, validation: 1}"), tmp_path / "out"
    )
    assert metrics["without_gold"] == 3
    assert metrics["unpaid_targets"] == 0
    (warning,) = progress.warnings
    assert warning.startswith(
        "3 rows have no gold answer, so they are not rewarded and nothing verifies them (splits.json"
    )
    assert "mathcode-1: two final answers disagree" in warning
    named = json.loads((tmp_path / "out" / "splits.json").read_text())["without_gold"]
    assert sorted(text.partition(":")[0] for text in named) == ["mathcode-1", "mathcode-2", "mathcode-3"]


class Lax(Gsm8k):
    """A task whose targets its own judge does not read: the mistake of a new task."""

    def _example(self, row: Any) -> Example:
        found = super()._example(row)
        return Example(
            found.id, found.question, found.gold, found.group, found.tags, found.target.replace("####", "So")
        )


def test_a_task_whose_targets_are_not_paid_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Lax(TaskChoice("gsm8k", "sample", None, None, "error", {}), Gsm8k.Params(), 0)
    monkeypatch.setattr(preprocess, "task_of", lambda *_: task)
    recipe, _ = read("gsm8k", ["task.source=sample"])
    assert recipe is not None
    metrics, progress = prepare(recipe, tmp_path / "out")
    assert metrics["unpaid_targets"] == metrics["rows"]["sft"] + metrics["rows"]["validation"]
    assert any("would not be paid in full by the task's own judge" in text for text in progress.warnings)
    assert any("its target is unanswered (no final answer is marked as one)" in text for text in progress.warnings)


# ---------------------------------------------------------------- copies and counts

DIFFERENT = [
    ("What is 3 + x?", "What is 3 - x?"),
    ("a+b", "a-b"),
    ("Simplify x+3.", "Simplify x-3."),
    ("What is -5 times 2?", "What is 5 times 2?"),
    ("Is 3 < x?", "Is 3 > x?"),
    ("(2+3)*4", "2+(3*4)"),
    ("x^2 = 4", "x*2 = 4"),
    ("What is 5!?", "What is 5?"),
    ("Find 3.5 of it", "Find 35 of it"),
    ("Find .5 of it", "Find 5 of it"),
    ("1,000 apples", "1,001 apples"),
    ("6 / 2", "6 * 2"),
    ("Is 50% more?", "Is 50 more?"),
    ("Where does a point to?", "Where does b point to?"),
]
COPIES = [
    ("What is 3 + x?", "what  is 3+x"),
    ("What is 3 − x?", "What is 3 - x?"),
    ("A well-known rule", "a well known rule."),
    ("1,000 apples", "1000 apples"),
    ("How much is the sum?", "How much is  sum"),
    ("Is a cat an animal?", "Is cat animal"),
    ("x² + 1", "x^{2}+1"),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_questions_that_differ_in_a_sign_are_no_copies(one: str, other: str) -> None:
    assert group_of(one) != group_of(other)


@pytest.mark.parametrize(("one", "other"), COPIES)
def test_questions_that_differ_in_writing_are_copies(one: str, other: str) -> None:
    assert group_of(one) == group_of(other)


@pytest.mark.parametrize("name", ["gsm8k", "math_science", "medical", "human_like"])
def test_every_task_keeps_questions_apart_that_differ_in_a_sign(name: str, tmp_path: Path) -> None:
    good = next(case for case in CASES if TASKS.get(case.task, case.task) == name)
    rows = []
    for sign in "+-":
        for k in range(4):
            text = json.dumps(row(good, k)).replace(f"number {k}?", f"{k} {sign} x?")
            rows.append(json.loads(text))
    _, splits = learn(name, rows, tmp_path)
    assert splits.proof["same_question"] == []


def test_counts_are_shown_as_counts_and_shared_rows_once(tmp_path: Path) -> None:
    progress = Progress("preprocess", state="done", figures={"rows": 14930.0, "loss": 0.31428, "reward": 1.0})
    assert describe(progress) == "rows 14,930, loss 0.3143, reward 1"
    assert (
        describe(Progress("sft", state="done", figures={"loss": float("nan"), "norm": float("inf")}))
        == "loss nan, norm inf"
    )
    recipe, _ = read("gsm8k", ["task.source=sample"])
    assert recipe is not None
    metrics, last = prepare(recipe, tmp_path / "out")
    assert metrics["rows"]["sft"] == metrics["rows"]["grpo"]
    assert last.figures["rows"] == sum(metrics["rows"].values()) - metrics["rows"]["grpo"]
    assert re.search(r"\brows \d+(,|$)", describe(last))


def test_the_end_of_preprocess_is_told_with_whole_numbers(tmp_path: Path) -> None:
    path, runs = tmp_path / "rows.jsonl", tmp_path / "runs"
    path.write_text(
        "".join(json.dumps({"question": f"{k} + 1?", "answer": f"{k}+1\n#### {k + 1}"}) + "\n" for k in range(1_234))
    )
    words = ["task.source=path", f"task.path={path}", "task.params.rows=null"]
    done = run_cli("run", "gsm8k", *words, "--runs", str(runs), "--stages", "preprocess")
    assert done.returncode == 0, done.stderr
    for told in (done.stderr + done.stdout, run_cli("status", "--runs", str(runs)).stdout):
        assert "rows 1,234" in told
        assert "e+04" not in told
    assert open_artifact(only(runs, "gsm8k/preprocess-*")).metrics["rows"]["sft"] < 1_234
