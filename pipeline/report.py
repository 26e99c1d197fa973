"""The models side by side, with intervals, paired differences, curves and settings: HTML, Markdown and JSON.

    python -m pipeline.report tiny
    python -m pipeline report tiny qwen1.5b        several recipes, one report

`report.json` holds every figure; `report.html` (one file, no network) and `report.md` are drawn from it, and
`summary.txt` is what the command line prints. A claim that one stage is better than another is made only where
the paired intervals of their difference, in F1 and in balanced accuracy, both leave out 0 (in accuracy, for a task
without a positive class). Where answers cannot be verified, that is what is said, and a proxy is called one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline import __version__
from pipeline.config.recipe import Goal, Recipe
from pipeline.core.errors import printable
from pipeline.core.files import read_json, read_lines, write_json
from pipeline.core.hashing import plain
from pipeline.core.markdown import cell, fenced
from pipeline.scoring.charts import Mark, Series, curves, intervals, number
from pipeline.scoring.metrics import LOWER_IS_BETTER, MAIN_METRICS, SOLVER, compare, outcome_of, unanswered_rows
from pipeline.scoring.reading import REASONS
from pipeline.tasks.task import Task, task_of
from pipeline.training.harness import main
from pipeline.workflow.artifact import HISTORY, PROMPTS, Artifact
from pipeline.workflow.figures import figures_of
from pipeline.workflow.runtime import Runtime, format_hardware
from pipeline.workflow.stage import read_spec

SMOKE_TEST_NOTICE = "REHEARSAL of a shrunken model with random weights: no figure here is a result"
TITLES = {
    "f1": "F1",
    "balanced_accuracy": "balanced accuracy",
    "mcc": "MCC",
    "accuracy": "accuracy",
    "proxy": "match (proxy)",
    "precision": "precision",
    "recall": "recall",
    "preference": "preference accuracy",
    "thoughts": "answers with a thought",
    "validation_loss": "validation loss",
    "validation_loss_gap": "validation loss − training loss",
    "unanswered": "unanswered",
    "tokens": "mean tokens",
}
CURVES = {
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
CHART_METRICS = ("balanced_accuracy", "accuracy", "proxy", "unanswered")  # the figure to look at: the first there is
SAMPLES = 3


def run(recipe: Recipe, inputs: Mapping[str, Artifact], out: Path, runtime: Runtime) -> dict[str, Any]:
    runtime.progress.update(state="running", note="counting")
    task = task_of(recipe.task, recipe.seed)
    criteria = json.loads(runtime.options.get("success_criteria", "{}"))
    report = gather(inputs, task, recipe, criteria)
    write_json(out / "report.json", report)
    runtime.progress.update(note="drawing")
    page = {**report, "charts": draw(report, task), "titles": TITLES, "why": REASONS, "task": task}
    for name in ("report.html", "report.md", "summary.txt"):
        (out / name).write_text(render(name, page), encoding="utf-8")
    return {"claims": report["claims"]}


def gather(inputs: Mapping[str, Artifact], task: Task, recipe: Recipe, criteria: Mapping[str, Any]) -> dict[str, Any]:
    """Every figure of the report, from the artifacts of its steps. `criteria`: of success, by recipe."""
    models = [
        _model(label, artifact, figures_of(artifact, task, recipe.report, recipe.seed))
        for label, artifact in inputs.items()
        if artifact.stage.startswith("evaluate-")
    ]
    models.sort(key=lambda model: (model["recipe"], ("base", "sft", "grpo").index(model["role"])))
    main_split = recipe.evaluate.splits[0] if recipe.evaluate.splits else ""
    differences = []
    for name in dict.fromkeys(model["recipe"] for model in models):
        mine = [model for model in models if model["recipe"] == name]
        for before, after in pairwise(mine):
            differences.append(_difference(before, after, inputs, task, recipe))
    trained = {label: artifact for label, artifact in inputs.items() if artifact.stage in ("sft", "grpo")}
    data = {label: artifact for label, artifact in inputs.items() if artifact.stage == "preprocess"}
    first = next(iter(models), None)
    return {
        "title": " and ".join(dict.fromkeys(model["recipe"] for model in models)),
        "task_title": task.title,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "version": __version__,
        "splits": list(recipe.evaluate.splits),
        "main_split": main_split,
        "confidence": recipe.report.confidence,
        "seed": recipe.seed,
        "models": models,
        "baselines": first["splits"][main_split]["baselines"] if first else {},
        "differences": differences,
        "claims": [SMOKE_TEST_NOTICE]
        if recipe.smoke_test
        else [claim(difference, main_split) for difference in differences],
        "headline": shown_metrics(models, main_split),
        "unanswered": unanswered_rows(models, recipe.evaluate.splits),
        "notes": notes(models, recipe.evaluate.splits, task),
        "warnings": [f"{label}: {text}" for label, artifact in inputs.items() for text in artifact.warnings],
        "published": list(task.published),
        "breakdowns": list(task.breakdowns),
        "curves": {label: _history(artifact) for label, artifact in trained.items()},
        "training": {label: artifact.metrics for label, artifact in trained.items()},
        "data": {label: artifact.metrics for label, artifact in data.items()},
        "goals": _goals(models, trained, main_split, criteria),
        "prompts": _prompts(models, inputs),
        "samples": _samples(models[-1], inputs, task, main_split) if models else [],
        "steps": {label: _provenance(artifact) for label, artifact in inputs.items()},
        "settings": {artifact.recipe: _settings(artifact) for artifact in inputs.values()},
    }


def shown_metrics(models: list[dict[str, Any]], split: str) -> list[str]:
    """The figures that the tables show: those that some model has."""
    return [name for name in MAIN_METRICS if any(name in model["splits"][split]["all"] for model in models)]


def notes(models: list[dict[str, Any]], splits: Sequence[str], task: Task) -> list[str]:
    """What a reader has to know of the figures: what could not be verified, what is only a proxy."""
    if not models:
        return ["no model was asked anything (evaluate.splits is empty), so nothing is said of what was learned"]
    found, proxies = [], False
    for split in splits:
        all_ = models[0]["splits"][split]["all"]
        rows, verified = int(all_["rows"]["value"]), int(all_["verified"]["value"])
        proxies = proxies or "proxy" in all_
        if verified < rows:
            of = f"of the {rows} answers of {split} can be verified"
            found.append(
                f"only {verified} {of}; accuracy is of those" if verified else f"none {of}: no accuracy is given"
            )
    if proxies:
        found.append(f"{TITLES['proxy']} is a stand-in, not correctness: {task.proxy}")
    return found


def _model(label: str, artifact: Artifact, figures: dict[str, Any]) -> dict[str, Any]:
    role = artifact.stage.removeprefix("evaluate-")
    names = {"base": "base", "sft": "SFT", "grpo": "GRPO"}
    return {
        "label": label,
        "recipe": artifact.recipe,
        "role": role,
        "name": f"{artifact.recipe} {names[role]}",
        "splits": figures,
    }


def _records(artifact: Artifact) -> list[dict[str, Any]]:
    return read_lines(artifact.folder / "predictions.jsonl")


def _difference(
    before: dict[str, Any], after: dict[str, Any], inputs: Mapping[str, Artifact], task: Task, recipe: Recipe
) -> dict[str, Any]:
    """The paired difference of two successive stages, by split."""
    settings = recipe.report
    old, new = _records(inputs[before["label"]]), _records(inputs[after["label"]])
    found = {}
    for split in recipe.evaluate.splits:
        pair = [[outcome_of(r, task.positive) for r in records if r["split"] == split] for records in (old, new)]
        found[split] = compare(pair[0], pair[1], settings.bootstrap_samples, settings.confidence, recipe.seed)
    return {"before": before["name"], "after": after["name"], "role": after["role"], "splits": found}


def claim(difference: dict[str, Any], split: str) -> str:
    """What may be said of two stages: better or worse only where both paired intervals leave out 0.

    F1 alone would do for a task that is rarely Yes; where half the rows are, always saying Yes has F1 0.667. Nothing
    is said of answers that cannot be verified, whatever a proxy shows.
    """
    compared = difference["splits"][split]
    names = ("f1", "balanced_accuracy") if "f1" in compared else ("accuracy",)
    shown = [name for name in names if name in compared] or ["proxy"] * ("proxy" in compared)
    figures = [compared[name] for name in shown]
    told = ", ".join(
        f"{TITLES[name]} {f['value']:+.3f} ({f['low']:+.3f} … {f['high']:+.3f})"
        for name, f in zip(shown, figures, strict=True)
    )
    if not set(shown) & set(names):
        told = f"; {told}" if told else ""
        return f"{difference['after']} against {difference['before']}: the answers cannot be verified{told}"
    if all(figure["low"] > 0 for figure in figures):
        return f"{difference['after']} is better than {difference['before']}: {told}"
    if all(figure["high"] < 0 for figure in figures):
        return f"{difference['after']} is worse than {difference['before']}: {told}"
    return f"no difference shown between {difference['after']} and {difference['before']}: {told}"


def _history(artifact: Artifact) -> dict[str, list[list[float]]]:
    """Curves of a training step: name -> [[step, value], …]."""
    history = read_json(artifact.folder / HISTORY) or []
    found = {}
    for key in CURVES[artifact.stage]:
        points = [[entry["step"], entry[key]] for entry in history if entry.get(key) is not None]
        if points:
            found[key] = points
    return found


def _samples(model: dict[str, Any], inputs: Mapping[str, Artifact], task: Task, split: str) -> list[dict[str, Any]]:
    """A few answers of the last model: right, wrong, unverified and unanswered ones, the shortest questions first."""
    records = [record for record in _records(inputs[model["label"]]) if record["split"] == split]
    data = next(a for a in inputs.values() if a.stage == "preprocess" and a.recipe == model["recipe"])
    import pyarrow.parquet as pq

    questions = {
        row["id"]: row["question"] for row in pq.read_table(data.folder / "data" / f"{split}.parquet").to_pylist()
    }
    kinds = {"right": [], "wrong": [], "unverified": [], "unanswered": []}  # type: dict[str, list[dict[str, Any]]]
    for record in records:
        kind = {True: "right", False: "wrong", None: "unverified"}[record["correct"]]
        kind = kind if record["answered"] else "unanswered"
        kinds[kind].append({**record, "kind": kind, "question": questions[record["id"]]})
    shown = []
    for found in kinds.values():
        found.sort(key=lambda record: (len(record["question"]), record["id"]))
        shown += found[:: max(1, len(found) // SAMPLES)][:SAMPLES]
    return shown


def _goals(
    models: list[dict[str, Any]], trained: Mapping[str, Artifact], split: str, criteria: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The recipes' success criteria: each figure, its bound, and whether it is met (None: not measured)."""
    found = []
    last = {model["recipe"]: model for model in models}
    for name, model in last.items():
        sft = next((a.metrics for a in trained.values() if a.stage == "sft" and a.recipe == name), {})
        figures = {key: figure["value"] for key, figure in model["splits"][split]["all"].items()} if split else {}
        for key, bounds in criteria.get(name, {}).items():
            goal = Goal(**bounds)
            value = sft.get(key, figures.get(key))
            met = None if value is None else goal_met(goal, value)
            found.append(
                {"recipe": name, "name": key, "below": goal.below, "above": goal.above, "value": value, "met": met}
            )
    return found


def goal_met(goal: Goal, value: float) -> bool:
    return (goal.below is None or value < goal.below) and (goal.above is None or value > goal.above)


def _prompts(models: list[dict[str, Any]], inputs: Mapping[str, Artifact]) -> list[dict[str, Any]]:
    """Each shown question with the answers of the models that were asked it, side by side."""
    found: dict[str, dict[str, Any]] = {}
    for model in models:
        for one in read_json(inputs[model["label"]].folder / PROMPTS) or []:
            row = found.setdefault(one["prompt"], {"prompt": one["prompt"], "answers": {}})
            row["answers"][model["name"]] = one["answer"]
    return list(found.values())


def _provenance(artifact: Artifact) -> dict[str, Any]:
    return {
        "fingerprint": artifact.fingerprint,
        "folder": str(artifact.folder),
        "seconds": artifact.provenance["seconds"],
        "processes": artifact.provenance["processes"],
        "cluster": artifact.provenance["cluster"],
        "versions": artifact.provenance["versions"],
        "python": artifact.provenance["python"],
        "machine": artifact.provenance["machine"],
        "git": artifact.provenance["git"],
        "hardware": format_hardware(artifact.provenance.get("hardware") or {}),
    }


def _settings(artifact: Artifact) -> str:
    """The resolved recipe as YAML."""
    settings = plain(read_spec(artifact.folder).recipe)  # data: a prompt with ${x} in it is no template
    return str(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


# ---------------------------------------------------------------- drawing


def draw(report: dict[str, Any], task: Task) -> dict[str, Any]:
    """Every chart of the page, as SVG."""
    main_split = report["main_split"]
    charts: dict[str, Any] = {"by": {}, "curves": {}, "main": {}}
    shown = [name for name in CHART_METRICS if name in report["headline"]][:1]
    for metric in ["f1", *shown] if "f1" in report["headline"] else shown:
        marks = [
            _mark(m["name"], m["splits"][main_split]["all"][metric], m["role"])
            for m in report["models"]
            if metric in m["splits"][main_split]["all"]
        ]
        simple = [(name, figures) for name, figures in report["baselines"].items() if name != SOLVER]
        best = max(simple, key=lambda item: item[1][metric], default=None)
        lines = [(best[1][metric], best[0])] if best else []
        charts["main"][metric] = intervals(marks, 0.0, 1.0, lines=lines, title=f"{TITLES[metric]} on {main_split}")
    changed = next(iter(charts["main"]), "unanswered")
    charts["changed"] = changed
    marks = [
        _mark(f"{d['after'].split()[-1]} − {d['before'].split()[-1]}, {split}", d["splits"][split][changed], d["role"])
        for split in report["splits"]
        for d in report["differences"]
        if changed in d["splits"][split]
    ]
    if marks:
        low, high = min(0.0, *(m.low for m in marks)), max(0.0, *(m.high for m in marks))
        charts["differences"] = intervals(
            marks,
            low,
            high,
            lines=[(0.0, "no difference")],
            signed=True,
            title=f"paired differences of {TITLES[changed]}",
        )
    main = shown[0] if shown else "unanswered"
    coin = [(0.5, "coin")] if main == "balanced_accuracy" else []
    charts["splits"] = intervals(
        [
            _mark(f"{m['name']}, {split}", m["splits"][split]["all"][main], m["role"])
            for split in report["splits"]
            for m in report["models"]
            if main in m["splits"][split]["all"]
        ],
        0.0,
        1.0,
        lines=coin,
        title=f"{TITLES[main]} by test set",
    )
    for tag in report["breakdowns"]:
        # recipes may be asked different rows, so a kind of row may be missing from some models
        by = {m["name"]: m["splits"][main_split].get(tag, {}) for m in report["models"]}
        values = sorted({value for figures in by.values() for value in figures})
        charts["by"][tag] = intervals(
            [
                _mark(f"{value}: {m['name']}", by[m["name"]][value][main], m["role"])
                for value in values
                for m in report["models"]
                if m["role"] != "base" and main in by[m["name"]].get(value, {})
            ],
            0.0,
            1.0,
            lines=coin,
            title=f"{TITLES[main]} by {tag}",
        )
    for label, history in report["curves"].items():
        stage = label.partition("/")[2]
        charts["curves"][label] = [
            curves([Series(title, tuple((x, y) for x, y in history[key]), stage)], title=title)
            for key, title in CURVES[stage].items()
            if key in history
        ]
    return charts


def _mark(label: str, figure: dict[str, float], role: str) -> Mark:
    return Mark(label, figure["value"], figure.get("low", figure["value"]), figure.get("high", figure["value"]), role)


def render(name: str, page: dict[str, Any]) -> str:
    """A template of `templates/` with the report's figures."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        autoescape=name.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure
    environment.filters["number"] = number
    environment.filters |= {"fenced": fenced, "cell": cell, "printable": printable}
    environment.globals["lower_is_better"] = LOWER_IS_BETTER
    return environment.get_template(f"{name}.jinja").render(page)


def figure(value: dict[str, float] | None, metric: str) -> str:
    """`0.812`, or `34` for tokens, or `1.2 %` for a share, or `–` where there is none."""
    if value is None:
        return "–"
    if metric == "tokens":
        return f"{value['value']:.0f}"
    if metric == "unanswered":
        return f"{100 * value['value']:.1f} %"
    return f"{value['value']:.3f}"


if __name__ == "__main__":
    main("report", run)
