"""run, plan, check, prepare: recipes."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.plans import evaluation_plan_of, export_plan_of, plan_of, refuse_what_would_fail, typed_again
from pipeline.cli.results import show_end, show_export, show_metrics, show_plan
from pipeline.core import slurm_client as slurm
from pipeline.core.errors import PlanError
from pipeline.workflow import refresh
from pipeline.workflow.jobs import record_job
from pipeline.workflow.plan import RUNS, Plan, Step, spec_of
from pipeline.workflow.progress import format_duration
from pipeline.workflow.stage import STAGES, write_spec


def run_command(args: argparse.Namespace) -> int:
    plan = plan_of(args)
    if args.refresh:
        outdated = _outdated(plan, args)
        if args.dry_run:
            return show_plan(plan, outdated)
        print("".join(f"{line}\n" for line in refresh.move_aside(outdated, plan.runs)), end="", file=sys.stderr)
    print("".join(f"note: {note}\n" for note in refresh.code_notes(plan)), end="", file=sys.stderr)
    if plan.cluster.submits:
        return submit_command(args, plan)
    if args.dry_run:
        return show_plan(plan)
    from pipeline.launchers.local import run_plan

    if not plan.to_run:
        print("everything is done already; nothing to run")
    else:
        refuse_what_would_fail(plan)
        print(f"{len(plan.to_run)} of {len(plan.wanted)} steps to run, under {plan.runs}/", file=sys.stderr)
        run_plan(plan)
    show_end(plan, typed_again(args))
    return 0


def submit_command(args: argparse.Namespace, plan: Plan) -> int:
    """Hand the plan to Slurm, say what was done, and leave."""
    from pipeline.launchers import slurm as chain
    from pipeline.launchers import submitit

    if not plan.to_run:
        print("everything is done already; nothing to submit")
        if hasattr(args, "stages"):
            show_end(plan, typed_again(args))
        elif plan.steps[0].stage == "export":
            show_export(plan.steps[0])
        else:
            show_metrics(plan.steps[0])
        return 0
    if args.dry_run:
        print(chain.dry_run_text(chain.run_plan(plan, dry_run=True), plan))
        refuse_what_would_fail(plan)  # after the scripts, which are worth reading all the same
        return 0
    refuse_what_would_fail(plan)
    submit = submitit.submit if plan.cluster.launcher == "submitit" else chain.sbatch
    submissions = chain.run_plan(plan, submit, typed=typed_again(args) if hasattr(args, "stages") else None)
    print(chain.submissions_table(submissions))
    new = sum(one.new for one in submissions)
    names = " ".join(dict.fromkeys(step.folder.parent.name for step in plan.to_run))
    runs = f" --runs {shlex.quote(str(args.runs))}" if args.runs not in (RUNS, RUNS.absolute()) else ""
    print(
        f"\n{new} jobs submitted" + (f", {len(submissions) - new} were there before" if new < len(submissions) else "")
    )
    print(f"\nnext:\n  python -m pipeline status {names}{runs} --watch")
    print(f"  python -m pipeline logs {submissions[0].step.label}{runs} -f")
    print(f"  python -m pipeline cancel {names}{runs}      ends what waits or runs; the run command resumes later")
    return 0


def check_command(args: argparse.Namespace) -> int:
    """Everything at once, with what sbatch itself would say."""
    from pipeline.launchers.batch_script import script
    from pipeline.preflight import checks

    plan = plan_of(args)
    wrong, notes = checks.problems(plan, audited=args.audit)
    if plan.cluster.submits:
        stages = dict.fromkeys(step.stage for step in plan.to_run)
        wrong += checks.refused({stage: script(STAGES[stage], plan.cluster) for stage in stages})
    print("".join(f"note: {note}\n" for note in notes), end="")
    if wrong:
        raise PlanError(*wrong)
    print(f"{len(plan.to_run)} steps can be run; nothing is known that would stop them")
    return 0


def plan_command(args: argparse.Namespace) -> int:
    plan = plan_of(args)
    if not args.memory:
        return show_plan(plan, _outdated(plan, args) if args.refresh else ())
    from pipeline.sizing.fitting import show

    recipes = {step.recipe.name: step.recipe for step in plan.steps}
    print("\n\n".join(show(recipe, plan.cluster) for recipe in recipes.values()))
    return 0


def _outdated(plan: Plan, args: argparse.Namespace) -> list[Path]:
    """The results that --refresh makes again; what stays is said."""
    folders, notes = refresh.outdated_folders(plan, [name for name in args.refresh.split(",") if name])
    print("".join(f"note: {note}\n" for note in notes), end="", file=sys.stderr)
    return folders


def prepare_command(args: argparse.Namespace) -> int:
    """Write the orders of one stage's steps and print their folders: for torchrun by hand, and for a batch script.

    In a Slurm job the job's own nodes and GPUs count, whatever the cluster's file says; and a job that starts again
    keeps what it resolved at first, even if the YAML has changed since.
    """
    job = slurm.this_job() if "RANK" not in os.environ else None
    kept = args.runs / ".jobs" / f"{job}.txt"
    if job and os.environ.get("SLURM_RESTART_COUNT") and kept.is_file():
        print(kept.read_text(encoding="utf-8"), end="")
        return 0
    changes = _of_this_job() if job else []
    if args.stages == "export":
        if not args.ckpt or not args.format:
            raise PlanError("an export needs --ckpt DIR and --format: see python -m pipeline export --help")
        plan = export_plan_of(args, changes)
    elif args.ckpt or args.endpoint:
        plan = evaluation_plan_of(args, changes)
    else:
        plan = plan_of(args, changes)
        missing = plan.missing()
        if missing:
            raise PlanError(*missing)
    steps = [step for step in plan.steps if step.label in plan.wanted]
    if len(steps) != 1 and not job:
        which = ", ".join(step.label for step in steps)
        raise PlanError(f"torchrun runs one step, but {len(steps)} are asked for ({which}); use python -m pipeline run")
    todo = [step for step in steps if not step.done]
    if job:
        refuse_what_would_fail(plan)
        _note_early_signal(plan, todo)
        record_job([step.folder for step in todo], job)
    for step in todo:
        write_spec(step.folder, spec_of(step, plan.cluster))
    told = "".join(f"{step.folder}\n" for step in (todo if job else steps))
    if job:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(told, encoding="utf-8")
        print("".join(f"{step.label}: done already\n" for step in steps if step.done), end="", file=sys.stderr)
    print(told, end="")
    return 0


def _note_early_signal(plan: Plan, todo: Sequence[Step]) -> None:
    """Say where a time limit of the command line is shorter than the warning of the script's own --signal.

    Slurm then signals half a minute after the start, and the step saves and starts again without end.
    """
    end = slurm.job_end()
    left = math.inf if end is None else end - time.time()
    for step in todo:
        warning = plan.cluster.slurm.save_seconds(step.stage)
        if left <= warning and STAGES[step.stage].resumable:
            print(
                f"note: {step.label}: {format_duration(left)} are left to this job, and it is signalled to save "
                f"{format_duration(warning)} before the limit, which is at once. "
                f"Fix: sbatch --signal=B:USR1@{max(30, int(left) // 4)} … (or a longer --time)",
                file=sys.stderr,
            )


def _of_this_job() -> list[str]:
    """The nodes, GPUs and cores that Slurm has given this job, as overrides of the cluster."""
    given = {"nodes": "SLURM_JOB_NUM_NODES", "gpus": "SLURM_GPUS_ON_NODE", "slurm.cpus": "SLURM_CPUS_PER_TASK"}
    found = {key: os.environ.get(name) for key, name in given.items()}
    return [f"cluster.{key}={value or 0}" for key, value in found.items() if value or key == "gpus"]
