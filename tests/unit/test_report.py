"""The report's texts, from known answers: golden files, and claims that the intervals allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.recipe import Goal, TaskChoice
from pipeline.report import TITLES, claim, figure, goal_met, notes, render, shown_metrics
from pipeline.scoring.metrics import (
    MAIN_METRICS,
    Outcome,
    baseline_figures,
    compare,
    reasons_of,
    summarize,
    unanswered_rows,
)
from pipeline.tasks.task import task_of

FIXTURES = Path(__file__).parents[1] / "fixtures"


def outcomes(right: int, unanswered: int = 0) -> list[Outcome]:
    """40 rows of 10 groups, half positive; the first `right` are correct, the last `unanswered` have no answer."""
    return [Outcome(f"row-{k}", f"g{k % 10}", k % 2 == 0, k < right, k < 40 - unanswered, 100 + k) for k in range(40)]


@pytest.fixture
def page() -> dict[str, Any]:
    stages = {"base": outcomes(0, 40), "sft": outcomes(24, 2), "grpo": outcomes(36)}
    names = {"base": "tiny base", "sft": "tiny SFT", "grpo": "tiny GRPO"}
    models: list[dict[str, Any]] = [
        {"name": names[role], "role": role, "splits": {"test": {"all": summarize(rows, 200, 0.95, 0)}}}
        for role, rows in stages.items()
    ]
    models[0]["splits"]["test"]["reasons"] = {"truncated": 30, "no_verdict": 10}
    models[1]["splits"]["test"]["reasons"] = {"two_verdicts": 2}
    differences = [
        {
            "before": names[before],
            "after": names[after],
            "role": after,
            "splits": {"test": compare(stages[before], stages[after], 200, 0.95, 0)},
        }
        for before, after in (("base", "sft"), ("sft", "grpo"))
    ]
    return {
        "title": "tiny",
        "task_title": "Corr2Cause",
        "models": models,
        "main_split": "test",
        "splits": ["test"],
        "confidence": 0.95,
        "seed": 0,
        "differences": differences,
        "claims": [claim(difference, "test") for difference in differences],
        "baselines": baseline_figures(stages["sft"]),
        "breakdowns": [],
        "published": [{"name": "GPT-4", "f1": 0.291}],
        "steps": {},
        "settings": {"tiny": "seed: 0"},
        "headline": [name for name in MAIN_METRICS if name not in ("proxy", "preference")],
        "notes": [],
        "unanswered": unanswered_rows(models, ["test"]),
        "warnings": ["tiny/sft: 5 of 96 SFT rows are longer than sft.max_length 64 tokens and were left out"],
        "goals": [
            {"recipe": "tiny", "name": "thoughts", "below": None, "above": 0.9, "value": 0.95, "met": True},
            {"recipe": "tiny", "name": "validation_loss", "below": 1.0, "above": None, "value": 1.5, "met": False},
            {"recipe": "tiny", "name": "validation_loss_gap", "below": 0.5, "above": None, "value": None, "met": None},
        ],
        "prompts": [{"prompt": "Why?", "answers": {"tiny base": "so\nso", "tiny GRPO": "Therefore: No"}}],
        "titles": TITLES,
    }


@pytest.mark.parametrize("name", ["summary.txt", "report.md"])
def test_the_texts_in_full(page: dict[str, Any], name: str) -> None:
    assert render(name, page) == (FIXTURES / name).read_text(encoding="utf-8")


HOSTILE = "x\n```\n````\n</pre><script>alert(1)</script>\n# Title ![i](http://x) | cell\x1b[2J\x9b1m\u202e\ud800"


def test_what_a_model_or_a_file_says_cannot_leave_its_place(page: dict[str, Any]) -> None:
    page["prompts"] = [{"prompt": HOSTILE, "answers": {"tiny base": HOSTILE}}]
    page["settings"] = {"tiny": f"prompt: |\n  {HOSTILE}"}
    page["warnings"] = [HOSTILE]
    text = render("report.md", page)
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
        assert not set(render(name, page)) & set("\x1b\x9b\u202e\ud800")


def difference(f1: tuple[float, float], balanced: tuple[float, float]) -> dict[str, Any]:
    def interval(low: float, high: float) -> dict[str, float]:
        return {"value": (low + high) / 2, "low": low, "high": high}

    figures = {"f1": interval(*f1), "balanced_accuracy": interval(*balanced)}
    return {"before": "SFT", "after": "GRPO", "splits": {"test": figures}}


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
    assert figure({"value": 0.81234}, "f1") == "0.812"
    assert figure({"value": 0.012}, "unanswered") == "1.2 %"
    assert figure({"value": 233.6}, "tokens") == "234"


def unverified(proxy: bool | None) -> dict[str, Any]:
    """A model's figures on ten rows that nothing verifies."""
    rows = [Outcome(str(k), str(k), None, None, True, 10, proxy) for k in range(10)]
    return {"name": "medical SFT", "role": "sft", "splits": {"short": {"all": summarize(rows, 50, 0.95, 0)}}}


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
    mixed = {**unverified(None), "splits": {"test": {"all": summarize(rows, 50, 0.95, 0)}}}
    assert notes([mixed], ["test"], task) == ["only 4 of the 10 answers of test can be verified; accuracy is of those"]


def test_nothing_is_claimed_of_what_cannot_be_verified() -> None:
    better = {"value": 0.5, "low": 0.4, "high": 0.6}
    given = {"before": "SFT", "after": "GRPO", "splits": {"short": {"proxy": better, "unanswered": better}}}
    assert claim(given, "short") == (
        "GRPO against SFT: the answers cannot be verified; match (proxy) +0.500 (+0.400 … +0.600)"
    )
    given = {"before": "base", "after": "SFT", "splits": {"test": {"unanswered": better}}}
    assert claim(given, "test") == "SFT against base: the answers cannot be verified"
    given = {"before": "base", "after": "SFT", "splits": {"test": {"accuracy": better}}}
    assert claim(given, "test") == "SFT is better than base: accuracy +0.500 (+0.400 … +0.600)"


def test_a_figure_that_there_is_not_is_a_dash() -> None:
    assert figure(None, "accuracy") == "–"


def test_why_rows_are_unanswered_is_counted_also_in_records_of_an_earlier_version() -> None:
    def record(reason: str | None, **more: Any) -> dict[str, Any]:
        return {"answered": reason is None, "reason": reason, **more}

    records = [record("no_verdict"), record("truncated"), record("no_verdict"), record(None)]
    assert reasons_of(records) == {"no_verdict": 2, "truncated": 1}
    old = [{"answered": False, "truncated": True}, {"answered": False, "truncated": False}, {"answered": True}]
    assert reasons_of(old) == {"not_recorded": 1, "truncated": 1}
    model = unverified(None)
    assert unanswered_rows([model], ["short"]) == []  # metrics of an earlier version
    model["splits"]["short"]["reasons"] = reasons_of(records)
    assert unanswered_rows([model], ["short"]) == [
        {
            "name": "medical SFT",
            "role": "sft",
            "split": "short",
            "rows": 10,
            "count": 3,
            "reasons": {"no_verdict": 2, "truncated": 1},
            "told": "no_verdict 2, truncated 1",
        }
    ]
