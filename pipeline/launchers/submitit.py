"""Submit a plan through submitit: the same steps, argv and folders as launchers/slurm.py, its jobs and its requeue.

    python -m pipeline run tiny --launcher submitit

What is pickled is a `StepCommand`: a folder's name and nothing else. Before the time limit, and on preemption where
the site sends a job's own signal, submitit calls its `checkpoint`, which writes the stop file, waits until the step
has saved, and hands the same command back; submitit then requeues the job.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.artifact import STOP
from pipeline.cluster import minutes
from pipeline.errors import EXIT_STOPPED, MissingDependency
from pipeline.launchers.batch_script import resources
from pipeline.launchers.slurm import refused
from pipeline.plan import Plan, Step
from pipeline.slurm import JobRecord, reason_of
from pipeline.stage import STAGES

if TYPE_CHECKING:
    from submitit.core.utils import DelayedSubmission

JOBS = "submitit"  # of a step's folder: its pickles, scripts and logs
FOR_EVER = 1_000_000  # time limits that a job may run into; each has made progress


@dataclass
class StepCommand:
    """Runs a step's processes of this node; submitit calls it on every node."""

    folder: str

    def __call__(self) -> str:
        if os.environ.get("SLURM_PROCID", "0") == "0":  # a slower node must not clear a stop that was asked for since
            (Path(self.folder) / STOP).unlink(missing_ok=True)
        code = self._run()
        if code == EXIT_STOPPED:  # asked by another signal than submitit's own: its way of starting again
            signal.raise_signal(signal.SIGUSR2)
        if code:
            raise RuntimeError(f"{self.folder} ended with exit code {code}; see above")
        return self.folder

    def _run(self) -> int:
        command = [sys.executable, "-m", "pipeline.launchers.torchrun", "--step", self.folder]
        self._process = subprocess.Popen(command)
        while (code := self._process.poll()) is None:  # wait() would hold a lock that checkpoint() needs
            time.sleep(0.2)
        return code

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit in a signal handler: have the step save, then start again with the same command."""
        from submitit.helpers import DelayedSubmission

        (Path(self.folder) / STOP).touch()
        while _runs(self._process.pid):
            time.sleep(0.2)
        return DelayedSubmission(StepCommand(self.folder))

    def __getstate__(self) -> dict[str, str]:
        return {"folder": self.folder}


def _runs(pid: int) -> bool:
    """Whether a child has not ended yet; leaves its exit code to whoever waits for it."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def submit(step: Step, plan: Plan, after: Sequence[str], record: JobRecord) -> JobRecord:
    """Submit one step. LaunchError with Slurm's reason where it refuses."""
    try:
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError
    except ImportError as error:
        raise MissingDependency("submitit is not installed: pip install submitit, or use --launcher slurm") from error
    stage, slurm = STAGES[step.stage], plan.cluster.slurm
    options = {"output", "error", "open-mode"}
    asked = dict(option.removeprefix("--").partition("=")[::2] for option in resources(stage, plan.cluster))
    extra: dict[str, str | bool] = {key: value or True for key, value in asked.items() if key not in options}
    extra |= {"requeue": True, "kill-on-invalid-dep": "yes", "comment": record.token}
    extra |= {"dependency": f"afterok:{':'.join(after)}"} if after else {}
    python = shlex.quote(f"{slurm.venv}/bin/python") if slurm.venv else None  # None: the one that submits
    executor = submitit.SlurmExecutor(step.folder / JOBS, max_num_timeout=FOR_EVER, python=python)
    setup = [f"module load {' '.join(slurm.modules)}"] * bool(slurm.modules)
    setup += [f"export {key}={shlex.quote(value)}" for key, value in slurm.environment.items()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        executor.update_parameters(
            job_name=step.label,
            time=minutes(getattr(slurm.time, stage.name)),
            signal_delay_s=slurm.save_before,
            stderr_to_stdout=True,
            setup=setup,
            srun_args=[f"--cpus-per-task={slurm.cpus}", "--wait=60"],
            additional_parameters=extra,
        )
        try:
            job = executor.submit(StepCommand(str(step.folder)))
        except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
            raise refused(step, plan, reason_of(str(error))) from error
    return replace(record, id=job.job_id, log=str(job.paths.stdout))
