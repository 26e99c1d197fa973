"""Checkpoints that can be trusted: a manifest written last, resume from the newest that verifies, the agreed stop.

A checkpoint counts only with its manifest (files, sizes, sha256). A stop is a file in the step's folder: rank 0
sees it at a step boundary, all ranks agree by a collective, save, and leave together.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline import distributed
from pipeline.artifact import FileEntry, inventory
from pipeline.errors import Stopped
from pipeline.files import read_json, write_json
from pipeline.fingerprint import file_sha256
from pipeline.runtime import Runtime

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Record every file of a checkpoint. Written last: its existence means that the checkpoint is whole."""
    write_json(folder / MANIFEST, {name: asdict(entry) for name, entry in _files(folder).items()})


def _files(folder: Path) -> dict[str, FileEntry]:
    return inventory(folder, leave_out={MANIFEST})


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        return "it was not written to its end"
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"] or file_sha256(path) != entry["sha256"]:
            return f"{name} is not what was written"
    return None


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and what was passed over on the way, as sentences."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    passed: list[str] = []
    for checkpoint in found:
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint, passed
        passed.append(f"passed over {checkpoint.name}: {problem}")
    return None, passed


class SaveAndStop(TrainerCallback):
    """Writes the manifest after each save; turns the stop file into a save and an end at the same step everywhere."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.stopped = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> TrainerControl:
        self.runtime.check_still_owner()  # before anything is written: a zombie of an old attempt ends here
        if distributed.agree(self.runtime.stop_asked()) and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        distributed.barrier()  # every rank writes its own shards
        if self.runtime.rank == 0:
            write_manifest(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        distributed.barrier()


def leave_if_asked(runtime: Runtime) -> None:
    """Stopped, for a stage whose ranks do not wait for each other and that keeps its work as it goes."""
    runtime.check_still_owner()
    if runtime.stop_asked():
        raise Stopped(f"stopped at {runtime.progress.now.done} of {runtime.progress.now.total}, kept")
