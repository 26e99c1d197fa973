"""The report's texts, from known answers: golden files, and claims that the intervals allow."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.recipe import Goal, TaskChoice
from pipeline.report import claim, format_figure, goal_met, notes, render, shown_metrics
from pipeline.scoring.metrics import MAIN_METRICS, Outcome, baseline_metrics, compare, summarize, unanswered_rows
from pipeline.scoring.predictions import Prediction, count_reasons
from pipeline.scoring.report_charts import draw
from pipeline.scoring.results import (
    Criterion,
    Difference,
    Figure,
    ModelResult,
    Report,
    ShownPrompt,
    SplitMetrics,
    StepRecord,
    Unanswered,
    to_json,
)
from pipeline.tasks.task import task_of

FIXTURES = Path(__file__).parents[1] / "fixtures"


def outcomes(right: int, unanswered: int = 0) -> list[Outcome]:
    """40 rows of 10 groups, half positive; the first `right` are correct, the last `unanswered` have no answer."""
    return [Outcome(f"row-{k}", f"g{k % 10}", k % 2 == 0, k < right, k < 40 - unanswered, 100 + k) for k in range(40)]


@pytest.fixture
def report() -> Report:
    stages = {"base": outcomes(0, 40), "sft": outcomes(24, 2), "grpo": outcomes(36)}
    names = {"base": "tiny base", "sft": "tiny SFT", "grpo": "tiny GRPO"}
    reasons = {"base": {"truncated": 30, "no_verdict": 10}, "sft": {"two_verdicts": 2}, "grpo": None}
    models = [
        model(names[role], role, "test", SplitMetrics(summarize(rows, 200, 0.95, 0), {}, reasons[role]))
        for role, rows in stages.items()
    ]
    differences = [
        Difference(names[before], names[after], after, {"test": compare(stages[before], stages[after], 200, 0.95, 0)})
        for before, after in (("base", "sft"), ("sft", "grpo"))
    ]
    return Report(
        title="tiny",
        task_title="Corr2Cause",
        written="2026-11-28 12:00",
        version="0.1.0",
        splits=["test"],
        main_split="test",
        confidence=0.95,
        seed=0,
        models=models,
        baselines=baseline_metrics(stages["sft"]),
        differences=differences,
        claims=[claim(difference, "test") for difference in differences],
        headline=[name for name in MAIN_METRICS if name not in ("valid_proofs", "proxy", "preference")],
        unanswered=unanswered_rows(models, ["test"]),
        notes=[],
        warnings=["tiny/sft: 5 of 96 SFT rows are longer than sft.max_length 64 tokens and were left out"],
        published=[{"name": "GPT-4", "f1": 0.291}],
        breakdowns=[],
        curves={},
        training={},
        data={},
        goals=[
            Criterion("tiny", "thoughts", None, 0.9, 0.95, True),
            Criterion("tiny", "validation_loss", 1.0, None, 1.5, False),
            Criterion("tiny", "validation_loss_gap", 0.5, None, None, None),
        ],
        prompts=[ShownPrompt("Why?", {"tiny base": "so\nso", "tiny GRPO": "Therefore: No"})],
        samples=[],
        steps={
            "tiny/preprocess": replace(SFT, stage="preprocess", folder="runs/tiny/preprocess-5e4d3c2b1a"),
            "tiny/sft": replace(SFT, seconds_by_part=SPENT),
        },
        settings={"tiny": "seed: 0"},
    )


SPENT = {"start": 12.0, "load": 3.0, "forward/backward": 90.0, "wait": 15.0}
SFT = StepRecord("sft", "1a2b3c4d5e", "runs/tiny/sft-1a2b3c4d5e", 60, 1, "local", {"torch": "2"}, "3.12", "x", None, "")


def model(name: str, role: str, split: str, metrics: SplitMetrics) -> ModelResult:
    return ModelResult(f"tiny/evaluate-{role}", "tiny", role, name, {split: metrics})


@pytest.mark.parametrize("name", ["summary.txt", "report.md"])
def test_the_texts_in_full(report: Report, name: str) -> None:
    assert render(name, report) == (FIXTURES / name).read_text(encoding="utf-8")


def test_several_samples_have_a_table_of_their_own(report: Report) -> None:
    assert "Several samples" not in render("report.md", report) + render("report.html", report, draw(report))
    rows = [replace(one, sample=k, correct=k == 0, answer=str(k == 0)) for one in outcomes(40) for k in range(4)]
    metrics = SplitMetrics(summarize(rows, 200, 0.95, 0), {}, {"no_verdict": 5}, samples=4)
    models = [*report.models, model("tiny gpt", "endpoint", "test", metrics)]
    sampled = replace(report, models=models, unanswered=unanswered_rows(models, ["test"]))
    text, page = render("report.md", sampled), render("report.html", sampled, draw(sampled))
    assert "| tiny gpt | test | 4 | pass@2 | 0.500 (0.500 … 0.500) |" in text
    assert "| tiny gpt | test | 4 | majority@4 | 0.000 (0.000 … 0.000) |" in text
    assert "| tiny gpt | test | 5 | 160 | no_verdict 5 |" in text
    assert "<th>pass@1</th><th>pass@2</th><th>pass@4</th><th>majority@4</th>" in page
    assert '<span class="dot endpoint"></span>tiny gpt' in page
    assert "tiny gpt: pass@4 1.000 (1.000 … 1.000)" in render("summary.txt", sampled)
    assert "40 rows of" in text


HOSTILE = "x\n```\n````\n</pre><script>alert(1)</script>\n# Title ![i](http://x) | cell\x1b[2J\x9b1m\u202e\ud800"


def test_what_a_model_or_a_file_says_cannot_leave_its_place(report: Report) -> None:
    report = replace(
        report,
        prompts=[ShownPrompt(HOSTILE, {"tiny base": HOSTILE})],
        settings={"tiny": f"prompt: |\n  {HOSTILE}"},
        warnings=[HOSTILE],
    )
    text = render("report.md", report)
    outside, fence = [], ""
    for line in text.splitlines():
        run = line[: len(line) - len(line.lstrip("`"))]
        if fence:  # CommonMark: a fence ends at one that is at least as long, alone on its line
            fence = "" if len(run) >= len(fence) and not line.strip("` ") else fence
        elif len(run) >= 3:
            fence = run
        else:
            outside.append(line)
    assert not fence
    assert not any("<script>" in line.replace("\\<", "") or line.startswith("# Title") for line in outside)
    assert sum("script" in line for line in outside) == 1  # the warning, on one line
    for name in ("report.md", "summary.txt"):
        assert not set(render(name, report)) & set("\x1b\x9b\u202e\ud800")


def test_the_page_shows_every_chart_and_the_best_model(report: Report) -> None:
    report = replace(report, steps={"tiny/sft": SFT}, curves={"tiny/sft": {"loss": [[1, 2.0], [2, 1.5]]}})
    page = render("report.html", report, draw(report))
    assert page.count("<svg") == 5  # F1, balanced accuracy, differences, splits, the loss of SFT
    assert "Where the time went" not in page  # a step of an earlier version
    assert '<b class="best">0.900</b>' in page
    assert "NaN" not in page


def test_the_page_shows_where_the_time_went(report: Report) -> None:
    page = render("report.html", report, draw(report))
    assert "<title>tiny/sft, forward/backward: 1.5 minutes (75 %)</title>" in page
    assert "<td>90.0<small>75 %</small></td>" in page
    assert page.count("<tr><td>tiny/preprocess</td>") == 1  # only among the steps: it has no times


def test_report_json_holds_every_figure_as_before(report: Report) -> None:
    found = json.loads(json.dumps(to_json(report)))
    assert list(found) == [field.name for field in fields(Report)]
    f1 = report.models[2].splits["test"].overall["f1"]
    assert found["models"][2]["splits"]["test"]["all"]["f1"] == {"value": f1.value, "low": f1.low, "high": f1.high}
    assert found["differences"][0]["splits"]["test"]["f1"].keys() == {"value", "low", "high"}
    assert found["unanswered"][1]["told"] == "two_verdicts 2"
    assert found["goals"][2]["met"] is None


def difference(f1: tuple[float, float], balanced: tuple[float, float]) -> Difference:
    figures = {
        name: Figure((low + high) / 2, low, high)
        for name, (low, high) in {"f1": f1, "balanced_accuracy": balanced}.items()
    }
    return Difference("SFT", "GRPO", "grpo", {"test": figures})


@pytest.mark.parametrize(
    ("f1", "balanced", "told"),
    [
        ((0.01, 0.1), (0.01, 0.1), "GRPO is better than SFT"),
        ((-0.2, -0.1), (-0.2, -0.1), "GRPO is worse than SFT"),
        ((-0.01, 0.1), (0.01, 0.1), "no difference shown"),
        ((0.01, 0.1), (-0.01, 0.1), "no difference shown"),  # it says Yes more often, which F1 alone would praise
        ((0.01, 0.1), (-0.2, -0.1), "no difference shown"),
        ((0.0, 0.1), (0.0, 0.1), "no difference shown"),
    ],
)
def test_a_claim_needs_both_intervals(f1: tuple[float, float], balanced: tuple[float, float], told: str) -> None:
    assert claim(difference(f1, balanced), "test").startswith(told)


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [
        (Goal(below=1.0), 0.99, True),
        (Goal(below=1.0), 1.0, False),
        (Goal(above=0.9), 0.91, True),
        (Goal(0.5, 0.1), 0.05, False),
    ],
)
def test_a_goal_is_met_within_its_bounds(goal: Goal, value: float, met: bool) -> None:
    assert goal_met(goal, value) is met


def test_figures_are_told_in_their_units() -> None:
    assert format_figure(Figure(0.81234, 0.7, 0.9), "f1") == "0.812"
    assert format_figure(0.012, "unanswered") == "1.2 %"
    assert format_figure(233.6, "tokens") == "234"


def unverified(proxy: bool | None, reasons: dict[str, int] | None = None) -> ModelResult:
    """A model's metrics on ten rows that nothing verifies."""
    rows = [Outcome(str(k), str(k), None, None, True, 10, proxy) for k in range(10)]
    return model("medical SFT", "sft", "short", SplitMetrics(summarize(rows, 50, 0.95, 0), {}, reasons))


def test_what_cannot_be_verified_is_said_and_a_proxy_called_one() -> None:
    task = task_of(TaskChoice("medical", "sample", None, None, "error", {}), 0)
    found = notes([unverified(True)], ["short"], task)
    assert found == [
        "none of the 10 answers of short can be verified: no accuracy is given",
        "match (proxy) is a stand-in, not correctness: the final answer equals the gold one in normalised words",
    ]
    assert notes([unverified(None)], ["short"], task) == found[:1]
    assert shown_metrics([unverified(True)], "short") == ["proxy", "unanswered", "tokens"]
    assert shown_metrics([unverified(None)], "short") == ["unanswered", "tokens"]
    assert "nothing is said" in notes([], [], task)[0]
    rows = [Outcome(str(k), str(k), None, True if k < 4 else None, True, 10) for k in range(10)]
    mixed = model("medical SFT", "sft", "test", SplitMetrics(summarize(rows, 50, 0.95, 0)))
    assert notes([mixed], ["test"], task) == ["only 4 of the 10 answers of test can be verified; accuracy is of those"]


def test_nothing_is_claimed_of_what_cannot_be_verified() -> None:
    better = Figure(0.5, 0.4, 0.6)
    found = Difference("SFT", "GRPO", "grpo", {"short": {"proxy": better, "unanswered": better}})
    assert claim(found, "short") == (
        "GRPO against SFT: the answers cannot be verified; match (proxy) +0.500 (+0.400 … +0.600)"
    )
    found = Difference("base", "SFT", "sft", {"test": {"unanswered": better}})
    assert claim(found, "test") == "SFT against base: the answers cannot be verified"
    found = Difference("base", "SFT", "sft", {"test": {"accuracy": better}})
    assert claim(found, "test") == "SFT is better than base: accuracy +0.500 (+0.400 … +0.600)"


def test_a_figure_that_there_is_not_is_a_dash() -> None:
    assert format_figure(None, "accuracy") == "–"


def test_why_rows_are_unanswered_is_counted_also_in_records_of_an_earlier_version() -> None:
    def prediction(**more: Any) -> Prediction:
        record = {"split": "short", "id": "1", "group": "g", "gold": "x", "correct": None, "tokens": 1}
        return Prediction.from_json(record | more)

    some = [prediction(answered=reason is None, reason=reason) for reason in ("no_verdict", "truncated", "no_verdict")]
    some.append(prediction(answered=True, reason=None))
    reasons = count_reasons(some)
    assert reasons == {"no_verdict": 2, "truncated": 1}
    old = [prediction(answered=False, truncated=cut) for cut in (True, False)]
    assert count_reasons([*old, prediction(answered=True)]) == {"not_recorded": 1, "truncated": 1}
    assert unanswered_rows([unverified(None)], ["short"]) == []  # metrics of an earlier version
    (found,) = unanswered_rows([unverified(None, reasons)], ["short"])
    assert found == Unanswered("medical SFT", "sft", "short", 10, 3, reasons)
    assert found.summary == "no_verdict 2, truncated 1"
