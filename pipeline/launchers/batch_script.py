"""The batch script of a step: what its job asks Slurm for, how the node is set up, and how the step is started.

    script(STAGES["grpo"], cluster)              the committed slurm/grpo.slurm: of the recipe that its arguments name
    script(STAGES["sft"], cluster, step, venv)   runs/…/job.slurm: of one step

Both come from one template. Nothing here submits anything; that is launchers/slurm.py.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from pipeline.artifact import LOG, SCRIPT
from pipeline.cluster import Cluster, minutes
from pipeline.plan import Step
from pipeline.stage import STAGES, Stage

FOLDER = Path("slurm")
LOGS = Path("logs")

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
  [ $code != 75 ] || python -m pipeline.launchers.requeue "$step"  # unless someone is cancelling this job
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
    named = {"clusters": slurm.clusters, "partition": slurm.partition, "account": slurm.account, "qos": slurm.qos}
    named["constraint"] = slurm.constraint
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
