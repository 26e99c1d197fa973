"""What the harness gives a stage next to its recipe and inputs: processes, folder, progress, deadline."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.cluster import Cluster
from pipeline.core.errors import ArtifactError, Stopped
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


class Deadline:
    """Stops a step early whose own steps take longer than the time Slurm gives it to save.

    `signal_before_limit` seconds before the job's limit Slurm signals the step to save. It saves at the end of the
    step or batch that it is in. Where one takes longer than that, the limit comes first, and Slurm does not start the
    job again. So this requests the stop as soon as another one as long as the longest may not end in time.
    """

    def __init__(self, runtime: Runtime, stage: str) -> None:
        self.runtime = runtime
        self.stage = stage
        self.before = runtime.cluster.slurm.save_seconds(stage)
        self.end = job_end() if runtime.rank == 0 else None  # of the Slurm job, where there is one with a limit
        self.longest = 0.0
        self.warned = False
        self.begin()

    def begin(self) -> None:
        """Start timing now: the time before the first step does not count."""
        self.last = time.time()

    def step(self) -> None:
        """Call it after each step or batch."""
        now = time.time()
        self.longest, self.last = max(self.longest, now - self.last), now
        if self.end is None or self.longest <= self.before:
            return
        if not self.warned:
            self.warned = True
            self.runtime.warn(
                f"one step or batch took {format_duration(self.longest)}, more than "
                f"cluster.slurm.signal_before_limit.{self.stage} ({format_duration(self.before)}), so this step "
                "stops and saves early before a time limit. "
                f"Fix: cluster.slurm.signal_before_limit.{self.stage}={math.ceil(round(2 * self.longest) / 60) * 60}"
            )
        if now + 2 * self.longest > self.end:
            (self.runtime.folder / STOP).touch()


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
