"""Submit a plan to Slurm: one job a step, each waiting for its inputs. And the batch scripts, from one renderer.

    scripts/render       writes slurm/*.slurm (python -m pipeline.launchers.slurm [CLUSTER] [FOLDER])

The script that the launcher submits for a step and the committed one of its stage differ in one thing: which step it
is. Before sbatch is called, the step's `job.json` holds a token that goes with the job as its comment; the id is
written after. So a chain whose submission was cut off is completed by the same command, and never doubled.
"""

from __future__ import annotations

import contextlib
import fcntl
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.artifact import LOG, SCRIPT, refuse_if_owned
from pipeline.cluster import Cluster, minutes, read_cluster
from pipeline.errors import EXIT_MISTAKE, LaunchError, PlanError, RecipeError, run_main
from pipeline.plan import Plan, Step, order_of
from pipeline.slurm import Job, JobRecord, call, live_jobs, reason_of, write_job
from pipeline.stage import STAGES, Stage, write_order

FOLDER = Path("slurm")
LOGS = Path("logs")
ENDING = 60  # seconds to wait for a job that is ending

# ---------------------------------------------------------------- the batch script

HEAD = """\
#!/usr/bin/env bash
# {about}
#
#   {usage}
#
# {origin}
"""

OPTIONS = """\
#SBATCH --job-name={name}
{asked}
#SBATCH --output={log}
#SBATCH --open-mode=append            # a job that starts again goes on in the same log
#SBATCH --requeue                     # it starts again after its node died or it was preempted
#SBATCH --signal=B:USR1@{save_before}{pad} # {save_before} s before the time limit, to this script: time enough to save
#SBATCH --kill-on-invalid-dep=yes     # when what it waits for has failed, it shall not wait for ever
"""

SETUP = """
set -uo pipefail
IFS=$'\\n'
cd "${{SLURM_SUBMIT_DIR:-.}}" || exit
{check}{setup}export PATH="{venv}/bin:$PATH"
"""

CHECK = """\
if [ $# = 0 ]; then
  echo "{stage}: which recipe? {usage}" >&2
  exit 2
fi
"""

PREPARE = """\
# the resolved recipe goes into step.json of the step's folder; from then on only that file counts
steps=$(python -m pipeline prepare --stages {stage} --cluster {cluster} "$@") || exit
"""

RUN = """
for step in $steps; do
  rm -f "$step/stop"
  trap 'touch "$step/stop"' USR1 TERM  # all ranks see it at the same step, save, and leave with code 75
  srun --wait=60 --cpus-per-task="$SLURM_CPUS_PER_TASK" python -m pipeline.launchers.torchrun --step "$step" &
  while kill -0 $! 2>/dev/null; do wait $!; done  # a trap ends wait, not the step
  wait $!
  code=$?
  # start again, unless someone is cancelling this job
  if [ $code = 75 ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  [ $code = 0 ] || exit $code
done
"""


def script(stage: Stage, cluster: Cluster, step: Step | None = None, venv: str | None = None) -> str:
    """The batch script of a stage on a cluster: of one step, or of whatever recipe its arguments name.

    `venv` is the environment to use where the cluster names none; by default that of the project.
    """
    slurm, name = cluster.slurm, stage.name
    usage = f"sbatch {FOLDER}/{name}.slurm {USAGE.get(name, 'RECIPE [key=value …]')}"
    save_before = str(slurm.save_before)
    head = HEAD.format(
        about=f"{step.label if step else name}: {stage.about}.",
        usage=f"sbatch {step.folder / SCRIPT}" if step else usage,
        origin=f"Rendered from configs/clusters/{cluster.name}.yaml by "
        + ("the launcher." if step else "scripts/render. Options of sbatch and SBATCH_* variables come before these."),
    )
    options = OPTIONS.format(
        name=step.label if step else name,
        asked="\n".join(f"#SBATCH {option}" for option in resources(stage, cluster)),
        log=step.folder / LOG if step else LOGS / "%x-%j.log",
        save_before=save_before,
        pad=" " * (12 - len(save_before)),
    )
    setup = SETUP.format(
        check="" if step else CHECK.format(stage=name, usage=usage),
        setup="".join(
            [f"module load {' '.join(slurm.modules)}\n"] * bool(slurm.modules)
            + [f"export {key}={shlex.quote(value)}\n" for key, value in slurm.environment.items()]
        ),
        venv=slurm.venv or venv or "${THEREFORE_VENV:-$PWD/.venv}",
    )
    which = f"steps={shlex.quote(str(step.folder))}\n" if step else PREPARE.format(stage=name, cluster=cluster.name)
    return head + options + setup + which + RUN


USAGE = {
    "export": "--ckpt DIR --format merged16 [--quant q8_0]",
    "evaluate": "RECIPE [key=value …]   or   --ckpt DIR [--task NAME] [--split NAME] [--limit N]",
}


def resources(stage: Stage, cluster: Cluster) -> list[str]:
    """What the job of a stage asks for, as options of sbatch. Stages of one process need one node and no GPU."""
    slurm, wide = cluster.slurm, stage.processes == "all"
    named = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos, "constraint": slurm.constraint}
    options = [f"--{name}={value}" for name, value in named.items() if value]
    options += [f"--nodes={cluster.nodes if wide else 1}", "--ntasks-per-node=1", f"--cpus-per-task={slurm.cpus}"]
    if cluster.gpus and wide:
        options.append(f"--gres=gpu:{slurm.gpu_type + ':' if slurm.gpu_type else ''}{cluster.gpus}")
    options += [f"--mem={slurm.memory}"] * bool(slurm.memory)
    return [*options, f"--time={_time(getattr(slurm.time, stage.name))}", *slurm.options]


def _time(time: str) -> str:
    """`90m` as Slurm writes it: 1:30:00, or 1-06:00:00."""
    hours, rest = divmod(minutes(time), 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02}:{rest:02}:00" if days else f"{hours}:{rest:02}:00"


def render(cluster: Cluster, folder: Path) -> list[Path]:
    """Write the batch script of every stage."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for stage in STAGES.values():
        written.append(folder / f"{stage.name}.slurm")
        written[-1].write_text(script(stage, cluster), encoding="utf-8")
    return written


# ---------------------------------------------------------------- the chain


@dataclass(frozen=True)
class Submission:
    """A step that is to run, and the job that runs it."""

    step: Step
    job: str  # its id; where nothing is submitted, the step's label
    new: bool  # submitted now, not by an earlier command
    after: tuple[str, ...]  # the jobs it waits for


Submit = Callable[[Step, Plan, Sequence[str], JobRecord], JobRecord]


def run_plan(plan: Plan, submit: Submit | None = None, *, dry_run: bool = False) -> list[Submission]:
    """Submit every step that is neither done nor with Slurm already, each after the jobs of its inputs.

    With `dry_run` nothing is written; what would be submitted is returned.
    """
    submit = submit or sbatch
    if not dry_run:
        call("sbatch", "--version")  # before anything is written
    with contextlib.nullcontext() if dry_run else _alone(plan.runs):
        live = _live(plan)
        missing = plan.missing(step.label for step in plan.steps if step.folder in live)
        if missing:
            raise PlanError(*missing)
        jobs = {step.label: live[step.folder].id for step in plan.steps if step.folder in live}
        found: list[Submission] = []
        for step in plan.to_run:
            after = tuple(jobs[needed.label] for needed in step.inputs.values() if not needed.done)
            new = step.label not in jobs
            if new and dry_run:
                jobs[step.label] = step.label
            elif new:
                refuse_if_owned(step.folder)
                jobs[step.label] = _submit(step, plan, after, submit, found)
            found.append(Submission(step, jobs[step.label], new, after))
        return found


def _live(plan: Plan) -> dict[Path, Job]:
    """The steps' jobs that wait or run. One that is ending is waited for: what becomes of it decides."""
    until = time.time() + ENDING
    while True:
        live = live_jobs([step.folder for step in plan.steps if not step.done])
        ending = [job.id for job in live.values() if job.state == "COMPLETING"]
        if not ending:
            return live
        if time.time() > until:
            raise LaunchError(f"job {ending[0]} is still ending after {ENDING} s (squeue -j {ending[0]}); try again")
        time.sleep(1)


def _submit(step: Step, plan: Plan, after: Sequence[str], submit: Submit, before: list[Submission]) -> str:
    """Order, token, job, id: in this sequence, so that nothing that Slurm has taken can be forgotten."""
    write_order(step.folder, order_of(step, plan.cluster))
    record = JobRecord(uuid.uuid4().hex, plan.cluster.launcher, time.time(), log=str(step.folder / LOG))
    write_job(step.folder, record)
    try:
        record = submit(step, plan, after, record)
    except LaunchError as error:
        waiting = [one for one in before if one.new]
        stay = f"{len(waiting)} steps before it are queued and stay (python -m pipeline cancel ends them); "
        together = LaunchError(*error.problems, f"{stay if waiting else ''}the same command submits what is left")
        together.exit_code = error.exit_code
        raise together from error
    write_job(step.folder, record)
    assert record.id is not None
    return record.id


def sbatch(step: Step, plan: Plan, after: Sequence[str], record: JobRecord) -> JobRecord:
    """Write the step's batch script and submit it. LaunchError with Slurm's reason where it refuses."""
    path = step.folder / SCRIPT
    path.write_text(script(STAGES[step.stage], plan.cluster, step, sys.prefix), encoding="utf-8")
    done = call(*sbatch_line(path, after, record.token))
    if done.returncode:
        raise refused(step, plan, reason_of(done.stderr))
    return replace(record, id=done.stdout.strip().splitlines()[-1].split(";")[0])  # id;cluster on a federation


def sbatch_line(path: Path, after: Sequence[str], token: str) -> list[str]:
    waits = [f"--dependency=afterok:{':'.join(after)}"] if after else []
    return ["sbatch", "--parsable", *waits, f"--comment={token}", str(path)]


def refused(step: Step, plan: Plan, reason: str) -> LaunchError:
    """What Slurm said against a job; a user's mistake, unless Slurm itself could not be reached."""
    if "contact slurm controller" in reason or "Socket timed out" in reason:
        return LaunchError(f"{step.label}: Slurm cannot be reached: {reason}; try again when scontrol ping answers")
    asked = " ".join(resources(STAGES[step.stage], plan.cluster))
    error = LaunchError(
        f"{step.label}: Slurm refused the job: {reason}",
        f"it asked for {asked}",
        f"change configs/clusters/{plan.cluster.name}.yaml, or say cluster.slurm.partition=… cluster.gpus=… "
        "(sinfo -o '%P %G %c %m %l' shows what there is)",
    )
    error.exit_code = EXIT_MISTAKE
    return error


@contextlib.contextmanager
def _alone(runs: Path) -> Iterator[None]:
    """One submission at a time in a runs folder: a second one waits, and then finds the first one's jobs."""
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / ".submitting").open("w") as file:
        with contextlib.suppress(OSError):  # some network file systems lock nothing; the tokens still hold
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def show(submissions: list[Submission]) -> str:
    """One line a step: its job, and what it waits for."""
    width = max((len(one.step.label) for one in submissions), default=0)
    lines = []
    for one in submissions:
        waits = f"after {', '.join(one.after)}" if one.after else "can start"
        state = waits if one.new else "submitted before"
        lines.append(f"{one.step.label:<{width}}  job {one.job}  {state}")
    return "\n".join(lines)


def show_dry_run(submissions: list[Submission], plan: Plan) -> str:
    """Every script and the line that would submit it; a job that has no id yet is called by its step."""
    parts = []
    for one in submissions:
        if not one.new:
            parts.append(f"# {one.step.label}: with Slurm already, as job {one.job}\n")
            continue
        path = one.step.folder / SCRIPT
        text = script(STAGES[one.step.stage], plan.cluster, one.step, sys.prefix)
        parts.append(f"# ---- {path}\n{text}\n{shlex.join(sbatch_line(path, one.after, 'TOKEN'))}\n")
    return "\n".join(parts)


def main(argv: list[str]) -> int:
    cluster, problems = read_cluster(argv[0] if argv else "slurm")
    if cluster is None:
        raise RecipeError(*problems)
    if cluster.launcher == "local":
        raise RecipeError(f"cluster {cluster.name}: its launcher is local, so it has no batch scripts; name another")
    print("\n".join(str(path) for path in render(cluster, Path(argv[1]) if argv[1:] else FOLDER)))
    return 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
