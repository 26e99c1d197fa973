"""Checkpoints that can be trusted: a manifest written last, resume from the newest that verifies, the agreed stop.

A checkpoint counts only with its manifest (files, sizes, sha256), which is signed (signing.py) and covers the layout
that it was written in (layouts.py). Older checkpoints are deleted after the manifest of a newer one is there, never
before. A stop is a file in the step's folder: rank 0 sees it at a step boundary, all ranks agree by a collective, save,
and leave together.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.core.errors import ArtifactError
from pipeline.core.files import read_json, write_json
from pipeline.core.hashing import file_sha256
from pipeline.training import distributed
from pipeline.workflow.artifact import hash_files
from pipeline.workflow.layouts import Layout, layout_mismatch, saved_layout, write_layout
from pipeline.workflow.runtime import Deadline, Runtime
from pipeline.workflow.signing import MANIFEST, SIGNATURE, origin_problem, sign


def write_manifest(folder: Path, layout: Layout | None = None) -> None:
    """Record every file of a checkpoint. Written last: its existence means that the checkpoint is whole."""
    if layout is not None:
        write_layout(folder, layout)
    entries = hash_files(folder, leave_out={MANIFEST, SIGNATURE})
    manifest = {name: asdict(entry) for name, entry in entries.items()}
    sign(folder, manifest)
    write_json(folder / MANIFEST, manifest)


def validation_error(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not all(isinstance(entry, dict) for entry in manifest.values()):
        return "it was not written to its end"
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.get("size") or file_sha256(path) != entry.get("sha256"):
            return f"{name} is not what was written"
    return None


def numbered(folder: Path) -> list[Path]:
    """The checkpoints of a folder by their step, the oldest first; other folders are left out."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def latest_valid_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and what was passed over on the way, as sentences."""
    passed: list[str] = []
    for checkpoint in reversed(numbered(folder)):
        problem = validation_error(checkpoint)
        if problem is None:
            return checkpoint, passed
        passed.append(f"passed over {checkpoint.name}: {problem}")
    return None, passed


def checkpoint_to_resume(folder: Path, layout: Layout, stage: str, runtime: Runtime) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from and what was passed over: rank 0 verifies, every process is given the same.

    ArtifactError, in every process, for a checkpoint that this user did not write or that needs another layout: a
    refusal is repaired by a word, while starting again from an older one would lose work without a trace.
    """

    def decide() -> tuple[str | None, list[str]]:
        for checkpoint in numbered(folder):
            if problem := origin_problem(checkpoint):
                raise ArtifactError(problem)
        found, passed = latest_valid_checkpoint(folder)
        saved = saved_layout(found) if found else None
        if found and saved and (problem := layout_mismatch(saved, layout, found, stage, runtime.cluster)):
            raise ArtifactError(problem)
        return (str(found) if found else None), passed

    found, passed = distributed.from_rank_0(decide)
    return (Path(found) if found else None), passed


def rotate(folder: Path, newest: Path, keep: int, best: str | None = None) -> None:
    """Delete checkpoints beyond the `keep` most recent, `newest` and the best among them.

    Later steps than `newest` are of an attempt whose checkpoints did not verify; they go first, as those without a
    manifest do.
    """
    kept = {newest.name, *([Path(best).name] if best else [])}
    others = [path for path in numbered(folder) if path.name not in kept]
    good = [path for path in others if _step(path) < _step(newest) and (path / MANIFEST).is_file()]
    spared = good[len(good) - max(0, keep - len(kept)) :] if keep > len(kept) else []
    for path in others:
        if path not in spared:
            (path / MANIFEST).unlink(missing_ok=True)  # first: half a checkpoint must not look like a whole one
            shutil.rmtree(path, ignore_errors=True)


class CheckpointCallback(TrainerCallback):
    """Writes the manifest after each save and then deletes older ones; turns the stop file into an agreed end."""

    def __init__(self, runtime: Runtime, layout: Layout, deadline: Deadline) -> None:
        self.runtime = runtime
        self.deadline = deadline
        self.layout = layout
        self.stopped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.deadline.begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> TrainerControl:
        self.runtime.check_lock()  # before anything is written: a zombie of an old attempt ends here
        self.deadline.step()
        if distributed.broadcast_flag(self.runtime.stop_requested()) and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        distributed.barrier()  # every rank writes its own shards
        folder = Path(args.output_dir)
        newest = folder / f"checkpoint-{state.global_step}"

        def record() -> None:
            write_manifest(newest, self.layout)
            rotate(folder, newest, self.runtime.cluster.keep_checkpoints, state.best_model_checkpoint)

        distributed.from_rank_0(record)  # hashing a large model takes minutes, which no collective should wait for
