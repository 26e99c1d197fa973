"""Submit a plan through submitit: the same steps, argv and folders as launchers/slurm.py, its jobs and its requeue.

    python -m pipeline run tiny --launcher submitit

submitit pickles a `StepCommand`, which holds only a folder's name. Before the time limit, and on preemption where the
site sends the job's own signal, submitit calls its `checkpoint`. That writes the stop file, waits until the step has
saved, and returns the same command; submitit then requeues the job.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.site import Slurm, minutes
from pipeline.core.errors import EXIT_STOPPED
from pipeline.core.slurm_client import JobRecord, client_environment, error_text, this_restart
from pipeline.launchers.batch_script import resources, setup_lines, shell_value
from pipeline.launchers.retry import starts_again
from pipeline.launchers.slurm import exported, submission_error
from pipeline.workflow.artifact import STOP
from pipeline.workflow.plan import Plan, Step
from pipeline.workflow.runtime import read_times

if TYPE_CHECKING:
    from submitit.core.utils import DelayedSubmission

JOBS_FOLDER = "submitit"  # in a step's folder: submitit's pickles, scripts and logs
# sites define `module` in the profile, and submitit's shell is not a login shell
LOGIN_SETUP = "command -v module >/dev/null || . /etc/profile"
# USR2 would end a Python process before submitit has set its handler: until then it is ignored
DELAYED_SIGNALS = """bash -c 'trap "" USR1 USR2; exec "$@"' bash"""
MAX_REQUEUES = 1_000_000  # time limits that a job may reach; each attempt makes progress


@dataclass
class StepCommand:
    """Run a step's processes of this node; submitit calls it on every node."""

    folder: str

    def __call__(self) -> str:
        first = os.environ.get("SLURM_PROCID", "0") == "0"  # of the nodes: it alone decides, and requeues
        if first:  # a slower node must not delete a stop file written since
            (Path(self.folder) / STOP).unlink(missing_ok=True)
        if first and this_restart() and not starts_again(Path(self.folder), None):
            raise RuntimeError(f"{self.folder} does not start again; see the log above")
        code = self._run()
        if code == EXIT_STOPPED:  # stopped by another signal than submitit's own, which makes submitit requeue
            signal.raise_signal(signal.SIGUSR2)
        if code and first and starts_again(Path(self.folder), code):
            signal.raise_signal(signal.SIGUSR2)
        if code:
            raise RuntimeError(f"{self.folder} ended with exit code {code}; see the log above")
        return self.folder

    def _run(self) -> int:
        command = [sys.executable, "-m", "pipeline.launchers.torchrun", "--step", self.folder]
        self._process = subprocess.Popen(command)
        while (code := self._process.poll()) is None:  # wait() would hold a lock that checkpoint() needs
            time.sleep(0.2)
        return code

    def checkpoint(self) -> DelayedSubmission:
        """Stop the step, wait until it has saved, and return the same command. Called in submitit's signal handler."""
        from submitit.helpers import DelayedSubmission

        (Path(self.folder) / STOP).touch()
        while _runs(self._process.pid):
            time.sleep(0.2)
        return DelayedSubmission(StepCommand(self.folder))

    def __getstate__(self) -> dict[str, str]:
        return {"folder": self.folder}


def _runs(pid: int) -> bool:
    """Return whether a child process still runs; its exit code stays available to `poll`."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def submit(step: Step, plan: Plan, after: Sequence[str], record: JobRecord) -> JobRecord:
    """Submit one step. Returns the record with the job's id and log. Raises LaunchError where Slurm refuses.

    preflight has checked that submitit is installed.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    stage, slurm, times = step.runs_as, plan.cluster.slurm, read_times(step.folder)
    options = {"output", "error", "open-mode"}
    requested = dict(option.removeprefix("--").partition("=")[::2] for option in resources(stage, plan.cluster))
    extra: dict[str, str | bool] = {key: value or True for key, value in requested.items() if key not in options}
    extra |= {"requeue": True, "kill-on-invalid-dep": "yes", "comment": record.token}
    extra |= {"dependency": f"afterok:{':'.join(after)}"} if after else {}
    executor = submitit.SlurmExecutor(step.folder / JOBS_FOLDER, max_num_timeout=MAX_REQUEUES, python=_python(slurm))
    path = f'export PATH={shell_value(slurm.venv or sys.prefix)}/bin:"$PATH"'
    with warnings.catch_warnings(), _environment(client_environment() | exported(slurm)):
        warnings.simplefilter("ignore")
        executor.update_parameters(
            job_name=step.label,
            time=minutes(getattr(slurm.time, stage.name)),
            signal_delay_s=slurm.save_seconds(stage.name, times.needed if times else None),
            stderr_to_stdout=True,
            setup=[*[LOGIN_SETUP] * bool(slurm.modules or slurm.setup), *setup_lines(slurm), path],
            srun_args=[*([f"--cpus-per-task={slurm.cpus}"] if slurm.cpus else []), "--wait=60"],
            additional_parameters=extra,
        )
        try:
            job = executor.submit(StepCommand(str(step.folder)))
        except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
            raise submission_error(step, plan, error_text(str(error))) from error
    return replace(record, id=job.job_id, log=str(job.paths.stdout))


def _python(slurm: Slurm) -> str:
    """Return the shell words between srun and submitit's module: options, wrapper and Python."""
    options, wrapper = ([shell_value(word) for word in words] for words in (slurm.srun, slurm.wrapper))
    return " ".join([*options, DELAYED_SIGNALS, *wrapper, "python"])


@contextlib.contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Replace this process's environment temporarily, because submitit calls sbatch in it."""
    before = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(wanted)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
