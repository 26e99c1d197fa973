"""What the harness gives a stage next to its recipe and inputs: processes, folder, progress, deadline."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.config.cluster import Cluster
from pipeline.core import heartbeat
from pipeline.core.errors import ArtifactError, Stopped
from pipeline.core.files import write_json
from pipeline.core.records import record_or_none
from pipeline.core.slurm_client import job_end
from pipeline.workflow.artifact import STOP
from pipeline.workflow.lock import LockHolder, holds_lock
from pipeline.workflow.progress import ProgressFile, format_duration
from pipeline.workflow.stage import Options


@dataclass(frozen=True)
class Runtime:
    """The processes of one stage, its folder, and who may write there."""

    cluster: Cluster
    progress: ProgressFile
    rank: int
    world: int
    folder: Path
    holder: LockHolder | None  # rank 0's hold on the folder
    options: Options | None  # of the step's spec

    def stop_requested(self) -> bool:
        """Return whether this step shall save and stop. Training ranks agree on it at the end of a step."""
        return (self.folder / STOP).exists()

    def raise_if_stopping(self) -> None:
        """Raise Stopped after a stop request, for a stage whose ranks work apart and keep their work as they go."""
        heartbeat.beat()
        self.check_lock()
        if self.stop_requested():
            raise Stopped(f"stopped at {self.progress.now.done} of {self.progress.now.total}, kept")

    def warn(self, sentence: str) -> None:
        """Warn of what the user should know before they trust the result: rows left out, nothing learned.

        The sentence goes to the log, to progress.json and, when the step is done, to `metrics["warnings"]` of its
        artifact; `run`, `status` and the report show it. Every rank may call this; what rank 0 reports is kept.
        """
        if self.rank == 0 and sentence not in self.progress.now.warnings:
            print(f"warning: {sentence}", flush=True)
        self.progress.warn(sentence)

    def check_lock(self) -> None:
        """Raise ArtifactError where another attempt holds the folder's lock: this one must not write any more."""
        if self.holder and not holds_lock(self.folder, self.holder):
            raise ArtifactError(f"{self.folder} now belongs to another attempt; this one ({self.holder}) ends here")


TIMES = ".times.json"  # in a step's folder; a hidden file is no part of its result
MARGIN = 1.5  # of what is measured: the next step may be longer than the ones before
SPARE_SECONDS = 15.0  # to leave with every process
RECENT_STEPS = 50


@dataclass(frozen=True)
class MeasuredTimes:
    """What a step and a save took in the attempts so far; the content of TIMES."""

    step: float  # seconds, the longest of the last ones
    save: float | None  # seconds until a checkpoint is complete; None: none was saved
    processes: int

    @property
    def needed(self) -> float:
        """Seconds before a limit at which the last step must begin; an unknown save takes as long as a step."""
        return MARGIN * (self.step + (self.step if self.save is None else self.save)) + SPARE_SECONDS


def read_times(folder: Path) -> MeasuredTimes | None:
    """Return what the earlier attempts of a step have measured; None before the first."""
    return record_or_none(folder / TIMES, MeasuredTimes)


class Deadline:
    """Stops a step before its job's limit: as soon as what remains is less than one more step and a save.

    Slurm signals the step to save `signal_before_limit` seconds before the limit, and it saves at the end of the step
    or batch that it is in. Where that takes longer, or the signal is lost, the limit comes first, and Slurm does not
    start the job again. What was measured is kept for the signal of the step's next job.
    """

    def __init__(self, runtime: Runtime, stage: str) -> None:
        self.runtime = runtime
        self.stage = stage
        self.before = runtime.cluster.slurm.fixed_save_seconds(stage)
        self.end = job_end() if runtime.rank == 0 else None  # of the Slurm job, where there is one with a limit
        known = read_times(runtime.folder) if runtime.rank == 0 else None
        self.save = known.save if known and known.processes == runtime.world else None
        self.first = 0.0  # also compiles and fills caches, so it counts only until there are others
        self.steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self.count = 0
        self.warned = False
        self.begin()

    @property
    def longest(self) -> float:
        return max(self.steps) if len(self.steps) > 1 else max(self.first, *self.steps, 0.0)

    def begin(self) -> None:
        """Start timing now: the time before the first step does not count, nor that of a save."""
        self.last = time.time()

    def saved(self, seconds: float) -> None:
        """Take note of how long a save took, until its checkpoint was complete."""
        self.save = max(seconds, self.save or 0.0)
        self._keep()

    def step(self) -> None:
        """Call it after each step or batch."""
        now = time.time()
        if self.count:
            self.steps.append(now - self.last)
        else:
            self.first = now - self.last
        self.last, self.count = now, self.count + 1
        if self.count & (self.count - 1) == 0:
            self._keep()
        if self.end is None:
            return
        if self.before and self.longest > self.before and not self.warned:
            self.warned = True
            self.runtime.warn(
                f"one step or batch took {format_duration(self.longest)}, more than "
                f"cluster.slurm.signal_before_limit.{self.stage} ({format_duration(self.before)}), so this step "
                "stops and saves early before a time limit. "
                f"Fix: cluster.slurm.signal_before_limit.{self.stage}=auto, or "
                f"{math.ceil(round(2 * self.longest) / 60) * 60}"
            )
        if now + self.longest + (self.longest if self.save is None else self.save) > self.end:
            (self.runtime.folder / STOP).touch()

    def _keep(self) -> None:
        if self.runtime.rank == 0:
            with contextlib.suppress(OSError):  # a full disk, which the next save reports
                write_json(
                    self.runtime.folder / TIMES, asdict(MeasuredTimes(self.longest, self.save, self.runtime.world))
                )


def format_hardware(found: Mapping[str, Any]) -> str:
    """One line for log and report of what a stage ran on, as `devices.describe` and `devices.measured` give it."""
    nested = ("planned_gib", "measured")
    parts = [str(found["device"])] if "device" in found else []
    parts += [f"{name.replace('_', ' ')} {value}" for name, value in found.items() if name not in ("device", *nested)]
    planned = [f"{phase} {size} GiB" for phase, size in found.get("planned_gib", {}).items()]
    held = [f"{name.removesuffix('_gib')} {size} GiB" for name, size in found.get("measured", {}).items()]
    parts += [f"planned: {', '.join(planned)}"] if planned else []
    ended = [f"held at most: {', '.join(held)}"] if held else []
    return "; ".join([", ".join(parts), *ended] if parts else ended)
