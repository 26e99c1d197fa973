"""What was measured, typed: figures with intervals, the metrics of a model on a split, and a whole report.

    SplitMetrics.from_json(artifact.metrics["test"]).overall["f1"]     Figure(value=0.81, low=0.74, high=0.87)
    write_json(out / "report.json", to_json(report))

The JSON is that of earlier versions, in `metrics.json`, `artifact.json` and `report.json`; what an earlier version did
not record is filled in when it is read. Counting is metrics.py; the pages drawn from a report are report.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from pipeline.scoring.predictions import Prediction

COUNTS = ("rows", "verified", "groups")  # of a Metrics: no figures of a sample, so without an interval
NOT_TAGS = ("all", "baselines", "reasons", "samples")  # keys of a split's JSON that are not a breakdown
Baselines = dict[str, dict[str, float]]  # always No, always Yes, coin, exact solver -> metric -> value


@dataclass(frozen=True)
class Figure:
    """A value and its confidence interval."""

    value: float
    low: float
    high: float

    @classmethod
    def from_json(cls, record: Any, where: str) -> Figure:
        """Read `{"value": 0.8, "low": 0.7, "high": 0.9}`. Raises ValueError naming `where` for anything else."""
        value = _number(record, "value", where)
        return cls(value, *(_number({"value": value, **record}, key, where, value) for key in ("low", "high")))


@dataclass(frozen=True)
class Metrics:
    """The figures of some rows. `figures` holds the metrics that apply to them: no F1 without a positive class."""

    rows: int
    verified: int  # rows whose correctness can be told
    groups: int  # of rows that are drawn together
    figures: Mapping[str, Figure]

    def __contains__(self, metric: object) -> bool:
        return metric in self.figures

    def __getitem__(self, metric: str) -> Figure:
        return self.figures[metric]

    def get(self, metric: str) -> Figure | None:
        return self.figures.get(metric)

    def to_json(self) -> dict[str, Any]:
        counts = {"verified": float(self.verified), "rows": float(self.rows), "groups": self.groups}
        return {**to_json(self.figures), **{name: {"value": count} for name, count in counts.items()}}

    @classmethod
    def from_json(cls, record: Any, where: str) -> Metrics:
        if not isinstance(record, dict):
            raise ValueError(f"{where}: got {_kind(record)}; expected a mapping of figures")
        counts = {name: int(_number(record.get(name, {}), "value", f"{where}.{name}", 0.0)) for name in COUNTS}
        figures = {name: Figure.from_json(one, f"{where}.{name}") for name, one in record.items() if name not in COUNTS}
        return cls(**counts, figures=figures)


@dataclass(frozen=True)
class SplitMetrics:
    """What one model answered on one split."""

    overall: Metrics
    baselines: Baselines = field(default_factory=dict)  # empty for a task without a positive class
    reasons: Mapping[str, int] | None = None  # unanswered rows by reason; None: an earlier version did not count them
    by_tag: Mapping[str, Mapping[str, Metrics]] = field(default_factory=dict)  # breakdown -> its value -> metrics
    samples: int = 1  # completions of each row; `reasons` counts completions

    def to_json(self) -> dict[str, Any]:
        reasons = {} if self.reasons is None else {"reasons": dict(self.reasons)}
        samples = {"samples": self.samples} if self.samples > 1 else {}
        return {
            "all": self.overall.to_json(),
            "baselines": self.baselines,
            **reasons,
            **samples,
            **to_json(self.by_tag),
        }

    @classmethod
    def from_json(cls, record: Any, where: str) -> SplitMetrics:
        """Read the metrics of a split. Raises ValueError naming `where` for what cannot be such."""
        if not isinstance(record, dict) or "all" not in record:
            raise ValueError(f"{where}: got {_kind(record)}; expected the metrics of a split")
        tags = {tag: values for tag, values in record.items() if tag not in NOT_TAGS}
        return cls(
            Metrics.from_json(record["all"], f"{where}.all"),
            {name: dict(values) for name, values in record.get("baselines", {}).items()},
            record.get("reasons"),
            {
                tag: {value: Metrics.from_json(one, f"{where}.{tag}.{value}") for value, one in values.items()}
                for tag, values in tags.items()
            },
            int(_number(record, "samples", where, 1)),
        )


@dataclass(frozen=True)
class ModelResult:
    """One evaluated model of a report."""

    label: str  # of its evaluation: tiny/evaluate-sft
    recipe: str
    role: str  # base, sft, grpo or endpoint
    name: str  # tiny SFT
    splits: Mapping[str, SplitMetrics]


@dataclass(frozen=True)
class Difference:
    """The paired difference of two successive models, by split and metric."""

    before: str
    after: str
    role: str  # of the later one, or endpoint
    splits: Mapping[str, Mapping[str, Figure]]


@dataclass(frozen=True)
class Unanswered:
    """The rows of a split that a model left unanswered, by reason, the commonest first."""

    name: str
    role: str
    split: str
    rows: int  # of the split; with several samples its completions
    count: int
    reasons: Mapping[str, int]

    @property
    def summary(self) -> str:
        """`truncated 30, no_verdict 10`"""
        return ", ".join(f"{reason} {count}" for reason, count in self.reasons.items())

    def to_json(self) -> dict[str, Any]:
        return {**{f.name: to_json(getattr(self, f.name)) for f in fields(self)}, "told": self.summary}


@dataclass(frozen=True)
class Criterion:
    """A recipe's success criterion: its bounds, the value, and whether it is met (None: not measured)."""

    recipe: str
    name: str
    below: float | None
    above: float | None
    value: float | None
    met: bool | None


@dataclass(frozen=True)
class ShownPrompt:
    """A question of `evaluate.prompts` with the answer of each model."""

    prompt: str
    answers: Mapping[str, str]  # by the model's name


@dataclass(frozen=True)
class Sample:
    """A test row with the last model's answer to it."""

    prediction: Prediction
    kind: str  # right, wrong, unverified, unanswered
    question: str

    def to_json(self) -> dict[str, Any]:
        return {**self.prediction.to_json(), "kind": self.kind, "question": self.question}


@dataclass(frozen=True)
class StepRecord:
    """How a step of a report was made."""

    stage: str
    fingerprint: str
    folder: str
    seconds: float
    processes: int
    cluster: str
    versions: Mapping[str, str]
    python: str
    machine: str
    git: str | None
    hardware: str  # one line
    seconds_by_part: Mapping[str, float] = field(default_factory=dict)  # core/stopwatch.py; {} of an earlier version


@dataclass(frozen=True)
class Report:
    """Every figure and text of a report; `report.json` holds exactly this."""

    title: str
    task_title: str
    written: str  # date and time
    version: str
    splits: Sequence[str]
    main_split: str  # "" where no model was evaluated
    confidence: float
    seed: int
    models: Sequence[ModelResult]
    baselines: Baselines
    differences: Sequence[Difference]
    claims: Sequence[str]
    headline: Sequence[str]  # the metrics that the tables show
    unanswered: Sequence[Unanswered]
    notes: Sequence[str]
    warnings: Sequence[str]
    published: Sequence[Mapping[str, Any]]  # scores of other systems: name, f1, …
    breakdowns: Sequence[str]  # tags
    curves: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]  # step -> logged value -> [[step, value], …]
    training: Mapping[str, Mapping[str, Any]]  # step -> what it returned
    data: Mapping[str, Mapping[str, Any]]  # preprocess step -> what it returned
    goals: Sequence[Criterion]
    prompts: Sequence[ShownPrompt]
    samples: Sequence[Sample]
    steps: Mapping[str, StepRecord]
    settings: Mapping[str, str]  # recipe -> its resolved settings as YAML

    def overall(self, model: ModelResult) -> Metrics:
        """The metrics of a model on the main split."""
        return model.splits[self.main_split].overall


def to_json(value: Any) -> Any:
    """Results as dicts, lists and scalars; a class with a `to_json` of its own decides for itself."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, list | tuple) else value


def _number(record: Any, key: str, where: str, missing: float | None = None) -> float:
    found = record.get(key, missing) if isinstance(record, dict) else record
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ValueError(f"{where}: got {_kind(found)}; expected a number")
    return found


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
