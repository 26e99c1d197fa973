"""Render batch scripts: the resources that a job requests, the setup of its node, and the start of its step.

    script(STAGES["grpo"], cluster)              the committed slurm/grpo.slurm: runs the recipe of its arguments
    script(STAGES["sft"], cluster, step, venv)   runs/…/job.slurm: runs one step

Both come from one template. The cluster's file defines the job's environment; the shell that submits does not. A
module, variable or program that the node lacks ends the job with an error message. Every value is quoted; only `$NAME`
and a leading `~` are expanded. launchers/slurm.py submits the scripts.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from pipeline.config.cluster import Cluster
from pipeline.config.site import Slurm, minutes, option_words, parts, references
from pipeline.core.errors import PlanError
from pipeline.workflow.artifact import LOG, SCRIPT
from pipeline.workflow.plan import Step
from pipeline.workflow.runtime import read_times
from pipeline.workflow.stage import STAGES, Stage

SCRIPTS = Path("slurm")
LOGS = Path("logs")

HEAD = """\
#!/bin/bash -l
# {about}
#
#   {usage}
#
# {origin}
"""

OPTIONS = """\
#SBATCH --job-name={name}
{resources}
#SBATCH --output={log}
#SBATCH --open-mode=append            # a requeued job appends to the same log
#SBATCH --requeue                     # Slurm restarts the job after a node failure or preemption
#SBATCH --signal=B:USR1@{seconds}{pad} # signals this script {seconds} s before the time limit: time to save
#SBATCH --kill-on-invalid-dep=yes     # cancel the job if a dependency fails, instead of pending forever
"""

SETUP = """
stopping=; trap 'stopping=1' USR1 TERM  # from here on, a signal requests that the step saves and the job is requeued
cd "${{SLURM_SUBMIT_DIR:-.}}" || exit 2
{check}{setup}venv={venv}
[ -x "$venv/bin/python" ] || fail "slurm.venv: got $venv without bin/python. Fix: name a folder that the nodes can read"
export PATH="$venv/bin:$PATH"
set -uo pipefail
IFS=$'\\n'
"""

FAIL = """fail() { echo "error: $1 (on $HOSTNAME)" >&2; exit 2; }"""

MODULES = """\
command -v module >/dev/null || fail 'slurm.modules: the command module is not defined. Fix: read the file that \
defines it in slurm.setup, such as . /etc/profile.d/modules.sh'
load() {
  local before=${LOADEDMODULES-}
  module load "$1" || fail "slurm.modules: $1 does not load. Fix: module avail $1"
  case ":${LOADEDMODULES-$1}:" in *":$1":* | *":$1/"*) return ;; esac  # some versions report no failure
  [ "$LOADEDMODULES" != "$before" ] || fail "slurm.modules: $1 does not load. Fix: module avail $1"
}"""

CHECK = """\
[ $# -gt 0 ] || {{ echo "{stage}: got no arguments; expected a recipe. Fix: {usage}" >&2; exit 2; }}
"""

PREPARE = """\
# `prepare` writes the resolved recipe to step.json of the step's folder; from here on only that file is read
steps=$(python -m pipeline prepare --stages {stage} --cluster {cluster} "$@") || exit
"""

RUN = """
for step in $steps; do
  rm -f "$step/stop"
  trap 'stopping=1; touch "$step/stop"' USR1 TERM  # all ranks read it at the same step, save, and exit with code 75
  [ -z "${{SLURM_RESTART_COUNT:-}}" ] || python -m pipeline.launchers.retry "$step" || exit  # a crash loop ends here
  code=75 retry=0
  until [ -n "$stopping" ]; do
    THEREFORE_RETRY=$retry srun --wait=60 {srun}python -m pipeline.launchers.torchrun --step "$step" &
    while kill -0 $! 2>/dev/null; do wait $!; done  # a trap ends wait, not the step
    wait $!; code=$?
    case $code in 0 | 75 | 138 | 140 | 143) break ;; esac
    python -m pipeline.launchers.retry "$step" $code || break  # it starts again after a failure that may pass
    code=75 retry=$((retry + 1))
  done
  # 75: saved; 138, 140, 143: USR1, USR2 or TERM ended it before its handlers were set. `requeue` skips a cancelled job
  case $code in 75 | 138 | 140 | 143) python -m pipeline.launchers.requeue "$step" ;; esac
  [ $code = 0 ] || exit $code
done
"""


def script(stage: Stage, cluster: Cluster, step: Step | None = None, venv: str | None = None) -> str:
    """Return the batch script of a stage on a cluster: for one step, or for the recipe of its arguments.

    `venv` is the environment where the cluster names none; by default the project's. Raises PlanError for a folder
    whose name cannot stand in a script.
    """
    slurm, name = cluster.slurm, stage.name
    if step:
        check_path(step.folder)
    usage = f"sbatch {SCRIPTS}/{name}.slurm {USAGE.get(name, 'RECIPE [key=value …]')}"
    times = read_times(step.folder) if step else None
    seconds = str(slurm.save_seconds(name, times.needed if times else None))
    head = HEAD.format(
        about=f"{step.label if step else name}: {stage.about}.",
        usage=f"sbatch {shlex.quote(str(step.folder / SCRIPT))}" if step else usage,
        origin=f"Rendered from configs/clusters/{cluster.name}.yaml by "
        + ("the launcher." if step else "scripts/render. Options of sbatch and SBATCH_* variables come before these."),
    )
    log = str(step.folder / LOG).replace("%", "%%") if step else str(LOGS / "%x-%j.log")
    options = OPTIONS.format(
        name=shlex.quote(step.label if step else name),
        resources="\n".join(f"#SBATCH {_quoted(option)}" for option in resources(stage, cluster)),
        log=shlex.quote(log),
        seconds=seconds,
        pad=" " * (12 - len(seconds)),
    )
    default = shlex.quote(venv) if venv else '"${THEREFORE_VENV:-$PWD/.venv}"'
    setup = SETUP.format(
        check="" if step else CHECK.format(stage=name, usage=usage),
        setup="".join(f"{line}\n" for line in setup_lines(slurm)),
        venv=shell_value(slurm.venv) if slurm.venv else default,
    )
    which = f"steps={shlex.quote(str(step.folder))}\n" if step else PREPARE.format(stage=name, cluster=cluster.name)
    cores = "${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}"
    words = [cores, *map(shell_value, (*slurm.srun, *slurm.wrapper))]
    return head + options + setup + which + RUN.format(srun="".join(f"{word} " for word in words))


def setup_lines(slurm: Slurm) -> list[str]:
    """Return the lines of a job's shell before Python starts; `fail` ends the job with an error message."""
    leaked = ["SLURM_EXPORT_ENV"]  # otherwise srun exports only the variables of sbatch --export
    if slurm.memory:
        leaked += ["SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU"]  # of the allocation that submitted this job
    lines = [FAIL, f"unset {' '.join(leaked)}"]
    lines += [f"eval {shlex.quote(line)} || fail {_message('slurm.setup', line, 'failed')}" for line in slurm.setup]
    if slurm.modules:
        lines += [MODULES, *(f"load {shlex.quote(module)}" for module in slurm.modules)]
    lines += [
        f'[ -n "${{{name}+set}}" ] || fail '
        + shlex.quote(f"slurm.pass_environment: {name} is not set. Fix: export it in the shell that submits")
        for name in slurm.pass_environment
    ]
    for name, value in slurm.variables.items():
        lines += _needed(f"slurm.environment.{name}", [value])
        lines.append(f"export {name}={shell_value(value)}")
    others = {"slurm.venv": [slurm.venv or ""], "slurm.srun": slurm.srun, "slurm.wrapper": slurm.wrapper}
    return lines + [line for key, values in others.items() for line in _needed(key, values)]


def _needed(key: str, values: Iterable[str]) -> list[str]:
    """Return a check for each variable that the expansion of these values needs."""
    names = dict.fromkeys(name for value in values for name in references(value))
    return [
        f'[ -n "${{{name}+set}}" ] || fail '
        + shlex.quote(f"{key}: ${name} is not set in the job. Fix: write the value out, or set it in slurm.setup")
        for name in names
    ]


def _message(key: str, value: str, problem: str) -> str:
    return shlex.quote(f"{key}: {value!r} {problem}")


def shell_value(value: str) -> str:
    """Return a value as a word of bash in which only $NAME and a leading ~ are expanded."""
    words = (f'"${{{text}}}"' if kind == "name" else shlex.quote(text) for kind, text in parts(value) if text)
    return "".join(words) or "''"


def _quoted(option: str) -> str:
    """Return an option quoted for a #SBATCH line, which sbatch splits by the rules of a shell."""
    name, equals, value = option.partition("=")
    return f"{name}={shlex.quote(value)}" if equals else shlex.quote(option)


def check_path(folder: Path) -> None:
    """Raise PlanError for a folder whose name cannot stand in a batch script."""
    if not str(folder).isprintable() or "\\" in str(folder):
        raise PlanError(
            f"--runs: got {str(folder)!r}; expected a folder without control characters and backslashes, because Slurm "
            "cannot write a log to it. Fix: --runs DIR"
        )


USAGE = {
    "export": "--ckpt DIR --format merged16 [--quant q8_0]",
    "evaluate": "RECIPE [key=value …]   or   --ckpt DIR [--task NAME] [--split NAME] [--limit N]",
}


def resources(stage: Stage, cluster: Cluster) -> list[str]:
    """Return a stage's resources as options of sbatch. Stages of one process take one node and no GPU."""
    slurm, wide = cluster.slurm, stage.processes == "all"
    named = {"clusters": slurm.clusters, "partition": slurm.partition, "account": slurm.account, "qos": slurm.qos}
    named["constraint"] = slurm.constraint
    options = [f"--{name}={value}" for name, value in named.items() if value]
    options += [f"--nodes={cluster.nodes if wide else 1}", "--ntasks-per-node=1"]
    options += [f"--cpus-per-task={slurm.cpus}"] * bool(slurm.cpus)
    if cluster.gpus and wide and slurm.gpu_request != "none":
        kind = f"{slurm.gpu_type}:{cluster.gpus}" if slurm.gpu_type else cluster.gpus
        options.append(f"--gres=gpu:{kind}" if slurm.gpu_request == "gres" else f"--gpus-per-node={kind}")
    options += [f"--mem={slurm.memory}"] * bool(slurm.memory)
    options.append(f"--time={_time(getattr(slurm.time, stage.name))}")
    return options + [word for option in slurm.extra_sbatch_args for word in option_words(option)]


def _time(time: str) -> str:
    """Return a time such as `90m` in Slurm's form: 1:30:00, or 1-06:00:00."""
    hours, rest = divmod(minutes(time), 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02}:{rest:02}:00" if days else f"{hours}:{rest:02}:00"


def render(cluster: Cluster, folder: Path) -> list[Path]:
    """Write the batch script of every stage. Returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for stage in STAGES.values():
        written.append(folder / f"{stage.name}.slurm")
        written[-1].write_text(script(stage, cluster), encoding="utf-8")
    return written
