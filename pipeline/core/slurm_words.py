"""What Slurm's words about a job mean, and how to go on: for the rows of `status`.

    pending(job)        "waits for free nodes (Resources)"
    end_reason(job, log)    "ran into its time limit before it could save: raise …"

`log` is the file that the job writes its output to.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.core.slurm_client import Job, peak_memory

END_REASONS = {
    "TIMEOUT": "reached its time limit before it could save: raise cluster.slurm.signal_before_limit or "
    "cluster.slurm.time",
    "NODE_FAIL": "its node failed, and Slurm did not start it again",
    "PREEMPTED": "was preempted, and Slurm did not start it again",
    "CANCELLED": "was cancelled",
    "BOOT_FAIL": "its node did not start",
    "DEADLINE": "its deadline has passed",
}
PENDING_REASONS = {
    "Priority": "others are before it",
    "Resources": "waits for free nodes",
    "BeginTime": "starts again in a moment",
    "DependencyNeverSatisfied": "what it waits for has failed",
    "ReqNodeNotAvail": "its nodes are down or reserved",
    "PartitionTimeLimit": "asks for more time than its partition allows: lower cluster.slurm.time",
    "JobHeldUser": "held: scontrol release",
    "JobHeldAdmin": "held by an administrator",
}
LAUNCH_FAILURE = "0:53"  # the exit code of a job whose log slurmd could not open
KILLED_CODES = ("0:9", "137:0")
TAIL_BYTES = 8192  # bytes of a log that are looked at


def pending_reason(job: Job) -> str:
    """Slurm's reason for a job that waits, and what the usual ones mean."""
    meaning = PENDING_REASONS.get(job.reason.partition(",")[0].strip("()"), "")
    return f"{meaning} ({job.reason})" if meaning else job.reason


def end_reason(job: Job, log: Path) -> str:
    """Why a job ended that has left no word of its own."""
    if "JobLaunchFailure" in job.reason or job.exit_code in (LAUNCH_FAILURE,):
        return (
            f"Slurm could not start it on {job.node or 'its node'}, most likely because its log cannot be written. "
            f"Fix: see that {log.parent} exists on the nodes and that you may write there"
        )
    if job.state == "OUT_OF_MEMORY" or job.exit_code in KILLED_CODES:
        peak = peak_memory(job)
        held = f" (peak {peak})" if peak else ""
        if job.state == "OUT_OF_MEMORY":
            return f"out of host memory: it needs more memory than cluster.slurm.memory{held}. Fix: raise that"
        return f"was killed, most likely because the host's memory ran out{held}. Fix: raise cluster.slurm.memory"
    return END_REASONS.get(job.state) or last_error(log) or "ended without a word, see its log"


def explain_exit_code(exit_code: str) -> str:
    """`exit code 2` for 2:0, `signal 9` for 0:9; nothing for 0:0."""
    code, _, number = exit_code.partition(":")
    if number not in ("", "0"):
        return f"signal {number}"
    return f"exit code {code}" if code not in ("", "0") else ""


def last_error(log: Path) -> str | None:
    """The sentence with which the batch script ended itself: the last `error: …` at the end of a log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)
