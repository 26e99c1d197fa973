"""Where a stage runs: what the harness gives it beside its recipe and its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.artifact import STOP, Owner, is_owner
from pipeline.cluster import Cluster
from pipeline.errors import ArtifactError
from pipeline.progress import ProgressFile


@dataclass(frozen=True)
class Runtime:
    """The processes of one stage, its folder, and who may write there."""

    cluster: Cluster
    progress: ProgressFile
    rank: int
    world: int
    folder: Path
    owner: Owner | None  # rank 0's hold on the folder
    checkpoint: str | None  # weights to evaluate or export
    options: Mapping[str, str] = field(default_factory=dict)  # of an export

    def stop_asked(self) -> bool:
        """Whether someone asked this step to save and leave (rank 0 looks, all ranks agree elsewhere)."""
        return (self.folder / STOP).exists()

    def warn(self, sentence: str) -> None:
        """Report something that the user should read before they trust the result: rows left out, nothing learned.

        The sentence goes to the log, to progress.json and, when the step is done, to `metrics["warnings"]` of its
        artifact; `run`, `status` and the report show it. Every rank may call this; what rank 0 reports is kept.
        """
        if self.rank == 0 and sentence not in self.progress.now.warnings:
            print(f"warning: {sentence}", flush=True)
        self.progress.warn(sentence)

    def check_still_owner(self) -> None:
        """ArtifactError when another attempt has taken the folder over: this one must not write any more."""
        if self.owner and not is_owner(self.folder, self.owner):
            raise ArtifactError(f"{self.folder} now belongs to another attempt; this one ({self.owner}) ends here")


def show_hardware(found: Mapping[str, Any]) -> str:
    """One line for log and report of what a stage ran on, as `devices.describe` and `devices.measured` give it."""
    nested = ("planned_gib", "measured")
    parts = [str(found["device"])] if "device" in found else []
    parts += [f"{name.replace('_', ' ')} {value}" for name, value in found.items() if name not in ("device", *nested)]
    planned = [f"{phase} {size} GiB" for phase, size in found.get("planned_gib", {}).items()]
    held = [f"{name.removesuffix('_gib')} {size} GiB" for name, size in found.get("measured", {}).items()]
    parts += [f"planned: {', '.join(planned)}"] if planned else []
    ended = [f"held at most: {', '.join(held)}"] if held else []
    return "; ".join([", ".join(parts), *ended] if parts else ended)
