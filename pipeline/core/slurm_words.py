"""Explain Slurm's states and reasons of a job, with the remedy, for the rows of `status`.

    pending_reason(job)     "waits for free nodes (Resources)"
    end_reason(job, log)    "reached its time limit before it could save. Fix: raise …"

`log` is the file that the job writes its output to.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.core.slurm_client import Job, peak_memory

END_REASONS = {
    "TIMEOUT": "reached its time limit before it could save. Fix: raise cluster.slurm.signal_before_limit or "
    "cluster.slurm.time",
    "NODE_FAIL": "its node failed, and Slurm did not restart the job",
    "PREEMPTED": "was preempted, and Slurm did not restart it",
    "CANCELLED": "was cancelled",
    "BOOT_FAIL": "its node did not start",
    "DEADLINE": "its deadline has passed",
}
PENDING_REASONS = {
    "Priority": "waits for jobs of higher priority",
    "Resources": "waits for free nodes",
    "BeginTime": "restarts shortly",
    "DependencyNeverSatisfied": "a job that it depends on has failed",
    "ReqNodeNotAvail": "its nodes are down or reserved",
    "PartitionTimeLimit": "its time limit exceeds the partition's. Fix: lower cluster.slurm.time",
    "JobHeldUser": "held by its user. Fix: scontrol release",
    "JobHeldAdmin": "held by an administrator",
}
LAUNCH_FAILURE = "0:53"  # the exit code of a job whose log slurmd could not open
KILLED_CODES = ("0:9", "137:0")
TAIL_BYTES = 8192  # bytes at the end of a log that are read


def pending_reason(job: Job) -> str:
    """Return why a job is pending: Slurm's reason, after an explanation of the usual ones."""
    meaning = PENDING_REASONS.get(job.reason.partition(",")[0].strip("()"), "")
    return f"{meaning} ({job.reason})" if meaning else job.reason


def end_reason(job: Job, log: Path) -> str:
    """Return why a job ended whose step recorded no end."""
    if "JobLaunchFailure" in job.reason or job.exit_code in (LAUNCH_FAILURE,):
        return (
            f"Slurm could not start it on {job.node or 'its node'}, most likely because its log cannot be written. "
            f"Fix: make {log.parent} exist on the nodes, writable for you"
        )
    if job.state == "OUT_OF_MEMORY" or job.exit_code in KILLED_CODES:
        peak = peak_memory(job)
        held = f" (peak {peak})" if peak else ""
        if job.state == "OUT_OF_MEMORY":
            return f"out of host memory: it needs more memory than cluster.slurm.memory{held}. Fix: raise that"
        return f"was killed, most likely because the host's memory ran out{held}. Fix: raise cluster.slurm.memory"
    return END_REASONS.get(job.state) or last_error(log) or "ended without an error message; see its log"


def explain_exit_code(exit_code: str) -> str:
    """Return `exit code 2` for 2:0, `signal 9` for 0:9 and "" for 0:0."""
    code, _, number = exit_code.partition(":")
    if number not in ("", "0"):
        return f"signal {number}"
    return f"exit code {code}" if code not in ("", "0") else ""


def last_error(log: Path) -> str | None:
    """Return the message with which the batch script ended: the last `error: …` near the end of a log, or None."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)
