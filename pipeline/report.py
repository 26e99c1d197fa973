"""The models side by side, with intervals, paired differences, curves and settings: HTML, Markdown and JSON.

    python -m pipeline.report tiny
    python -m pipeline report tiny qwen1.5b        several recipes, one report

`report.json` holds every figure; `report.html` (one file, no network) and `report.md` are drawn from it, and
`summary.txt` is what the command line prints. A claim that one stage is better than another is made only where
the paired intervals of their difference, in F1 and in balanced accuracy, both leave out 0 (in accuracy, for a task
without a positive class). Where answers cannot be verified, the report says so, and a proxy is called one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline import __version__
from pipeline.config.recipe import Goal, Recipe
from pipeline.core import stopwatch
from pipeline.core.errors import printable
from pipeline.core.files import read_json, write_json
from pipeline.core.hashing import plain
from pipeline.core.markdown import cell, fenced
from pipeline.core.stopwatch import PARTS
from pipeline.scoring.charts import number
from pipeline.scoring.metrics import (
    LOWER_IS_BETTER,
    MAIN_METRICS,
    TITLES,
    compare,
    outcome_of,
    sampled_metrics,
    unanswered_rows,
)
from pipeline.scoring.predictions import FAILED, FAILED_TITLE, PREDICTIONS, Prediction, read_predictions
from pipeline.scoring.reading import REASONS
from pipeline.scoring.report_charts import CURVES, Charts, draw
from pipeline.scoring.results import (
    Criterion,
    Difference,
    Figure,
    ModelResult,
    Report,
    Sample,
    ShownPrompt,
    SplitMetrics,
    StepRecord,
    to_json,
)
from pipeline.tasks.task import Task, task_of
from pipeline.training.harness import main
from pipeline.workflow.artifact import ENDPOINT, HISTORY, PROMPTS, Artifact
from pipeline.workflow.figures import describe_calls, metrics_of
from pipeline.workflow.runtime import Runtime, format_hardware
from pipeline.workflow.stage import ROLES, STAGES, ReportModels, endpoint_name, read_spec
from pipeline.workflow.time_spent import TIME_NOTE, add

SMOKE_TEST_NOTICE = "SMOKE TEST of a shrunken model with random weights: no figure here is a result"
ROLE_TITLES = {"sft": "SFT", "grpo": "GRPO"}
ORDER = (*ROLES, ENDPOINT)  # of a recipe's models
SAMPLES = 3  # of each kind


def run(recipe: Recipe, inputs: Mapping[str, Artifact], out: Path, runtime: Runtime) -> dict[str, Any]:
    stopwatch.enter("evaluate")
    runtime.progress.update(state="running", note="counting")
    task = task_of(recipe.task, recipe.seed)
    options = runtime.options if isinstance(runtime.options, ReportModels) else ReportModels()
    report = gather(inputs, task, recipe, options.success_criteria)
    write_json(out / "report.json", to_json(report))
    stopwatch.enter("save")
    runtime.progress.update(note="drawing")
    charts = draw(report)
    for name in ("report.html", "report.md", "summary.txt"):
        (out / name).write_text(render(name, report, charts), encoding="utf-8")
    return {"claims": list(report.claims)}


# ---------------------------------------------------------------- gathering


def gather(
    inputs: Mapping[str, Artifact], task: Task, recipe: Recipe, criteria: Mapping[str, Mapping[str, Goal]]
) -> Report:
    """Every figure of the report, from the artifacts of its steps. `criteria`: of success, by recipe."""
    models = [
        _model(label, artifact, metrics_of(artifact, task, recipe.report, recipe.seed))
        for label, artifact in inputs.items()
        if artifact.role in ROLES or endpoint_name(artifact.role)
    ]
    models.sort(key=lambda model: (model.recipe, ORDER.index(model.role)))
    splits = list(recipe.evaluate.splits)
    main_split = splits[0] if splits else ""
    differences = []
    for name in dict.fromkeys(model.recipe for model in models):
        own = [model for model in models if model.recipe == name and model.role != ENDPOINT]
        others = [model for model in models if model.recipe == name and model.role == ENDPOINT]
        for before, after in [*pairwise(own), *((other, own[-1]) for other in others)]:
            differences.append(_difference(before, after, inputs, task, recipe))
    trained = {label: artifact for label, artifact in inputs.items() if STAGES[artifact.stage].trains}
    data = {label: artifact for label, artifact in inputs.items() if artifact.stage == "preprocess"}
    return Report(
        title=" and ".join(dict.fromkeys(model.recipe for model in models)),
        task_title=task.title,
        written=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
        splits=splits,
        main_split=main_split,
        confidence=recipe.report.confidence,
        seed=recipe.seed,
        models=models,
        baselines=models[0].splits[main_split].baselines if models else {},
        differences=differences,
        claims=[SMOKE_TEST_NOTICE] if recipe.smoke_test else [claim(one, main_split) for one in differences],
        headline=shown_metrics(models, main_split),
        unanswered=unanswered_rows(models, splits),
        notes=[*notes(models, splits, task), *_calls(inputs)],
        warnings=[f"{label}: {text}" for label, artifact in inputs.items() for text in artifact.warnings],
        published=list(task.published),
        breakdowns=list(task.breakdowns),
        curves={label: _logged_curves(artifact) for label, artifact in trained.items()},
        training={label: artifact.metrics for label, artifact in trained.items()},
        data={label: artifact.metrics for label, artifact in data.items()},
        goals=_criteria(models, trained, main_split, criteria),
        prompts=_prompts(models, inputs),
        samples=_samples(_own(models)[-1], inputs, main_split) if models else [],
        steps={label: _step_record(artifact) for label, artifact in inputs.items()},
        settings={artifact.recipe: _settings(artifact) for artifact in inputs.values()},
    )


def shown_metrics(models: Sequence[ModelResult], split: str) -> list[str]:
    """The main metrics that some model has: those that the tables show."""
    return [name for name in MAIN_METRICS if any(name in model.splits[split].overall for model in models)]


def notes(models: Sequence[ModelResult], splits: Sequence[str], task: Task) -> list[str]:
    """What a reader has to know of the figures: what could not be verified, what is only a proxy."""
    if not models:
        return ["no model was evaluated (evaluate.splits is empty), so nothing is said of what was learned"]
    found, proxies = [], False
    for split in splits:
        overall = models[0].splits[split].overall
        proxies = proxies or "proxy" in overall
        if overall.verified < overall.rows:
            of = f"of the {overall.rows} answers of {split} can be verified"
            some = f"only {overall.verified} {of}; accuracy is of those"
            found.append(some if overall.verified else f"none {of}: no accuracy is given")
    if proxies:
        found.append(f"{TITLES['proxy']} is a stand-in, not correctness: {task.proxy}")
    return found


def _model(label: str, artifact: Artifact, splits: Mapping[str, SplitMetrics]) -> ModelResult:
    role = artifact.role or "base"
    if name := endpoint_name(role):
        return ModelResult(label, artifact.recipe, ENDPOINT, f"{artifact.recipe} {name}", splits)
    return ModelResult(label, artifact.recipe, role, f"{artifact.recipe} {ROLE_TITLES.get(role, role)}", splits)


def _calls(inputs: Mapping[str, Artifact]) -> list[str]:
    """What the answers of endpoints took."""
    return [describe_calls(calls) for artifact in inputs.values() if (calls := artifact.metrics.get(ENDPOINT))]


def _predictions(artifact: Artifact, split: str) -> list[Prediction]:
    return [one for one in read_predictions(artifact.folder / PREDICTIONS) if one.split == split]


def _difference(
    before: ModelResult, after: ModelResult, inputs: Mapping[str, Artifact], task: Task, recipe: Recipe
) -> Difference:
    """The paired difference of two successive stages, by split."""
    settings = recipe.report
    found = {}
    for split in recipe.evaluate.splits:
        old, new = (
            [outcome_of(one, task.positive) for one in _predictions(inputs[model.label], split)]
            for model in (before, after)
        )
        found[split] = compare(old, new, settings.bootstrap_samples, settings.confidence, recipe.seed)
    role = ENDPOINT if before.role == ENDPOINT else after.role
    return Difference(before.name, after.name, role, found)


def claim(difference: Difference, split: str) -> str:
    """What may be said of two stages: better or worse only where both paired intervals leave out 0.

    F1 alone would do for a task that is rarely Yes; where half the rows are, always saying Yes has F1 0.667. Nothing
    is said of answers that cannot be verified, whatever a proxy shows.
    """
    compared = difference.splits[split]
    decisive = ("f1", "balanced_accuracy") if "f1" in compared else ("accuracy",)
    shown = [name for name in decisive if name in compared] or ["proxy"] * ("proxy" in compared)
    figures = [compared[name] for name in shown]
    listed = ", ".join(
        f"{TITLES[name]} {figure.value:+.3f} ({figure.low:+.3f} … {figure.high:+.3f})"
        for name, figure in zip(shown, figures, strict=True)
    )
    before, after = difference.before, difference.after
    if not set(shown) & set(decisive):
        return f"{after} against {before}: the answers cannot be verified{f'; {listed}' if listed else ''}"
    if all(figure.low > 0 for figure in figures):
        return f"{after} is better than {before}: {listed}"
    if all(figure.high < 0 for figure in figures):
        return f"{after} is worse than {before}: {listed}"
    return f"no difference shown between {after} and {before}: {listed}"


def _logged_curves(artifact: Artifact) -> dict[str, list[list[float]]]:
    """Curves of a training step: name -> [[step, value], …]."""
    history = read_json(artifact.folder / HISTORY) or []
    found = {}
    for key in CURVES[artifact.stage]:
        points = [[entry["step"], entry[key]] for entry in history if entry.get(key) is not None]
        if points:
            found[key] = points
    return found


def _samples(model: ModelResult, inputs: Mapping[str, Artifact], split: str) -> list[Sample]:
    """A few answers of the last model: right, wrong, unverified and unanswered ones, the shortest questions first."""
    import pyarrow.parquet as pq

    data = next(a for a in inputs.values() if a.stage == "preprocess" and a.recipe == model.recipe)
    table = pq.read_table(data.folder / "data" / f"{split}.parquet", columns=["id", "question"])
    questions = {row["id"]: row["question"] for row in table.to_pylist()}
    kinds: dict[str, list[Sample]] = {"right": [], "wrong": [], "unverified": [], "unanswered": []}
    for prediction in _predictions(inputs[model.label], split):
        if prediction.sample:
            continue
        kind = {True: "right", False: "wrong", None: "unverified"}[prediction.correct]
        kind = kind if prediction.answered else "unanswered"
        kinds[kind].append(Sample(prediction, kind, questions[prediction.id]))
    shown = []
    for found in kinds.values():
        found.sort(key=lambda sample: (len(sample.question), sample.prediction.id))
        shown += found[:: max(1, len(found) // SAMPLES)][:SAMPLES]
    return shown


def _criteria(
    models: Sequence[ModelResult],
    trained: Mapping[str, Artifact],
    split: str,
    criteria: Mapping[str, Mapping[str, Goal]],
) -> list[Criterion]:
    """The recipes' success criteria, each with the value of SFT's validation or of the last model."""
    found = []
    for name, model in {model.recipe: model for model in _own(models)}.items():
        sft = next((a.metrics for a in trained.values() if a.stage == "sft" and a.recipe == name), {})
        for key, goal in criteria.get(name, {}).items():
            figure = model.splits[split].overall.get(key) if split else None
            value = sft.get(key, figure.value if figure else None)
            met = None if value is None else goal_met(goal, value)
            found.append(Criterion(name, key, goal.below, goal.above, value, met))
    return found


def _own(models: Sequence[ModelResult]) -> list[ModelResult]:
    """The models of the recipes, without those behind servers."""
    return [model for model in models if model.role != ENDPOINT]


def goal_met(goal: Goal, value: float) -> bool:
    return (goal.below is None or value < goal.below) and (goal.above is None or value > goal.above)


def _prompts(models: Sequence[ModelResult], inputs: Mapping[str, Artifact]) -> list[ShownPrompt]:
    """Each shown question with the answers of the models that were given it, side by side."""
    found: dict[str, dict[str, str]] = {}
    for model in models:
        for one in read_json(inputs[model.label].folder / PROMPTS) or []:
            found.setdefault(one["prompt"], {})[model.name] = one["answer"]
    return [ShownPrompt(prompt, answers) for prompt, answers in found.items()]


def _step_record(artifact: Artifact) -> StepRecord:
    made = artifact.provenance
    return StepRecord(
        stage=artifact.stage,
        fingerprint=artifact.fingerprint,
        folder=str(artifact.folder),
        seconds=made["seconds"],
        processes=made["processes"],
        cluster=made["cluster"],
        versions=made["versions"],
        python=made["python"],
        machine=made["machine"],
        git=made["git"],
        hardware="; ".join([format_hardware(made.get("hardware") or {}), *_mismatch(artifact)]),
        seconds_by_part=add(artifact.seconds_by_part),
    )


def _mismatch(artifact: Artifact) -> list[str]:
    """How far GRPO's engine and its trainer were apart; nothing where the trainer's own model generated."""
    apart = artifact.metrics.get("engine_mismatch")
    if not isinstance(apart, dict) or "mean" not in apart:
        return []
    return [f"engine and trainer differ by {apart['mean']:.2g} nats a token on average, {apart['max']:.2g} at most"]


def _settings(artifact: Artifact) -> str:
    """The resolved recipe as YAML."""
    settings = plain(read_spec(artifact.folder).recipe)  # data: a prompt with ${x} in it is no template
    return str(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


# ---------------------------------------------------------------- pages


def render(name: str, report: Report, charts: Charts | None = None) -> str:
    """A template of `templates/` filled with the report; `charts` are those of the HTML page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        autoescape=name.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": format_figure, "number": number}
    environment.filters |= {"fenced": fenced, "cell": cell, "printable": printable}
    figures = [name for model in report.models for name in report.overall(model).figures]
    sampled = sampled_metrics(dict.fromkeys(figures))
    page = {f.name: getattr(report, f.name) for f in fields(report)}
    times = [step.seconds_by_part for step in report.steps.values()]
    more = {
        "report": report,
        "charts": charts,
        "titles": TITLES,
        "sampled": sampled,
        "why": REASONS | {FAILED: FAILED_TITLE},
        "best": best_values(report),
        "parts": {name: about for name, about in PARTS.items() if any(name in spent for spent in times)},
        "time_note": TIME_NOTE,
    }
    return environment.get_template(f"{name}.jinja").render(page | more)


def best_values(report: Report) -> dict[str, float]:
    """The best value that a model has on the main split, by metric; not of `tokens`, where none is better."""
    found = {}
    for metric in report.headline:
        values = [figure.value for model in report.models if (figure := report.overall(model).get(metric))]
        if values and metric != "tokens":
            found[metric] = min(values) if metric in LOWER_IS_BETTER else max(values)
    return found


def format_figure(figure: Figure | float | None, metric: str) -> str:
    """`0.812`, or `34` for tokens, or `1.2 %` for a share, or `–` where there is none."""
    if figure is None:
        return "–"
    value = figure.value if isinstance(figure, Figure) else figure
    if metric == "tokens":
        return f"{value:.0f}"
    return f"{100 * value:.1f} %" if metric == "unanswered" else f"{value:.3f}"


if __name__ == "__main__":
    main("report", run)
