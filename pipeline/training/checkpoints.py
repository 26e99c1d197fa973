"""Verified checkpoints: a manifest that is written last, resume from the latest valid one, the coordinated stop.

A checkpoint is valid only with its manifest (files, sizes, sha256). The manifest is signed (signing.py) and covers the
training layout (layouts.py). Older checkpoints are deleted only after a newer one has its manifest. A stop is requested
by a file in the step's folder: rank 0 reads it at a step boundary and broadcasts the decision; all ranks save and exit.
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
    """Record every file of a checkpoint. Written last: its existence means that the checkpoint is complete."""
    if layout is not None:
        write_layout(folder, layout)
    entries = hash_files(folder, leave_out={MANIFEST, SIGNATURE})
    manifest = {name: asdict(entry) for name, entry in entries.items()}
    sign(folder, manifest)
    write_json(folder / MANIFEST, manifest)


def validation_error(folder: Path) -> str | None:
    """Return why a checkpoint is not valid, or None."""
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not all(isinstance(entry, dict) for entry in manifest.values()):
        return "it is incomplete (no manifest)"
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.get("size") or file_sha256(path) != entry.get("sha256"):
            return f"{name} has changed since it was written"
    return None


def numbered(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder by step, the oldest first; other folders are left out."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def latest_valid_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Return (the latest valid checkpoint or None, a message for each later one that was skipped)."""
    skipped: list[str] = []
    for checkpoint in reversed(numbered(folder)):
        problem = validation_error(checkpoint)
        if problem is None:
            return checkpoint, skipped
        skipped.append(f"skipped {checkpoint.name}: {problem}")
    return None, skipped


def checkpoint_to_resume(folder: Path, layout: Layout, stage: str, runtime: Runtime) -> tuple[Path | None, list[str]]:
    """Return, in every process, (the checkpoint to resume from, messages about skipped ones); rank 0 verifies them.

    Raises ArtifactError in every process for a checkpoint that another user wrote or that needs another layout. One
    override fixes such an error, while a silent resume from an older checkpoint would lose work.
    """

    def decide() -> tuple[str | None, list[str]]:
        for checkpoint in numbered(folder):
            if problem := origin_problem(checkpoint):
                raise ArtifactError(problem)
        found, skipped = latest_valid_checkpoint(folder)
        saved = saved_layout(found) if found else None
        if found and saved and (problem := layout_mismatch(saved, layout, found, stage, runtime.cluster)):
            raise ArtifactError(problem)
        return (str(found) if found else None), skipped

    found, skipped = distributed.from_rank_0(decide)
    return (Path(found) if found else None), skipped


def rotate(folder: Path, newest: Path, keep: int, best: str | None = None) -> None:
    """Delete all but the `keep` most recent checkpoints; `newest` and the best are kept and count towards `keep`.

    Steps later than `newest` are from an attempt whose checkpoints were invalid. They are always deleted, and so are
    checkpoints without a manifest.
    """
    kept = {newest.name, *([Path(best).name] if best else [])}
    others = [path for path in numbered(folder) if path.name not in kept]
    valid = [path for path in others if _step(path) < _step(newest) and (path / MANIFEST).is_file()]
    recent = valid[len(valid) - max(0, keep - len(kept)) :] if keep > len(kept) else []
    for path in others:
        if path not in recent:
            (path / MANIFEST).unlink(missing_ok=True)  # first: a partly deleted checkpoint must not look complete
            shutil.rmtree(path, ignore_errors=True)


class CheckpointCallback(TrainerCallback):
    """Writes the manifest after each save, deletes older checkpoints, and ends all ranks together at a stop request."""

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
        self.runtime.check_lock()  # before anything is written: a leftover process of an earlier attempt ends here
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

        distributed.from_rank_0(record)  # hashing a large model takes minutes: too long for a collective
