"""The charts of a report as SVG: models, paired differences, splits, breakdowns, curves of training,
time by part.

charts = draw(report)        charts.main["f1"], charts.differences, charts.by_tag["n"], …
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.core.stopwatch import PARTS
from pipeline.scoring.charts import Bar, Mark, Series, curves, intervals, stacked
from pipeline.scoring.metrics import SOLVER, TITLES
from pipeline.scoring.results import Figure, Report

CHART_METRICS = ("balanced_accuracy", "accuracy", "proxy", "unanswered")  # the charts show the first there is
UNITS = {"hours": 3600, "minutes": 60, "seconds": 1}
CURVES = {  # of a training stage: what its trainer logs -> title
    "sft": {"loss": "SFT loss", "eval_loss": "SFT validation loss"},
    "grpo": {
        "reward": "GRPO reward",
        "rewards/correctness/mean": "correctness reward",
        "rewards/format/mean": "format reward",
        "rewards/match/mean": "match reward (a proxy)",
        "completions/mean_length": "completion length (tokens)",
        "frac_reward_zero_std": "share of groups without spread",
        "entropy": "entropy (nats a token)",
    },
}


@dataclass(frozen=True)
class Charts:
    """Every chart of the page."""

    main: Mapping[str, str]  # by metric: F1 and the metric of the other charts
    changed: str  # the metric of `differences`
    differences: str | None  # None where no two models can be compared
    splits: str
    by_tag: Mapping[str, str]  # by breakdown
    curves: Mapping[str, list[str]]  # by training step
    time: str | None  # by step and part; None where no step has recorded it


def draw(report: Report) -> Charts:
    metric = next((name for name in CHART_METRICS if name in report.headline), None)
    shown = [name for name in ("f1", metric) if name in report.headline]
    main = {name: _models(report, name) for name in shown if name}
    changed = next(iter(main), "unanswered")
    metric = metric or "unanswered"
    return Charts(
        main=main,
        changed=changed,
        differences=_differences(report, changed),
        splits=_splits(report, metric),
        by_tag={tag: _by_tag(report, tag, metric) for tag in report.breakdowns},
        curves={label: _curves(report.steps[label].stage, logged) for label, logged in report.curves.items()},
        time=_time(report),
    )


def _models(report: Report, metric: str) -> str:
    """The models on the main split, with the best baseline as a line."""
    marks = [
        _mark(model.name, overall[metric], model.role)
        for model in report.models
        if metric in (overall := report.overall(model))
    ]
    simple = {name: values[metric] for name, values in report.baselines.items() if name != SOLVER}
    best = max(simple, key=lambda name: simple[name], default=None)
    lines = [(simple[best], best)] if best else []
    return intervals(marks, 0.0, 1.0, lines=lines, title=f"{TITLES[metric]} on {report.main_split}")


def _differences(report: Report, metric: str) -> str | None:
    marks = [
        _mark(f"{one.after.split()[-1]} − {one.before.split()[-1]}, {split}", one.splits[split][metric], one.role)
        for split in report.splits
        for one in report.differences
        if metric in one.splits[split]
    ]
    if not marks:
        return None
    low, high = min(0.0, *(m.low for m in marks)), max(0.0, *(m.high for m in marks))
    title = f"paired differences of {TITLES[metric]}"
    return intervals(marks, low, high, lines=[(0.0, "no difference")], signed=True, title=title)


def _splits(report: Report, metric: str) -> str:
    marks = [
        _mark(f"{model.name}, {split}", overall[metric], model.role)
        for split in report.splits
        for model in report.models
        if metric in (overall := model.splits[split].overall)
    ]
    return intervals(marks, 0.0, 1.0, lines=_coin(metric), title=f"{TITLES[metric]} by test set")


def _by_tag(report: Report, tag: str, metric: str) -> str:
    # recipes may be evaluated on different rows, so a kind of row may be missing from some models
    by = {model.name: model.splits[report.main_split].by_tag.get(tag, {}) for model in report.models}
    marks = [
        _mark(f"{value}: {model.name}", by[model.name][value][metric], model.role)
        for value in sorted({value for found in by.values() for value in found})
        for model in report.models
        if model.role != "base" and value in by[model.name] and metric in by[model.name][value]
    ]
    return intervals(marks, 0.0, 1.0, lines=_coin(metric), title=f"{TITLES[metric]} by {tag}")


def _curves(stage: str, logged: Mapping[str, Sequence[Sequence[float]]]) -> list[str]:
    return [
        curves([Series(title, tuple((x, y) for x, y in logged[key]), stage)], title=title)
        for key, title in CURVES[stage].items()
        if key in logged
    ]


def _time(report: Report) -> str | None:
    """Where the time of each step went, in the largest unit of which the longest step has some."""
    steps = {label: step.seconds_by_part for label, step in report.steps.items() if step.seconds_by_part}
    if not steps:
        return None
    longest = max(sum(parts.values()) for parts in steps.values())
    unit, size = next((name, size) for name, size in UNITS.items() if longest >= 2 * size or size == 1)
    bars = [Bar(label, tuple((name, spent / size) for name, spent in parts.items())) for label, parts in steps.items()]
    used = [name for name in PARTS if any(name in parts for parts in steps.values())]
    return stacked(bars, used, title="time by step and part", unit=unit)


def _coin(metric: str) -> list[tuple[float, str]]:
    return [(0.5, "coin")] if metric == "balanced_accuracy" else []


def _mark(label: str, figure: Figure, role: str) -> Mark:
    return Mark(label, figure.value, figure.low, figure.high, role)
