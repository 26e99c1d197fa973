"""Commit checkpoints while training continues: hash, manifest, read back, second place; and the coordinated stop.

    saves = Saves(folder, layout, keep=2, second=Path("/archive/tiny/sft-1a2b3c4d5e"))      rank 0
    saves.begin(checkpoint, files, best)     every rank has written its files: returns at once, a thread does the rest
    saves.wait()                             until that is done; raises what it raised

A checkpoint is valid from the moment its manifest is there, and that is written last, when every file is on the disk.
Then each file is read again, from the disk where the kernel can forget its copy, and compared with the manifest. Only
then are older checkpoints deleted. A process that ends in between leaves an incomplete checkpoint, which is passed
over, and the older ones. The next save waits for the one before, and so does a stop. At the end of training the model
is saved meanwhile.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.core import heartbeat, stopwatch
from pipeline.core.errors import DiskError, explain_disk
from pipeline.core.files import drop_cache, sync
from pipeline.training import distributed
from pipeline.training.checkpoints import (
    copy_checkpoint,
    discard,
    file_sizes,
    numbered,
    rotate,
    second_place,
    validation_error,
    wait_for_files,
    write_manifest,
)
from pipeline.workflow.layouts import Layout
from pipeline.workflow.runtime import Deadline, Runtime
from pipeline.workflow.signing import MANIFEST


class Saves:
    """The checkpoints of a training step, committed one at a time in a thread of rank 0."""

    def __init__(self, folder: Path, layout: Layout | None, keep: int, second: Path | None = None) -> None:
        self.folder = folder
        self.layout = layout
        self.keep = keep
        self.second = second  # the copies' folder
        self.seconds = 0.0  # of the last commit, until its manifest was there
        self.thread: threading.Thread | None = None
        self.ending = threading.Event()  # nobody waits any longer for what can be done later
        self.error: BaseException | None = None
        self.warnings: list[str] = []

    def begin(self, checkpoint: Path, files: Mapping[str, int], best: str | None) -> None:
        """Commit a checkpoint in the background; `files`: the size of each, as the ranks that wrote them see it."""
        self.wait()
        present = numbered(self.folder)  # a later one that the trainer begins to write meanwhile is none to delete
        self.thread = threading.Thread(target=self._run, args=(checkpoint, files, best, present), daemon=True)
        self.thread.start()

    def wait(self, *, ending: bool = False) -> None:
        """Wait until the last checkpoint is committed. Raises what its commit raised.

        `ending`: the process ends, so the older checkpoints may stay and the copy to the second place may be missing.
        """
        if ending:
            self.ending.set()
        if self.thread:
            while self.thread.is_alive():
                self.thread.join(1.0)
                heartbeat.beat(long=True)  # a thread's own signs do not count, and a large model takes minutes
            self.thread = None
        if self.error:
            error, self.error = self.error, None
            raise error

    def check_room(self, best: str | None) -> None:
        """Raise DiskError where the disk has no room for one more checkpoint, before it is full. A quota is not seen.

        Before that, checkpoints other than the newest and the best are deleted.
        """
        complete = [path for path in numbered(self.folder) if not validation_error(path, hashes=False)]
        if not complete:
            return
        needed = sum(file_sizes(complete[-1]).values())
        for path in complete[:-1]:
            if shutil.disk_usage(self.folder).free < needed and path.name != Path(best or "").name:
                self.warnings.append(f"{path.name} is deleted: the disk has no room for one more checkpoint")
                discard(path)
        if (free := shutil.disk_usage(self.folder).free) < needed:
            raise DiskError(
                f"no space left to write the next checkpoint into {self.folder}: {free / 1e9:.2f} GB are free, and it "
                f"takes {needed / 1e9:.2f} GB; {complete[-1].name} is kept. Fix: free space or quota, then run the "
                "same command again"
            )

    def take_warnings(self) -> list[str]:
        """Return the warnings since the last call."""
        found, self.warnings = self.warnings, []
        return found

    def _run(self, checkpoint: Path, files: Mapping[str, int], best: str | None, present: list[Path]) -> None:
        started = time.monotonic()
        try:
            wait_for_files(checkpoint, files)
            write_manifest(checkpoint, self.layout)
            sync(self.folder)
            self.seconds = time.monotonic() - started
            if problem := self._read_back(checkpoint):
                self.warnings.append(f"{checkpoint.name} is damaged, so no older checkpoint is deleted: {problem}")
                return
            if not self.ending.is_set():
                rotate(present, checkpoint, self.keep, best)
        except Exception as error:
            self.error = error
            return
        if self.second and not self.ending.is_set():
            self._copy(checkpoint, best)

    def _read_back(self, checkpoint: Path) -> str | None:
        """Return what is wrong with a committed checkpoint on the disk; nothing is read where the process ends."""
        for path in checkpoint.rglob("*"):
            if path.is_file():
                drop_cache(path)
        return validation_error(checkpoint, stop=self.ending.is_set)

    def _copy(self, checkpoint: Path, best: str | None) -> None:
        """Copy a checkpoint to the second place. A failure is a warning: the first place has it."""
        assert self.second is not None
        try:
            copy_checkpoint(checkpoint, self.second, stop=self.ending.is_set)
            if best and not (self.second / Path(best).name / MANIFEST).is_file() and Path(best).is_dir():
                copy_checkpoint(Path(best), self.second, stop=self.ending.is_set)
            if (self.second / checkpoint.name / MANIFEST).is_file():
                rotate(numbered(self.second), self.second / checkpoint.name, self.keep, best)
        except OSError as error:
            why = explain_disk(error, None) or f"{error.filename or self.second}: {error.strerror or error}"
            self.warnings.append(f"cluster.checkpoint_copy: {checkpoint.name} has no copy: {why}")


# ---------------------------------------------------------------- the trainer's callback


class CheckpointCallback(TrainerCallback):
    """Commits each checkpoint in the background, and ends all ranks together at a stop request."""

    def __init__(self, runtime: Runtime, layout: Layout | None, deadline: Deadline, out: Path) -> None:
        self.runtime = runtime
        self.deadline = deadline
        self.folder = out / "checkpoints"
        keep, second = runtime.cluster.keep_checkpoints, second_place(runtime.cluster.checkpoint_copy, out)
        self.saves = Saves(self.folder, layout, keep, second)
        self.stopped = False
        self.ended = 0.0  # when the last step ended
        self.writing = 0.0  # seconds from there until every rank had written its files

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.deadline.begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> TrainerControl:
        self.runtime.check_lock()  # before anything is written: a leftover process of an earlier attempt ends here
        self.deadline.step()
        self._note_save()
        self.ended = time.monotonic()
        self._warn()
        if distributed.broadcast_flag(self.runtime.stop_requested()) and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
        if control.should_save:
            with stopwatch.part("save"):
                distributed.from_rank_0(lambda: self._make_room(state.global_step, state.best_model_checkpoint))
        return control

    def _make_room(self, step: int, best: str | None) -> None:
        """Wait for the save before, and delete what a passed-over attempt has left of this one."""
        self.saves.wait()
        discard(self.folder / f"checkpoint-{step}")
        self.saves.check_room(best)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        with stopwatch.part("save"):
            self._commit(state)

    def _commit(self, state: TrainerState) -> None:
        """Begin the commit of the checkpoint that every rank has written its files of."""
        newest = self.folder / f"checkpoint-{state.global_step}"
        distributed.barrier()  # every rank has written its own files, and no temporary one is left
        seen = distributed.to_rank_0(file_sizes(newest))
        files = {name: max(sizes.get(name, 0) for sizes in seen) for name in {name for sizes in seen for name in sizes}}
        distributed.from_rank_0(lambda: self.saves.begin(newest, files, state.best_model_checkpoint))
        self.writing = time.monotonic() - self.ended
        self.deadline.begin()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self.stopped:  # the process leaves next
            distributed.from_rank_0(lambda: self.saves.wait(ending=True))
        self._note_save()
        self._warn()

    def commit(self) -> None:
        """Wait for the last checkpoint, whose commit goes on while the trained model is saved."""
        distributed.from_rank_0(self.saves.wait)
        self._note_save()
        self._warn()

    def finish(self) -> None:
        """Commit what was saved before training failed; rank 0 calls it alone. Raises nothing."""
        with contextlib.suppress(Exception):
            self.saves.wait(ending=True)

    def _note_save(self) -> None:
        if self.saves.seconds:
            self.deadline.saved(self.writing + self.saves.seconds)
            self.saves.seconds = 0.0

    def _warn(self) -> None:
        for warning in self.saves.take_warnings():
            self.runtime.warn(warning)
