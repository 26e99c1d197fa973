"""What a command shows of a plan, and of what it has made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.core.errors import (
    printable,
)
from pipeline.core.files import read_text
from pipeline.core.records import MAX_BYTES
from pipeline.workflow.artifact import ENDPOINT, open_artifact
from pipeline.workflow.plan import Plan, Step, explain
from pipeline.workflow.stage import STAGES, Export
from pipeline.workflow.time_spent import TIME_NOTE, table


def show_plan(plan: Plan, outdated: Sequence[Path] = ()) -> int:
    """The steps and why each runs. `outdated`: results that the run would make again."""
    width = max(len(step.label) for step in plan.steps)
    count = 0
    for step in plan.steps:
        reasons = (
            explain(step, plan.cluster) if step.label in plan.wanted else ["done" if step.done else "not asked for"]
        )
        done = step.done
        if step.folder in outdated:
            reasons, done = ["made again: its code, or that of a step before it, has changed"], False
        state = "done" if done else "run " if step.label in plan.wanted else "-   "
        count += state == "run "
        first = reasons[0] if reasons[0] != "done" else ""
        print(printable(f"{state}  {step.label:<{width}}  {step.fingerprint}  {first}".rstrip()))
        for reason in reasons[1:]:
            print(printable(f"{'':<{width + 20}}{reason}"))
    print(f"\n{count} of {len(plan.wanted)} steps to run, under {plan.runs}/")
    return 0


def show_end(plan: Plan, typed: str) -> None:
    """Where everything is, the headline numbers, and what to type next."""
    done = {step.name: step for step in plan.steps if step.done}
    report = next((step for step in plan.steps if step.stage == "report" and step.done), None)
    if report:
        print()
        print(read_summary(report.folder / "summary.txt"))
        print(f"\nreport    {report.folder}/report.html   (report.md and report.json beside it)")
    else:  # the report's summary has them
        for step in done.values():
            for warning in open_artifact(step.folder, verify=False).warnings:
                print(printable(f"warning: {step.label}: {warning}"))
    for step in plan.steps:
        if step.done and STAGES[step.stage].trains:
            print(f"{step.label:<9} {step.folder}")
    spent = {step.label: open_artifact(step.folder, verify=False).seconds_by_part for step in done.values()}
    if any(spent.values()):
        print(f"\ntime      seconds {TIME_NOTE}\n{table(spent)}")
    last = done.get("grpo") or done.get("sft")
    print("\nnext:")
    if last:
        print(f"  python -m pipeline chat --ckpt {last.folder}      questions of your own")
        print(f"  python -m pipeline evaluate --ckpt {last.folder} --split validation")
    left = [step for step in plan.steps if not step.done]
    if left:
        print(f"  {typed}      ({len(left)} steps are left)")
    else:
        change = "grpo.beta=0.01" if "grpo" in done else "sft.epochs=2"
        print(f"  {typed} {change}      one setting changed; only what depends on it runs")


def read_summary(path: Path) -> str:
    """The report in short; where the file cannot be used, a sentence that says how it is made again."""
    text, problem = read_small_text(path)
    if problem:
        return f"note: {path}: {problem}. Fix: delete {path.parent} and run the same command, which writes it again"
    return text.rstrip()


def read_small_text(path: Path) -> tuple[str, str]:
    """A small file's text as a terminal may show it and "", or "" and why it cannot be read."""
    try:
        text, problem = read_text(path, MAX_BYTES)
    except OSError as error:
        return "", f"cannot be read ({error.strerror})"
    return printable(text or ""), problem


def show_export(step: Step, *, pushed: bool = False) -> Path:
    """Where it is, how large, and what to type next. Returns the folder that others get."""
    artifact = open_artifact(step.folder)
    place = next(path for path in (step.folder / name for name in ("model", "adapter", "gguf")) if path.is_dir())
    print(f"{artifact.metrics['format']}: {artifact.metrics['bytes'] / 1e6:,.2f} MB in {place}")
    print("\n".join(f"  {path.name}" for path in sorted(place.iterdir())))
    print("\nnext:")
    if isinstance(step.options, Export) and step.options.format == "gguf":
        print(f"  llama-cli -m {next(place.glob('*.gguf'))} --jinja")
    else:
        print(f"  python -m pipeline chat --ckpt {step.folder}")
    if not pushed:
        print("  the same export with --push OWNER/NAME puts it on the hub")
    return place


def show_metrics(step: Step) -> None:
    from pipeline.scoring.metrics import MAIN_METRICS, sampled_metrics
    from pipeline.tasks.task import task_of
    from pipeline.workflow.figures import describe_calls, metrics_of

    artifact, recipe = open_artifact(step.folder), step.recipe
    task = task_of(recipe.task, recipe.seed)
    for split, metrics in metrics_of(artifact, task, recipe.report, recipe.seed).items():
        overall = metrics.overall
        several = f", {metrics.samples} samples of each" if metrics.samples > 1 else ""
        print(f"{split}: {overall.rows} rows{several}, {overall.groups} groups")
        if overall.verified < overall.rows:
            print(f"  {overall.verified} of them can be verified")
        for name in [*MAIN_METRICS, *sampled_metrics(overall.figures)]:
            if figure := overall.get(name):
                print(f"  {name:<18} {figure.value:7.3f}   {figure.low:.3f} … {figure.high:.3f}")
        if "proxy" in overall:
            print(f"  proxy is not correctness: {task.proxy}")
    if calls := artifact.metrics.get(ENDPOINT):
        print(printable(describe_calls(calls)))
    print(printable("".join(f"warning: {warning}\n" for warning in artifact.warnings)), end="")
    print(f"\n{step.folder}/predictions.jsonl and metrics.json")
